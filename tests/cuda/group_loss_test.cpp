// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/group_loss.hpp>
#include <talpa/cuda/group_loss.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_group_loss_test {
using support::device;
using support::on_device;

namespace {

/// Something of the totals that balance losses read, with its derivatives.
struct reads_balance {
  static constexpr used_totals uses{.counts = true, .probability = true, .squared_logsumexp = true};
  double scale;

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto tokens = g.uniform(in.tokens > T{0} ? in.tokens : T{1});
    const auto weight = [&](auto e) { return g.load(in.counts, e, T{0}) / tokens; };
    g.for_each([&](auto e) { g.store(out.probability, e, weight(e)); });
    const auto sum = g.template sum<T>(
        [&](auto e) { return math::mul(weight(e), g.load(in.probability, e, T{0})); });
    const auto factor = g.uniform(static_cast<T>(scale));
    return {math::fma(factor, g.uniform(in.squared_logsumexp), sum), factor};
  }
};

/// Something of the others.
struct reads_terms {
  static constexpr used_totals uses{.importance = true, .affinity = true, .row_term = true};

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto sum = g.template sum<T>([&](auto e) {
      return math::mul(g.load(in.importance, e, T{0}), g.load(in.affinity, e, T{0}));
    });
    g.for_each([&](auto e) {
      g.store(out.importance, e, g.load(in.affinity, e, T{0}));
      g.store(out.affinity, e, g.load(in.importance, e, T{0}));
    });
    const auto t = g.uniform(in.row_term);
    return {math::fma(t, t, sum), g.uniform(T{0}), t + t};
  }
};

struct reads_counts {
  static constexpr used_totals uses{.counts = true};

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>&) const {
    return {g.template max<T>([&](auto e) { return g.load(in.counts, e, T{0}); }), g.uniform(T{0})};
  }
};

struct reads_numbers {
  static constexpr used_totals uses{.squared_logsumexp = true, .row_term = true};

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>&) const {
    const auto t = g.uniform(in.row_term);
    return {math::fma(t, t, g.uniform(in.squared_logsumexp)), g.uniform(T{1}), t + t};
  }
};

template <class T>
matrix<T, cpu> filled(index rows, index cols, int value) {
  matrix<T, cpu> m(rows, cols);
  std::fill_n(m.data(), m.size(), static_cast<T>(value));
  return m;
}

/// Value and derivatives on both backends; one group in three has no real token.
template <class T, class Loss>
std::string difference(const Loss& loss, index groups, index experts, group_reduction reduction,
                       grad_mode mode, bool live = true) {
  support::test_random random(51);
  matrix<index, cpu> tokens(1, groups);
  matrix<index, cpu> count(groups, experts);
  for (index g = 0; g < groups; ++g) {
    tokens(0, g) = live && g % 3 != 1 ? 1 + random.below(9) : 0;
    for (index e = 0; e < experts; ++e) count(g, e) = random.below(9);
  }
  matrix<T, cpu> probability = support::random_matrix<T>(random, groups, experts),
                 importance = support::random_matrix<T>(random, groups, experts),
                 affinity = support::random_matrix<T>(random, groups, experts),
                 numbers = support::random_matrix<T>(random, 2, groups);
  matrix<T, cpu> value = filled<T>(1, 1, 7), dprobability = filled<T>(groups, experts, 7),
                 dimportance = dprobability, daffinity = dprobability,
                 dnumbers = filled<T>(2, groups, 7);

  on_device<index> device_count(count);
  on_device<T> on_probability(probability), on_importance(importance), on_affinity(affinity),
      on_value(value), on_dprobability(dprobability), on_dimportance(dimportance),
      on_daffinity(daffinity);
  auto device_tokens = to_device<device>(tokens.view());
  auto device_numbers = to_device<device>(numbers.view());
  auto device_dnumbers = to_device<device>(dnumbers.view());

  context<cpu> host(1);
  ops::group_loss(host, loss, reduction,
                  routing_totals<T, cpu>{{tokens.data(), groups},
                                         count,
                                         probability,
                                         importance,
                                         {numbers.data(), groups},
                                         {},
                                         affinity,
                                         {numbers.data() + groups, groups}},
                  routing_totals_gradient<T, cpu>{dprobability,
                                                  dimportance,
                                                  {dnumbers.data(), groups},
                                                  daffinity,
                                                  {dnumbers.data() + groups, groups}},
                  value.view(), mode);
  context<device> ctx;
  ops::group_loss(ctx, loss, reduction,
                  routing_totals<T, device>{{device_tokens.data(), groups},
                                            device_count.view(),
                                            on_probability.view(),
                                            on_importance.view(),
                                            {device_numbers.data(), groups},
                                            {},
                                            on_affinity.view(),
                                            {device_numbers.data() + groups, groups}},
                  routing_totals_gradient<T, device>{on_dprobability.view(),
                                                     on_dimportance.view(),
                                                     {device_dnumbers.data(), groups},
                                                     on_daffinity.view(),
                                                     {device_dnumbers.data() + groups, groups}},
                  on_value.view(), mode);
  ctx.synchronise();
  const bool intact = on_value.intact() && on_dprobability.intact() && on_dimportance.intact() &&
                      on_daffinity.intact();
  return support::bit_difference(on_value.now(), value) +
         support::bit_difference(on_dprobability.now(), dprobability) +
         support::bit_difference(on_dimportance.now(), dimportance) +
         support::bit_difference(on_daffinity.now(), daffinity) +
         support::bit_difference(to_host(device_dnumbers.view()), dnumbers) +
         (intact ? "" : "something else was written");
}

}  // namespace

TEST_SUITE("cuda/group_loss") {
  TEST_CASE_TEMPLATE("group_loss has the bits of the host", T, TALPA_SCALARS) {
    constexpr auto sum = group_reduction::sum, mean = group_reduction::mean;
    for (const index groups : {index{0}, index{1}, support::device_size(131, 1031)}) {
      CAPTURE(groups);
      CHECK(difference<T>(reads_balance{0.3}, groups, 5, sum, grad_mode::overwrite) == "");
      CHECK(difference<T>(reads_terms{}, groups, 5, mean, grad_mode::accumulate) == "");
    }
    CHECK(difference<T>(reads_balance{0.3}, 3, 33, mean, grad_mode::overwrite) == "");
  }

  TEST_CASE("group_loss of counts alone") {
    CHECK(difference<float>(reads_counts{}, 5, 9, group_reduction::mean, grad_mode::overwrite) ==
          "");
  }

  TEST_CASE("group_loss of numbers alone, beside which no array is there") {
    CHECK(difference<float>(reads_numbers{}, 5, 0, group_reduction::mean, grad_mode::overwrite) ==
          "");
  }

  TEST_CASE("the mean over groups none of which has a token is zero") {
    CHECK(difference<double>(reads_balance{1.0}, 4, 2, group_reduction::mean, grad_mode::overwrite,
                             false) == "");
  }
}

}  // namespace talpa::cuda_group_loss_test
