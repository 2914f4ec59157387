// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <type_traits>

namespace talpa::selector_laws_test {

namespace {

/// top_k with one mistake, so that the laws can be seen to find it.
struct faulty {
  enum class fault {
    none,
    negative_gate,
    gate_without_bit,
    one_too_many,
    mass,
    absolute_threshold,
    position_matters,
    depends_on_lane_width,
    replay_scales,
    selects_masked,
    gives_masked_a_gradient,
    keeps_invalid_rows,
    gradient_sign,
    gradient_reads_all,
    gradient_of_others,
    replay_gradient,
    forgets_a_gate,
    imprecise,
  };

  static constexpr const char* name = "faulty";
  static constexpr bool unit_mass = true;

  // clang warns of & and | between two calls that return bool, as they do on the serial group.
  template <class Condition>
  static Condition both(Condition a, Condition b) {
    return a & b;
  }
  template <class Condition>
  static Condition either(Condition a, Condition b) {
    return a | b;
  }

  fault with = fault::none;
  top_k<gate::renormalised> inner{.k = 2};

  void validate(index experts) const { inner.validate(experts); }
  index max_selected(index experts) const { return inner.max_selected(experts); }

  template <class G, class T>
  void select(const G& g, const select_row<T>& row) const {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    inner.select(g, row);
    const auto zero = g.uniform(T{0});
    const auto gate_of = [&](auto e) {
      return g.load(row_pointer<const T>{row.gates.data, row.gates.stride}, e, T{0});
    };
    const auto first = [&](auto e) { return e.expert() == g.uniform(std::int32_t{0}); };
    const auto on = [&](auto e) { return g.load_bit(row.recorded(), e); };
    const auto change = [&](auto f) {
      g.for_each([&](auto e) { g.store(row.gates, e, f(e, gate_of(e))); });
    };
    switch (with) {
      case fault::negative_gate:
        change([&](auto e, auto v) { return talpa::select(both(first(e), on(e)), zero - v, v); });
        break;
      case fault::gate_without_bit:
        change([&](auto e, auto v) {
          return talpa::select(both(first(e), !on(e)), g.uniform(T{0.25}), v);
        });
        break;
      case fault::one_too_many:
        g.store_mask(row.mask, [&](auto e) { return either(on(e), first(e)); });
        break;
      case fault::mass:
        change([&](auto, auto v) { return math::mul(v, g.uniform(T{1} + T{1} / T{1024})); });
        break;
      case fault::absolute_threshold: {
        const auto low = [&](auto e) { return g.load(row.logits, e, -infinity) < g.uniform(T{0}); };
        change([&](auto e, auto v) {
          return talpa::select(both(low(e), on(e)), v + g.uniform(T{1} / T{512}), v);
        });
        break;
      }
      case fault::position_matters:
        change([&](auto e, auto v) {
          return talpa::select(first(e), math::mul(v, g.uniform(T{0.5})), v);
        });
        break;
      case fault::depends_on_lane_width:
        // The last bit of a sum that is formed in the order of this group's own lanes.
        change([&](auto, auto v) {
          return math::mul(v, g.uniform(sizeof(typename G::template value<T>) ==
                                                (std::is_same_v<T, float> ? 4 : 8) * sizeof(T)
                                            ? T{1} + std::numeric_limits<T>::epsilon()
                                            : T{1}));
        });
        break;
      case fault::selects_masked:
        g.store_mask(row.mask, [&](auto e) {
          const auto masked = g.load(row.logits, e, T{0}) == g.uniform(-infinity);
          return either(on(e), both(masked, first(e)));
        });
        break;
      case fault::keeps_invalid_rows:
        change([&](auto, auto v) { return talpa::select(v == v, v, zero); });
        break;
      case fault::forgets_a_gate:
        g.for_each([&](auto e) {
          g.store(row.gates, e,
                  talpa::select(e.expert() == g.uniform(std::int32_t{4}),
                                g.uniform(std::numeric_limits<T>::quiet_NaN()), gate_of(e)));
        });
        break;
      case fault::imprecise:
        change([&](auto, auto v) {
          return std::is_same_v<T, float> ? math::mul(v, g.uniform(T{1} + T{1} / T{4096})) : v;
        });
        break;
      default:
        break;
    }
  }

