// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/routed.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/group_loss.hpp>
#include <talpa/cuda/routing_sums.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/losses/entropy.hpp>
#include <talpa/losses/gjs.hpp>
#include <talpa/losses/importance_cv2.hpp>
#include <talpa/losses/labelled.hpp>
#include <talpa/losses/lambda.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/load_cv2.hpp>
#include <talpa/losses/localized_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/losses/prior_approximate.hpp>
#include <talpa/losses/router_z.hpp>
#include <talpa/losses/top_k_mass.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace talpa::cuda_losses_test {
using support::device;

namespace {

using layer_type = support::routed_layer<float>;

/// A routing with everything that a loss may read: padding, sequences of 3 tokens with labels, a
/// control, noise that is zero for some experts. Nobody chooses the last experts.
layer_type make_layer(support::test_random& random, index tokens, index experts) {
  layer_type layer = support::random_layer<float>(random, tokens, experts, (experts + 1) / 2, 5);
  layer.sequence_length = tokens > 0 ? 3 : 0;
  layer.control = support::random_matrix<float>(random, tokens, 1);
  layer.labels = vector<std::int32_t, cpu>(tokens / 3);
  for (index s = 0; s < layer.labels.size(); ++s) layer.labels[s] = static_cast<int>(s % 2);
  layer.clean = support::random_matrix<float>(random, tokens, experts);
  layer.deviation = support::random_matrix<float>(random, tokens, experts);
  for (index i = 0; i < layer.deviation.size(); ++i) {
    const float d = std::abs(layer.deviation.data()[i]);
    layer.deviation.data()[i] = i % 11 == 0 ? 0.0F : d;
    layer.clean.data()[i] = layer.logits.data()[i] - d;
  }
  return layer;
}

/// A layer of the host on B, and room for its gradients, filled with one.
template <class B>
struct layer_on {
  explicit layer_on(const layer_type& from)
      : logits(to_device<B>(from.logits.view())),
        gates(to_device<B>(from.gates.view())),
        control(to_device<B>(from.control.view())),
        clean(to_device<B>(from.clean.view())),
        deviation(to_device<B>(from.deviation.view())),
        mask(to_device<B>(from.mask.view())),
        padding(to_device<B>(as_column(from.padding.view()))),
        labels(to_device<B>(as_column(from.labels.view()))),
        sequence_length(from.sequence_length) {
    const auto like = [](const matrix<float, B>& m) {
      matrix<float, cpu> ones(m.rows(), m.cols());
      std::fill_n(ones.data(), ones.size(), 1.0F);
      return to_device<B>(ones.view());
    };
    for (auto* const m : {&logits, &gates, &control, &clean, &deviation}) {
      gradients.push_back(like(*m));
    }
  }
  routed_view<float, B> view() const {
    return {logits.view(),
            {gates.view(), mask.view()},
            {padding.data(), padding.rows()},
            sequence_length,
            control.view(),
            {labels.data(), labels.rows()},
            {clean.view(), deviation.view()}};
  }
  routed_gradient<float, B> gradient() {
    return {gradients[0].view(),
            gradients[1].view(),
            gradients[2].view(),
            {gradients[3].view(), gradients[4].view()}};
  }
  matrix<float, B> logits, gates, control, clean, deviation;
  matrix<std::uint32_t, B> mask;
  matrix<std::uint8_t, B> padding;
  matrix<std::int32_t, B> labels;
  index sequence_length;
  std::vector<matrix<float, B>> gradients;
};

/// Value and gradients of a loss of `layers` on B, on the host.
template <class B, class Loss>
std::vector<matrix<float, cpu>> run_on(context<B>& ctx, const Loss& loss,
                                       const std::vector<layer_type>& layers, grad_mode mode) {
  std::vector<layer_on<B>> there;
  std::vector<routed_view<float, B>> views;
  std::vector<routed_gradient<float, B>> gradients;
  there.reserve(layers.size());
  for (const layer_type& layer : layers) {
    there.emplace_back(layer);
    views.push_back(there.back().view());
    gradients.push_back(there.back().gradient());
  }
  matrix<float, cpu> half(1, 1);
  half(0, 0) = 0.5F;
  const auto dvalue = to_device<B>(half.view());
  const typename workspace<B>::scope scope(ctx.memory);
  const auto kept = loss.forward(ctx, std::span<const routed_view<float, B>>(views));
  loss.backward(ctx, views, kept, dvalue, gradients, mode);
  if constexpr (!std::same_as<B, cpu>) ctx.synchronise();
  std::vector<matrix<float, cpu>> out;
  out.push_back(to_host(matrix_view<const float, B>(kept.value)));
  for (const layer_on<B>& layer : there) {
    for (const auto& gradient : layer.gradients) out.push_back(to_host(gradient.view()));
  }
  return out;
}

/// Empty when two runs have the same bits, and gradients that are not all equal.
std::string bits(const std::vector<matrix<float, cpu>>& found,
                 const std::vector<matrix<float, cpu>>& expected, bool trivial) {
  std::string text;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    text += support::bit_difference(found[i], expected[i]);
    for (index j = 1; i > 0 && j < expected[i].size(); ++j) {
      trivial = trivial || expected[i].data()[j] != expected[i].data()[0];
    }
  }
  return trivial ? text : text + "all gradients are equal and prove nothing";
}

