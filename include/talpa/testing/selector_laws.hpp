// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/explain.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/report.hpp>
#include <talpa/testing/selector_subject.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace talpa::testing {

/// What a selector promises beyond its declared members.
struct selector_claims {
  /// Adding a constant to a row of logits changes neither selection nor gates.
  bool shift_invariant = true;
  /// Permuting the experts permutes the result.
  bool permutable = true;
  /// Fewest experts of a real token.
  index min_selected = 1;
  /// Relative error of a gate in units of gamma(2 E + 8): 1 for quotients of sums of exponentials.
  double amplification = 1.0;
  /// Errors of a gate are relative to no less than this: the size of what a gate that is a
  /// difference is a difference of.
  double gate_floor = 0.0;
  /// Largest derivative of a gate by a logit or by the control, at least 1.
  double slope = 1.0;
  /// Gates do not move with the logits as long as the selection stays: every gradient is zero.
  bool constant_gates = false;
  /// select_backward is the derivative of the gates, and not a substitute for it.
  bool derivative = true;
  /// Range of the controls to try, for a selector with a control.
  double control_low = -2.0, control_high = 2.0;
  /// Range of the biases to try, for a selector with a bias: multiples of logit_grid.
  double bias_size = 0.25;
};

namespace detail {

template <floating T>
class selector_trial {
 public:
  /// The same selector thrice: gradients are compared in double, and so is the precision.
  selector_trial(const selector_ops<T>& selector, const selector_lanes<T>& lanes,
                 const selector_ops<double>& in_double, const selector_facts& facts, index experts,
                 const selector_claims& claims, index tokens, std::uint64_t seed)
      : selector_(selector),
        lanes_(lanes),
        in_double_(in_double),
        facts_(facts),
        experts_(experts),
        claims_(claims),
        random_(seed),
        logits_(separated_logits<T>(tokens, experts, random_)),
        mask_(random_mask(tokens, experts, 0.5, random_)),
        dgates_(uneven<T>(tokens, experts, random_)),
        control_(facts.controlled ? tokens : 0, 1),
        bias_(facts.biased ? 1 : 0, experts) {
    const random_stream control = random_.next(), bias = random_.next();
    for (index n = 0; n < control_.rows(); ++n) {
      const double share = uniform<double>(control, static_cast<std::uint64_t>(n));
      // Exact in float, so that float and double try the same.
      control_(n, 0) = static_cast<float>(claims_.control_low +
                                          share * (claims_.control_high - claims_.control_low));
    }
    const auto steps = static_cast<std::uint64_t>(2.0 * claims_.bias_size / logit_grid) + 1;
    for (index e = 0; e < bias_.size(); ++e) {
      const auto step = uniform_index(bias, static_cast<std::uint64_t>(e), steps);
      bias_.data()[e] = static_cast<double>(step) * logit_grid - claims_.bias_size;
    }
    chosen_ = select(logits_);
  }

  report run() {
    gates_fit_mask();
    support();
    mass();
    shift();
    permutation_of_experts();
    if (!facts_.coupled) own_row();
    groups();
    threads();
    own_mask();
    padding();
    backward_reads_only_gates_that_are_on();
    backward_sums_to_zero();
    gradients();
    no_tokens();
    masked_experts();
    invalid_rows();
    checked_context();
    strided_views();
    precision();
    return out_;
  }

 private:
  using logit_matrix = matrix<T, cpu>;
  using mask_matrix = matrix<std::uint32_t, cpu>;
  using gradient = selection_gradient<T>;
  static constexpr T infinity = std::numeric_limits<T>::infinity();

  static std::string text(index n) { return std::to_string(n); }
  /// Two results that differ by the order of their sums only.
  double gate_bound(double gate) const {
    const double roundings = 2.0 * static_cast<double>(experts_) + 8.0;
    return 2.0 * claims_.amplification * gamma<T>(roundings) *
               std::max(std::abs(gate), claims_.gate_floor) +
           static_cast<double>(experts_) *
               static_cast<double>(std::numeric_limits<T>::denorm_min());
  }
  /// The same for dlogits: p (dg - sum of p dg), both terms at most max |dg| in size.
  double gradient_bound(double largest_dgate) const {
    const double roundings = 4.0 * static_cast<double>(experts_) + 16.0;
    return 4.0 * claims_.amplification * claims_.slope * gamma<T>(roundings) * largest_dgate;
  }