  template <class G, class T>
  void replay(const G& g, const select_row<T>& row) const {
    inner.replay(g, row);
    if (with != fault::replay_scales && with != fault::replay_gradient) return;
    const T factor = with == fault::replay_scales ? T{1} + std::numeric_limits<T>::epsilon() : T{2};
    // A row of four experts is one that only replay makes.
    const auto count = g.count([&](auto e) { return g.load_bit(row.recorded(), e); });
    const auto many = count > g.uniform(std::int32_t{2});
    g.for_each([&](auto e) {
      const auto v = g.load(row_pointer<const T>{row.gates.data, row.gates.stride}, e, T{0});
      const auto scaled = math::mul(v, g.uniform(factor));
      g.store(row.gates, e, with == fault::replay_scales ? scaled : talpa::select(many, scaled, v));
    });
  }

  template <class G, class T>
  void select_backward(const G& g, const select_gradient_row<T>& row) const {
    inner.select_backward(g, row);
    const auto change = [&](auto f) {
      g.for_each([&](auto e) {
        const auto v = g.load(row_pointer<const T>{row.dlogits.data, row.dlogits.stride}, e, T{0});
        g.store(row.dlogits, e, f(e, v));
      });
    };
    if (with == fault::gradient_sign) change([&](auto, auto v) { return -v; });
    if (with == fault::gradient_reads_all) {
      change([&](auto e, auto v) {
        return v + math::mul(g.load(row.dgates, e, T{0}), g.uniform(T{0}));
      });
    }
    if (with == fault::gradient_of_others) {
      change([&](auto e, auto v) {
        return talpa::select(e.expert() == g.uniform(std::int32_t{1}), v + g.uniform(T{1} / T{64}),
                             v);
      });
    }
    if (with == fault::gives_masked_a_gradient) {
      change([&](auto e, auto v) {
        const auto masked =
            g.load(row.logits, e, T{0}) == g.uniform(-std::numeric_limits<T>::infinity());
        return talpa::select(masked, g.uniform(T{1}), v);
      });
    }
  }
};

/// What the laws say about a fault.
template <class T>
std::string found(faulty::fault fault) {
  return testing::selector_laws<T>(faulty{.with = fault}, 8).text();
}
template <class T = float>
bool finds(faulty::fault fault, const std::string& law) {
  const std::string text = found<T>(fault);
  INFO(text);
  return text.find(law) != std::string::npos;
}

using fault = faulty::fault;

}  // namespace

TEST_SUITE("testing/selector_laws") {
  TEST_CASE("a selector without a mistake obeys them") {
    support::obeys(testing::selector_laws<float>(faulty{}, 8));
  }

  TEST_CASE("each mistake breaks the law that is about it") {
    CHECK(finds(fault::negative_gate, "gates are finite, not negative"));
    CHECK(finds(fault::gate_without_bit, "zero where the mask is off"));
    CHECK(finds(fault::one_too_many, "every token gets min_selected to max_selected experts"));
    CHECK(finds(fault::mass, "the gates of a token sum to one"));
    CHECK(finds(fault::absolute_threshold, "adding a constant to the logits"));
    CHECK(finds(fault::position_matters, "permuting the experts permutes the result"));
    CHECK(finds(fault::depends_on_lane_width, "every lane group and every repetition"));
    CHECK(finds<double>(fault::depends_on_lane_width, "every lane group and every repetition"));
    CHECK(finds(fault::replay_scales, "replay of a selector's own mask"));
    CHECK(finds(fault::selects_masked, "an expert with logit -inf is never on"));
    CHECK(finds(fault::gives_masked_a_gradient, "an expert with logit -inf is never on"));
    CHECK(finds(fault::keeps_invalid_rows, "a row with NaN, +inf or only -inf"));
    CHECK(finds(fault::gradient_sign, "select: the gradient of 'logits' equals differences"));
    CHECK(finds(fault::gradient_reads_all, "the gradient of a gate that is off is ignored"));
    CHECK(finds(fault::gradient_of_others, "the gradients of a token's logits sum to zero"));
    CHECK(finds(fault::replay_gradient, "replay: the gradient of 'logits' equals differences"));
    CHECK(finds(fault::forgets_a_gate, "gates are finite"));
    CHECK(finds(fault::imprecise, "float agrees with double within rounding"));
  }

  TEST_CASE("claims turn off what a selector does not promise") {
    testing::selector_claims claims;
    claims.permutable = false;
    claims.amplification = std::numeric_limits<double>::infinity();
    const std::string text =
        testing::selector_laws<float>(faulty{.with = fault::position_matters}, 8, claims).text();
    CHECK(text.find("permuting") == std::string::npos);
  }
}

}  // namespace talpa::selector_laws_test
