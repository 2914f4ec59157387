// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/scorers/explain.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/parameters.hpp>
#include <talpa/testing/report.hpp>
#include <talpa/testing/scorer_subject.hpp>
#include <talpa/testing/subject.hpp>
#include <talpa/testing/surroundings.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace talpa::testing {

/// What a scorer promises beyond its declared members.
struct scorer_claims {
  /// A token's scores depend on its own row of x alone.
  bool own_row = true;
  /// Scores depend on x at all.
  bool reads_tokens = true;
  /// Rounding errors of the scores in units of gamma(D + E + 8) times N E (D + 1) times the largest
  /// input times the largest weight, each at least 1: more than enough for one linear map.
  double amplification = 1.0;
};

struct scorer_sizes {
  index tokens = 9;
  index inputs = 7;
  index experts = 5;
  /// For scorers that look beyond the token. A length must divide `tokens` and 1100.
  index sequence_length = 0;     ///< of the batch; 0: one sequence
  index classes = 0;             ///< labels go round 0..classes - 1; 0: none
  index conditioning_rows = 0;   ///< rows of each sequence, some of them absent; 0: none
  index conditioning_width = 0;  ///< C
};

namespace detail {

template <floating T>
class scorer_trial {
 public:
  /// The same scorer twice: gradients are compared in double.
  scorer_trial(const scorer_subject<T>& scorer, const scorer_subject<double>& in_double,
               const scorer_claims& claims, const scorer_sizes& sizes, std::uint64_t seed)
      : scorer_(scorer), in_double_(in_double), claims_(claims), sizes_(sizes), random_(seed) {}

  report run() {
    initialisation_laws<T>(out_, [&](generator& random, const std::string& prefix) {
      return scorer_.init(sizes_.inputs, sizes_.experts, random, prefix);
    });
    overwrites();
    own_row();
    reads_tokens();
    same_bits();
    rule_of_signs();
    frozen();
    gradients();
    return out_;
  }

 private:
  template <class U>
  using params = parameter_bag<U>;

  template <class U>
  params<U> make() {
    params<U> p =
        subject_in<U>(scorer_, in_double_).init(sizes_.inputs, sizes_.experts, random_, "");
    shake<U>(p, random_, 0.25);
    return p;
  }

  /// One forward and, unless dlogits is empty, one backward.
  template <class U>
  struct step {
    matrix<U, cpu> logits;
    matrix<U, cpu> dx;
    matrix<U, cpu> dconditioning;
  };

  template <class U>
  step<U> run_step(params<U>& p, const matrix<U, cpu>& x, const matrix<U, cpu>& dlogits,
                   int threads = 1, grad_mode dx_mode = grad_mode::overwrite,
                   U dx_before = std::numeric_limits<U>::quiet_NaN(), int repetitions = 1,
                   const surroundings<U>* given = nullptr) {
    context<cpu> ctx(threads);
    // Noise, where the scorer draws any, is the same in every step.
    generator noise(5);
    const surroundings<U> around = given != nullptr ? *given : surroundings<U>(sizes_, x.rows());
    step<U> s{matrix<U, cpu>(x.rows(), sizes_.experts), matrix<U, cpu>(x.rows(), x.cols()),
              matrix<U, cpu>(around.rows.rows(), around.rows.cols())};
    const batch_info<U, cpu> batch = around.batch(s.dconditioning, noise);
    poison<U>(s.logits.view());
    std::fill_n(s.dx.data(), s.dx.size(), dx_before);
    const bool returned = subject_in<U>(scorer_, in_double_)
                              .run(ctx, p, batch, x, s.logits.view(), dlogits, s.dx.view(), dx_mode,
                                   dlogits.cols() == 0 ? 0 : repetitions);
    returned_ = returned_ && returned;
    return s;
  }

  void overwrites() {
    law l(out_, "forward writes every score, backward hands its memory back, no tokens is legal");
    params<T> p = make<T>();
    const matrix<T, cpu> x = uneven<T>(sizes_.tokens, sizes_.inputs, random_);
    const matrix<T, cpu> dlogits = uneven<T>(sizes_.tokens, sizes_.experts, random_);
    const step<T> s = run_step<T>(p, x, dlogits);
    for (index i = 0; i < s.logits.size(); ++i) {
      l.expect(std::isfinite(s.logits.data()[i]), [&] {
        return talpa::detail::concat("score ", std::to_string(i), " is ",
                                     digits(static_cast<double>(s.logits.data()[i])));
      });
    }
    l.expect(returned_, [] { return std::string("backward kept memory"); });
    const matrix<T, cpu> nothing(0, sizes_.inputs), no_scores(0, sizes_.experts);
    fill_gradients<T>(p, T{0.5});
    const auto before = gradients_of<T>(p);
    run_step<T>(p, nothing, no_scores);
    l.expect_none(first_difference(gradients_of<T>(p), before), "no tokens");
  }