  /// Control and bias of rows first, first + 1, ..., beginning anew behind the last.
  template <class U>
  struct sides {
    sides(const selector_trial& trial, index rows, index first = 0)
        : controlled(trial.facts_.controlled),
          biased(trial.facts_.biased),
          control(controlled ? rows : 0, 1),
          bias(trial.bias_.rows(), trial.experts_) {
      for (index n = 0; n < control.rows(); ++n) {
        control(n, 0) = static_cast<U>(trial.control_((first + n) % trial.control_.rows(), 0));
      }
      for (index i = 0; i < bias.size(); ++i)
        bias.data()[i] = static_cast<U>(trial.bias_.data()[i]);
    }
    select_inputs<U, cpu> view() const {
      select_inputs<U, cpu> more;
      if (controlled) more.control = control.view();
      if (biased) more.bias = bias.view();
      return more;
    }
    bool controlled, biased;
    matrix<U, cpu> control;  // [rows, 1]
    matrix<U, cpu> bias;     // [1, E]
  };

  routing<T, cpu> select(const logit_matrix& logits, int threads = 1,
                         vector_view<const std::uint8_t, cpu> padding = {}) const {
    context<cpu> ctx(threads);
    routing<T, cpu> r(logits.rows(), logits.cols());
    poison<T>(r.gates.view());
    std::fill_n(r.mask.data(), r.mask.size(), ~0u);
    const sides<T> beside(*this, logits.rows());
    selector_.select(ctx, logits, padding, r.gates.view(), r.mask.view(), beside.view());
    return r;
  }
  logit_matrix replay(const logit_matrix& logits, const mask_matrix& mask, int threads = 1,
                      vector_view<const std::uint8_t, cpu> padding = {}) const {
    context<cpu> ctx(threads);
    logit_matrix gates(logits.rows(), logits.cols());
    mask_matrix copy = mask;
    poison<T>(gates.view());
    const sides<T> beside(*this, logits.rows());
    selector_.replay(ctx, logits, padding, copy.view(), gates.view(), beside.view());
    return gates;
  }
  gradient backward(const logit_matrix& logits, const routing<T, cpu>& r,
                    const logit_matrix& dgates, int threads = 1) const {
    context<cpu> ctx(threads);
    const sides<T> beside(*this, logits.rows());
    gradient g{logit_matrix(logits.rows(), logits.cols()), logit_matrix(beside.control.rows(), 1)};
    poison<T>(g.dlogits.view());
    poison<T>(g.dcontrol.view());
    selector_.select_backward(ctx, logits, r.gates.view(), r.mask.view(), dgates, g.dlogits.view(),
                              beside.view(), g.dcontrol.view());
    return g;
  }
  index selected(const routing<T, cpu>& r, index n) const {
    index count = 0;
    for (index e = 0; e < experts_; ++e) count += bit(r.mask.view(), n, e) ? 1 : 0;
    return count;
  }
  static std::string difference(const routing<T, cpu>& a, const routing<T, cpu>& b) {
    std::string gates = first_difference(a.gates, b.gates);
    if (!gates.empty()) return talpa::detail::concat("gates: ", gates);
    std::string mask = first_difference(a.mask, b.mask);
    return mask.empty() ? mask : talpa::detail::concat("mask: ", mask);
  }
  static std::string difference(const gradient& a, const gradient& b) {
    std::string logits = first_difference(a.dlogits, b.dlogits);
    if (!logits.empty()) return talpa::detail::concat("dlogits: ", logits);
    std::string control = first_difference(a.dcontrol, b.dcontrol);
    return control.empty() ? control : talpa::detail::concat("dcontrol: ", control);
  }
  static logit_matrix row_of(const logit_matrix& m, index n) {
    return logit_matrix(m.view().row_range(n, 1));
  }

  void gates_fit_mask() {
    law l(out_, "gates are finite, not negative, and zero where the mask is off");
    for (index n = 0; n < logits_.rows(); ++n) {
      for (index e = 0; e < mask_words(experts_) * mask_word_bits; ++e) {
        const bool on = bit(chosen_.mask.view(), n, e);
        const double g = e < experts_ ? static_cast<double>(chosen_.gates(n, e)) : 0.0;
        l.expect(e < experts_ ? std::isfinite(g) && g >= 0.0 && (on || g == 0.0) : !on, [&] {
          return talpa::detail::concat("token ", text(n), ", expert ", text(e), ", ",
                                       on ? "on" : "off", ", gate ", digits(g));
        });
      }
    }
  }

  void support() {
    law l(out_, "every token gets min_selected to max_selected experts");
    for (index n = 0; n < logits_.rows(); ++n) {
      const index count = selected(chosen_, n), most = facts_.max_selected;
      l.expect(count >= claims_.min_selected && count <= most && most <= experts_, [&] {
        return talpa::detail::concat("token ", text(n), " has ", text(count), ", expected ",
                                     text(claims_.min_selected), "..", text(most));
      });
    }
  }

