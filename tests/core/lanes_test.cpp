// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"

#include <talpa/core/lanes.hpp>
#include <talpa/cpu/token_pack.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/lanes.hpp>
#include <talpa/testing/sim.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace talpa::lanes_test {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

/// Sizes round a power of two, a mask word, and several of them.
const std::vector<index> sizes = {1,  2,  3,  4,  5,  7,  8,  9,   15, 16,
                                  17, 31, 32, 33, 63, 64, 65, 100, 200};

// The value that row `i` of a pack, or the whole group, holds. Lanes of one row must agree.
template <class G, class Value>
auto row_value(const Value& value, int i) {
  if constexpr (std::is_arithmetic_v<Value>) {
    return value;
  } else if constexpr (G::tokens > 1) {
    return value.v[i];
  } else {
    constexpr int lanes = static_cast<int>(sizeof(value.v) / sizeof(value.v[0]));
    for (int l = 1; l < lanes; ++l) REQUIRE(testing::same_number(value.v[l], value.v[0]));
    return value.v[0];
  }
}

/// Whether a condition holds in element i of a pack.
template <int W>
bool holds(const pack<bool, W>& condition, int i) {
  return condition.v[i] != 0;
}

/// collective(group, first row) for each row of `tokens`, on group G, one result a row.
template <class G, class Result, class Collective>
std::vector<Result> results_on(index tokens, index experts, Collective collective) {
  std::vector<Result> results;
  testing::for_each_row_on<G>(tokens, experts, [&](const auto& group, index first, int rows) {
    const auto value = collective(group, first);
    for (int i = 0; i < rows; ++i) results.push_back(static_cast<Result>(row_value<G>(value, i)));
  });
  return results;
}

/// check(group tag) on every group that runs on the CPU.
template <class G>
struct tag {
  using group = G;
};
template <class Check>
void on_every_group(Check check) {
  check(tag<serial>{}, "serial");
  check(tag<token_pack<4>>{}, "token_pack<4>");
  check(tag<token_pack<8>>{}, "token_pack<8>");
  check(tag<token_pack<16>>{}, "token_pack<16>");
  check(tag<sim<1>>{}, "sim<1>");
  check(tag<sim<4>>{}, "sim<4>");
  check(tag<sim<8>>{}, "sim<8>");
  check(tag<sim<16>>{}, "sim<16>");
  check(tag<sim<32>>{}, "sim<32>");
}

template <class T>
row_pointer<const T> row_at(const matrix<T, cpu>& m, index row) {
  return {m.view().row(row), m.cols()};
}

/// The canonical sum as it is defined: 32 virtual lanes from +0, then the tree 16, 8, 4, 2, 1.
template <class T>
T canonical_sum(const T* x, index experts) {
  T lane[32];
  for (index v = 0; v < 32; ++v) {
    lane[v] = T{0};
    for (index e = v; e < experts; e += 32) lane[v] = lane[v] + x[e];
  }
  for (index half = 16; half >= 1; half /= 2) {
    for (index v = 0; v < half; ++v) lane[v] = lane[v] + lane[v + half];
  }
  return lane[0];
}

template <class T>
matrix<T, cpu> wild_matrix(index tokens, index experts, std::uint64_t seed) {
  support::test_random random(seed);
  matrix<T, cpu> m(tokens, experts);
  for (index i = 0; i < m.size(); ++i) {
    // Sizes over 2^-20 .. 2^20, so that every order of additions rounds differently.
    const double scale = std::ldexp(1.0, static_cast<int>(random.below(41)) - 20);
    m.data()[i] = static_cast<T>(random.uniform(-1.0, 1.0) * scale);
  }
  return m;
}

