// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/item.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/optim/clip.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace talpa::clip_test {

namespace {

template <class T>
parameter<T, cpu> with_grad(const char* name, const matrix<T, cpu>& grad) {
  parameter<T, cpu> p(name, matrix<T, cpu>(grad.rows(), grad.cols()));
  for (index i = 0; i < grad.size(); ++i) p.grad().data[i] = grad.data()[i];
  return p;
}

}  // namespace

TEST_SUITE("optim/clip") {
  TEST_CASE("clip_gradients scales a gradient of norm five to norm one") {
    context<cpu> ctx(1);
    matrix<double, cpu> three(1, 1), four(1, 1);
    three(0, 0) = 3.0;
    four(0, 0) = -4.0;
    auto a = with_grad("a", three), b = with_grad("b", four), frozen = with_grad("f", four);
    frozen.freeze();
    const std::vector<parameter<double, cpu>*> all{&a, &frozen, &b};
    const std::span<parameter<double, cpu>* const> span(all);
    CHECK(clip_gradients(ctx, span, 5.0) == 5.0);
    CHECK(a.grad()(0, 0) == 3.0);
    CHECK(clip_gradients(ctx, span, std::numeric_limits<double>::infinity()) == 5.0);
    CHECK(b.grad()(0, 0) == -4.0);
    CHECK(clip_gradients(ctx, span, 2.5) == 5.0);
    CHECK(a.grad()(0, 0) == 1.5);
    CHECK(b.grad()(0, 0) == -2.0);
    CHECK(ctx.scratch.used() == 0);
  }

  TEST_CASE_TEMPLATE("the norm agrees with the reference and has the same bits for any threads", T,
                     TALPA_SCALARS) {
    support::test_random random(40);
    const matrix<T, cpu> ga = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> gb = support::random_matrix<T>(random, 3, 9);
    double squares = 0.0;
    for (const matrix<T, cpu>* g : {&ga, &gb}) {
      for (const double v : support::to_table(g->view()).values) squares += v * v;
    }
    const double expected = std::sqrt(squares);
    T first{0};
    std::vector<T> first_clipped;
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      auto a = with_grad("a", ga), b = with_grad("b", gb);
      const std::vector<parameter<T, cpu>*> all{&a, &b};
      const T norm = clip_gradients(ctx, std::span<parameter<T, cpu>* const>(all), T{1});
      if (threads == 1) first = norm;
      CHECK(norm == first);
      // Half the relative error of the sum, and the rounding of the root.
      CHECK(support::within(static_cast<double>(norm), expected,
                            support::sum_bound<T>(ga.size() + gb.size() + 2, expected)));
      support::table clipped =
          support::each(support::to_table(ga.view()), [&](double g) { return g / expected; });
      const support::table bounds = support::each(clipped, [&](double g) {
        return support::rounding_bound<T>(static_cast<double>(ga.size() + gb.size()) + 4.0, g);
      });
      CHECK(support::difference(std::as_const(a).grad(), clipped, bounds) == "");
    }
  }

  TEST_CASE_TEMPLATE("a norm that is not finite is returned and changes nothing", T,
                     TALPA_SCALARS) {
    context<cpu> ctx(1);
    for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                        std::numeric_limits<T>::max()}) {
      matrix<T, cpu> g(1, 2);
      g(0, 0) = bad;
      g(0, 1) = T{7};
      auto p = with_grad("p", g);
      const std::vector<parameter<T, cpu>*> all{&p};
      const T norm = clip_gradients(ctx, std::span<parameter<T, cpu>* const>(all), T{1});
      CHECK(!std::isfinite(norm));
      CHECK(p.grad()(0, 1) == T{7});
    }
  }

  TEST_CASE("clip_gradients of nothing is zero and wants a norm above zero") {
    context<cpu> ctx(1);
    const std::span<parameter<float, cpu>* const> nothing;
    CHECK(clip_gradients(ctx, nothing, 1.0f) == 0.0f);
    CHECK_THROWS_WITH_AS(clip_gradients(ctx, nothing, 0.0f),
                         "talpa::clip_gradients: 'max_norm' is 0, expected a number > 0",
                         value_error);
    CHECK_THROWS_AS(clip_gradients(ctx, nothing, std::numeric_limits<float>::quiet_NaN()),
                    value_error);
  }
}

}  // namespace talpa::clip_test