  void mass() {
    if (!facts_.unit_mass) return;
    law l(out_, "the gates of a token sum to one, as unit_mass says");
    // E additions and a division on the way to each gate.
    const double bound = claims_.amplification * gamma<T>(static_cast<double>(experts_) + 2.0) +
                         static_cast<double>(experts_) * gamma<double>(1.0);
    for (index n = 0; n < logits_.rows(); ++n) {
      double sum = 0.0;
      for (index e = 0; e < experts_; ++e) sum += static_cast<double>(chosen_.gates(n, e));
      l.expect(std::abs(sum - 1.0) <= bound, [&] {
        return talpa::detail::concat("token ", text(n), " has ", digits(sum), ", bound ",
                                     digits(bound));
      });
    }
  }

  void shift() {
    if (!claims_.shift_invariant) return;
    law l(out_, "adding a constant to the logits of a token changes nothing");
    // Whole numbers this small are added without rounding: see separated_logits.
    for (const double constant : {-3.0, 64.0}) {
      logit_matrix moved = logits_;
      for (index i = 0; i < moved.size(); ++i) moved.data()[i] += static_cast<T>(constant);
      const routing<T, cpu> r = select(moved);
      l.expect_none(first_difference(r.mask, chosen_.mask),
                    talpa::detail::concat("mask, constant ", digits(constant)));
      l.expect_none(first_excess(r.gates.view(), chosen_.gates.view(),
                                 [&](index n, index e) {
                                   return gate_bound(static_cast<double>(chosen_.gates(n, e)));
                                 }),
                    talpa::detail::concat("gates, constant ", digits(constant)));
    }
  }

  void permutation_of_experts() {
    if (!claims_.permutable) return;
    law l(out_, "permuting the experts permutes the result");
    const std::vector<index> to = permutation(experts_, random_);
    const auto permuted = [&](const logit_matrix& m) {
      logit_matrix p(m.rows(), m.cols());
      for (index n = 0; n < m.rows(); ++n) {
        for (index e = 0; e < m.cols(); ++e) p(n, to[static_cast<std::size_t>(e)]) = m(n, e);
      }
      return p;
    };
    const logit_matrix logits = permuted(logits_);
    const gradient here_unpermuted = backward(logits_, chosen_, dgates_);
    const matrix<double, cpu> bias = bias_;
    for (index e = 0; e < bias_.size(); ++e) {
      bias_.data()[to[static_cast<std::size_t>(e)]] = bias.data()[e];
    }
    const routing<T, cpu> r = select(logits);
    for (index n = 0; n < logits_.rows(); ++n) {
      for (index e = 0; e < experts_; ++e) {
        l.expect(
            bit(r.mask.view(), n, to[static_cast<std::size_t>(e)]) ==
                bit(chosen_.mask.view(), n, e),
            [&] { return talpa::detail::concat("mask of token ", text(n), ", expert ", text(e)); });
      }
    }
    const logit_matrix gates = permuted(chosen_.gates);
    l.expect_none(first_excess(r.gates.view(), gates.view(),
                               [&](index n, index e) {
                                 return gate_bound(static_cast<double>(gates(n, e)));
                               }),
                  "gates");
    const double bound = gradient_bound(largest(dgates_.view()));
    const gradient there = backward(logits, r, permuted(dgates_));
    bias_ = bias;
    const logit_matrix here = permuted(here_unpermuted.dlogits);
    l.expect_none(
        first_excess(there.dlogits.view(), here.view(), [&](index, index) { return bound; }),
        "dlogits");
    l.expect_none(first_excess(there.dcontrol.view(), here_unpermuted.dcontrol.view(),
                               [&](index, index) { return bound; }),
                  "dcontrol");
  }

  void own_row() {
    law l(out_, "a token's result depends on its own logits alone");
    const logit_matrix dlogits = backward(logits_, chosen_, dgates_).dlogits;
    for (index changed = 0; changed < logits_.rows(); changed += 5) {
      logit_matrix logits = logits_;
      for (index e = 0; e < experts_; ++e) {
        logits(changed, e) = changed % 2 == 0 ? -logits_(changed, e) : infinity;
      }
      const routing<T, cpu> r = select(logits);
      const logit_matrix changed_gradient = backward(logits, r, dgates_).dlogits;
      for (index n = 0; n < logits_.rows(); ++n) {
        if (n == changed) continue;
        const std::string where =
            talpa::detail::concat("token ", text(n), " when ", text(changed), " changes");
        l.expect_none(first_difference<T>(r.gates.view().row_range(n, 1),
                                          chosen_.gates.view().row_range(n, 1), n),
                      where);
        l.expect_none(first_difference<std::uint32_t>(r.mask.view().row_range(n, 1),
                                                      chosen_.mask.view().row_range(n, 1), n),
                      where);
        l.expect_none(first_difference<T>(changed_gradient.view().row_range(n, 1),
                                          dlogits.view().row_range(n, 1), n),
                      where);
      }
    }
  }

