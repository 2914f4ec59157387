// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/both_backends.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/expert_errors.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/pair_gates.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/cuda/activation.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/dropout.hpp>
#include <talpa/cuda/expert_errors.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gated_activation.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/indexed_gemm.hpp>
#include <talpa/cuda/pair_gates.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/cuda/sequence_rows.hpp>
#include <talpa/cuda/slot_dropout.hpp>
#include <talpa/cuda/unit_rows.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/layers/adapter_banks.hpp>
#include <talpa/layers/dense_ffn.hpp>
#include <talpa/layers/factored_ffn.hpp>
#include <talpa/layers/linear.hpp>
#include <talpa/layers/lora_linear.hpp>
#include <talpa/layers/merge.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/layers/mole_ffn.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/layers/parrot_block.hpp>
#include <talpa/layers/perft_block.hpp>
#include <talpa/placements/dense.hpp>
#include <talpa/placements/embedded.hpp>
#include <talpa/placements/routed.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <utility>

namespace talpa::cuda_layers_test {

namespace {

using support::backend_difference;
using support::device;
using support::fill_parameters;
using support::parity_sizes;
using support::recorded;
using own_router = router<linear_scorer, top_k<gate::renormalised>>;
using base_type = moe_ffn<own_router>;

constexpr index features = 6, neurons = 8;

template <class B>
affine_params<double, B> plain_base(generator& random) {
  return init_affine<double, B>(features, 5, true, false, random, "base.");
}

/// Parameters that look at memory of `owner`.
template <class Params, class Owner>
struct looking : Params {
  looking(Params p, std::shared_ptr<Owner> o) : Params(std::move(p)), owner(std::move(o)) {}
  std::shared_ptr<Owner> owner;
};

/// A layer whose `init` takes the width of tokens.
template <class Layer>
std::string featured(const Layer& layer, const parity_sizes& sizes = {}) {
  return backend_difference(
      layer,
      [&]<class B>(generator& random) { return layer.template init<double, B>(features, random); },
      sizes);
}
/// A layer round a linear one.
template <class Layer>
std::string round_linear(const Layer& layer, const parity_sizes& sizes = {}) {
  return backend_difference(
      layer,
      [&]<class B>(generator& random) {
        return layer.template init<double, B>(plain_base<B>(random), random);
      },
      sizes);
}

template <class Placement, class Adapter>
std::string placed(const Placement& placement, const Adapter& adapter, index adapters,
                   const parity_sizes& sizes = {}) {
  base_type base;
  base.router.selector.k = 2;
  base.expert.hidden = 3;
  base.experts = 4;
  base.scale = 0.5;
  const perft_block<base_type, Placement, Adapter> layer{base, placement, adapter, adapters};
  return backend_difference(
      layer,
      [&]<class B>(generator& random) {
        return layer.template init<double, B>(base.template init<double, B>(features, random),
                                              random);
      },
      sizes);
}

}  // namespace

TEST_SUITE("cuda_policies/layers") {
  TEST_CASE("linear and lora_linear do on a device what they do on the host") {
    const linear plain;
    for (const index tokens : {index{0}, index{1}, index{9}}) {
      CHECK(backend_difference(plain,
                               [&]<class B>(generator& random) {
                                 return plain.init<double, B>(features, 5, random, "linear.");
                               },
                               {.tokens = tokens}) == "");
    }
    CHECK(round_linear(lora_linear{{.rank = 3, .dropout = 0.25}}) == "");
  }

  TEST_CASE("adapter_banks borrow one base on a device") {
    const lora_linear layer{{.rank = 2}};
    CHECK(backend_difference(layer, [&]<class B>(generator& random) {
            using banks = adapter_banks<lora_linear, double, B>;
            auto all = std::make_shared<banks>(plain_base<B>(random));
            all->add("one", layer, random);
            return looking(std::move(all->add("two", layer, random)), all);
          }) == "");
  }

  TEST_CASE("dense_ffn does on a device what it does on the host") {
    const dense_ffn<> layer;
    CHECK(backend_difference(layer, [&]<class B>(generator& random) {
            return layer.init<double, B>(features, neurons, random);
          }) == "");
  }

  TEST_CASE("moe_ffn with shared experts, scale and residual is that of the host") {
    base_type layer;
    layer.router = {{.bias = true}, {2}};
    layer.expert.hidden = layer.shared.hidden = 3;
    layer.experts = 4;
    layer.shared_experts = 2;
    layer.scale = 1.5;
    layer.residual = 0.5;
    CHECK(featured(layer) == "");
    CHECK(featured(layer, {.tokens = 2, .padded = false}) == "");
    CHECK(featured(layer, {.tokens = 0}) == "");
  }

  TEST_CASE("parrot_block is that of the host") {
    parrot_block layer;
    layer.expert.hidden = 3;
    layer.experts = 3;
    CHECK(featured(layer, {.sequence_length = 3,
                           .conditioning_rows = 4,
                           .conditioning_width = features}) == "");
  }

  TEST_CASE("mole_ffn does on a device what it does on the host") {
    const mole_ffn<own_router> layer{{{}, {2}}, {.rank = 2, .dropout = 0.25}, 4};
    for (const index tokens : {index{0}, index{2}, index{9}}) {
      CHECK(backend_difference(
                layer,
                [&]<class B>(generator& random) {
                  return layer.init<double, B>(
                      dense_ffn<>{}.init<double, B>(features, neurons, random, "base."), random);
                },
                {.tokens = tokens}) == "");
    }
  }

  TEST_CASE("factored_ffn splits a network of a device as one of the host") {
    factored_ffn<> layer;
    layer.router.selector.k = 2;
    layer.experts = 3;
    layer.shared_experts = 1;
    neuron_split split = given_split({5, 0, 3, 7, 1, 6, 2, 4}, 4);
    split.shared = 1;
    CHECK(backend_difference(layer, [&]<class B>(generator& random) {
            const auto dense = dense_ffn<>{}.init<double, B>(features, neurons, random);
            return layer.split(dense, split, random);
          }) == "");
    CHECK(backend_difference(layer, [&]<class B>(generator& random) {
            auto dense = std::make_shared<glu_ffn<>::params<double, B>>(
                dense_ffn<>{}.init<double, B>(features, neurons, random));
            reorder_neurons(*dense, split);
            return looking(layer.borrow(*dense, random), dense);
          }) == "");
  }

  TEST_CASE("perft_block places adapters on a device as on the host") {
    using own = placement::routed<own_router>;
    using weighted = placement::base_weighted<own_router>;
    const own_router two{{}, {2}};
    const lora low{.rank = 2, .dropout = 0.25};
    const parallel_adapter<> parallel{.rank = 2, .dropout = 0.25};
    CHECK(placed(own{two}, low, 3) == "");
    CHECK(placed(own{two}, parallel, 3, {.tokens = 0}) == "");
    CHECK(placed(weighted{two}, low, 3) == "");
    CHECK(placed(placement::embedded{}, low, 4) == "");
    CHECK(placed(placement::dense{}, parallel, 3) == "");
    CHECK(placed(placement::single{}, parallel, 1) == "");
  }

  // An element of W takes a product of R terms, the scale and a sum.
  TEST_CASE("adapters are merged on a device as on the host") {
    const lora_linear one{{.rank = 3}};
    const mole_linear<own_router, lora> routed{{{}, {1}}, {.rank = 3}, 1};
    base_type base;
    base.router.selector.k = 2;
    base.expert.hidden = 3;
    const perft_block<base_type, placement::dense, lora> placed{base, {}, {.rank = 3}, 2};
    CHECK(recorded(
              [&]<class B>(context<B>& ctx, generator& random, support::run_record& out) {
                auto of_one = one.init<double, B>(plain_base<B>(random), random);
                auto of_routed = routed.template init<double, B>(plain_base<B>(random), random);
                auto of_placed = placed.template init<double, B>(
                    base.template init<double, B>(features, random), random);
                fill_parameters<B>(of_one, random);
                fill_parameters<B>(of_routed, random);
                fill_parameters<B>(of_placed, random);
                auto first = merge(ctx, one, of_one), second = merge(ctx, routed, of_routed);
                auto third = merge(placed, of_placed);
                support::detail::wait(ctx);
                const auto add = [&](parameter<double, B>& q) { out.add(q.name(), q.value()); };
                first.visit(add);
                second.visit(add);
                third.params.visit(add);
              },
              5) == "");
  }

  // Lengths of D terms, a product of as many, the activation.
  TEST_CASE("dense_ffn shows its neurons on a device as on the host") {
    const dense_ffn<> layer;
    CHECK(recorded(
              [&]<class B>(context<B>& ctx, generator& random, support::run_record& out) {
                const auto p = layer.init<double, B>(features, neurons, random);
                matrix<double, B> x(9, features), h(9, neurons), unit(9, neurons);
                fill_uniform(x.view(), 1.0, random);
                layer.neurons(ctx, p, x, h.view());
                layer.neurons(ctx, p, x, unit.view(), true);
                support::detail::wait(ctx);
                out.add("neurons", h.view());
                out.add("of unit vectors", unit.view());
              },
              3 * features + 64) == "");
  }

  // Products of D and of H terms, the activation, the error over D features.
  TEST_CASE("factored_ffn labels tokens on a device as on the host") {
    factored_ffn<> layer;
    layer.router.selector.k = 2;
    layer.experts = 4;
    CHECK(recorded(
              [&]<class B>(context<B>& ctx, generator& random, support::run_record& out) {
                const auto dense = dense_ffn<>{}.init<double, B>(features, neurons, random);
                const auto p = layer.split(dense, contiguous_split(neurons, 4), random);
                matrix<double, B> h(9, features), target(9, features);
                fill_uniform(h.view(), 1.0, random);
                fill_uniform(target.view(), 1.0, random);
                const auto labels = layer.label(ctx, p, h, target);
                support::detail::wait(ctx);
                out.add("errors", labels.errors);
                out.add_mask(matrix_view<const std::uint32_t, B>(labels.chosen.mask));
              },
              3 * features + neurons + 64) == "");
  }
}

}  // namespace talpa::cuda_layers_test