/// Numbers from `low` to 1; every third row with many ties, others with -inf, one of nothing else.
template <class T>
matrix<T, cpu> rows_to_rank(support::test_random& random, index tokens, index experts, double low) {
  matrix<T, cpu> x(tokens, experts);
  for (index n = 0; n < tokens; ++n) {
    for (index e = 0; e < experts; ++e) {
      x(n, e) = static_cast<T>(random.uniform(low, 1.0));
      if (n % 3 == 1) x(n, e) = static_cast<T>(random.below(3));
      if (n % 4 == 2 && e % 3 != 0) x(n, e) = static_cast<T>(-infinity);
      if (n == 8) x(n, e) = static_cast<T>(-infinity);
    }
  }
  return x;
}

}  // namespace

TEST_SUITE("core/lanes") {
  TEST_CASE("the canonical sum of 34 elements, by hand") {
    // Virtual lane 0 holds 1 + 2^-53, which rounds to 1, and lane 1 holds 2^-53 + 2^-53 = 2^-52.
    // The tree adds lane 1 to lane 0 last: 1 + 2^-52. A sum from left to right would give 1.
    matrix<double, cpu> x(1, 34);
    x(0, 0) = 1.0;
    x(0, 1) = x(0, 32) = x(0, 33) = 0x1p-53;
    on_every_group([&](auto which, const char* name) {
      CAPTURE(name);
      using G = typename decltype(which)::group;
      const auto sums = results_on<G, double>(1, 34, [&](const auto& g, index first) {
        return g.template sum<double>([&](auto e) { return g.load(row_at(x, first), e, 0.0); });
      });
      CHECK(sums[0] == 1.0 + 0x1p-52);
    });
  }

  TEST_CASE_TEMPLATE("sums follow the canonical definition on every group", T, TALPA_SCALARS) {
    bool order_matters = false;
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = 21;
      const matrix<T, cpu> x =
          wild_matrix<T>(tokens, experts, 31 + static_cast<std::uint64_t>(experts));
      on_every_group([&](auto which, const char* name) {
        CAPTURE(name);
        using G = typename decltype(which)::group;
        const auto sums = results_on<G, T>(tokens, experts, [&](const auto& g, index first) {
          // What a lane holds beyond the row must not count.
          return g.template sum<T>(
              [&](auto e) { return g.load(row_at(x, first), e, static_cast<T>(nan)); });
        });
        REQUIRE(sums.size() == static_cast<std::size_t>(tokens));
        for (index n = 0; n < tokens; ++n) {
          CHECK(testing::same_number(sums[static_cast<std::size_t>(n)],
                                     canonical_sum(x.view().row(n), experts)));
        }
      });
      for (index n = 0; n < tokens; ++n) {
        T in_order{0};
        for (index e = 0; e < experts; ++e) in_order += x(n, e);
        order_matters = order_matters || in_order != canonical_sum(x.view().row(n), experts);
      }
    }
    CHECK(order_matters);
  }

  TEST_CASE_TEMPLATE("sum_of maps each element once, by one function or in lock-step", T,
                     TALPA_SCALARS) {
    const auto check = [](auto map, auto of_number) {
      for (const index experts : sizes) {
        CAPTURE(experts);
        const index tokens = 21;
        matrix<T, cpu> x = wild_matrix<T>(tokens, experts, 32), wanted(tokens, experts);
        for (index i = 0; i < x.size(); ++i) {
          x.data()[i] = i % 5 == 0 ? static_cast<T>(-infinity) : -std::abs(x.data()[i]);
          wanted.data()[i] = of_number(x.data()[i]);
        }
        on_every_group([&](auto which, const char* name) {
          CAPTURE(name);
          using G = typename decltype(which)::group;
          matrix<T, cpu> kept(tokens, experts);
          const auto sums = results_on<G, T>(tokens, experts, [&](const auto& g, index first) {
            auto y = g.template elements<T>();
            const auto sum = g.template sum_of<T>(
                map, [&](auto e) { return g.load(row_at(x, first), e, T{0}); },
                [&](auto e, const auto& value) { return y[e] = value; });
            const auto written = kept.view();
            g.store_row(row_pointer<T>{written.row(first), written.stride},
                        [&](auto e) { return y[e]; });
            return sum;
          });
          for (index n = 0; n < tokens; ++n) {
            CHECK(testing::same_number(sums[static_cast<std::size_t>(n)],
                                       canonical_sum(wanted.view().row(n), experts)));
          }
          for (index i = 0; i < kept.size(); ++i) {
            CHECK(testing::same_number(kept.data()[i], wanted.data()[i]));
          }
        });
      }
    };
    check(detail::exp_nonpositive_of{}, [](T x) { return math::exp_nonpositive(x); });
    check(detail::expm1_nonpositive_of{}, [](T x) { return math::expm1_nonpositive(x); });
    check([](const auto& x) { return math::sigmoid(x); }, [](T x) { return math::sigmoid(x); });
  }

  TEST_CASE("a sum of negative zeros is positive zero") {
    matrix<double, cpu> x(1, 3);
    for (index e = 0; e < 3; ++e) x(0, e) = -0.0;
    on_every_group([&](auto which, const char* name) {
      CAPTURE(name);
      using G = typename decltype(which)::group;
      const auto sums = results_on<G, double>(1, 3, [&](const auto& g, index first) {
        return g.template sum<double>([&](auto e) { return g.load(row_at(x, first), e, 0.0); });
      });
      CHECK(testing::same_number(sums[0], 0.0));
    });
  }

  TEST_CASE("max skips NaN and is -inf where nothing else is") {
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = 19;
      matrix<double, cpu> x = wild_matrix<double>(tokens, experts, 5);
      for (index n = 0; n < tokens; ++n) {
        if (n % 3 == 1) x(n, n % experts) = nan;
        for (index e = 0; n % 7 == 2 && e < experts; ++e) x(n, e) = n % 2 == 0 ? nan : -infinity;
      }
      on_every_group([&](auto which, const char* name) {
        CAPTURE(name);
        using G = typename decltype(which)::group;
        const auto found = results_on<G, double>(tokens, experts, [&](const auto& g, index first) {
          return g.template max<double>(
              [&](auto e) { return g.load(row_at(x, first), e, infinity); });
        });
        for (index n = 0; n < tokens; ++n) {
          double most = -infinity;
          for (index e = 0; e < experts; ++e) most = std::fmax(most, x(n, e));
          CHECK(found[static_cast<std::size_t>(n)] == most);
        }
      });
    }
  }

  TEST_CASE("arg_max takes the lowest index among equal values and only active elements") {
    support::test_random random(11);
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = 23;
      matrix<double, cpu> x(tokens, experts), active(tokens, experts);
      for (index i = 0; i < x.size(); ++i) {
        x.data()[i] = static_cast<double>(random.below(4));  // many ties
        active.data()[i] = random.below(3) == 0 ? 0.0 : 1.0;
      }
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          if (n % 5 == 1) active(n, e) = 0.0;
          if (n % 5 == 2) x(n, e) = -infinity;
          if (n % 5 == 3) x(n, e) = (n + e) % 2 == 0 ? 0.0 : -0.0;
        }
      }
      on_every_group([&](auto which, const char* name) {
        CAPTURE(name);
        using G = typename decltype(which)::group;
        std::vector<double> values;
        const auto winners =
            results_on<G, std::int32_t>(tokens, experts, [&](const auto& g, index first) {
              const auto best = g.template arg_max<double>(
                  [&](auto e) { return g.load(row_at(x, first), e, infinity); },
                  [&](auto e) { return g.load(row_at(active, first), e, 1.0) > g.uniform(0.5); });
              const int rows = static_cast<int>(std::min<index>(G::tokens, tokens - first));
              for (int i = 0; i < rows; ++i) values.push_back(row_value<G>(best.value, i));
              return best.expert;
            });
        for (index n = 0; n < tokens; ++n) {
          std::int32_t winner = -1;
          for (index e = 0; e < experts; ++e) {
            if (active(n, e) > 0.5 && (winner < 0 || x(n, e) > x(n, winner))) {
              winner = static_cast<std::int32_t>(e);
            }
          }
          CHECK(winners[static_cast<std::size_t>(n)] == winner);
          if (winner >= 0) CHECK(values[static_cast<std::size_t>(n)] == x(n, winner));
        }
      });
    }
  }

  TEST_CASE("count, load_bit and store_mask agree about which elements are on") {
    support::test_random random(12);
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = 18, words = mask_words(experts);
      matrix<std::uint32_t, cpu> mask(tokens, words);
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          if (random.below(2) == 0) mask(n, e / 32) |= 1u << (e % 32);
        }
      }
      on_every_group([&](auto which, const char* name) {
        CAPTURE(name);
        using G = typename decltype(which)::group;
        matrix<std::uint32_t, cpu> copy(tokens, words);
        for (index i = 0; i < copy.size(); ++i) copy.data()[i] = ~0u;
        const auto counts =
            results_on<G, std::int32_t>(tokens, experts, [&](const auto& g, index first) {
              const auto on = [&](auto e) { return g.load_bit(row_at(mask, first), e); };
              g.store_mask(row_pointer<std::uint32_t>{copy.view().row(first), words}, on);
              return g.count(on);
            });
        CHECK(testing::first_difference(copy, mask) == "");
        // A condition that holds beyond the row as well counts the row only.
        const auto all = results_on<G, std::int32_t>(tokens, experts, [](const auto& g, index) {
          return g.count([&](auto) { return g.uniform(true); });
        });
        CHECK(all[0] == experts);
        for (index n = 0; n < tokens; ++n) {
          std::int32_t count = 0;
          for (index e = 0; e < experts; ++e) count += (mask(n, e / 32) >> (e % 32)) & 1u;
          CHECK(counts[static_cast<std::size_t>(n)] == count);
        }
      });
    }
  }

  TEST_CASE("a mask is read as it was written last, also right after that") {
    support::test_random random(13);
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = 18, words = mask_words(experts);
      const matrix<double, cpu> x = wild_matrix<double>(tokens, experts, 12);
      on_every_group([&](auto which, const char* name) {
        CAPTURE(name);
        using G = typename decltype(which)::group;
        matrix<std::uint32_t, cpu> one(tokens, words), two(tokens, words);
        testing::for_each_row_on<G>(tokens, experts, [&](const auto& g, index first, int rows) {
          const auto u = g.load_row(row_at(x, first), 0.0);
          const auto positive = [&](auto e) { return u[e] > g.uniform(0.0); };
          const auto at = [&](matrix<std::uint32_t, cpu>& m) {
            return row_pointer<std::uint32_t>{m.view().row(first), words};
          };
          // Elements for which the mask that is read and the one in memory differ.
          const auto check = [&](matrix<std::uint32_t, cpu>& m) {
            const auto on = g.load_mask(row_at(std::as_const(m), first));
            const auto differ = g.count([&](auto e) {
              const auto read = on(e), stored = g.load_bit(row_at(std::as_const(m), first), e);
              return (read & !stored) | (stored & !read);
            });
            for (int i = 0; i < rows; ++i) CHECK(row_value<G>(differ, i) == 0);
          };
          g.store_mask(at(one), positive);
          check(one);
          g.store_mask(at(two), [&](auto e) { return !positive(e); });
          check(one);
          check(two);
          const auto value = [&](auto e) { return u[e]; };
          const auto top = g.template top<double>(1, value);
          g.template store_first<double>(at(one), g.uniform(std::int32_t{1}), top.last,
                                         g.uniform(std::int32_t{0}), value);
          check(one);
          check(two);
        });
      });
    }
  }

  TEST_CASE("for_each visits every element once, and elements keep what was put there") {
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = 17;
      const matrix<double, cpu> x = wild_matrix<double>(tokens, experts, 8);
      on_every_group([&](auto which, const char* name) {
        CAPTURE(name);
        using G = typename decltype(which)::group;
        matrix<double, cpu> y(tokens, experts);
        testing::poison<double>(y.view());
        testing::for_each_row_on<G>(tokens, experts, [&](const auto& g, index first, int) {
          CHECK(g.experts() == experts);
          // As many arrays as one functor may ask for; none may lie on top of another.
          auto a = g.template elements<double>();
          auto b = g.template elements<double>();
          auto c = g.template elements<double>();
          auto d = g.template elements<double>();
          auto h = g.template elements<double>();
          auto number = g.template elements<std::int32_t>();
          g.for_each([&](auto e) {
            a[e] = g.load(row_at(x, first), e, 0.0);
            b[e] = c[e] = d[e] = h[e] = g.uniform(-1.0);
            number[e] = e.expert();
          });
          g.for_each([&](auto e) {
            const auto right = number[e] == e.expert();
            g.store(row_pointer<double>{y.view().row(first), experts}, e,
                    talpa::select(right, a[e] + b[e] - c[e] + d[e] - h[e], g.uniform(nan)));
          });
        });
        for (index i = 0; i < x.size(); ++i) {
          // ((x - 1) + 1 - 1) + 1, rounded as in the group.
          CHECK(y.data()[i] == x.data()[i] + -1.0 - -1.0 + -1.0 - -1.0);
        }
      });
    }
  }

  TEST_CASE("a pack writes no row beyond the last valid one") {
    const index experts = 5, tokens = 3;
    matrix<double, cpu> x = wild_matrix<double>(tokens, experts, 9);
    matrix<double, cpu> y(16, experts);
    matrix<std::uint32_t, cpu> mask(16, 1);
    testing::poison<double>(y.view());
    for (index n = 0; n < 16; ++n) mask(n, 0) = 0xdeadbeefu;
    const index bytes = static_cast<index>(lane_scratch::bytes_for(experts, 16));
    std::vector<std::byte> storage(static_cast<std::size_t>(bytes));
    lane_scratch scratch(storage.data(), storage.size());
    const token_pack<16> g(experts, static_cast<int>(tokens), &scratch);
    g.for_each([&](auto e) {
      g.store(row_pointer<double>{y.data(), experts}, e, g.load(row_at(x, 0), e, 0.0));
    });
    g.store_mask(row_pointer<std::uint32_t>{mask.data(), 1},
                 [&](auto e) { return g.load(row_at(x, 0), e, 0.0) > g.uniform(0.0); });
    for (index n = 0; n < 16; ++n) {
      for (index e = 0; e < experts; ++e) {
        CHECK(testing::same_number(y(n, e), n < tokens ? x(n, e) : nan));
      }
      CHECK((mask(n, 0) == 0xdeadbeefu) == (n >= tokens));
    }
  }

  TEST_CASE("a number that a row has once is read and written by its row alone") {
    const index experts = 6, tokens = 21;
    const matrix<double, cpu> x = wild_matrix<double>(tokens, 2, 10);
    on_every_group([&](auto group_tag, const char* name) {
      CAPTURE(name);
      using G = typename decltype(group_tag)::group;
      matrix<double, cpu> y(tokens, 2);
      testing::poison<double>(y.view());
      testing::for_each_row_on<G>(tokens, experts, [&](const auto& g, index first, int) {
        const auto v = g.load(row_scalar<const double>{x.view().row(first), 2});
        g.store(row_scalar<double>{y.view().row(first), 2}, v + g.uniform(1.0));
      });
      for (index n = 0; n < tokens; ++n) {
        CHECK(testing::same_number(y(n, 0), x(n, 0) + 1.0));
        CHECK(std::isnan(y(n, 1)));
      }
    });
  }

  TEST_CASE("any looks at all rows at hand") {
    const index experts = 6, tokens = 21;
    on_every_group([&](auto group_tag, const char* name) {
      CAPTURE(name);
      using G = typename decltype(group_tag)::group;
      for (const index wanted : {index{0}, index{9}, tokens - 1, tokens}) {
        matrix<double, cpu> x(tokens, 1);
        if (wanted < tokens) x(wanted, 0) = 1.0;
        bool found = false;
        testing::for_each_row_on<G>(tokens, experts, [&](const auto& g, index first, int) {
          found =
              g.any(g.load(row_scalar<const double>{x.view().row(first), 1}) > g.uniform(0.5)) ||
              found;
        });
        CHECK(found == (wanted < tokens));
      }
    });
  }

  TEST_CASE("a number that rows share is computed anew for another kind, E, argument or type") {
    std::vector<std::byte> storage(lane_scratch::bytes_for(8, 4));
    lane_scratch scratch(storage.data(), storage.size());
    int calls = 0;
    const auto number = [&](index experts, int kind, double argument, auto value) {
      using T = decltype(value);
      const token_pack<4> g(experts, 4, &scratch);
      const auto next = [&] {
        ++calls;
        return value;
      };
      return g.template shared<T>(kind, argument, next);
    };
    CHECK(number(8, 0, 1.5, 0.1) == 0.1);
    scratch.reset();
    CHECK(number(8, 0, 1.5, 0.2) == 0.1);
    CHECK(calls == 1);
    CHECK(number(8, 1, 1.5, 0.3) == 0.3);
    CHECK(number(7, 1, 1.5, 0.4) == 0.4);
    CHECK(number(7, 1, 2.5, 0.5) == 0.5);
    CHECK(number(7, 1, 2.5, 0.6f) == 0.6f);
    CHECK(calls == 5);
  }

  TEST_CASE("the scratch of a group is full after the arrays that it promises") {
    const index experts = 7;
    std::vector<std::byte> storage(lane_scratch::bytes_for(experts, 1));
    lane_scratch scratch(storage.data(), storage.size());
    for (index i = 0; i < lane_scratch::max_arrays; ++i) {
      CHECK(scratch.take(static_cast<std::size_t>(experts) * sizeof(double)) != nullptr);
    }
    scratch.reset();
    void* const first = scratch.take(1);
    CHECK(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
    CHECK(scratch.take(storage.size()) == nullptr);
  }

  TEST_CASE_TEMPLATE("ranks are the largest values in order, and last_equal ends the first n", T,
                     TALPA_SCALARS) {
    support::test_random random(14);
    for (const index experts : sizes) {
      CAPTURE(experts);
      // Full packs and a rest. Under a sanitizer, where rows cost the most, of the narrowest packs.
      const index tokens = support::sanitized ? 10 : 19;
      matrix<T, cpu> x = rows_to_rank<T>(random, tokens, experts, -1.0);
      for (index e = 0; e < experts; ++e) x(7, e) = e % 2 == 0 ? T{0} : -T{0};
      for (const index most : {index{1}, index{2}, index{3}, index{4}, index{5}, index{8}, index{9},
                               index{33}, experts}) {
        if (most > experts || (support::sanitized && experts > 40 && most % 3 != 0)) continue;
        CAPTURE(most);
        matrix<std::uint32_t, cpu> firsts(tokens, mask_words(experts));
        matrix<std::uint32_t, cpu> early_ones(tokens, mask_words(experts));
        on_every_group([&](auto which, const char* name) {
          CAPTURE(name);
          using G = typename decltype(which)::group;
          testing::for_each_row_on<G>(tokens, experts, [&](const auto& g, index first, int rows) {
            const auto u = g.load_row(row_at(x, first), static_cast<T>(-infinity));
            const auto value = [&](auto e) { return u[e]; };
            const auto ranks = g.template ranks<T>(most, value);
            const auto end = g.template last_equal<T>(g.uniform(static_cast<std::int32_t>(most)),
                                                      ranks(most - 1), value);
            const auto top = g.template top<T>(most, value);
            const auto store = [&](matrix<std::uint32_t, cpu>& mask, std::int32_t early) {
              g.template store_first<T>({mask.view().row(first), mask.view().stride},
                                        g.uniform(static_cast<std::int32_t>(most)), top.last,
                                        g.uniform(early), value);
            };
            store(firsts, 0);
            store(early_ones, 1);
            for (int i = 0; i < rows; ++i) {
              std::vector<T> sorted(x.view().row(first + i), x.view().row(first + i) + experts);
              std::stable_sort(sorted.begin(), sorted.end(), [](T a, T b) { return a > b; });
              for (index j = 0; j < most; ++j) {
                CHECK(row_value<G>(ranks(j), i) == sorted[static_cast<std::size_t>(j)]);
              }
              CHECK(row_value<G>(top.first, i) == sorted[0]);
              CHECK(row_value<G>(top.last, i) == sorted[static_cast<std::size_t>(most - 1)]);
              // The experts with the value of the last rank, as many as the ranks before it leave.
              const T last = sorted[static_cast<std::size_t>(most - 1)];
              index left = most, wanted = -1;
              for (const T y : sorted) left -= y > last ? 1 : 0;
              for (index e = 0; e < experts; ++e) {
                if (x(first + i, e) != last) continue;
                if (left-- > 0) wanted = e;
              }
              if (left >= 0) wanted = experts - 1;
              if (last == static_cast<T>(-infinity)) wanted = -1;
              CHECK(row_value<G>(end, i) == wanted);
              const auto bit = [&](const matrix<std::uint32_t, cpu>& mask, index e) {
                return (mask(first + i, e / 32) >> (e % 32) & 1u) != 0;
              };
              for (index e = 0; e < experts; ++e) {
                CHECK(bit(firsts, e) ==
                      (x(first + i, e) > last || (x(first + i, e) == last && e <= wanted)));
                CHECK(bit(early_ones, e) == (e == 0));
              }
            }
          });
        });
      }
    }
  }

  TEST_CASE_TEMPLATE("leading_ranks ends where the sum of their parts is beyond", T,
                     TALPA_SCALARS) {
    support::test_random random(16);
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = support::sanitized ? 10 : 19;
      const matrix<T, cpu> x = rows_to_rank<T>(random, tokens, experts, 0.0);
      const T b = T{3};
      const auto part = [](const auto& v) { return math::mul(v, v); };
      const T bound = static_cast<T>(experts) / T{20};
      for (const rank_limit limit :
           {rank_limit{0, false}, rank_limit{0, true}, rank_limit{2, false}, rank_limit{5, true}}) {
        CAPTURE(limit.least);
        on_every_group([&](auto which, const char* name) {
          CAPTURE(name);
          using G = typename decltype(which)::group;
          testing::for_each_row_on<G>(tokens, experts, [&](const auto& g, index first, int rows) {
            const auto u = g.load_row(row_at(x, first), static_cast<T>(-infinity));
            const auto top = g.template max<T>([&](auto e) { return u[e]; });
            const auto asked = top < g.uniform(T{2});
            const auto end = g.template leading_ranks<T>(
                limit, part, g.uniform(b), [&](const auto& sum) { return sum <= g.uniform(bound); },
                asked, [&](auto e) { return u[e]; });
            for (int i = 0; i < rows; ++i) {
              std::vector<T> sorted(x.view().row(first + i), x.view().row(first + i) + experts);
              std::stable_sort(sorted.begin(), sorted.end(), [](T y, T z) { return y > z; });
              const index all = std::count_if(sorted.begin(), sorted.end(),
                                              [](T y) { return y > static_cast<T>(-infinity); });
              index wanted = 0;
              if (sorted[0] < T{2}) {
                T sum{0};
                for (; wanted < all; ++wanted) {
                  sum += part(sorted[static_cast<std::size_t>(wanted)]) / b;
                  if (!(sum <= bound)) break;
                }
                wanted += limit.one_more ? 1 : 0;
              }
              wanted = std::min(std::max(wanted, limit.least), all);
              CHECK(row_value<G>(end.count, i) == wanted);
              CHECK(row_value<G>(end.last, i) ==
                    (wanted == 0 ? static_cast<T>(infinity)
                                 : sorted[static_cast<std::size_t>(wanted - 1)]));
            }
          });
        });
      }
    }
  }

  TEST_CASE_TEMPLATE("whole rows and masks are read and written as element by element", T,
                     TALPA_SCALARS) {
    support::test_random random(15);
    for (const index experts : sizes) {
      CAPTURE(experts);
      const index tokens = 21, words = mask_words(experts);
      const matrix<T, cpu> x = wild_matrix<T>(tokens, experts, 16);
      matrix<std::uint32_t, cpu> mask(tokens, words);
      for (index i = 0; i < mask.size(); ++i) {
        mask.data()[i] = static_cast<std::uint32_t>(random.below(1u << 31)) * 2 + 1;
      }
      on_every_group([&](auto which, const char* name) {
        CAPTURE(name);
        using G = typename decltype(which)::group;
        matrix<T, cpu> y(tokens + 1, experts);
        testing::poison<T>(y.view());
        testing::for_each_row_on<G>(tokens, experts, [&](const auto& g, index first, int) {
          const auto u = g.load_row(row_at(x, first), T{0});
          const auto on = g.load_mask(row_at(mask, first));
          g.store_row(row_pointer<T>{y.view().row(first), experts},
                      [&](auto e) { return talpa::select(on(e), u[e], g.uniform(T{0})); });
        });
        for (index n = 0; n < tokens; ++n) {
          for (index e = 0; e < experts; ++e) {
            const bool on = ((mask(n, e / 32) >> (e % 32)) & 1u) != 0;
            CHECK(testing::same_number(y(n, e), on ? x(n, e) : T{0}));
          }
        }
        for (index e = 0; e < experts; ++e) CHECK(std::isnan(y(tokens, e)));
      });
    }
  }

  TEST_CASE("pack arithmetic is the arithmetic of its elements") {
    support::test_random random(4);
    pack<float, 8> a, b, c;
    for (int i = 0; i < 8; ++i) {
      a.v[i] = static_cast<float>(random.uniform(-3.0, 3.0));
      b.v[i] = i == 5 ? a.v[i] : static_cast<float>(random.uniform(-3.0, 3.0));
      c.v[i] = static_cast<float>(random.uniform(-3.0, 3.0));
    }
    for (int i = 0; i < 8; ++i) {
      CHECK((a + b).v[i] == a.v[i] + b.v[i]);
      CHECK((a - b).v[i] == a.v[i] - b.v[i]);
      CHECK((-a).v[i] == -a.v[i]);
      CHECK((a / b).v[i] == a.v[i] / b.v[i]);
      CHECK(holds(a < b, i) == (a.v[i] < b.v[i]));
      CHECK(holds(a > b, i) == (a.v[i] > b.v[i]));
      CHECK(holds(a <= b, i) == (a.v[i] <= b.v[i]));
      CHECK(holds(a >= b, i) == (a.v[i] >= b.v[i]));
      CHECK(holds(a == b, i) == (a.v[i] == b.v[i]));
      CHECK(holds((a < b) & (b < c), i) == (a.v[i] < b.v[i] && b.v[i] < c.v[i]));
      CHECK(holds((a < b) | (b < c), i) == (a.v[i] < b.v[i] || b.v[i] < c.v[i]));
      CHECK(holds(!(a < b), i) == !(a.v[i] < b.v[i]));
      CHECK(select(a < b, a, c).v[i] == (a.v[i] < b.v[i] ? a.v[i] : c.v[i]));
      CHECK(math::fma(a, b, c).v[i] == std::fma(a.v[i], b.v[i], c.v[i]));
      CHECK(math::mul(a, b).v[i] == math::mul(a.v[i], b.v[i]));
      CHECK(math::exp(a).v[i] == math::exp(a.v[i]));
      CHECK(testing::same_number(math::log(a).v[i], math::log(a.v[i])));
    }
  }
}

}  // namespace talpa::lanes_test