  void group(law& l, lane_group g, const logit_matrix& logits) {
    const char* const name = name_of(g);
    const routing<T, cpu> reference = select(logits);
    const sides<T> beside(*this, logits.rows());
    if (!facts_.coupled) {
      l.expect_none(difference(lanes_.select_on(g, logits, beside.view()), reference),
                    talpa::detail::concat("select on ", name));
    }
    l.expect_none(
        first_difference(lanes_.replay_on(g, logits, mask_, beside.view()), replay(logits, mask_)),
        talpa::detail::concat("replay on ", name));
    const gradient expected = backward(logits, reference, dgates_);
    l.expect_none(
        difference(lanes_.select_backward_on(g, logits, reference, dgates_, beside.view()),
                   expected),
        talpa::detail::concat("select_backward on ", name));
    l.expect_none(difference(backward(logits, reference, dgates_), expected),
                  "select_backward, second call");
  }

  void groups() {
    law l(out_, "every lane group and every repetition gives the same bits");
    // Logits with ties, masked experts and rows that are not valid come through as well.
    logit_matrix hard = logits_;
    for (index n = 0; n < hard.rows(); ++n) {
      for (index e = 0; e < experts_; ++e) {
        if ((n + e) % 3 == 0) hard(n, e) = T{1};
        if (n % 4 == 1 && e % 2 == 0) hard(n, e) = -infinity;
      }
      if (n % 9 == 5) hard(n, n % experts_) = std::numeric_limits<T>::quiet_NaN();
    }
    for (const logit_matrix* logits : {&logits_, &hard}) {
      for (const lane_group g : lane_groups<T>) group(l, g, *logits);
    }
  }

  void threads() {
    law l(out_, "any number of threads gives the same bits");
    // Enough rows for three tasks of the loop over rows.
    const index tokens = 2 * 64 * talpa::detail::packed_tokens<T> + 5;
    logit_matrix logits(tokens, experts_), dgates(tokens, experts_);
    for (index n = 0; n < tokens; ++n) {
      const index from = n % logits_.rows();
      std::copy_n(logits_.view().row(from), experts_, logits.view().row(n));
      std::copy_n(dgates_.view().row(from), experts_, dgates.view().row(n));
    }
    const routing<T, cpu> one = select(logits, 1);
    const gradient expected = backward(logits, one, dgates, 1);
    const logit_matrix again = replay(logits, one.mask, 1);
    for (const int count : {2, 3}) {
      const std::string where = talpa::detail::concat(text(count), " threads");
      l.expect_none(difference(select(logits, count), one), where);
      l.expect_none(difference(backward(logits, one, dgates, count), expected), where);
      l.expect_none(first_difference(replay(logits, one.mask, count), again), where);
    }
  }

  void own_mask() {
    law l(out_, "replay of a selector's own mask gives the same gates");
    l.expect_none(first_difference(replay(logits_, chosen_.mask), chosen_.gates));
  }

