// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"
#include "support/totals.hpp"

#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/token_pack.hpp>
#include <talpa/ops/routing_sums.hpp>
#include <talpa/testing/sim.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <limits>
#include <vector>

namespace talpa::routing_sums_test {

using namespace support;

namespace {

template <class T>
routed_rows<T, cpu> rows_of(const routed_layer<T>& layer, index group_rows = 0) {
  return {layer.logits, layer.gates, layer.mask, layer.padding.view(), group_rows};
}

/// The same sums by plain loops.
struct slow_totals {
  table tokens, counts, probability, importance, squared_logsumexp, entropy;

  slow_totals(const routed_layer<double>& layer, index group_rows)
      : slow_totals(layer, group_rows, group_rows == 0 ? 1 : layer.tokens() / group_rows) {}
  slow_totals(const routed_layer<double>& layer, index group_rows, index groups)
      : tokens(1, groups),
        counts(groups, layer.experts()),
        probability(groups, layer.experts()),
        importance(groups, layer.experts()),
        squared_logsumexp(1, groups),
        entropy(1, groups) {
    for (index n = 0; n < layer.tokens(); ++n) {
      if (!layer.real(n)) continue;
      const index g = group_rows == 0 ? 0 : n / group_rows;
      tokens(0, g) += 1.0;
      const double z = log_sum_exp(layer, n);
      squared_logsumexp(0, g) += z * z;
      const std::vector<double> p = probabilities(layer, n);
      for (index e = 0; e < layer.experts(); ++e) {
        const double x = p[static_cast<std::size_t>(e)];
        probability(g, e) += x;
        if (x > 0.0) entropy(0, g) -= x * std::log(x);
        if (!layer.on(n, e)) continue;
        counts(g, e) += 1.0;
        importance(g, e) += layer.gates(n, e);
      }
    }
  }
};

/// Empty when `found` is within a relative bound of each element of `expected`.
template <class V>
std::string mismatch(const V& found, const table& expected, double roundings, double floor) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(found.data())>>;
  for (index i = 0; i < expected.size(); ++i) {
    const double wanted = expected.values[static_cast<std::size_t>(i)];
    const double is = static_cast<double>(found.data()[i]);
    if constexpr (std::is_same_v<T, index>) {
      if (is != wanted) return exact_text(is) + " is not " + exact_text(wanted);
    } else {
      const double bound = rounding_bound<T>(roundings, std::abs(wanted) + floor);
      if (!within(is, wanted, bound)) {
        return exact_text(is) + " is not " + exact_text(wanted) + " within " + exact_text(bound);
      }
    }
  }
  return "";
}

/// A row term that adds up the clean logits.
struct reads_noise {
  static constexpr row_term_uses uses{.affinity = true, .noise = true};

  template <class T, class G>
  typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                        row_pointer<T> affinity) const {
    g.for_each([&](auto e) { g.store(affinity, e, g.load(in.clean, e, T{0})); });
    return g.uniform(T{0});
  }
  template <class T, class G>
  void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                const routed_row_gradient<T>& out) const {
    g.for_each([&](auto e) {
      g.store(out.dlogits, e, g.uniform(T{0}));
      if (in.deviation.data == nullptr) return;
      g.store(out.dclean, e, math::mul(g.uniform(d.scale), g.load(d.affinity, e, T{0})));
      g.store(out.ddeviation, e, g.uniform(T{0}));
    });
  }
};

}  // namespace

