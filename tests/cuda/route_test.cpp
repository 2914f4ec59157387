// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"

#include <talpa/core/half.hpp>
#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/cpu/route.hpp>
#include <talpa/cuda/assign_balanced.hpp>
#include <talpa/cuda/mole_route.hpp>
#include <talpa/cuda/route.hpp>
#include <talpa/selectors/base_assignment.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/selectors/top_p.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

namespace talpa::cuda_route_test {
using support::device;
using support::on_device;

namespace {

/// Rows of any kind: masked experts, ties, padding with logits that no sum may see.
template <class T>
struct batch {
  matrix<T, cpu> logits;
  vector<std::uint8_t, cpu> real;

  batch(index tokens, index experts, index padding_every, std::uint64_t seed = 61)
      : real(padding_every > 0 ? tokens : 0) {
    support::test_random random(seed);
    logits = support::random_matrix<T>(random, tokens, experts, 2.0);
    for (index n = 0; n < tokens; ++n) {
      T* const row = logits.data() + n * experts;
      if (n % 9 == 4 && experts > 1) row[n % experts] = -std::numeric_limits<T>::infinity();
      if (n % 5 == 3) std::copy_n(row - experts, experts, row);
      if (padding_every == 0) continue;
      real[n] = random.below(padding_every) != 0 ? 1 : 0;
      if (real[n] == 0) std::fill_n(row, experts, std::numeric_limits<T>::quiet_NaN());
    }
  }
};

/// Everything that can be wanted, on both backends; begins as 7.
template <class T>
struct totals_of_both {
  matrix<index, cpu> tokens, counts;
  matrix<T, cpu> probability, importance, squares, entropy;
  matrix<index, device> device_tokens;
  on_device<index> device_counts;
  on_device<T> device_probability, device_importance;
  matrix<T, device> device_squares, device_entropy;

  totals_of_both(index groups, index experts)
      : tokens(filled<index>(groups, 1)),
        counts(filled<index>(groups, experts)),
        probability(filled<T>(groups, experts)),
        importance(filled<T>(groups, experts)),
        squares(filled<T>(groups, 1)),
        entropy(filled<T>(groups, 1)),
        device_tokens(to_device<device>(tokens.view())),
        device_counts(counts),
        device_probability(probability),
        device_importance(importance),
        device_squares(to_device<device>(squares.view())),
        device_entropy(to_device<device>(entropy.view())) {}

  routing_totals<T, cpu> host_view() {
    return {column(tokens), counts, probability, importance, column(squares), column(entropy)};
  }
  routing_totals<T, device> device_view() {
    return {column(device_tokens),    device_counts.view(),   device_probability.view(),
            device_importance.view(), column(device_squares), column(device_entropy)};
  }
  std::string difference() {
    const bool intact =
        device_counts.intact() && device_probability.intact() && device_importance.intact();
    return support::bit_difference(to_host(device_tokens.view()), tokens) +
           support::bit_difference(device_counts.now(), counts) +
           support::bit_difference(device_probability.now(), probability) +
           support::bit_difference(device_importance.now(), importance) +
           support::bit_difference(to_host(device_squares.view()), squares) +
           support::bit_difference(to_host(device_entropy.view()), entropy) +
           (intact ? "" : "something else was written");
  }