  void padding() {
    law l(out_, "padding gets no gate and no gradient and changes nothing else");
    vector<std::uint8_t, cpu> real(logits_.rows());
    logit_matrix logits = logits_;
    for (index n = 0; n < logits_.rows(); ++n) {
      real[n] = n % 3 == 1 ? 0 : 1;
      for (index e = 0; real[n] == 0 && e < experts_; ++e) {
        logits(n, e) = std::numeric_limits<T>::quiet_NaN();
      }
    }
    const routing<T, cpu> r = select(logits, 1, real.view());
    routing<T, cpu> expected = facts_.coupled ? without(real) : chosen_;
    const gradient found = backward(logits, r, dgates_);
    const logit_matrix gates = replay(logits, expected.mask, 1, real.view());
    gradient expected_gradient = backward(logits_, expected, dgates_);
    for (index n = 0; n < logits_.rows(); ++n) {
      if (real[n] != 0) continue;
      std::fill_n(expected.gates.view().row(n), experts_, T{0});
      std::fill_n(expected.mask.view().row(n), expected.mask.cols(), 0u);
      std::fill_n(expected_gradient.dlogits.view().row(n), experts_, T{0});
      if (expected_gradient.dcontrol.rows() > 0) expected_gradient.dcontrol(n, 0) = T{0};
    }
    l.expect_none(difference(r, expected), "select");
    l.expect_none(first_difference(gates, expected.gates), "replay");
    l.expect_none(difference(found, expected_gradient), "select_backward");
  }
  /// The routing of the real tokens alone, at their places; padding has none.
  routing<T, cpu> without(const vector<std::uint8_t, cpu>& real) const {
    index count = 0;
    for (index n = 0; n < real.size(); ++n) count += real[n] != 0 ? 1 : 0;
    logit_matrix kept(count, experts_);
    index to = 0;
    for (index n = 0; n < real.size(); ++n) {
      if (real[n] != 0) std::copy_n(logits_.view().row(n), experts_, kept.view().row(to++));
    }
    const routing<T, cpu> packed = select(kept);
    routing<T, cpu> spread(real.size(), experts_);
    to = 0;
    for (index n = 0; n < real.size(); ++n) {
      if (real[n] == 0) continue;
      std::copy_n(packed.gates.view().row(to), experts_, spread.gates.view().row(n));
      std::copy_n(packed.mask.view().row(to), packed.mask.cols(), spread.mask.view().row(n));
      ++to;
    }
    return spread;
  }

  void backward_reads_only_gates_that_are_on() {
    law l(out_, "the gradient of a gate that is off is ignored");
    logit_matrix dgates = dgates_;
    for (index n = 0; n < logits_.rows(); ++n) {
      for (index e = 0; e < experts_; ++e) {
        if (!bit(chosen_.mask.view(), n, e)) {
          dgates(n, e) = std::numeric_limits<T>::quiet_NaN();
        }
      }
    }
    l.expect_none(
        difference(backward(logits_, chosen_, dgates), backward(logits_, chosen_, dgates_)));
  }

  void backward_sums_to_zero() {
    if (!claims_.shift_invariant) return;
    law l(out_, "the gradients of a token's logits sum to zero, as adding a constant does nothing");
    const logit_matrix dlogits = backward(logits_, chosen_, dgates_).dlogits;
    for (index n = 0; n < logits_.rows(); ++n) {
      double sum = 0.0;
      for (index e = 0; e < experts_; ++e) sum += static_cast<double>(dlogits(n, e));
      // Each of the E terms has its own error, and the probabilities sum to one.
      const double bound = gradient_bound(largest(dgates_.view().row_range(n, 1)));
      l.expect(std::abs(sum) <= bound, [&] {
        return talpa::detail::concat("token ", text(n), " has ", digits(sum), ", bound ",
                                     digits(bound));
      });
    }
  }

