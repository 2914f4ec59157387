// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/layer_subject.hpp>
#include <talpa/testing/report.hpp>
#include <talpa/testing/subject.hpp>
#include <talpa/testing/surroundings.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace talpa::testing {

/// What a layer promises beyond its declared members.
struct layer_claims {
  /// Sums of absolute terms of an output in units of the largest output for absolute values of
  /// tokens, weights and conditioning rows, which differs from such a sum by the experts that those
  /// tokens choose.
  double amplification = 8.0;
};

struct layer_sizes {
  index tokens = 7;
  index inputs = 5;
  /// Tokens for which the number of threads is changed: enough for products to be cut into tasks.
  index many_tokens = 1100;
  index sequence_length = 0;     ///< a divisor of both numbers of tokens; 0: one sequence
  index classes = 0;             ///< labels go round 0..classes - 1; 0: none
  index conditioning_rows = 0;   ///< rows of each sequence, some of them absent; 0: none
  index conditioning_width = 0;  ///< C
};

namespace detail {

template <floating T>
class layer_trial {
 public:
  /// The same layer twice: gradients are compared in double.
  layer_trial(const layer_subject<T>& layer, const layer_subject<double>& in_double,
              const layer_claims& claims, const layer_sizes& sizes, std::uint64_t seed)
      : layer_(layer), in_double_(in_double), claims_(claims), sizes_(sizes), random_(seed) {}

  report run() {
    overwrites();
    inference();
    modes();
    frozen();
    same_bits();
    gradients();
    return out_;
  }

 private:
  template <class U>
  parameter_bag<U> make() {
    parameter_bag<U> p = subject_in<U>(layer_, in_double_).init(random_);
    for (parameter<U, cpu>* q : parameters_of<U>(p)) {
      const matrix<U, cpu> noise = uneven<U>(q->rows(), q->cols(), random_, 0.25);
      for (index r = 0; r < q->rows(); ++r) {
        for (index c = 0; c < q->cols(); ++c) q->value()(r, c) += noise(r, c);
      }
    }
    return p;
  }

  template <class U>
  struct step {
    matrix<U, cpu> y, dx, drows;
    std::vector<std::uint32_t> masks;
  };
  template <class U>
  step<U> run_step(parameter_bag<U>& p, const matrix<U, cpu>& x, const matrix<U, cpu>& dy,
                   int threads = 1, grad_mode dx_mode = grad_mode::overwrite,
                   U dx_before = std::numeric_limits<U>::quiet_NaN(), int repetitions = 1,
                   const surroundings<U>* given = nullptr) {
    context<cpu> ctx(threads);
    generator noise(5);
    const surroundings<U> around = given != nullptr ? *given : surroundings<U>(sizes_, x.rows());
    step<U> s{matrix<U, cpu>(x.rows(), subject_in<U>(layer_, in_double_).output_width(p)),
              matrix<U, cpu>(x.rows(), x.cols()),
              matrix<U, cpu>(around.rows.rows(), around.rows.cols()),
              {}};
    poison<U>(s.y.view());
    std::fill_n(s.dx.data(), s.dx.size(), dx_before);
    const batch_info<U, cpu> batch = around.batch(s.drows, noise);
    const bool returned = subject_in<U>(layer_, in_double_)
                              .run(ctx, p, batch, x, s.y.view(), dy, s.dx.view(), dx_mode,
                                   dy.cols() == 0 ? 0 : repetitions, s.masks);
    returned_ = returned_ && returned;
    return s;
  }
  template <class U>
  matrix<U, cpu> tokens(index count) {
    return uneven<U>(count, sizes_.inputs, random_);
  }

  /// Roundings on the longest path from an input to an output: three products one behind the other,
  /// sums over rows or columns of a parameter, the gates' sum over experts, and 64 in softmax and
  /// activation.
  template <class U>
  static double roundings(parameter_bag<U>& p) {
    double most = 0.0;
    for (const parameter<U, cpu>* q : parameters_of<U>(p)) {
      most = std::max(most, static_cast<double>(q->rows() + q->cols()));
    }
    return 4.0 * most + 64.0;
  }
  /// Bound of the absolute terms of one output, see layer_claims, at least 1.
  template <class U>
  double magnitude(parameter_bag<U>& p, const matrix<U, cpu>& x) {
    const auto absolute = [](matrix_view<U, cpu> m) {
      for (index r = 0; r < m.rows; ++r) {
        for (index c = 0; c < m.cols; ++c) m(r, c) = std::abs(m(r, c));
      }
    };
    std::vector<matrix<U, cpu>> kept;
    for (parameter<U, cpu>* q : parameters_of<U>(p)) {
      kept.emplace_back(q->value());
      absolute(q->value());
    }
    matrix<U, cpu> tokens = x;
    absolute(tokens.view());
    surroundings<U> around(sizes_, x.rows());
    absolute(around.rows.view());
    const step<U> s =
        run_step<U>(p, tokens, matrix<U, cpu>(), 1, grad_mode::ignore, U{0}, 0, &around);
    std::size_t i = 0;
    for (parameter<U, cpu>* q : parameters_of<U>(p)) {
      for (index r = 0; r < q->rows(); ++r)
        std::copy_n(kept[i].view().row(r), q->cols(), q->value().row(r));
      ++i;
    }
    return claims_.amplification * std::max(1.0, largest(s.y.view()));
  }

