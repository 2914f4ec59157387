// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/routed.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cuda/routing_sums.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace talpa::cuda_routing_sums_test {
using support::device;
using support::on_device;

namespace {

/// A row term that reads and writes all there is.
struct reads_everything {
  static constexpr row_term_uses uses{
      .affinity = true, .number = true, .gates = true, .control = true, .noise = true};

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T> affinity) const {
    g.for_each([&](auto e) {
      g.store(affinity, e, math::mul(g.load(in.gates, e, T{0}), g.load(in.clean, e, T{0})));
    });
    const auto sum = g.template sum<T>([&](auto e) { return g.load(in.logits, e, T{0}); });
    return math::mul(sum, g.load(in.control));
  }
  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto sum = g.template sum<T>([&](auto e) { return g.load(in.logits, e, T{0}); });
    const auto number = g.uniform(math::mul(d.scale, d.number));
    g.store(out.dcontrol, math::mul(number, sum));
    const auto by_logit = math::mul(number, g.load(in.control));
    g.for_each([&](auto e) {
      const auto wanted = math::mul(g.uniform(d.scale), g.load(d.affinity, e, T{0}));
      g.store(out.dlogits, e, by_logit);
      g.store(out.dgates, e, math::mul(wanted, g.load(in.clean, e, T{0})));
      if (in.deviation.data == nullptr) return;
      g.store(out.dclean, e, math::mul(wanted, g.load(in.gates, e, T{0})));
      g.store(out.ddeviation, e, wanted);
    });
  }
};

template <class T>
struct device_layer {
  on_device<T> logits, gates, control, clean, deviation;
  on_device<std::uint32_t> mask;
  matrix<std::uint8_t, device> padding;

  explicit device_layer(const support::routed_layer<T>& layer)
      : logits(layer.logits),
        gates(layer.gates),
        control(layer.control),
        clean(layer.clean),
        deviation(layer.deviation),
        mask(layer.mask),
        padding(to_device<device>(as_column(layer.padding.view()))) {}

  routed_rows<T, device> rows(index group_rows) {
    return {logits.view(), gates.view(),   mask.view(),  {padding.data(), padding.rows()},
            group_rows,    control.view(), clean.view(), deviation.view()};
  }
};

template <class T>
routed_rows<T, cpu> rows_of(const support::routed_layer<T>& layer, index group_rows) {
  return {layer.logits, layer.gates,          layer.mask,         layer.padding.view(),
          group_rows,   layer.control.view(), layer.clean.view(), layer.deviation.view()};
}

template <class T>
support::routed_layer<T> make_layer(index tokens, index experts, index padding_every) {
  support::test_random random(41);
  auto layer =
      support::random_layer<T>(random, tokens, experts, std::min<index>(experts, 3), padding_every);
  support::add_control(random, layer);
  support::add_noise(random, layer, 0.5);
  if (tokens > 2 && experts > 1) layer.logits(2, 0) = -std::numeric_limits<T>::infinity();
  return layer;
}

template <class T>
matrix<T, cpu> filled(index rows, index cols, int value) {
  matrix<T, cpu> m(rows, cols);
  std::fill_n(m.data(), m.size(), static_cast<T>(value));
  return m;
}

/// Every total on both backends; `other` stands in the outputs before.
template <class T, class Term>
std::string forward_difference(const support::routed_layer<T>& layer, index group_rows,
                               grad_mode mode, const Term& term) {
  const index groups = group_rows == 0 ? 1 : layer.tokens() / group_rows, e = layer.experts();
  // tokens, squared_logsumexp, entropy, row_term: a row each.
  matrix<index, cpu> tokens = filled<index>(1, groups, 7), counts = filled<index>(groups, e, 7);
  matrix<T, cpu> numbers = filled<T>(3, groups, 7), probability = filled<T>(groups, e, 7),
                 importance = filled<T>(groups, e, 7), affinity = filled<T>(groups, e, 7);
  on_device<index> device_counts(counts);
  on_device<T> device_probability(probability), device_importance(importance),
      device_affinity(affinity);
  auto device_tokens = to_device<device>(tokens.view());
  auto device_numbers = to_device<device>(numbers.view());

  context<cpu> host(1);
  ops::routing_sums(host, rows_of(layer, group_rows),
                    routing_totals<T, cpu>{{tokens.data(), groups},
                                           counts,
                                           probability,
                                           importance,
                                           {numbers.data(), groups},
                                           {numbers.data() + groups, groups},
                                           affinity,
                                           {numbers.data() + 2 * groups, groups}},
                    mode, term);
  context<device> ctx;
  device_layer<T> on(layer);
  ops::routing_sums(ctx, on.rows(group_rows),
                    routing_totals<T, device>{{device_tokens.data(), groups},
                                              device_counts.view(),
                                              device_probability.view(),
                                              device_importance.view(),
                                              {device_numbers.data(), groups},
                                              {device_numbers.data() + groups, groups},
                                              device_affinity.view(),
                                              {device_numbers.data() + 2 * groups, groups}},
                    mode, term);
  ctx.synchronise();
  const bool intact = device_counts.intact() && device_probability.intact() &&
                      device_importance.intact() && device_affinity.intact();
  return support::bit_difference(to_host(device_tokens.view()), tokens) +
         support::bit_difference(device_counts.now(), counts) +
         support::bit_difference(device_probability.now(), probability) +
         support::bit_difference(device_importance.now(), importance) +
         support::bit_difference(device_affinity.now(), affinity) +
         support::bit_difference(to_host(device_numbers.view()), numbers) +
         (intact ? "" : "something else was written");
}