  /// Gradient of one row in double: of selecting, and of the gates of the row's random mask.
  void gradients() {
    const bool constant = claims_.constant_gates || (facts_.unit_mass && facts_.max_selected == 1);
    const gradient_accuracy accuracy{
        .roundings = claims_.amplification * (2.0 * static_cast<double>(experts_) + 8.0),
        .magnitude = static_cast<double>(experts_) * std::max(1.0, claims_.gate_floor),
        .expect_nonzero = false};
    index checked = 0, eligible = 0;
    law l(out_, "some gradient of the logits is not zero");
    bool nonzero = false;
    const index rows = std::min<index>(logits_.rows(), 8);
    for (index n = 0; n < rows; ++n) {
      matrix<double, cpu> u(1, experts_);
      for (index e = 0; e < experts_; ++e) u(0, e) = static_cast<double>(logits_(n, e));
      const matrix<double, cpu> upstream =
          cotangent(1, experts_, static_cast<std::uint64_t>(n) + 11);
      context<cpu> ctx(1);
      routing<double, cpu> r(1, experts_);
      matrix<double, cpu> du(1, experts_);
      sides<double> beside(*this, 1, n);
      matrix<double, cpu> dcontrol(beside.control.rows(), 1);
      const auto check = [&](const char* name, mask_matrix* recorded) {
        const auto forward = [&] {
          if (recorded == nullptr) {
            in_double_.select(ctx, u, {}, r.gates.view(), r.mask.view(), beside.view());
          } else {
            in_double_.replay(ctx, u, {}, recorded->view(), r.gates.view(), beside.view());
          }
          return r.gates.view();
        };
        // Which experts are on, and which of them weigh something.
        const auto pattern = [&] {
          std::vector<std::uint32_t> bits(r.mask.data(), r.mask.data() + r.mask.size());
          if (recorded != nullptr) bits.clear();
          for (index e = 0; e < experts_; ++e) bits.push_back(r.gates(0, e) != 0.0 ? 1 : 0);
          return bits;
        };
        forward();
        in_double_.select_backward(ctx, u, r.gates.view(),
                                   recorded == nullptr ? r.mask.view() : recorded->view(), upstream,
                                   du.view(), beside.view(), dcontrol.view());
        nonzero = nonzero || largest(du.view()) > 0.0;
        if (!claims_.derivative) return;
        ++eligible;
        if (!far_from_kinks(u, forward, pattern) ||
            !far_from_kinks(beside.control, forward, pattern)) {
          return;
        }
        ++checked;
        std::vector<gradient_probe> probes{{"logits", u.view(), du.view()}};
        if (dcontrol.rows() > 0)
          probes.push_back({"control", beside.control.view(), dcontrol.view()});
        out_.add(gradient_check(name, probes, upstream, accuracy, forward, pattern));
      };
      if (!facts_.coupled) check("select", nullptr);
      mask_matrix recorded(mask_.view().row_range(n, 1));
      std::uint32_t any = 0;
      for (index w = 0; w < recorded.cols(); ++w) any |= recorded(0, w);
      if (any != 0) check("replay", &recorded);
    }
    l.expect(nonzero || constant || experts_ == 1,
             [] { return std::string("all are, so nothing is proven"); });
    l.expect(!nonzero || !claims_.constant_gates,
             [] { return std::string("some are not, and constant_gates says they are"); });
    law enough(out_, "at least half of the rows lie away from a change of selection");
    enough.expect(2 * checked >= eligible,
                  [&] { return talpa::detail::concat(text(checked), " of ", text(eligible)); });
  }
  /// Whether the selection stays when each logit moves as far as the gradient check moves it.
  template <class Forward, class Mask>
  static bool far_from_kinks(matrix<double, cpu>& u, Forward forward, Mask mask) {
    forward();
    const auto before = mask();
    bool same = true;
    for (index e = 0; e < u.size(); ++e) {
      const double at = u.data()[e];
      for (const double side : {-2.0, 2.0}) {
        u.data()[e] = at + side * difference_step(at);
        forward();
        same = same && mask() == before;
      }
      u.data()[e] = at;
    }
    forward();
    return same;
  }

  void no_tokens() {
    law l(out_, "a batch of no tokens is legal");
    const logit_matrix none(0, experts_);
    const routing<T, cpu> r = select(none);
    l.expect(r.gates.rows() == 0 && backward(none, r, none).dlogits.rows() == 0 &&
                 replay(none, r.mask).rows() == 0,
             [] { return std::string("it has rows"); });
  }

  void masked_experts() {
    law l(out_, "an expert with logit -inf is never on and gets no gradient");
    logit_matrix logits = logits_;
    for (index n = 0; n < logits.rows(); ++n) {
      // One expert, every second one, and all but one.
      const index left = n % experts_;
      for (index e = 0; e < experts_; ++e) {
        const bool masked = n % 3 == 0 ? e == (n + 1) % experts_ : n % 3 == 1 ? e % 2 == 0 : true;
        if (masked && e != left) logits(n, e) = -infinity;
      }
    }
    const routing<T, cpu> r = select(logits);
    const logit_matrix dlogits = backward(logits, r, dgates_).dlogits;
    for (index n = 0; n < logits.rows(); ++n) {
      for (index e = 0; e < experts_; ++e) {
        if (logits(n, e) != -infinity) continue;
        l.expect(!bit(r.mask.view(), n, e) && r.gates(n, e) == T{0} && dlogits(n, e) == T{0}, [&] {
          return talpa::detail::concat("token ", text(n), ", expert ", text(e), ": gate ",
                                       digits(static_cast<double>(r.gates(n, e))), ", gradient ",
                                       digits(static_cast<double>(dlogits(n, e))));
        });
      }
      l.expect(std::isfinite(static_cast<double>(largest(r.gates.view().row_range(n, 1)))) &&
                   selected(r, n) >= std::min<index>(claims_.min_selected, 1),
               [&] { return talpa::detail::concat("token ", text(n), " has nothing left"); });
    }
  }