  void reads_tokens() {
    if (claims_.reads_tokens) return;
    law l(out_, "scores do not depend on the tokens, which get a gradient of zero");
    params<T> p = make<T>();
    const matrix<T, cpu> x = uneven<T>(sizes_.tokens, sizes_.inputs, random_);
    const matrix<T, cpu> other = uneven<T>(sizes_.tokens, sizes_.inputs, random_);
    const matrix<T, cpu> dlogits = uneven<T>(sizes_.tokens, sizes_.experts, random_);
    const step<T> a = run_step<T>(p, x, dlogits), b = run_step<T>(p, other, dlogits);
    l.expect_none(testing::first_difference(a.logits, b.logits));
    l.expect(largest(a.dx.view()) == 0.0, [] { return std::string("dx is not zero"); });
  }

  void own_row() {
    if (!claims_.own_row) return;
    law l(out_, "a token's scores depend on its own input alone");
    params<T> p = make<T>();
    const matrix<T, cpu> x = uneven<T>(sizes_.tokens, sizes_.inputs, random_);
    const matrix<T, cpu> none;
    const step<T> all = run_step<T>(p, x, none);
    for (index changed = 0; changed < x.rows(); ++changed) {
      matrix<T, cpu> moved = x;
      for (index d = 0; d < x.cols(); ++d) moved(changed, d) += T{3};
      const step<T> s = run_step<T>(p, moved, none);
      for (index n = 0; n < x.rows(); ++n) {
        if (n == changed) continue;
        l.expect_none(testing::first_difference<T>(s.logits.view().row_range(n, 1),
                                                   all.logits.view().row_range(n, 1), n),
                      talpa::detail::concat("when token ", std::to_string(changed), " changes"));
      }
    }
  }

  void same_bits() {
    law l(out_, "any number of threads and any repetition gives the same bits");
    // Enough tokens for a product to be cut into tasks.
    const index tokens = 1100;
    const matrix<T, cpu> x = uneven<T>(tokens, sizes_.inputs, random_);
    const matrix<T, cpu> dlogits = uneven<T>(tokens, sizes_.experts, random_);
    params<T> p = make<T>();
    const auto compute = [&](int threads) {
      fill_gradients<T>(p, T{0});
      return run_step<T>(p, x, dlogits, threads);
    };
    const step<T> one = compute(1);
    const auto gradients = gradients_of<T>(p);
    for (const int threads : {1, 2, 3}) {
      const std::string where = talpa::detail::concat(std::to_string(threads), " threads");
      const step<T> s = compute(threads);
      l.expect_none(testing::first_difference(s.logits, one.logits), where);
      l.expect_none(testing::first_difference(s.dx, one.dx), where);
      l.expect_none(testing::first_difference(s.dconditioning, one.dconditioning), where);
      l.expect_none(first_difference(gradients_of<T>(p), gradients), where);
    }
  }

  void rule_of_signs() {
    law adds(out_, "backward adds to parameter gradients and keeps what forward saved");
    law modes(out_, "backward overwrites, adds to or leaves out dx as it is told");
    const matrix<T, cpu> x = uneven<T>(sizes_.tokens, sizes_.inputs, random_);
    const matrix<T, cpu> dlogits = uneven<T>(sizes_.tokens, sizes_.experts, random_);
    const matrix<T, cpu> nothing(sizes_.tokens, sizes_.experts);
    params<T> p = make<T>();
    fill_gradients<T>(p, T{0.375});
    const auto before = gradients_of<T>(p);
    const step<T> still = run_step<T>(p, x, nothing, 1, grad_mode::accumulate, T{0.375});
    adds.expect_none(first_difference(gradients_of<T>(p), before), "no upstream gradient");
    for (index i = 0; i < still.dx.size(); ++i) {
      modes.expect(still.dx.data()[i] == T{0.375},
                   [] { return std::string("adding zero changes dx"); });
    }

    // Twice in a row, from the same saved values, is twice the gradient.
    fill_gradients<T>(p, T{0});
    const step<T> once = run_step<T>(p, x, dlogits);
    const auto single = gradients_of<T>(p);
    fill_gradients<T>(p, T{0});
    const step<T> again = run_step<T>(p, x, dlogits, 1, grad_mode::overwrite, T{0}, 2);
    const auto twice = gradients_of<T>(p);
    adds.expect_none(testing::first_difference(again.dx, once.dx), "dx of a second call");
    for (std::size_t i = 0; i < single.size(); ++i) {
      const double bound = value_bound<T>(x, p, dlogits);
      matrix<T, cpu> expected = single[i];
      for (index j = 0; j < expected.size(); ++j) expected.data()[j] *= T{2};
      adds.expect_none(
          first_excess(twice[i].view(), expected.view(), [&](index, index) { return 2.0 * bound; }),
          talpa::detail::concat("parameter ", std::to_string(i), ", two calls"));
    }

    const step<T> added = run_step<T>(p, x, dlogits, 1, grad_mode::accumulate, T{2});
    const double bound = value_bound<T>(x, p, dlogits) + gamma<T>(2.0) * 2.0;
    matrix<T, cpu> sum = once.dx;
    for (index i = 0; i < sum.size(); ++i) sum.data()[i] += T{2};
    modes.expect_none(
        first_excess(added.dx.view(), sum.view(), [&](index, index) { return bound; }),
        "accumulate");
    const step<T> ignored = run_step<T>(p, x, dlogits, 1, grad_mode::ignore, T{7});
    for (index i = 0; i < ignored.dx.size(); ++i) {
      modes.expect(ignored.dx.data()[i] == T{7},
                   [] { return std::string("ignored dx is written"); });
    }
  }
  /// Bound of the rounding error of one element of a result, see scorer_claims.
  template <class U>
  double value_bound(const matrix<U, cpu>& x, params<U>& p, const matrix<U, cpu>& dlogits) const {
    const double terms = static_cast<double>(sizes_.inputs + sizes_.experts + x.rows());
    return claims_.amplification * gamma<U>(terms + 8.0) * terms *
           std::max(1.0, largest(x.view())) * std::max(1.0, largest_weight<U>(p)) *
           std::max(1.0, largest(dlogits.view()));
  }