 private:
  template <class U>
  static matrix<U, cpu> filled(index rows, index cols) {
    matrix<U, cpu> m(rows, cols);
    std::fill_n(m.data(), m.size(), static_cast<U>(7));
    return m;
  }
  template <class U, class B>
  static vector_view<U, B> column(matrix<U, B>& m) {
    return {m.data(), m.rows()};
  }
};

index groups_of(index tokens, index group_rows) {
  return group_rows == 0 ? 1 : tokens / group_rows;
}

/// Empty when route on the device leaves what select and routing_sums leave on the host, twice.
template <class T, class Selector>
std::string difference(const Selector& selector, index tokens, index experts,
                       index padding_every = 0, index group_rows = 0,
                       grad_mode mode = grad_mode::overwrite) {
  const batch<T> of(tokens, experts, padding_every);
  matrix<T, cpu> gates(tokens, experts);
  matrix<std::uint32_t, cpu> mask(tokens, mask_words(experts));
  on_device<T> logits(of.logits), device_gates(gates);
  on_device<std::uint32_t> device_mask(mask);
  const auto real = to_device<device>(as_column(of.real.view()));
  totals_of_both<T> totals(groups_of(tokens, group_rows), experts);

  context<cpu> host(1);
  context<device> ctx;
  std::string found;
  for (int run = 0; run < 2; ++run) {
    ops::select(host, selector, of.logits, of.real.view(), gates.view(), mask.view());
    ops::routing_sums(host, {of.logits, gates, mask, of.real.view(), group_rows},
                      totals.host_view(), mode);
    ops::route(ctx, selector, logits.view(), {real.data(), of.real.size()}, device_gates.view(),
               device_mask.view(), {totals.device_view(), mode, group_rows});
    ctx.synchronise();
    const bool intact = device_gates.intact() && device_mask.intact();
    found += support::bit_difference(device_mask.now(), mask) +
             support::bit_difference(device_gates.now(), gates) + totals.difference() +
             (intact ? "" : "something else was written");
  }
  return found;
}

}  // namespace

TEST_SUITE("cuda/route") {
  TEST_CASE("route has the bits of select and routing_sums on the host for every lane group") {
    const top_k<gate::renormalised> two{2}, eight{8};
    for (const index experts : {index{1}, index{8}, index{13}, index{32}, index{100}, index{128},
                                index{200}, index{300}}) {
      if (support::sanitized && experts != 1 && experts != 8 && experts != 100) continue;
      CAPTURE(experts);
      const index tokens = support::device_size(experts > 32 ? 21 : 70, 1500);
      CHECK(difference<float>(top_k<gate::raw>{1}, tokens, experts) == "");
      if (experts >= 8) CHECK(difference<float>(eight, tokens, experts, 4) == "");
    }
    CHECK(difference<double>(two, support::device_size(21, 1500), 64, 3) == "");
  }

  TEST_CASE("route of nothing, of one token, of a block of sums and one more") {
    for (const index tokens : {index{0}, index{1}, index{128}, index{129}}) {
      CAPTURE(tokens);
      CHECK(difference<float>(top_k<gate::renormalised>{2}, tokens, 8, 5) == "");
    }
    CHECK(difference<float>(top_k<gate::raw>{1}, 0, 8, 0, 3) == "");
  }

  TEST_CASE("totals of groups, overwritten and added to") {
    const top_k<gate::renormalised> two{2};
    for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
      if (support::sanitized && mode == grad_mode::overwrite) continue;
      CHECK(difference<float>(two, 36, 8, 4, 9, mode) == "");
      CHECK(difference<float>(two, 12, 5, 0, 1, mode) == "");
      // Two blocks of sums a group, the second of two rows.
      CHECK(difference<float>(two, 260, 8, 4, 130, mode) == "");
    }
    // More groups than a context has counters.
    CHECK(difference<float>(top_k<gate::raw>{1}, 70, 2, 4, 1) == "");
  }

  TEST_CASE("other selectors, those that couple rows too") {
    const index tokens = support::device_size(40, 1500);
    CHECK(difference<float>(dynamic_entropy<>{.threshold = 0.7}, tokens, 8, 5) == "");
    CHECK(difference<float>(top_p<gate::raw>{.p = 0.6}, tokens, 8, 5) == "");
    CHECK(difference<float>(base_assignment{}, tokens, 4, 5) == "");
  }

  TEST_CASE("a token that cannot be normalised makes its group NaN and no other") {
    const index tokens = 12, experts = 3;
    batch<float> of(tokens, experts, 0);
    of.logits(5, 1) = std::numeric_limits<float>::quiet_NaN();
    matrix<float, device> gates(tokens, experts);
    matrix<std::uint32_t, device> mask(tokens, 1);
    const auto logits = to_device<device>(of.logits.view());
    totals_of_both<float> totals(3, experts);
    context<device> ctx;
    ops::route(ctx, top_k<gate::raw>{2}, logits.view(), {}, gates.view(), mask.view(),
               {totals.device_view(), grad_mode::overwrite, 4});
    ctx.synchronise();
    const auto entropy = to_host(totals.device_entropy.view());
    CHECK(entropy(0, 0) == entropy(0, 0));
    CHECK(entropy(1, 0) != entropy(1, 0));
    CHECK(entropy(2, 0) == entropy(2, 0));
  }