  void invalid_rows() {
    law l(out_,
          "a row with NaN, +inf or only -inf gets NaN gates on its first max_selected experts");
    const T bad[] = {std::numeric_limits<T>::quiet_NaN(), infinity, -infinity};
    logit_matrix logits = logits_;
    for (index n = 0; n < logits.rows(); n += 2) {
      const T value = bad[n / 2 % 3];
      for (index e = 0; e < experts_; ++e) {
        if (value == -infinity || e == n % experts_) logits(n, e) = value;
      }
    }
    const routing<T, cpu> r = select(logits);
    const index first = facts_.max_selected;
    for (index n = 0; n < logits.rows(); ++n) {
      for (index e = 0; e < experts_; ++e) {
        const bool on = bit(r.mask.view(), n, e);
        const T g = r.gates(n, e);
        const bool fine = n % 2 == 1 ? facts_.coupled || (same_number(g, chosen_.gates(n, e)) &&
                                                          on == bit(chosen_.mask.view(), n, e))

                          : e < first ? on && std::isnan(g)
                                      : !on && g == T{0};
        l.expect(fine, [&] {
          return talpa::detail::concat("token ", text(n), ", expert ", text(e), ": gate ",
                                       digits(static_cast<double>(g)), on ? ", on" : ", off");
        });
      }
    }
  }

  void checked_context() {
    law l(out_, "a checked context refuses logits that give NaN gates, in real tokens only");
    context<cpu> ctx(1);
    ctx.checked = true;
    const sides<T> beside(*this, logits_.rows());
    for (const T value : {std::numeric_limits<T>::quiet_NaN(), infinity, -infinity}) {
      logit_matrix logits = logits_;
      const index n = logits.rows() - 1;
      for (index e = 0; e < experts_; ++e) {
        if (value == -infinity || e == 0) logits(n, e) = value;
      }
      vector<std::uint8_t, cpu> real(logits.rows());
      std::fill_n(real.data(), real.size(), std::uint8_t{1});
      for (const bool padded : {false, true}) {
        real[n] = padded ? 0 : 1;
        for (const bool again : {false, true}) {
          routing<T, cpu> r = chosen_;
          bool refused = false;
          try {
            if (again) {
              selector_.replay(ctx, logits, real.view(), r.mask.view(), r.gates.view(),
                               beside.view());
            } else {
              selector_.select(ctx, logits, real.view(), r.gates.view(), r.mask.view(),
                               beside.view());
            }
          } catch (const value_error&) {
            refused = true;
          }
          l.expect(refused != padded, [&] {
            return talpa::detail::concat(
                again ? "replay" : "select", " of ", digits(static_cast<double>(value)), " in a ",
                padded ? "padded" : "real", " token was ", refused ? "refused" : "accepted");
          });
        }
      }
    }
  }

  void strided_views() {
    law l(out_, "rows of longer matrices work, and nothing outside them is written");
    const index n = logits_.rows(), words = mask_words(experts_);
    matrix<T, cpu> wide(n, experts_ + 3), gates(n, experts_ + 2), dlogits(n, experts_ + 1);
    poison<T>(wide.view());
    poison<T>(gates.view());
    poison<T>(dlogits.view());
    mask_matrix mask(n, words + 1);
    std::fill_n(mask.data(), mask.size(), 0xabcdef01u);
    for (index r = 0; r < n; ++r) {
      std::copy_n(logits_.view().row(r), experts_, wide.view().row(r) + 2);
    }
    const auto gates_in = gates.view().col_range(1, experts_);
    const auto mask_in = mask.view().col_range(0, words);
    const auto gradient_in = dlogits.view().col_range(0, experts_);
    context<cpu> ctx(1);
    const sides<T> beside(*this, n);
    logit_matrix dcontrol(beside.control.rows(), 1);
    selector_.select(ctx, wide.view().col_range(2, experts_), {}, gates_in, mask_in, beside.view());
    selector_.select_backward(ctx, wide.view().col_range(2, experts_), gates_in, mask_in, dgates_,
                              gradient_in, beside.view(), dcontrol.view());
    l.expect_none(first_difference<T>(gates_in, chosen_.gates.view()), "gates");
    l.expect_none(first_difference<std::uint32_t>(mask_in, chosen_.mask.view()), "mask");
    l.expect_none(
        first_difference<T>(gradient_in, backward(logits_, chosen_, dgates_).dlogits.view()),
        "dlogits");
    for (index r = 0; r < n; ++r) {
      l.expect(std::isnan(gates(r, 0)) && std::isnan(gates(r, experts_ + 1)) &&
                   std::isnan(dlogits(r, experts_)) && mask(r, words) == 0xabcdef01u,
               [&] { return talpa::detail::concat("row ", text(r), " was written outside"); });
    }
  }