  void overwrites() {
    law l(out_, "forward writes every output, backward hands its memory back, no tokens is legal");
    parameter_bag<T> p = make<T>();
    const index outputs = layer_.output_width(p);
    const step<T> s =
        run_step<T>(p, tokens<T>(sizes_.tokens), uneven<T>(sizes_.tokens, outputs, random_));
    for (index i = 0; i < s.y.size(); ++i) {
      l.expect(std::isfinite(s.y.data()[i]),
               [&] { return talpa::detail::concat("output ", std::to_string(i)); });
    }
    l.expect(returned_, [] { return std::string("backward kept memory"); });
    fill_gradients<T>(p, T{0.5});
    const auto before = gradients_of<T>(p);
    run_step<T>(p, matrix<T, cpu>(0, sizes_.inputs), matrix<T, cpu>(0, outputs));
    l.expect_none(first_difference(gradients_of<T>(p), before), "no tokens");
  }

  void inference() {
    law l(out_, "infer equals forward in mode::inference and keeps nothing");
    parameter_bag<T> p = make<T>();
    const matrix<T, cpu> x = tokens<T>(sizes_.tokens);
    const surroundings<T> around(sizes_, x.rows());
    generator noise(5);
    matrix<T, cpu> a(x.rows(), layer_.output_width(p)), b = a;
    matrix<T, cpu> drows(around.rows.rows(), around.rows.cols());
    context<cpu> ctx(1);
    const batch_info<T, cpu> batch = around.batch(drows, noise);
    layer_.run_inference(ctx, p, batch, x, a.view(), true);
    l.expect(ctx.memory.used() == 0 && ctx.scratch.used() == 0,
             [] { return std::string("memory is left in use"); });
    layer_.run_inference(ctx, p, batch, x, b.view(), false);
    l.expect_none(first_difference(a, b));
  }

  void modes() {
    law adds(out_, "backward adds to parameter gradients and keeps what forward saved");
    law told(out_, "backward overwrites, adds to or leaves out dx as it is told");
    parameter_bag<T> p = make<T>();
    const matrix<T, cpu> x = tokens<T>(sizes_.tokens);
    const matrix<T, cpu> dy = uneven<T>(x.rows(), layer_.output_width(p), random_);
    fill_gradients<T>(p, T{0});
    const step<T> once = run_step<T>(p, x, dy);
    const auto single = gradients_of<T>(p);
    fill_gradients<T>(p, T{0});
    const step<T> twice = run_step<T>(p, x, dy, 1, grad_mode::overwrite, T{0}, 2);
    const auto doubled = gradients_of<T>(p);
    adds.expect_none(testing::first_difference(twice.dx, once.dx), "dx of a second call");
    const double bound = gamma<T>(roundings<T>(p)) * magnitude<T>(p, x) *
                         std::max(1.0, largest(x.view())) * std::max(1.0, largest(dy.view()));
    for (std::size_t i = 0; i < single.size(); ++i) {
      for (index j = 0; j < single[i].size(); ++j) {
        const double one = 2.0 * static_cast<double>(single[i].data()[j]);
        adds.expect(std::abs(static_cast<double>(doubled[i].data()[j]) - one) <= bound, [&] {
          return talpa::detail::concat("parameter ", std::to_string(i), ", two calls");
        });
      }
    }
    const step<T> added = run_step<T>(p, x, dy, 1, grad_mode::accumulate, T{2});
    const step<T> ignored = run_step<T>(p, x, dy, 1, grad_mode::ignore, T{7});
    for (index i = 0; i < once.dx.size(); ++i) {
      const double sum = static_cast<double>(once.dx.data()[i]) + 2.0;
      told.expect(std::abs(static_cast<double>(added.dx.data()[i]) - sum) <= bound,
                  [] { return std::string("adding gives another sum"); });
      told.expect(ignored.dx.data()[i] == T{7},
                  [] { return std::string("ignored dx is written"); });
    }
  }