  TEST_CASE("totals of which only some are wanted, or none") {
    const index tokens = 9, experts = 4;
    const batch<float> of(tokens, experts, 3);
    matrix<float, device> gates(tokens, experts);
    matrix<std::uint32_t, device> mask(tokens, 1);
    const auto logits = to_device<device>(of.logits.view());
    const auto real = to_device<device>(as_column(of.real.view()));
    const top_k<gate::raw> two{2};
    totals_of_both<float> all(1, experts), some(1, experts);
    context<device> ctx;
    const auto run = [&](const wanted_totals<float, device>& wanted) {
      ops::route(ctx, two, logits.view(), {real.data(), tokens}, gates.view(), mask.view(), wanted);
    };
    const auto to = some.device_view();
    run({all.device_view()});
    run({{.tokens = to.tokens}});
    run({{.counts = to.counts}});
    run({{.importance = to.importance}});
    run({{.entropy = to.entropy}});
    run({{.squared_logsumexp = to.squared_logsumexp}});
    run({{.probability = to.probability}});
    run({});
    run({to, grad_mode::ignore});
    ctx.synchronise();
    const auto same = [](auto& a, auto& b) {
      return support::bit_difference(to_host(a.view()), to_host(b.view()));
    };
    CHECK(same(some.device_tokens, all.device_tokens) == "");
    CHECK(same(some.device_counts, all.device_counts) == "");
    CHECK(same(some.device_importance, all.device_importance) == "");
    CHECK(same(some.device_probability, all.device_probability) == "");
    CHECK(same(some.device_entropy, all.device_entropy) == "");
    CHECK(same(some.device_squares, all.device_squares) == "");
  }

  TEST_CASE("totals over more blocks than one level of partial sums") {
    // 130 blocks of 128 rows.
    if (!support::sanitized) {
      CHECK(difference<float>(top_k<gate::renormalised>{2}, 130 * 128 - 5, 4, 7) == "");
    }
    const auto split = kernels::sum_chunks::of({2, 300 * 128, 300});
    CHECK(split.chunks == 3);
    CHECK(split.sets == 6);
    CHECK(split.chunk(299) == 2);
    CHECK(split.chunk(300) == 3);
    CHECK(split.first_block(3) == 300);
    CHECK(split.first_block(5) == 300 + 256);
    CHECK(split.first_block(6) == 600);
    const auto many = kernels::sum_chunks::of({1000, 4, 1});
    CHECK(many.a_set == 16);
    CHECK(many.sets == 63);
  }

  TEST_CASE("mole_route with totals routes and gates as without") {
    const index tokens = support::device_size(130, 1500), experts = 5, rank = 3;
    const top_k<gate::renormalised> two{2};
    const batch<float> of(tokens, experts, 5);
    support::test_random random(62);
    const auto u =
        to_device<device>(support::random_matrix<float>(random, tokens, experts * rank).view());
    const auto logits = to_device<device>(of.logits.view());
    const auto real = to_device<device>(as_column(of.real.view()));
    const index width = experts * rank + 1;
    matrix<float, device> gates[2], z[2];
    matrix<std::uint32_t, device> mask[2];
    totals_of_both<float> totals(1, experts);
    context<device> ctx;
    for (int i = 0; i < 2; ++i) {
      gates[i] = matrix<float, device>(tokens, experts);
      z[i] = matrix<float, device>(tokens, width);
      mask[i] = matrix<std::uint32_t, device>(tokens, 1);
      const mole_rows<float, device> rows{u.view(),
                                          logits.view(),
                                          {real.data(), tokens},
                                          gates[i].view(),
                                          mask[i].view(),
                                          z[i].view(),
                                          rank,
                                          0.5f};
      if (i == 0) {
        ops::mole_route(ctx, two, rows);
      } else {
        ops::mole_route(ctx, two, rows, {totals.device_view()});
      }
    }
    ctx.synchronise();
    CHECK(support::bit_difference(to_host(gates[1].view()), to_host(gates[0].view())) == "");
    CHECK(support::bit_difference(to_host(mask[1].view()), to_host(mask[0].view())) == "");
    CHECK(support::bit_difference(to_host(z[1].view()), to_host(z[0].view())) == "");
    context<cpu> host(1);
    matrix<float, cpu> host_gates(tokens, experts);
    matrix<std::uint32_t, cpu> host_mask(tokens, 1);
    ops::route(host, two, of.logits, of.real.view(), host_gates.view(), host_mask.view(),
               {totals.host_view()});
    CHECK(totals.difference() == "");
  }
}

}  // namespace talpa::cuda_route_test