/// Two layers, more experts than a word of a mask holds, one expert where the loss knows what to do
/// then, no tokens.
template <class Loss>
std::string difference(const Loss& loss, bool one_expert = true) {
  support::test_random random(31);
  const index few = support::device_size(24, 1200);
  context<cpu> host(1);
  context<device> ctx;
  std::string text;
  const auto compare = [&](const std::vector<layer_type>& given, grad_mode mode, bool trivial) {
    text +=
        bits(run_on<device>(ctx, loss, given, mode), run_on<cpu>(host, loss, given, mode), trivial);
  };
  compare({make_layer(random, few, 6), make_layer(random, few, 6)}, grad_mode::overwrite, false);
  compare({make_layer(random, 12, 40)}, grad_mode::accumulate, false);
  if (one_expert) compare({make_layer(random, 6, 1)}, grad_mode::overwrite, true);
  compare({make_layer(random, 0, 6)}, grad_mode::overwrite, true);
  return text;
}

}  // namespace

TEST_SUITE("cuda_policies/losses") {
  TEST_CASE("load_balance of every fraction, pooling and affinity has the bits of the host") {
    using namespace balance;
    CHECK(difference(load_balance<per_selection, pooled>{}) == "");
    CHECK(difference(load_balance<per_token, per_sequence>{}) == "");
    CHECK(difference(load_balance<per_target, per_layer, affinity::gates>{{2}}) == "");
    CHECK(difference(load_balance<soft_mass, per_layer>{}) == "");
    CHECK(difference(load_balance<per_selection, per_layer, affinity::sigmoid>{}) == "");
    CHECK(difference(load_balance<per_selection, per_layer, affinity::margin>{}) == "");
  }

  TEST_CASE("losses of importance, load and size have the bits of the host") {
    CHECK(difference(importance_cv2{}) == "");
    CHECK(difference(load_cv2{}) == "");
    CHECK(difference(load_cv2{.noise_alone = true}) == "");
    CHECK(difference(localized_balance{}) == "");
    CHECK(difference(router_z{}) == "");
    CHECK(difference(losses{term{0.5, router_z{}}, term{2.0, importance_cv2{}}}) == "");
  }

  TEST_CASE("losses of the rows of a routing have the bits of the host") {
    CHECK(difference(entropy_loss<entropy::shannon>{}) == "");
    CHECK(difference(entropy_loss<entropy::tsallis, balance::pooled>{.include_padding = true}) ==
          "");
    CHECK(difference(entropy_loss<entropy::renyi, balance::per_sequence>{}) == "");
    CHECK(difference(gjs{}) == "");
    CHECK(difference(lambda_mean{}) == "");
    CHECK(difference(lambda_sparsity{.k = 1}, false) == "");
    CHECK(difference(top_k_mass{}) == "");
  }

  TEST_CASE("labels of experts have the bits of the host") {
    CHECK(difference(prior_approximate{}) == "");
    for (const index experts : {index{6}, index{40}}) {
      support::test_random random(33);
      const layer_type layer = make_layer(random, 12, experts);
      const layer_type other = make_layer(random, 12, experts);
      const auto labels = to_device<device>(other.mask.view());
      context<cpu> host(1);
      context<device> ctx;
      const labelled<prior_approximate, cpu> on_host{{}, other.mask.view()};
      const labelled<prior_approximate, device> there{{}, labels.view()};
      CHECK(bits(run_on<device>(ctx, there, {layer}, grad_mode::overwrite),
                 run_on<cpu>(host, on_host, {layer}, grad_mode::overwrite), false) == "");
    }
  }
}

}  // namespace talpa::cuda_losses_test