  void frozen() {
    law l(out_, "frozen parameters have no gradient storage and pass the same gradient on");
    const matrix<T, cpu> x = uneven<T>(sizes_.tokens, sizes_.inputs, random_);
    const matrix<T, cpu> dlogits = uneven<T>(sizes_.tokens, sizes_.experts, random_);
    params<T> p = make<T>();
    const step<T> trained = run_step<T>(p, x, dlogits);
    for (parameter<T, cpu>* q : parameters_of<T>(p)) q->freeze();
    const step<T> s = run_step<T>(p, x, dlogits);
    l.expect_none(testing::first_difference(s.dx, trained.dx));
    for (parameter<T, cpu>* q : parameters_of<T>(p)) {
      l.expect(q->trained_size() == 0 && q->grad().size() == 0, [&] { return q->name(); });
    }
  }

  void gradients() {
    params<double> p = make<double>();
    matrix<double, cpu> x = uneven<double>(sizes_.tokens, sizes_.inputs, random_);
    const matrix<double, cpu> upstream = cotangent(sizes_.tokens, sizes_.experts, 3);
    fill_gradients<double>(p, 0.0);
    step<double> s = run_step<double>(p, x, upstream);
    surroundings<double> around(sizes_, sizes_.tokens);
    std::vector<gradient_probe> probes{{"x", x.view(), s.dx.view()}};
    add_probes(p, probes);
    if (around.rows.size() > 0) {
      probes.push_back({"conditioning", around.rows.view(), s.dconditioning.view()});
    }
    matrix<double, cpu> logits;
    const matrix<double, cpu> none;
    const double d = static_cast<double>(sizes_.inputs), e = static_cast<double>(sizes_.experts);
    const gradient_accuracy accuracy{.roundings = claims_.amplification * (d + e + 8.0),
                                     .magnitude = static_cast<double>(sizes_.tokens) * e *
                                                  (d + 1.0) * std::max(1.0, largest(x.view())) *
                                                  std::max(1.0, largest_weight<double>(p))};
    out_.add(gradient_check(
        "forward", probes, upstream, accuracy,
        [&] {
          logits = run_step<double>(p, x, none, 1, grad_mode::overwrite, 0.0, 1, &around).logits;
          return logits.view();
        },
        [] { return 0; }));
  }

  const scorer_subject<T>& scorer_;
  const scorer_subject<double>& in_double_;
  scorer_claims claims_;
  scorer_sizes sizes_;
  generator random_;
  bool returned_ = true;
  report out_;
};

}  // namespace detail

/// Laws of a scorer in scalar T, on the CPU.
///
/// Initialisation depends on the generator alone; forward writes every score and a token's scores
/// depend on its own input; any number of threads and any repetition gives the same bits; backward
/// overwrites, adds to or leaves out dx as it is told and adds to parameter gradients; frozen
/// parameters have no gradient storage and pass gradients on; gradients of x, of every parameter
/// and of conditioning rows equal central differences in double. `sizes` says what the batch has
/// beside its tokens.
template <floating T, class Scorer>
report scorer_laws(const Scorer& scorer, const scorer_claims& claims = {},
                   const scorer_sizes& sizes = {}, std::uint64_t seed = 1) {
  static_assert(talpa::detail::explain_scorer<Scorer>());
  const detail::scorer_model<T, Scorer> subject(scorer);
  const detail::scorer_model<double, Scorer> in_double(scorer);
  return detail::scorer_trial<T>(subject, in_double, claims, sizes, seed).run();
}

}  // namespace talpa::testing