TEST_SUITE("ops/routing_sums") {
  TEST_CASE_TEMPLATE("routing_sums adds up an example worked by hand", T, TALPA_SCALARS) {
    // Rows (0, ln 3), (0, 0) and padding: p = (1/4, 3/4), (1/2, 1/2); z = ln 4, ln 2;
    // H = ln 4 - 3/4 ln 3, ln 2.
    routed_layer<T> layer(3, 2);
    layer.logits(0, 1) = static_cast<T>(std::log(3.0));
    layer.logits(2, 0) = static_cast<T>(1000);
    layer.turn_on(0, 1, 0.75);
    layer.turn_on(1, 0, 0.5);
    layer.turn_on(1, 1, 0.25);
    layer.turn_on(2, 1, 1000.0);
    layer.padding = vector<std::uint8_t, cpu>(3);
    layer.padding[0] = layer.padding[1] = 1;
    context<cpu> ctx(1);
    all_totals<T> out(1, 2, -5);
    ops::routing_sums(ctx, rows_of(layer), out.view(), grad_mode::overwrite);
    CHECK(out.tokens[0] == 2);
    CHECK(out.counts(0, 0) == 1);
    CHECK(out.counts(0, 1) == 2);
    const double ln2 = std::log(2.0), bound = rounding_bound<T>(16.0, 3.0);
    CHECK(within(out.probability(0, 0), 0.75, bound));
    CHECK(within(out.probability(0, 1), 1.25, bound));
    CHECK(out.importance(0, 0) == T{0.5});
    CHECK(out.importance(0, 1) == T{1});
    CHECK(within(out.squared_logsumexp[0], 5.0 * ln2 * ln2, bound));
    CHECK(within(out.entropy[0], 3.0 * ln2 - 0.75 * std::log(3.0), bound));
  }

  TEST_CASE_TEMPLATE("routing_sums agrees with loops in double for any shape and grouping", T,
                     TALPA_SCALARS) {
    test_random random(16);
    context<cpu> ctx(2);
    for (const index experts : {1, 3, 32, 33, 64, 65, 130}) {
      for (const index group_rows : {0, 1, 20, 130}) {
        const routed_layer<T> layer = random_layer<T>(random, 260, experts, (experts + 1) / 2, 6);
        const slow_totals expected(widened(layer), group_rows);
        const index groups = group_rows == 0 ? 1 : 260 / group_rows;
        all_totals<T> out(groups, experts, 9);
        ops::routing_sums(ctx, rows_of(layer, group_rows), out.view(), grad_mode::overwrite);
        CAPTURE(experts);
        CAPTURE(group_rows);
        const std::vector<routed_layer<double>> wide = {widened(layer)};
        const double spread = spread_of(wide);
        const double roundings =
            softmax_roundings(experts, spread) + column_sum_roundings(260) + 4.0;
        CHECK(mismatch(out.tokens, expected.tokens, 0.0, 0.0) == "");
        CHECK(mismatch(out.counts, expected.counts, 0.0, 0.0) == "");
        CHECK(mismatch(out.probability, expected.probability, roundings, 0.0) == "");
        CHECK(mismatch(out.importance, expected.importance, roundings, 0.0) == "");
        // Errors of z and H are absolute: in units of z + spread and of ln E + spread a token.
        const double tokens = static_cast<double>(group_rows == 0 ? 260 : group_rows);
        const double z = spread + 6.0 + std::log(static_cast<double>(experts));
        CHECK(mismatch(out.squared_logsumexp, expected.squared_logsumexp, 3.0 * roundings,
                       tokens * z * z) == "");
        CHECK(mismatch(out.entropy, expected.entropy, 3.0 * roundings, tokens * z) == "");
      }
    }
  }

  TEST_CASE("routing_sums takes every row of more than 128 blocks exactly once") {
    context<cpu> ctx(2);
    for (const index tokens : {128 * 128, 128 * 128 + 1, 128 * 128 + 129}) {
      routed_layer<float> layer(tokens, 2);
      for (index n = 0; n < tokens; ++n) layer.turn_on(n, n + 1 == tokens ? 1 : 0, 1.0);
      all_totals<float> out(1, 2, 0);
      ops::routing_sums(ctx, rows_of(layer), out.view(), grad_mode::overwrite);
      CAPTURE(tokens);
      CHECK(out.tokens[0] == tokens);
      CHECK(out.counts(0, 0) == tokens - 1);
      CHECK(out.counts(0, 1) == 1);
      // Sums of ones and halves below 2^24 are exact.
      CHECK(out.importance(0, 0) == static_cast<float>(tokens - 1));
      CHECK(out.importance(0, 1) == 1.0f);
      CHECK(out.probability(0, 1) == 0.5f * static_cast<float>(tokens));
    }
  }

  TEST_CASE("routing_sums adds to what is there in accumulate mode and computes what is wanted") {
    test_random random(26);
    const routed_layer<double> layer = random_layer<double>(random, 40, 5, 2, 5);
    context<cpu> ctx(1);
    all_totals<double> all(2, 5, 0), added(2, 5, 3), ignored(2, 5, 3);
    ops::routing_sums(ctx, rows_of(layer, 20), all.view(), grad_mode::overwrite);
    ops::routing_sums(ctx, rows_of(layer, 20), added.view(), grad_mode::accumulate);
    ops::routing_sums(ctx, rows_of(layer, 20), ignored.view(), grad_mode::ignore);
    const auto check = [&](auto member) {
      for (index i = 0; i < (all.*member).size(); ++i) {
        CHECK((added.*member).data()[i] == (all.*member).data()[i] + 3);
        CHECK((ignored.*member).data()[i] == 3);
      }
    };
    check(&all_totals<double>::tokens);
    check(&all_totals<double>::counts);
    check(&all_totals<double>::probability);
    check(&all_totals<double>::importance);
    check(&all_totals<double>::squared_logsumexp);
    check(&all_totals<double>::entropy);

    // One at a time, each has the bits it has among the others.
    const auto alone = [&](auto of_totals, auto of_views) {
      all_totals<double> one(2, 5, 7);
      routing_totals<double, cpu> wanted;
      wanted.*of_views = one.view().*of_views;
      ops::routing_sums(ctx, rows_of(layer, 20), wanted, grad_mode::overwrite);
      for (index i = 0; i < (one.*of_totals).size(); ++i) {
        CHECK((one.*of_totals).data()[i] == (all.*of_totals).data()[i]);
      }
    };
    using totals = routing_totals<double, cpu>;
    alone(&all_totals<double>::tokens, &totals::tokens);
    alone(&all_totals<double>::counts, &totals::counts);
    alone(&all_totals<double>::probability, &totals::probability);
    alone(&all_totals<double>::importance, &totals::importance);
    alone(&all_totals<double>::squared_logsumexp, &totals::squared_logsumexp);
    alone(&all_totals<double>::entropy, &totals::entropy);
  }

  TEST_CASE("routing_sums gives zeros where nothing is, and keeps NaN to its group") {
    context<cpu> ctx(2);
    all_totals<float> none(1, 3, 9);
    ops::routing_sums(ctx, rows_of(routed_layer<float>(0, 3)), none.view(), grad_mode::overwrite);
    CHECK(none.tokens[0] == 0);
    CHECK(none.counts(0, 2) == 0);
    CHECK(none.probability(0, 2) == 0.0f);
    CHECK(none.entropy[0] == 0.0f);
    all_totals<float> no_groups(0, 3, 9);
    CHECK_NOTHROW(ops::routing_sums(ctx, rows_of(routed_layer<float>(0, 3), 4), no_groups.view(),
                                    grad_mode::overwrite));

    routed_layer<float> layer(4, 3);
    layer.logits(3, 1) = std::numeric_limits<float>::quiet_NaN();
    layer.turn_on(3, 1, 1.0);
    all_totals<float> out(2, 3, 9);
    ops::routing_sums(ctx, rows_of(layer, 2), out.view(), grad_mode::overwrite);
    for (index e = 0; e < 3; ++e) {
      CHECK(std::isfinite(out.probability(0, e)));
      CHECK(std::isnan(out.probability(1, e)));
    }
    CHECK(std::isnan(out.entropy[1]));
    CHECK(std::isnan(out.squared_logsumexp[1]));
    CHECK(out.counts(1, 1) == 1);
    for (index e = 0; e < 3; ++e) layer.logits(3, e) = -std::numeric_limits<float>::infinity();
    ops::routing_sums(ctx, rows_of(layer, 2), out.view(), grad_mode::overwrite);
    CHECK(std::isnan(out.probability(1, 0)));
  }

  TEST_CASE("routing_sums and its backward have the same bits for any number of threads") {
    test_random random(36);
    const routed_layer<float> layer = random_layer<float>(random, 2000, 24, 4, 6);
    const auto run = [&](int threads) {
      context<cpu> ctx(threads);
      all_totals<float> out(4, 24, 0);
      ops::routing_sums(ctx, rows_of(layer, 500), out.view(), grad_mode::overwrite);
      matrix<float, cpu> scale(1, 1), dlogits(2000, 24), dgates(2000, 24);
      scale(0, 0) = 0.3f;
      ops::routing_sums_backward(
          ctx, rows_of(layer, 500),
          {out.probability.view(), out.importance.view(), out.squared_logsumexp.view()}, scale,
          dlogits.view(), dgates.view(), grad_mode::overwrite);
      return std::pair(std::move(out), std::pair(std::move(dlogits), std::move(dgates)));
    };
    const auto expected = run(1);
    for (const int threads : {2, 3}) {
      const auto found = run(threads);
      CHECK(same_bits(found.first.probability.view(), expected.first.probability.view()));
      CHECK(same_bits(found.first.importance.view(), expected.first.importance.view()));
      CHECK(found.first.entropy[3] == expected.first.entropy[3]);
      CHECK(found.first.squared_logsumexp[2] == expected.first.squared_logsumexp[2]);
      CHECK(same_bits(found.second.first.view(), expected.second.first.view()));
      CHECK(same_bits(found.second.second.view(), expected.second.second.view()));
    }
  }

  TEST_CASE_TEMPLATE("the rows of routing_sums have the same bits for every lane group", T,
                     TALPA_SCALARS) {
    test_random random(46);
    std::vector<std::byte> memory(lane_scratch::bytes_for(100, 32));
    for (const index experts : {1, 2, 5, 31, 32, 33, 64, 100}) {
      matrix<T, cpu> logits = random_matrix<T>(random, 1, experts, 3.0);
      if (experts > 4) logits(0, 3) = -std::numeric_limits<T>::infinity();
      const matrix<T, cpu> upstream = random_matrix<T>(random, 1, experts, 1.0);
      // Rows of results: softmax; then dlogits; then logsumexp and entropy.
      const auto run = [&](auto make) {
        matrix<T, cpu> out(3, experts < 2 ? 2 : experts);
        lane_scratch scratch(memory.data(), memory.size());
        const auto group = make(&scratch);
        const auto scalars = detail::softmax_row(group, row_pointer<const T>{logits.data(), 0},
                                                 row_pointer<T>{out.view().row(0), 0});
        scratch.reset();
        detail::softmax_row_backward(
            group, row_pointer<const T>{logits.data(), 0},
            detail::totals_gradient_row<T>{{upstream.data(), 0}, T(0.25), T(1.5)},
            row_pointer<T>{out.view().row(1), 0});
        const auto first = [](const auto& x) {
          if constexpr (std::is_same_v<std::remove_cvref_t<decltype(x)>, T>) {
            return x;
          } else {
            return x.v[0];
          }
        };
        out(2, 0) = first(scalars.logsumexp);
        out(2, 1) = first(scalars.entropy);
        return out;
      };
      const auto expected = run([&](lane_scratch* s) { return serial(experts, s); });
      CAPTURE(experts);
      CHECK(same_bits(run([&](lane_scratch* s) { return sim<4>(experts, s); }).view(),
                      expected.view()));
      CHECK(same_bits(run([&](lane_scratch* s) { return sim<8>(experts, s); }).view(),
                      expected.view()));
      CHECK(same_bits(run([&](lane_scratch* s) { return sim<32>(experts, s); }).view(),
                      expected.view()));
      CHECK(same_bits(run([&](lane_scratch* s) { return token_pack<8>(experts, 1, s); }).view(),
                      expected.view()));
    }
  }

  TEST_CASE("routing_sums_backward has the gradients of central differences") {
    test_random random(56);
    const routed_layer<double> layer = random_layer<double>(random, 12, 5, 2, 4);
    const matrix<double, cpu> dprobability = random_matrix<double>(random, 3, 5);
    const matrix<double, cpu> dimportance = random_matrix<double>(random, 3, 5);
    vector<double, cpu> dsquares(3);
    for (index g = 0; g < 3; ++g) dsquares[g] = random.uniform(-1.0, 1.0);
    const double scale = 0.75, step = central_difference_step(1.0);
    const layer_gradient expected = numeric_gradient({layer}, 0, step, [&](const auto& at) {
      const slow_totals totals(at[0], 4);
      double sum = 0.0;
      for (index g = 0; g < 3; ++g) {
        for (index e = 0; e < 5; ++e) {
          sum += dprobability(g, e) * totals.probability(g, e) +
                 dimportance(g, e) * totals.importance(g, e);
        }
        sum += dsquares[g] * totals.squared_logsumexp(0, g);
      }
      return scale * sum;
    });
    context<cpu> ctx(2);
    matrix<double, cpu> factor(1, 1), dlogits(12, 5), dgates(12, 5), probabilities_only(12, 5);
    factor(0, 0) = scale;
    routing_totals_gradient<double, cpu> gradient;
    // The views are read only; the type is that of what a loss writes.
    matrix<double, cpu> dp = dprobability, di = dimportance;
    gradient.probability = dp;
    gradient.importance = di;
    gradient.squared_logsumexp = dsquares;
    ops::routing_sums_backward(ctx, rows_of(layer, 4), gradient, factor, dlogits.view(),
                               dgates.view(), grad_mode::overwrite);
    // |z| <= 12 for these logits; see the tests of the losses for the third derivatives.
    const double bound = rounding_bound<double>(60.0, 24.0) +
                         central_difference_bound(step, 1.5 + 6.0 + 4.0, 60.0, 12.0 * 144.0);
    CHECK(difference(dlogits.view(), expected.dlogits, bound) == "");
    CHECK(difference(dgates.view(), expected.dgates, bound) == "");
    CHECK(largest(expected.dlogits) > 100.0 * bound);

    gradient.importance = {};
    ops::routing_sums_backward(ctx, rows_of(layer, 4), gradient, factor, dlogits.view(),
                               dgates.view(), grad_mode::overwrite);
    CHECK(difference(dlogits.view(), expected.dlogits, bound) == "");
    CHECK(largest(to_table(dgates.view())) == 0.0);
    ops::routing_sums_backward(ctx, rows_of(layer, 4), {}, factor, dlogits.view(), dgates.view(),
                               grad_mode::accumulate);
    CHECK(difference(dlogits.view(), expected.dlogits, bound) == "");
  }

  TEST_CASE("routing_sums refuses what does not fit") {
    context<cpu> ctx(1);
    routed_layer<float> layer(6, 3);
    all_totals<float> out(1, 3, 0);
    const auto run = [&](const routed_rows<float, cpu>& rows) {
      ops::routing_sums(ctx, rows, out.view(), grad_mode::overwrite);
    };
    CHECK_NOTHROW(run(rows_of(layer)));
    CHECK_THROWS_WITH_AS(
        run(rows_of(layer, 4)),
        "talpa::ops::routing_sums: 'group_rows' is 4, expected a divisor of 6 = tokens, or 0",
        value_error);
    CHECK_THROWS_WITH_AS(run(rows_of(layer, 2)),
                         "talpa::ops::routing_sums: 'tokens' has shape [1], expected [3] = groups",
                         shape_error);
    routed_rows<float, cpu> rows = rows_of(layer);
    rows.gates = layer.gates.view().row_range(0, 5);
    CHECK_THROWS_WITH_AS(
        run(rows),
        "talpa::ops::routing_sums: 'gates' has shape [5, 3], expected [6, 3] = shape of logits",
        shape_error);
    out.counts = matrix<index, cpu>(1, 2);
    CHECK_THROWS_WITH_AS(
        run(rows_of(layer)),
        "talpa::ops::routing_sums: 'counts' has shape [1, 2], expected [1, 3] = groups, experts",
        shape_error);
    matrix<float, cpu> scale(1, 1), right(6, 3), wrong(6, 2);
    CHECK_THROWS_WITH_AS(ops::routing_sums_backward(ctx, rows_of(layer), {}, scale, wrong.view(),
                                                    right.view(), grad_mode::overwrite),
                         "talpa::ops::routing_sums_backward: 'dlogits' has shape [6, 2], expected "
                         "[6, 3] = shape of logits",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::routing_sums_backward(ctx, rows_of(layer), {}, right, right.view(), right.view(),
                                   grad_mode::overwrite),
        "talpa::ops::routing_sums_backward: 'scale' has shape [6, 3], expected [1, "
        "1] = one number",
        shape_error);
  }

  TEST_CASE("routing_sums refuses noise that is not there, and no room for its gradients") {
    test_random random(88);
    const routed_layer<float> layer = random_layer<float>(random, 6, 3, 1);
    context<cpu> ctx(1);
    matrix<float, cpu> affinity(1, 3), scale(1, 1), right(6, 3), wrong(6, 2);
    routing_totals<float, cpu> sums;
    sums.affinity = affinity.view();
    routed_rows<float, cpu> rows = rows_of(layer);
    const auto forward = [&] {
      ops::routing_sums<cpu, float>(ctx, rows, sums, grad_mode::overwrite, reads_noise{});
    };
    CHECK_THROWS_WITH_AS(
        forward(),
        "talpa::ops::routing_sums: 'clean' has shape [0, 0], expected [6, 3] = shape of logits",
        shape_error);
    rows.clean = right.view();
    CHECK_NOTHROW(forward());
    rows.deviation = wrong.view();
    CHECK_THROWS_WITH_AS(
        forward(),
        "talpa::ops::routing_sums: 'deviation' has shape [6, 2], expected [6, 3] = shape of logits",
        shape_error);
    rows.deviation = right.view();
    CHECK_NOTHROW(forward());
    routing_totals_gradient<float, cpu> wanted;
    wanted.affinity = affinity.view();
    matrix<float, cpu> dlogits(6, 3), dgates(6, 3), dclean(6, 3), ddeviation(6, 3);
    const auto backward = [&](const routed_rows_gradient<float, cpu>& more) {
      ops::routing_sums_backward<cpu, float>(ctx, rows, wanted, scale, dlogits.view(),
                                             dgates.view(), grad_mode::overwrite, reads_noise{},
                                             more);
    };
    CHECK_NOTHROW(backward({{}, dclean.view(), ddeviation.view()}));
    CHECK_THROWS_WITH_AS(backward({{}, {}, ddeviation.view()}),
                         "talpa::ops::routing_sums_backward: 'dclean' has shape [0, 0], expected "
                         "[6, 3] = shape of logits",
                         shape_error);
    CHECK_THROWS_WITH_AS(backward({{}, dclean.view(), wrong.view()}),
                         "talpa::ops::routing_sums_backward: 'ddeviation' has shape [6, 2], "
                         "expected [6, 3] = shape of logits",
                         shape_error);
    // Without noise there is no room to give.
    rows.deviation = {};
    CHECK_NOTHROW(backward({}));
  }
}

}  // namespace talpa::routing_sums_test
