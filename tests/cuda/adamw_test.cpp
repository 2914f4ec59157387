// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/adamw.hpp>
#include <talpa/cuda/adamw.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::cuda_adamw_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/adamw") {
  // betas whose powers are exact, so that counting by products and std::pow agree.
  TEST_CASE_TEMPLATE("steps counted by the host or by the device follow the double reference", T,
                     TALPA_SCALARS) {
    static_assert(ops::adamw_counts<device>);
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(61);
    adamw_numbers numbers{.learning_rate = 0.125,
                          .beta1 = 0.5,
                          .beta2 = 0.75,
                          .epsilon = 0x1p-20,
                          .weight_decay = 0.25};
    for (const index rows : {index{0}, index{1}, support::device_size(129, 2053)}) {
      for (const bool counted : {false, true}) {
        CAPTURE(rows);
        CAPTURE(counted);
        const matrix<T, cpu> zeros(rows, 5);
        on_device<T> w(support::random_matrix<T>(random, rows, 5)), m(zeros), v(zeros);
        matrix<double, cpu> wide = support::in_double(w.host()), first(rows, 5), second(rows, 5);
        matrix<double, cpu> ones(1, 2);
        ones(0, 0) = ones(0, 1) = 1.0;
        on_device<double> powers(ones);
        // Sums of the magnitudes that make up the mean gradient and the weight.
        support::table mean_size(rows, 5), size = support::to_table(w.host().view());
        for (double& s : size.values) s = std::abs(s);
        for (numbers.step = 1; numbers.step <= 3; ++numbers.step) {
          on_device<T> g(support::random_matrix<T>(random, rows, 5));
          const matrix<double, cpu> gradient = support::in_double(g.host());
          ops::adamw_update(host, numbers, gradient, first.view(), second.view(), wide.view());
          if (counted) {
            // The step of the host stands still, as in a graph that is replayed.
            adamw_numbers still = numbers;
            still.step = 1;
            ops::adamw_advance(ctx, still, powers.view());
            ops::adamw_update_counted(ctx, still, powers.view(), g.view(), m.view(), v.view(),
                                      w.view());
          } else {
            ops::adamw_update(ctx, numbers, g.view(), m.view(), v.view(), w.view());
          }
          const double step = static_cast<double>(numbers.step);
          for (index r = 0; r < rows; ++r) {
            for (index c = 0; c < 5; ++c) {
              mean_size(r, c) = 0.5 * mean_size(r, c) + 0.5 * std::abs(gradient(r, c));
              const double root = std::sqrt(second(r, c) / (1.0 - std::pow(0.75, step)));
              size(r, c) += 0.03125 * size(r, c) + 0.125 / (1.0 - std::pow(0.5, step)) *
                                                       mean_size(r, c) / (root + 0x1p-20);
            }
          }
        }
        ctx.synchronise();
        const auto within = [](const matrix<T, cpu>& found, const matrix<double, cpu>& expected,
                               double roundings, const support::table& sizes) {
          return support::difference(found.view(), support::to_table(expected.view()),
                                     support::each(sizes, [&](double s) {
                                       return support::rounding_bound<T>(roundings, s);
                                     }));
        };
        // A step takes three roundings on the longest path to m (the betas are exact) and four to
        // v; the weight takes those of m, half those of v, and ten of its own in every step.
        CHECK(within(m.now(), first, 9, mean_size) == "");
        CHECK(within(v.now(), second, 12, support::to_table(second.view())) == "");
        CHECK(within(w.now(), wide, 9 + 6 + 30, size) == "");
        CHECK(m.intact());
        CHECK(v.intact());
        CHECK(w.intact());
        const matrix<double, cpu> counts = powers.now();
        CHECK(counts(0, 0) == (counted ? 0.125 : 1.0));
        CHECK(counts(0, 1) == (counted ? 0.421875 : 1.0));
        CHECK(powers.intact());
      }
    }
  }
}

}  // namespace talpa::cuda_adamw_test
