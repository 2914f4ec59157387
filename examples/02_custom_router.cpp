// SPDX-License-Identifier: Apache-2.0
// Why: a router of your own is one small struct. It runs on every lane group of the library, and
// the laws that the library's own selectors obey are one call away.
//
// How: `within_margin` turns on the best expert and those that are nearly as good. First the laws,
// which contain a gradient check; then its time beside top-2; then a layer with this router learns
// which of two maps a token wants, and becomes less doubtful.
//
// To try: leave `invalid` out and read what the laws say; gate::raw; other margins.

#include <talpa/talpa.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

// [region selector]
/// Selector of the best expert and of those at most `margin` below it, weighed as Weight says.
template <class Weight>
struct within_margin {
  static constexpr const char* name = "within_margin";
  static constexpr bool unit_mass = Weight::unit_mass;

  double margin = 1.0;  ///< difference of logits, finite and >= 0

  void validate(talpa::index) const {
    talpa::check_value(margin >= 0.0 && std::isfinite(margin), name, "margin", margin,
                       "a finite number >= 0");
  }
  TALPA_HD talpa::index max_selected(talpa::index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const talpa::select_row<T>& row) const {
    const auto u = talpa::row_logits(g, row.logits);
    const auto exponential = talpa::exponentials<T>(g, u);
    const auto best = g.template max<T>([&](auto e) { return u[e]; });
    const auto bar = best - g.uniform(static_cast<T>(margin));
    g.store_mask(row.mask, [&](auto e) {
      const auto near = u[e] >= bar;
      return exponential.invalid | near;
    });
    talpa::weigh<Weight>(g, row, exponential);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const talpa::select_row<T>& row) const {
    talpa::weigh<Weight>(g, row, talpa::exponentials<T>(g, talpa::row_logits(g, row.logits)));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const talpa::select_gradient_row<T>& row) const {
    talpa::weigh_backward<Weight>(g, row);
  }
};
// [end selector]

namespace {

using talpa::cpu;
using matrix = talpa::matrix<float, cpu>;
using selector_type = within_margin<talpa::gate::renormalised>;

bool obeys_the_laws(const selector_type& selector) {
  talpa::testing::report laws;
  for (const talpa::index experts : {1, 2, 5, 33}) {
    laws.add(talpa::testing::selector_laws<float>(selector, experts));
    laws.add(talpa::testing::selector_laws<double>(selector, experts));
  }
  std::printf("%td laws: %s\n", laws.laws, laws.passed() ? "all hold" : laws.text().c_str());
  return laws.passed();
}

/// Seconds to route `logits`, once.
template <class Selector>
double time_of(const Selector& selector, const matrix& logits, talpa::routing<float, cpu>& chosen) {
  talpa::context<cpu> ctx(1);
  const auto start = std::chrono::steady_clock::now();
  talpa::ops::select(ctx, selector, logits, {}, chosen.gates.view(), chosen.mask.view());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Prints nanoseconds a token beside those of top-2: medians of runs that take turns.
void compare_with_top_two(const selector_type& selector) {
  constexpr talpa::index tokens = 4096, experts = 8;  // N, E
  talpa::generator random(2);
  matrix logits(tokens, experts);
  talpa::fill_normal(logits.view(), 1.0, random);
  talpa::routing<float, cpu> chosen(tokens, experts);
  std::vector<double> own, top_two;
  for (int run = 0; run < 21; ++run) {
    own.push_back(time_of(selector, logits, chosen));
    top_two.push_back(time_of(talpa::top_k<talpa::gate::renormalised>{.k = 2}, logits, chosen));
  }
  const auto median = [](std::vector<double>& times) {
    std::nth_element(times.begin(), times.begin() + 10, times.end());
    return 1e9 * times[10] / static_cast<double>(tokens);
  };
  std::printf("%.0f ns a token, top-2 takes %.0f\n", median(own), median(top_two));
}

}  // namespace

int main() {
  if (!obeys_the_laws({.margin = 1.5})) return 1;
  compare_with_top_two({.margin = 1.5});

  // The sign of its first number says which of two columns is added to a token's target.
  constexpr talpa::index tokens = 256, inputs = 8, outputs = 4;  // N, D, O
  talpa::context<cpu> ctx(1);
  talpa::generator random(3);
  auto base = talpa::linear{}.init<float, cpu>(inputs, outputs, random, "base.");
  base.freeze();
  matrix x(tokens, inputs), target(tokens, outputs);
  talpa::fill_normal(x.view(), 1.0, random);
  talpa::affine_forward(ctx, base, x, target.view());
  for (talpa::index n = 0; n < tokens; ++n) target(n, x(n, 0) > 0.0F ? 0 : 1) += x(n, 1);

  const talpa::mole_linear<talpa::router<talpa::linear_scorer, selector_type>, talpa::lora> layer{
      .router = {.selector = {.margin = 1.5}}, .expert = {.rank = 2, .alpha = 4.0}, .experts = 4};
  auto params = layer.init(std::move(base), random);
  matrix y(tokens, outputs), dy(tokens, outputs), value(1, 1), dvalue(1, 1);
  dvalue(0, 0) = 1.0F;
  float first = 0.0F;
  for (int step = 0; step <= 600; ++step) {
    const talpa::workspace<cpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, params, x, y, talpa::mode::training);
    talpa::ops::mse(ctx, y, target, value.view());
    if (step == 0) first = value(0, 0);
    if (step % 200 == 0) {
      const double active =
          talpa::statistics_report(talpa::measure(ctx, kept.routed)).active_experts();
      std::printf("step %3d  loss %.4f  %.2f experts a token\n", step, value(0, 0), active);
    }
    talpa::ops::mse_backward(ctx, y, target, dvalue, dy.view(), talpa::grad_mode::overwrite);
    layer.backward(ctx, params, kept, x, dy, {}, talpa::grad_mode::ignore);
    params.visit([&](talpa::parameter<float, cpu>& p) {
      if (!p.trainable()) return;
      talpa::ops::sgd_update(ctx, {.learning_rate = 0.5}, p.grad(), {}, p.value());
      talpa::ops::fill(ctx, 0.0F, p.grad());
    });
  }
  const bool learned = value(0, 0) < 0.1F * first;
  std::printf("the loss fell below a tenth of its start: %s\n", learned ? "yes" : "NO");
  return learned ? 0 : 1;
}