  /// The same in double: the logits are exact in both, so the selections agree up to ties in
  /// whatever else the selector compares.
  void precision() {
    if (std::same_as<T, double>) return;
    law l(out_, "float agrees with double within rounding");
    matrix<double, cpu> logits(logits_.rows(), experts_), dgates(logits_.rows(), experts_);
    for (index i = 0; i < logits_.size(); ++i) {
      logits.data()[i] = static_cast<double>(logits_.data()[i]);
      dgates.data()[i] = static_cast<double>(dgates_.data()[i]);
    }
    context<cpu> ctx(1);
    routing<double, cpu> r(logits.rows(), experts_);
    matrix<double, cpu> expected(logits.rows(), experts_);
    const sides<double> beside(*this, logits.rows());
    matrix<double, cpu> dcontrol(beside.control.rows(), 1);
    in_double_.select(ctx, logits, {}, r.gates.view(), r.mask.view(), beside.view());
    in_double_.select_backward(ctx, logits, r.gates.view(), r.mask.view(), dgates, expected.view(),
                               beside.view(), dcontrol.view());
    const gradient found = backward(logits_, chosen_, dgates_);
    index compared = 0;
    for (index n = 0; n < logits.rows(); ++n) {
      if (!first_difference<std::uint32_t>(r.mask.view().row_range(n, 1),
                                           chosen_.mask.view().row_range(n, 1))
               .empty()) {
        continue;
      }
      ++compared;
      const auto gates = r.gates.view().row_range(n, 1);
      l.expect_none(first_excess(chosen_.gates.view().row_range(n, 1), gates,
                                 [&](index, index e) { return gate_bound(gates(0, e)); }),
                    talpa::detail::concat("gates of token ", text(n)));
      const double bound = gradient_bound(largest(dgates_.view().row_range(n, 1)));
      if (dcontrol.rows() > 0) {
        l.expect_none(
            first_excess(found.dcontrol.view().row_range(n, 1), dcontrol.view().row_range(n, 1),
                         [&](index, index) { return bound; }),
            talpa::detail::concat("dcontrol of token ", text(n)));
      }
      l.expect_none(
          first_excess(found.dlogits.view().row_range(n, 1), expected.view().row_range(n, 1),
                       [&](index, index) { return bound; }),
          talpa::detail::concat("dlogits of token ", text(n)));
    }
    l.expect(10 * compared >= 9 * logits.rows(), [&] {
      return talpa::detail::concat("only ", text(compared), " of ", text(logits.rows()),
                                   " tokens have the same selection");
    });
  }

  const selector_ops<T>& selector_;
  const selector_lanes<T>& lanes_;
  const selector_ops<double>& in_double_;
  selector_facts facts_;
  index experts_;
  selector_claims claims_;
  generator random_;
  logit_matrix logits_;
  mask_matrix mask_;
  logit_matrix dgates_;
  matrix<double, cpu> control_;  // [tokens, 1], or empty
  matrix<double, cpu> bias_;     // [1, E], or empty
  routing<T, cpu> chosen_;
  report out_;
};

}  // namespace detail

/// Laws of a selector on rows of `experts` logits in scalar T, on the CPU.
///
/// Gates are finite, not negative, zero where the mask is off, and sum to one where unit_mass says
/// so; support is min_selected..max_selected; adding a constant, permuting experts and changing
/// other rows do what they should; every lane group (serial, token_pack, sim), number of threads
/// and repetition gives the same bits, forward, in replay and backward; padding, masked experts and
/// invalid rows are treated as ops::select documents; gradients equal central differences in
/// double. A selector with a control or a bias gets some of the range that `claims` names. Where
/// rows are coupled, the choice is not expected to be a row's own, padding is compared with leaving
/// the tokens out, and lane groups and differences are about the gates of given masks. Call it for
/// float and double: float sees sim<4> and sim<32>, double sim<8>.
template <floating T, class Selector>
report selector_laws(const Selector& selector, index experts, const selector_claims& claims = {},
                     index tokens = 37, std::uint64_t seed = 1) {
  static_assert(talpa::detail::explain_selector<Selector>());
  selector.validate(experts);
  const detail::selector_ops_model<T, Selector> subject(selector);
  const detail::selector_lanes_model<T, Selector> lanes(selector);
  const detail::selector_ops_model<double, Selector> in_double(selector);
  const detail::selector_facts facts{.unit_mass = Selector::unit_mass,
                                     .coupled = coupled_selector<Selector>,
                                     .controlled = controlled_selector<Selector>,
                                     .biased = biased_selector<Selector>,
                                     .max_selected = selector.max_selected(experts)};
  return detail::selector_trial<T>(subject, lanes, in_double, facts, experts, claims, tokens, seed)
      .run();
}

}  // namespace talpa::testing