  void frozen() {
    law l(out_, "frozen parameters have no gradient storage and pass the same gradient on");
    parameter_bag<T> p = make<T>();
    const matrix<T, cpu> x = tokens<T>(sizes_.tokens);
    const matrix<T, cpu> dy = uneven<T>(x.rows(), layer_.output_width(p), random_);
    const step<T> trained = run_step<T>(p, x, dy);
    for (parameter<T, cpu>* q : parameters_of<T>(p)) q->freeze();
    const step<T> s = run_step<T>(p, x, dy);
    l.expect_none(testing::first_difference(s.dx, trained.dx));
    for (parameter<T, cpu>* q : parameters_of<T>(p)) {
      l.expect(q->grad().size() == 0, [&] { return q->name(); });
    }
  }

  void same_bits() {
    law l(out_, "any number of threads and any repetition gives the same bits");
    parameter_bag<T> p = make<T>();
    const matrix<T, cpu> x = tokens<T>(sizes_.many_tokens);
    const matrix<T, cpu> dy = uneven<T>(x.rows(), layer_.output_width(p), random_);
    fill_gradients<T>(p, T{0});
    const step<T> one = run_step<T>(p, x, dy);
    const auto gradients = gradients_of<T>(p);
    for (const int threads : {1, 2, 3}) {
      const std::string where = talpa::detail::concat(std::to_string(threads), " threads");
      fill_gradients<T>(p, T{0});
      const step<T> s = run_step<T>(p, x, dy, threads);
      l.expect_none(testing::first_difference(s.y, one.y), where + ", y");
      l.expect_none(testing::first_difference(s.dx, one.dx), where + ", dx");
      l.expect_none(testing::first_difference(s.drows, one.drows), where + ", conditioning");
      l.expect_none(first_difference(gradients_of<T>(p), gradients), where);
    }
  }

  void gradients() {
    parameter_bag<double> p = make<double>();
    matrix<double, cpu> x = tokens<double>(sizes_.tokens);
    const index outputs = in_double_.output_width(p);
    const matrix<double, cpu> upstream = cotangent(x.rows(), outputs, 3), none;
    surroundings<double> around(sizes_, x.rows());
    fill_gradients<double>(p, 0.0);
    step<double> s = run_step<double>(p, x, upstream, 1, grad_mode::overwrite, 0.0, 1, &around);
    std::vector<gradient_probe> probes{{"x", x.view(), s.dx.view()}};
    add_probes(p, probes);
    if (around.rows.size() > 0) {
      probes.push_back({"conditioning", around.rows.view(), s.drows.view()});
    }
    const double terms = static_cast<double>(x.rows() * outputs) * magnitude<double>(p, x);
    step<double> now;
    out_.add(gradient_check(
        "forward", probes, upstream, {.roundings = roundings<double>(p), .magnitude = terms},
        [&] {
          now = run_step<double>(p, x, none, 1, grad_mode::overwrite, 0.0, 1, &around);
          return now.y.view();
        },
        [&] { return now.masks; }));
  }

  const layer_subject<T>& layer_;
  const layer_subject<double>& in_double_;
  layer_claims claims_;
  layer_sizes sizes_;
  generator random_;
  bool returned_ = true;
  report out_;
};

}  // namespace detail

/// Laws of a layer in scalar T, on the CPU. `init.template operator()<U>(generator)` makes its
/// params in scalar U, as a lambda `[&]<class U>(generator& random) { ... }` does.
///
/// Forward writes every output; infer equals forward in mode::inference and keeps nothing; backward
/// overwrites, adds to or leaves out dx as it is told, adds to parameter gradients and hands its
/// memory back; frozen parameters have no gradient storage and pass gradients on; any number of
/// threads gives the same bits; no tokens is legal; gradients of x, of every parameter and of
/// conditioning rows equal central differences in double at points where no selection changes: the
/// masks of saved.routed, saved.base.routed and saved.placement.routing, where there are such.
template <floating T, class Layer, class Init>
report layer_laws(const Layer& layer, const Init& init, const layer_claims& claims = {},
                  const layer_sizes& sizes = {}, std::uint64_t seed = 1) {
  const detail::layer_model<T, Layer, Init> subject(layer, init);
  const detail::layer_model<double, Layer, Init> in_double(layer, init);
  return detail::layer_trial<T>(subject, in_double, claims, sizes, seed).run();
}

}  // namespace talpa::testing
