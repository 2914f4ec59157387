// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/assign_balanced.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace talpa::assign_balanced_test {

namespace {

/// The expert of each token, -1 for none, -2 for a row of the mask that was not touched.
template <class T>
std::vector<index> assign(const matrix<T, cpu>& scores, const vector<std::uint8_t, cpu>& real = {},
                          int threads = 1) {
  context<cpu> ctx(threads);
  matrix<std::uint32_t, cpu> mask(scores.rows(), mask_words(scores.cols()));
  std::fill_n(mask.data(), mask.size(), ~0u);
  ops::assign_balanced(ctx, scores.view(), real.view(), mask.view());
  std::vector<index> found;
  for (index n = 0; n < scores.rows(); ++n) {
    index expert = -1, bits = 0;
    for (index e = 0; e < mask.cols() * mask_word_bits; ++e) {
      if (((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) == 0) continue;
      expert = e;
      ++bits;
    }
    if (bits > 1) expert = bits == mask.cols() * mask_word_bits ? -2 : 1000;
    found.push_back(expert);
  }
  return found;
}

/// Tokens with an expert, and the sum of their scores.
struct outcome {
  index placed = 0;
  double total = 0.0;
};

template <class T>
outcome worth(const matrix<T, cpu>& scores, const std::vector<index>& expert) {
  outcome o;
  for (index n = 0; n < scores.rows(); ++n) {
    const index e = expert[static_cast<std::size_t>(n)];
    if (e < 0) continue;
    ++o.placed;
    o.total += static_cast<double>(scores(n, e));
  }
  return o;
}

/// The best of all assignments, by trying them.
template <class T>
outcome try_all(const matrix<T, cpu>& scores, index places, index n, std::vector<index>& used) {
  if (n == scores.rows()) return {};
  outcome best = try_all(scores, places, n + 1, used);
  for (index e = 0; e < scores.cols(); ++e) {
    if (std::isinf(scores(n, e)) || used[static_cast<std::size_t>(e)] == places) continue;
    ++used[static_cast<std::size_t>(e)];
    outcome o = try_all(scores, places, n + 1, used);
    --used[static_cast<std::size_t>(e)];
    ++o.placed;
    o.total += static_cast<double>(scores(n, e));
    if (o.placed > best.placed || (o.placed == best.placed && o.total > best.total)) best = o;
  }
  return best;
}

/// Whether some chain of moves of tokens, round a circle of experts or ending at a free place,
/// gains more than `slack` a move: the longest gains between experts after E rounds.
template <class T>
bool can_be_improved(const matrix<T, cpu>& scores, const std::vector<index>& expert, index places,
                     double slack) {
  const index experts = scores.cols();
  constexpr double none = -std::numeric_limits<double>::infinity();
  // Node E stands for free places: a move to a free expert ends there, and a chain may start there.
  matrix<double, cpu> gain(experts + 1, experts + 1);
  std::fill_n(gain.data(), gain.size(), none);
  std::vector<index> used(static_cast<std::size_t>(experts), 0);
  for (index n = 0; n < scores.rows(); ++n) {
    const index e = expert[static_cast<std::size_t>(n)];
    ++used[static_cast<std::size_t>(e)];
    for (index f = 0; f < experts; ++f) {
      if (f == e) continue;
      gain(e, f) = std::max(gain(e, f),
                            static_cast<double>(scores(n, f)) - static_cast<double>(scores(n, e)));
    }
  }
  for (index e = 0; e < experts; ++e) {
    if (used[static_cast<std::size_t>(e)] < places) gain(e, experts) = 0.0;
    gain(experts, e) = 0.0;
  }
  std::vector<double> reach(static_cast<std::size_t>(experts + 1), 0.0);
  for (index round = 0; round <= experts + 1; ++round) {
    std::vector<double> further = reach;
    for (index a = 0; a <= experts; ++a) {
      for (index b = 0; b <= experts; ++b) {
        further[static_cast<std::size_t>(b)] =
            std::max(further[static_cast<std::size_t>(b)],
                     reach[static_cast<std::size_t>(a)] + gain(a, b) - slack);
      }
    }
    if (further == reach) return false;
    reach = further;
  }
  return true;
}

}  // namespace

TEST_SUITE("ops/assign_balanced") {
  TEST_CASE("the best total, not the best of each, by hand") {
    // Both prefer expert 0. Giving it to token 1 makes 3 + 5 instead of 4 + 1.
    matrix<double, cpu> s(2, 2);
    s(0, 0) = 4.0;
    s(0, 1) = 3.0;
    s(1, 0) = 5.0;
    s(1, 1) = 1.0;
    CHECK(assign(s) == std::vector<index>{1, 0});
    // A third token: two places each, so that both may have it.
    matrix<double, cpu> more(3, 2);
    std::copy_n(s.data(), 4, more.data());
    more(2, 0) = 0.0;
    more(2, 1) = 9.0;
    CHECK(assign(more) == std::vector<index>{0, 0, 1});
  }

  TEST_CASE_TEMPLATE("assign_balanced agrees with trying all assignments", T, TALPA_SCALARS) {
    support::test_random random(6);
    for (index trial = 0; trial < 600; ++trial) {
      const index tokens = 1 + random.below(6), experts = 1 + random.below(4);
      CAPTURE(trial);
      CAPTURE(tokens);
      CAPTURE(experts);
      matrix<T, cpu> s = support::random_matrix<T>(random, tokens, experts, 2.0);
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          // Ties in a third of the trials, masked experts in another.
          if (trial % 3 == 1) s(n, e) = static_cast<T>(random.below(3));
          if (trial % 3 == 2 && random.below(2) == 0 && e != n % experts) {
            s(n, e) = -std::numeric_limits<T>::infinity();
          }
        }
      }
      const index places = ceil_div(tokens, experts);
      std::vector<index> used(static_cast<std::size_t>(experts), 0);
      const outcome best = try_all(s, places, 0, used);
      const std::vector<index> found = assign(s);
      for (const index e : found) {
        REQUIRE(e < experts);
        if (e >= 0) ++used[static_cast<std::size_t>(e)];
      }
      CHECK(*std::max_element(used.begin(), used.end()) <= places);
      const outcome ours = worth(s, found);
      CHECK(ours.placed == best.placed);
      // Sums of at most 6 scores below 8 and of the differences on a chain of at most 4 moves.
      CHECK(support::within(ours.total, best.total,
                            support::rounding_bound<double>(6.0 + 2.0 * 4.0, 6.0 * 8.0)));
    }
  }

  TEST_CASE_TEMPLATE("no chain of moves improves an assignment of hundreds of tokens", T,
                     TALPA_SCALARS) {
    support::test_random random(7);
    for (const index experts : {2, 5, 16, 33}) {
      for (const index tokens : {33, 160, 331}) {
        CAPTURE(experts);
        CAPTURE(tokens);
        matrix<T, cpu> s = support::random_matrix<T>(random, tokens, experts, 2.0);
        // Some experts are liked by everybody.
        for (index n = 0; n < tokens; ++n) {
          for (index e = 0; e < experts / 2; ++e) s(n, e) += T{3};
        }
        const std::vector<index> found = assign(s);
        CHECK(assign(s, {}, 3) == found);
        const index places = ceil_div(tokens, experts);
        std::vector<index> used(static_cast<std::size_t>(experts), 0);
        for (const index e : found) {
          REQUIRE(e >= 0);
          REQUIRE(e < experts);
          ++used[static_cast<std::size_t>(e)];
        }
        const auto ends = std::minmax_element(used.begin(), used.end());
        CHECK(*ends.second <= places);
        if (tokens % experts == 0) CHECK(*ends.first == places);
        // Prices are sums of at most one difference of scores below 11 a token.
        const double slack = support::rounding_bound<double>(2.0 * static_cast<double>(tokens),
                                                             22.0 * static_cast<double>(experts));
        CHECK(!can_be_improved(s, found, places, slack));
      }
    }
  }

  TEST_CASE("padding and rows that cannot be routed take no place") {
    matrix<float, cpu> s(5, 2);
    for (index n = 0; n < 5; ++n) s(n, 0) = 1.0f;
    s(0, 1) = std::numeric_limits<float>::quiet_NaN();
    s(1, 0) = std::numeric_limits<float>::infinity();
    s(2, 0) = s(2, 1) = -std::numeric_limits<float>::infinity();
    vector<std::uint8_t, cpu> real(5);
    for (index n = 0; n < 5; ++n) real[n] = 1;
    // T = 2, one place each.
    CHECK(assign(s, real) == std::vector<index>{-2, -2, -2, 0, 1});
    real[3] = 0;
    CHECK(assign(s, real) == std::vector<index>{-2, -2, -2, -2, 0});
    CHECK(assign(matrix<float, cpu>(0, 3)).empty());
  }

  TEST_CASE("a token whose experts are all needed by others gets none") {
    const float never = -std::numeric_limits<float>::infinity();
    // Three tokens can only have expert 0, which has one place; the best of them gets it.
    matrix<float, cpu> s(3, 3);
    for (index n = 0; n < 3; ++n) {
      s(n, 0) = static_cast<float>(n == 1);
      s(n, 1) = s(n, 2) = never;
    }
    CHECK(assign(s) == std::vector<index>{-1, 0, -1});
    // As many as possible come first: token 0 leaves expert 0 to token 1, whatever it costs.
    matrix<float, cpu> t(2, 2);
    t(0, 0) = 1e30f;
    t(1, 1) = never;
    CHECK(assign(t) == std::vector<index>{1, 0});
  }

  TEST_CASE("the largest finite scores overflow nothing") {
    const double most = std::numeric_limits<double>::max();
    matrix<double, cpu> s(4, 2);
    for (index n = 0; n < 4; ++n) {
      s(n, 0) = most;
      s(n, 1) = n == 2 ? most : -most;
    }
    s(1, 1) = 0.0;
    CHECK(assign(s) == std::vector<index>{0, 1, 1, 0});
    // A power of two changes no order, so the same scores made small are assigned alike.
    support::test_random random(8);
    for (index trial = 0; trial < 20; ++trial) {
      matrix<double, cpu> large(12, 4), small(12, 4);
      for (index i = 0; i < large.size(); ++i) {
        // Two experts that all like, two that none likes: the differences are beyond the range.
        large.data()[i] = random.uniform(0.6, 1.0) * (i % 4 < 2 ? most : -most);
        small.data()[i] = large.data()[i] * 0x1p-900;
      }
      CHECK(assign(large) == assign(small));
    }
  }

  TEST_CASE("shapes that do not fit are refused") {
    context<cpu> ctx(1);
    const matrix<float, cpu> s(4, 3);
    matrix<std::uint32_t, cpu> mask(4, 1), wrong(4, 2);
    const vector<std::uint8_t, cpu> real(5);
    CHECK_THROWS_WITH_AS(ops::assign_balanced(ctx, s.view(), {}, wrong.view()),
                         "talpa::ops::assign_balanced: 'mask' has shape [4, 2], expected [4, 1] = "
                         "tokens, mask words of the experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::assign_balanced(ctx, s.view(), real.view(), mask.view()),
                         "talpa::ops::assign_balanced: 'padding_mask' has shape [5], expected [4] "
                         "= one flag a token",
                         shape_error);
  }
}

}  // namespace talpa::assign_balanced_test
