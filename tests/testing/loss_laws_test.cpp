// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/losses/importance_cv2.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/router_z.hpp>
#include <talpa/testing/loss_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa::loss_laws_test {

namespace {

/// router_z with one mistake.
struct faulty {
  enum class fault {
    none,
    value,
    counts_tokens,
    reads_padding,
    gradient,
    gate_gradient,
    overwrites_always,
    ignores_dvalue,
    writes_ignored,
    keeps_memory,
    gradient_where_masked,
  };

  static constexpr const char* name = "faulty";

  fault with = fault::none;

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    const saved<T, B> kept = router_z{}.forward(ctx, layers);
    T& value = kept.value(0, 0);
    if (with == fault::value) value += T{0.125};
    for (const auto& layer : layers) {
      if (with == fault::counts_tokens) value *= static_cast<T>(layer.logits.rows);
      for (index n = 0; with == fault::reads_padding && n < layer.logits.rows; ++n) {
        value += layer.logits(n, 0) * T{0};
      }
    }
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, std::span<const routed_view<T, B>> layers,
                const group_loss_saved<T, B>& kept, input<T, B> dvalue,
                std::span<const routed_gradient<T, B>> out, grad_mode mode) const {
    if (with == fault::overwrites_always && mode == grad_mode::accumulate) {
      mode = grad_mode::overwrite;
    }
    if (with == fault::writes_ignored && mode == grad_mode::ignore) mode = grad_mode::overwrite;
    if (with == fault::keeps_memory) ctx.memory.template take<T>(100);
    matrix<T, B> one(1, 1);
    one(0, 0) = with == fault::ignores_dvalue ? T{1} : dvalue(0, 0);
    router_z{}.backward(ctx, layers, kept, one, out, mode);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const auto& layer = layers[l];
      for (index n = 0; n < layer.logits.rows; ++n) {
        const bool real = layer.padding_mask.empty() || layer.padding_mask[n] != 0;
        if (!real || mode == grad_mode::ignore) continue;
        const bool masked = layer.logits(n, 0) == -std::numeric_limits<T>::infinity();
        if (with == fault::gradient) out[l].dlogits(n, 0) += T{1e-3f};
        if (with == fault::gate_gradient) out[l].dgates(n, 0) += T{1e-3f};
        if (with == fault::gradient_where_masked && masked) out[l].dlogits(n, 0) += T{1};
      }
    }
  }
};
static_assert(loss_policy<faulty>);
using fault = faulty::fault;

bool finds(fault with, const std::string& law) {
  testing::loss_claims claims;
  claims.at_balance = std::pow(std::log(5.0), 2.0);
  const std::string text = testing::loss_laws<double>(faulty{.with = with}, 5, claims).text();
  INFO(text);
  return text.find(law) != std::string::npos;
}

}  // namespace

TEST_SUITE("testing/loss_laws") {
  TEST_CASE("a loss without a mistake obeys them") {
    support::obeys(testing::loss_laws<float>(faulty{}, 5));
  }

  TEST_CASE("each mistake breaks the law that is about it") {
    CHECK(finds(fault::value, "the value at perfect balance is the claimed one"));
    CHECK(finds(fault::counts_tokens, "a batch beside a copy of itself has the same value"));
    CHECK(finds(fault::reads_padding, "padding is the same as removing the tokens"));
    CHECK(finds(fault::gradient, "value: the gradient of 'layers[0].logits'"));
    CHECK(finds(fault::gate_gradient, "value: the gradient of 'layers[1].gates'"));
    CHECK(finds(fault::overwrites_always, "backward overwrites, adds or does nothing"));
    CHECK(finds(fault::ignores_dvalue, "backward overwrites, adds or does nothing"));
    CHECK(finds(fault::writes_ignored, "backward overwrites, adds or does nothing"));
    CHECK(finds(fault::keeps_memory, "backward keeps memory"));
    CHECK(finds(fault::gradient_where_masked, "a logit of -inf gives a finite value"));
  }

  TEST_CASE_TEMPLATE("laws of the losses of the library", T, TALPA_SCALARS) {
    for (const index experts :
         std::is_same_v<T, float> ? std::vector<index>{1, 5} : std::vector<index>{1, 2, 5, 33}) {
      // tests/losses/ has more than 32 experts under a sanitizer, too.
      if (support::sanitized && experts > 5) continue;
      CAPTURE(experts);
      const double e = static_cast<double>(experts);
      // (ln E)^2, and a gradient of the logits for one expert as well: z is its logit.
      testing::loss_claims z;
      z.at_balance = std::log(e) * std::log(e);
      z.amplification = 64.0;
      support::obeys(testing::loss_laws<T>(router_z{}, experts, z));

      testing::loss_claims one;
      one.at_balance = 1.0;
      support::obeys(testing::loss_laws<T>(
          load_balance<balance::per_selection, balance::per_layer>{}, experts, one));
      support::obeys(testing::loss_laws<T>(load_balance<balance::per_token, balance::per_layer>{},
                                           experts, one));
      support::obeys(
          testing::loss_laws<T>(load_balance<balance::per_rank, balance::pooled>{}, experts, one));
      support::obeys(testing::loss_laws<T>(
          load_balance<balance::per_selection, balance::per_sequence>{}, experts, one));
      support::obeys(testing::loss_laws<T>(
          load_balance<balance::soft_mass, balance::per_sequence>{}, experts, one));
      support::obeys(
          testing::loss_laws<T>(load_balance<balance::soft_mass, balance::pooled>{}, experts, one));

      testing::loss_claims zero;
      zero.at_balance = 0.0;
      zero.amplification = e;
      // Only without epsilon is the coefficient a ratio.
      constexpr double tiny = 1e-30;
      support::obeys(testing::loss_laws<T>(importance_cv2{.epsilon = tiny}, experts, zero));
    }
  }
}

}  // namespace talpa::loss_laws_test