template <class T, class Term>
std::string backward_difference(const support::routed_layer<T>& layer, index group_rows,
                                grad_mode mode, const Term& term) {
  const index groups = group_rows == 0 ? 1 : layer.tokens() / group_rows;
  const index n = layer.tokens(), e = layer.experts();
  support::test_random random(42);
  const auto some = [&](index rows, index cols) {
    return on_device<T>(support::random_matrix<T>(random, rows, cols));
  };
  on_device<T> dprobability = some(groups, e), dimportance = some(groups, e),
               daffinity = some(groups, e), scale = some(1, 1);
  const matrix<T, cpu> dnumbers = support::random_matrix<T>(random, 2, groups);
  auto device_dnumbers = to_device<device>(dnumbers.view());
  matrix<T, cpu> dlogits = filled<T>(n, e, 7), dgates = filled<T>(n, e, 7),
                 dcontrol = filled<T>(n, 1, 7), dclean = filled<T>(n, e, 7),
                 ddeviation = filled<T>(n, e, 7);
  on_device<T> device_dlogits(dlogits), device_dgates(dgates), device_dcontrol(dcontrol),
      device_dclean(dclean), device_ddeviation(ddeviation);

  context<cpu> host(1);
  // What is given on the host is only read.
  matrix<T, cpu> copy[] = {dprobability.host(), dimportance.host(), daffinity.host(), dnumbers};
  ops::routing_sums_backward(
      host, rows_of(layer, group_rows),
      {copy[0], copy[1], {copy[3].data(), groups}, copy[2], {copy[3].data() + groups, groups}},
      scale.host(), dlogits.view(), dgates.view(), mode, term, {dcontrol, dclean, ddeviation});
  context<device> ctx;
  device_layer<T> on(layer);
  ops::routing_sums_backward(
      ctx, on.rows(group_rows),
      {dprobability.view(),
       dimportance.view(),
       {device_dnumbers.data(), groups},
       daffinity.view(),
       {device_dnumbers.data() + groups, groups}},
      scale.view(), device_dlogits.view(), device_dgates.view(), mode, term,
      {device_dcontrol.view(), device_dclean.view(), device_ddeviation.view()});
  ctx.synchronise();
  const bool intact = device_dlogits.intact() && device_dgates.intact() &&
                      device_dcontrol.intact() && device_dclean.intact() &&
                      device_ddeviation.intact();
  return support::bit_difference(device_dlogits.now(), dlogits) +
         support::bit_difference(device_dgates.now(), dgates) +
         support::bit_difference(device_dcontrol.now(), dcontrol) +
         support::bit_difference(device_dclean.now(), dclean) +
         support::bit_difference(device_ddeviation.now(), ddeviation) +
         (intact ? "" : "something else was written");
}

}  // namespace

TEST_SUITE("cuda/routing_sums") {
  TEST_CASE_TEMPLATE("routing_sums has the bits of the host", T, TALPA_SCALARS) {
    const reads_everything term;
    for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
      for (const index tokens : {index{0}, index{1}, support::device_size(132, 5200)}) {
        CAPTURE(tokens);
        const auto layer = make_layer<T>(tokens, 5, 4);
        CHECK(forward_difference(layer, 0, mode, term) == "");
        CHECK(backward_difference(layer, 0, mode, term) == "");
        if (tokens > 1) CHECK(forward_difference(layer, tokens / 4, mode, term) == "");
        if (tokens > 1) CHECK(backward_difference(layer, tokens / 4, mode, term) == "");
      }
    }
  }

  TEST_CASE_TEMPLATE("routing_sums without a row term", T, TALPA_SCALARS) {
    for (const index experts : {index{1}, index{33}}) {
      const auto layer = make_layer<T>(support::device_size(9, 1111), experts, 0);
      CHECK(forward_difference(layer, 0, grad_mode::overwrite, no_row_term{}) == "");
      CHECK(backward_difference(layer, 0, grad_mode::accumulate, no_row_term{}) == "");
    }
  }

  TEST_CASE("a token that cannot be normalised makes its group NaN, padding nothing") {
    auto layer = make_layer<float>(8, 3, 0);
    layer.padding = vector<std::uint8_t, cpu>(8);
    for (index n = 0; n < 8; ++n) layer.padding[n] = n % 4 != 3 ? 1 : 0;
    layer.logits(1, 1) = std::numeric_limits<float>::quiet_NaN();
    layer.logits(7, 1) = std::numeric_limits<float>::infinity();
    CHECK(forward_difference(layer, 4, grad_mode::overwrite, no_row_term{}) == "");
    CHECK(backward_difference(layer, 4, grad_mode::overwrite, no_row_term{}) == "");
  }

  TEST_CASE("routing_sums of what only numbers are wanted") {
    const auto layer = make_layer<double>(11, 4, 3);
    vector<double, cpu> expected(1);
    context<cpu> host(1);
    ops::routing_sums(host, rows_of(layer, 0),
                      routing_totals<double, cpu>{.squared_logsumexp = expected.view()},
                      grad_mode::overwrite);
    context<device> ctx;
    device_layer<double> on(layer);
    matrix<double, device> found(1, 1);
    ops::routing_sums(ctx, on.rows(0),
                      routing_totals<double, device>{.squared_logsumexp = {found.data(), 1}},
                      grad_mode::overwrite);
    ctx.synchronise();
    CHECK(to_host(found.view())(0, 0) == expected[0]);
  }

  TEST_CASE("sums over more blocks than one level of partial sums") {
    // 129 blocks of 128 rows need a second level; on a small device group_rows cannot reach it.
    const index n = 129;
    support::test_random random(43);
    matrix<float, cpu> x = support::random_matrix<float>(random, n * 128, 1), y = x;
    detail::sum_rows_in_place(x.view());
    CHECK(kernels::canonical_sum_in_place(y.data(), n * 128, 1) == x(0, 0));
  }
}

}  // namespace talpa::cuda_routing_sums_test
