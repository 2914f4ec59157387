// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/loss_subject.hpp>
#include <talpa/testing/report.hpp>
#include <talpa/testing/subject.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace talpa::testing {

/// What a loss promises beyond its declared members.
struct loss_claims {
  /// The value for one layer whose logits are all zero and whose token n uses expert n mod E alone
  /// with gate 1, N a multiple of E. NaN: not known, and not looked at.
  double at_balance = std::numeric_limits<double>::quiet_NaN();
  /// A batch beside a copy of itself has the same value.
  bool duplication_invariant = true;
  /// Rounding errors in units of gamma(N + E + 32) times the largest of the value and 1.
  double amplification = 1.0;
  /// The loss reads a control of each token, 0 at perfect balance.
  bool control = false;
  /// The loss reads clean logits and deviations of a scorer with noise, 0 and 1 at perfect balance.
  bool noise = false;
  /// The loss takes the logits for constants: its dlogits is zero.
  bool constant_logits = false;
};

namespace detail {

template <floating T>
class loss_trial {
 public:
  /// The same loss twice: gradients are compared in double.
  loss_trial(const loss_subject<T>& loss, const loss_subject<double>& in_double, index experts,
             const loss_claims& claims, std::uint64_t seed)
      : loss_(loss), in_double_(in_double), experts_(experts), claims_(claims), random_(seed) {}

  report run() {
    balance();
    duplication();
    padding();
    masked_experts();
    modes();
    same_bits();
    nothing();
    gradients();
    return out_;
  }

 private:
  /// What one router did to one batch, owned.
  template <class U>
  struct layer {
    matrix<U, cpu> logits;
    routing<U, cpu> routed;
    vector<std::uint8_t, cpu> real;  // empty: all
    index sequence_length = 0;
    vector<std::int32_t, cpu> labels;  // [S]
    matrix<U, cpu> control;            // [N, 1] where the loss reads it
    matrix<U, cpu> clean, deviation;   // [N, E] where the loss reads noise

    routed_view<U, cpu> view() const {
      return {logits.view(),
              routed.view(),
              real.view(),
              sequence_length,
              control.view(),
              labels.view(),
              {clean.view(), deviation.view()}};
    }
  };
  template <class U>
  using batch = std::vector<layer<U>>;

  /// Logits that differ clearly, two experts a token (one where there is one) with uneven gates.
  template <class U>
  layer<U> make_layer(index tokens) {
    layer<U> l{separated_logits<U>(tokens, experts_, random_),
               routing<U, cpu>(tokens, experts_),
               {},
               0,
               {},
               {},
               {},
               {}};
    const random_stream stream = random_.next();
    for (index n = 0; n < tokens; ++n) {
      for (index k = 0; k < std::min<index>(2, experts_); ++k) {
        const auto i = static_cast<std::uint64_t>(2 * n + k);
        const auto e =
            static_cast<index>(uniform_index(stream, i, static_cast<std::uint64_t>(experts_)));
        l.routed.mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
        l.routed.gates(n, e) = static_cast<U>(0.25 + 0.5 * uniform<double>(stream, i + 7));
      }
    }
    complete(l);
    for (index n = 0; n < l.control.rows(); ++n) {
      const auto i = static_cast<std::uint64_t>(4 * tokens + n);
      l.control(n, 0) = static_cast<U>(uniform<double>(stream, i) - 0.5);
    }
    if (!claims_.noise) return l;
    const random_stream noise = random_.next();
    for (index i = 0; i < l.clean.size(); ++i) {
      const auto at = static_cast<std::uint64_t>(2 * i);
      l.deviation.data()[i] = static_cast<U>(0.5 + uniform<double>(noise, at));
      l.clean.data()[i] =
          static_cast<U>(l.logits.data()[i] + static_cast<U>(uniform<double>(noise, at + 1) - 0.5));
    }
    return l;
  }
  /// Gives a layer a class for each sequence.
  template <class U>
  static void classify(layer<U>& l) {
    const index tokens = l.logits.rows();
    const index sequences = l.sequence_length > 0 ? tokens / l.sequence_length : tokens > 0;
    l.labels = vector<std::int32_t, cpu>(sequences);
    for (index s = 0; s < sequences; ++s) l.labels[s] = static_cast<std::int32_t>(s % 2);
  }
  /// The same and, where the loss reads them, controls of 0, clean logits of 0, deviations of 1.
  template <class U>
  void complete(layer<U>& l) const {
    classify(l);
    if (claims_.control) l.control = matrix<U, cpu>(l.logits.rows(), 1);
    if (!claims_.noise) return;
    l.clean = matrix<U, cpu>(l.logits.rows(), l.logits.cols());
    l.deviation = l.clean;
    std::fill_n(l.deviation.data(), l.deviation.size(), U{1});
  }
  /// Logits of zero and no expert.
  layer<T> blank(index tokens, index length) const {
    layer<T> l{matrix<T, cpu>(tokens, experts_),
               routing<T, cpu>(tokens, experts_),
               {},
               length,
               {},
               {},
               {},
               {}};
    complete(l);
    return l;
  }
  void copy_noise(const layer<T>& from, index n, layer<T>& to, index m) const {
    if (!claims_.noise) return;
    std::copy_n(from.clean.view().row(n), experts_, to.clean.view().row(m));
    std::copy_n(from.deviation.view().row(n), experts_, to.deviation.view().row(m));
  }
  template <class U>
  static void cut(layer<U>& l, index length) {
    l.sequence_length = length;
    classify(l);
  }

  template <class U>
  struct outcome {
    double value = 0.0;
    std::vector<matrix<U, cpu>> dlogits;
    std::vector<matrix<U, cpu>> dgates;
    std::vector<matrix<U, cpu>> dcontrol;
    std::vector<matrix<U, cpu>> dclean;
    std::vector<matrix<U, cpu>> ddeviation;
  };
  template <class U>
  outcome<U> evaluate(const batch<U>& layers, int threads = 1, U dvalue = U{1},
                      grad_mode mode = grad_mode::overwrite,
                      U before = std::numeric_limits<U>::quiet_NaN(), int repetitions = 1) {
    context<cpu> ctx(threads);
    std::vector<routed_view<U, cpu>> views;
    std::vector<routed_gradient<U, cpu>> gradients;
    outcome<U> r;
    for (const layer<U>& l : layers) {
      views.push_back(l.view());
      r.dlogits.emplace_back(l.logits.rows(), l.logits.cols());
      r.dgates.emplace_back(l.logits.rows(), l.logits.cols());
      r.dcontrol.emplace_back(l.control.rows(), l.control.cols());
      r.dclean.emplace_back(l.clean.rows(), l.clean.cols());
      r.ddeviation.emplace_back(l.clean.rows(), l.clean.cols());
    }
    for (std::size_t l = 0; l < layers.size(); ++l) {
      std::fill_n(r.dlogits[l].data(), r.dlogits[l].size(), before);
      std::fill_n(r.dgates[l].data(), r.dgates[l].size(), before);
      std::fill_n(r.dcontrol[l].data(), r.dcontrol[l].size(), before);
      std::fill_n(r.dclean[l].data(), r.dclean[l].size(), before);
      std::fill_n(r.ddeviation[l].data(), r.ddeviation[l].size(), before);
      gradients.push_back({r.dlogits[l].view(),
                           r.dgates[l].view(),
                           r.dcontrol[l].view(),
                           {r.dclean[l].view(), r.ddeviation[l].view()}});
    }
    const std::span<const routed_view<U, cpu>> in(views);
    const auto evaluated =
        subject_in<U>(loss_, in_double_).evaluate(ctx, in, gradients, dvalue, mode, repetitions);
    returned_ = returned_ && evaluated.returned;
    r.value = evaluated.value;
    return r;
  }
  double bound(index tokens, double value) const {
    return claims_.amplification * gamma<T>(static_cast<double>(tokens + experts_) + 32.0) *
           std::max(1.0, std::abs(value));
  }
  void expect_value(law& l, double found, double expected, index tokens, const char* where) {
    const double allowed = bound(tokens, expected);
    l.expect(std::isfinite(expected) && std::abs(found - expected) <= allowed, [&] {
      return talpa::detail::concat(where, digits(found), " instead of ", digits(expected),
                                   ", bound ", digits(allowed));
    });
  }
  static std::string difference(const outcome<T>& a, const outcome<T>& b) {
    if (!same_number(a.value, b.value)) {
      return talpa::detail::concat("value ", digits(a.value), " instead of ", digits(b.value));
    }
    for (std::size_t l = 0; l < b.dlogits.size(); ++l) {
      const std::string where = talpa::detail::concat("layer ", std::to_string(l));
      std::string text = first_difference(a.dlogits[l], b.dlogits[l]);
      if (!text.empty()) return talpa::detail::concat(where, ", dlogits: ", text);
      text = first_difference(a.dgates[l], b.dgates[l]);
      if (!text.empty()) return talpa::detail::concat(where, ", dgates: ", text);
      text = first_difference(a.dcontrol[l], b.dcontrol[l]);
      if (!text.empty()) return talpa::detail::concat(where, ", dcontrol: ", text);
      text = first_difference(a.dclean[l], b.dclean[l]);
      if (!text.empty()) return talpa::detail::concat(where, ", dclean: ", text);
      text = first_difference(a.ddeviation[l], b.ddeviation[l]);
      if (!text.empty()) return talpa::detail::concat(where, ", ddeviation: ", text);
    }
    return {};
  }

  void balance() {
    if (std::isnan(claims_.at_balance)) return;
    law l(out_, "the value at perfect balance is the claimed one");
    const index tokens = 4 * experts_;
    layer<T> even = blank(tokens, 0);
    for (index n = 0; n < tokens; ++n) {
      const index e = n % experts_;
      even.routed.mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
      even.routed.gates(n, e) = T{1};
    }
    expect_value(l, evaluate<T>({even}).value, claims_.at_balance, tokens, "");
  }

  void duplication() {
    if (!claims_.duplication_invariant) return;
    law l(out_, "a batch beside a copy of itself has the same value");
    for (const index length : {index{0}, index{6}}) {
      layer<T> once = make_layer<T>(24);
      cut(once, length);
      layer<T> twice = blank(48, length);
      for (index n = 0; n < 48; ++n) {
        std::copy_n(once.logits.view().row(n % 24), experts_, twice.logits.view().row(n));
        std::copy_n(once.routed.gates.view().row(n % 24), experts_,
                    twice.routed.gates.view().row(n));
        std::copy_n(once.routed.mask.view().row(n % 24), mask_words(experts_),
                    twice.routed.mask.view().row(n));
        if (claims_.control) twice.control(n, 0) = once.control(n % 24, 0);
        copy_noise(once, n % 24, twice, n);
      }
      expect_value(l, evaluate<T>({twice}).value, evaluate<T>({once}).value, 48,
                   length == 0 ? "" : "with sequences, ");
    }
  }

  void padding() {
    law l(out_, "padding is the same as removing the tokens, and gets no gradient");
    layer<T> padded = make_layer<T>(30);
    padded.real = vector<std::uint8_t, cpu>(30);
    layer<T> removed = blank(20, 0);
    index to = 0;
    for (index n = 0; n < 30; ++n) {
      padded.real[n] = n % 3 == 2 ? 0 : 1;
      if (padded.real[n] == 0) {
        // Whatever stands there.
        for (index e = 0; e < experts_; ++e) {
          padded.logits(n, e) = std::numeric_limits<T>::quiet_NaN();
          padded.routed.gates(n, e) = std::numeric_limits<T>::quiet_NaN();
          if (!claims_.noise) continue;
          padded.clean(n, e) = std::numeric_limits<T>::quiet_NaN();
          padded.deviation(n, e) = std::numeric_limits<T>::quiet_NaN();
        }
        if (claims_.control) padded.control(n, 0) = std::numeric_limits<T>::quiet_NaN();
        continue;
      }
      std::copy_n(padded.logits.view().row(n), experts_, removed.logits.view().row(to));
      std::copy_n(padded.routed.gates.view().row(n), experts_, removed.routed.gates.view().row(to));
      std::copy_n(padded.routed.mask.view().row(n), mask_words(experts_),
                  removed.routed.mask.view().row(to));
      if (claims_.control) removed.control(to, 0) = padded.control(n, 0);
      copy_noise(padded, n, removed, to);
      ++to;
    }
    const outcome<T> with = evaluate<T>({padded}), without = evaluate<T>({removed});
    expect_value(l, with.value, without.value, 30, "");
    to = 0;
    for (index n = 0; n < 30; ++n) {
      if (claims_.control) {
        const bool real = padded.real[n] != 0;
        const double c = real ? static_cast<double>(without.dcontrol[0](to, 0)) : 0.0;
        l.expect(std::abs(static_cast<double>(with.dcontrol[0](n, 0)) - c) <=
                     (real ? bound(30, without.value) : 0.0),
                 [&] { return talpa::detail::concat("control of token ", std::to_string(n)); });
      }
      for (index e = 0; e < experts_ && claims_.noise; ++e) {
        const bool real = padded.real[n] != 0;
        const double c = real ? static_cast<double>(without.dclean[0](to, e)) : 0.0;
        const double s = real ? static_cast<double>(without.ddeviation[0](to, e)) : 0.0;
        const double allowed = real ? bound(30, without.value) : 0.0;
        l.expect(std::abs(static_cast<double>(with.dclean[0](n, e)) - c) <= allowed &&
                     std::abs(static_cast<double>(with.ddeviation[0](n, e)) - s) <= allowed,
                 [&] { return talpa::detail::concat("noise of token ", std::to_string(n)); });
      }
      for (index e = 0; e < experts_; ++e) {
        const bool real = padded.real[n] != 0;
        const double u = real ? static_cast<double>(without.dlogits[0](to, e)) : 0.0;
        const double g = real ? static_cast<double>(without.dgates[0](to, e)) : 0.0;
        const double allowed = real ? bound(30, without.value) : 0.0;
        l.expect(std::abs(static_cast<double>(with.dlogits[0](n, e)) - u) <= allowed &&
                     std::abs(static_cast<double>(with.dgates[0](n, e)) - g) <= allowed,
                 [&] { return talpa::detail::concat("gradient of token ", std::to_string(n)); });
      }
      to += padded.real[n] != 0 ? 1 : 0;
    }
    // Nothing but padding.
    std::fill_n(padded.real.data(), padded.real.size(), std::uint8_t{0});
    const outcome<T> none = evaluate<T>({padded});
    l.expect(std::isfinite(none.value) && largest(none.dlogits[0].view()) == 0.0 &&
                 largest(none.dgates[0].view()) == 0.0 && largest(none.dcontrol[0].view()) == 0.0 &&
                 largest(none.dclean[0].view()) == 0.0 && largest(none.ddeviation[0].view()) == 0.0,
             [&] { return talpa::detail::concat("without a real token ", digits(none.value)); });
  }

  void masked_experts() {
    if (experts_ < 2) return;
    law l(out_, "a logit of -inf gives a finite value and gets no gradient");
    layer<T> some = make_layer<T>(16);
    for (index n = 0; n < 16; n += 2) {
      const index e = n % experts_;
      some.logits(n, e) = -std::numeric_limits<T>::infinity();
      if (claims_.noise) some.clean(n, e) = some.logits(n, e);
      some.routed.gates(n, e) = T{0};
      some.routed.mask(n, e / mask_word_bits) &= ~(1u << (e % mask_word_bits));
    }
    const outcome<T> r = evaluate<T>({some});
    l.expect(std::isfinite(r.value), [&] { return digits(r.value); });
    for (index n = 0; n < 16; n += 2) {
      l.expect(r.dlogits[0](n, n % experts_) == T{0},
               [&] { return talpa::detail::concat("token ", std::to_string(n)); });
      if (!claims_.noise) continue;
      l.expect(r.dclean[0](n, n % experts_) == T{0} && r.ddeviation[0](n, n % experts_) == T{0},
               [&] { return talpa::detail::concat("noise of token ", std::to_string(n)); });
    }
    for (index i = 0; i < r.dclean[0].size(); ++i) {
      l.expect(std::isfinite(r.dclean[0].data()[i]) && std::isfinite(r.ddeviation[0].data()[i]),
               [] { return std::string("a gradient of noise is not finite"); });
    }
    for (index i = 0; i < r.dlogits[0].size(); ++i) {
      l.expect(std::isfinite(r.dlogits[0].data()[i]) && std::isfinite(r.dgates[0].data()[i]),
               [] { return std::string("a gradient is not finite"); });
    }
  }

  void modes() {
    law l(out_, "backward overwrites, adds or does nothing as it is told, and scales with dvalue");
    const batch<T> layers{make_layer<T>(13), make_layer<T>(13)};
    const outcome<T> once = evaluate<T>(layers);
    const outcome<T> again = evaluate<T>(layers, 1, T{1}, grad_mode::overwrite, T{3}, 2);
    l.expect_none(difference(again, once), "second call");
    const outcome<T> doubled = evaluate<T>(layers, 1, T{2});
    const outcome<T> added = evaluate<T>(layers, 1, T{1}, grad_mode::accumulate, T{0.5});
    const outcome<T> ignored = evaluate<T>(layers, 1, T{1}, grad_mode::ignore, T{7});
    const auto compare = [&](const std::vector<matrix<T, cpu>>& g,
                             const std::vector<matrix<T, cpu>>& two,
                             const std::vector<matrix<T, cpu>>& sum,
                             const std::vector<matrix<T, cpu>>& same, const char* name) {
      for (std::size_t k = 0; k < g.size(); ++k) {
        for (index i = 0; i < g[k].size(); ++i) {
          const T v = g[k].data()[i];
          l.expect(std::isfinite(v), [&] { return talpa::detail::concat(name, " not written"); });
          // Doubling is exact in every product, but for subnormal ones, of which a gradient may
          // have one for each expert.
          l.expect(std::abs(static_cast<double>(two[k].data()[i]) - 2.0 * static_cast<double>(v)) <=
                       4.0 * static_cast<double>(experts_ + 1) *
                           static_cast<double>(std::numeric_limits<T>::denorm_min()),
                   [&] { return talpa::detail::concat(name, " for twice dvalue"); });
          l.expect(
              std::abs(static_cast<double>(sum[k].data()[i]) - (0.5 + static_cast<double>(v))) <=
                  gamma<T>(2.0) * (0.5 + std::abs(static_cast<double>(v))),
              [&] { return talpa::detail::concat(name, " added to something"); });
          l.expect(same[k].data()[i] == T{7},
                   [&] { return talpa::detail::concat(name, " that is ignored"); });
        }
      }
    };
    compare(once.dlogits, doubled.dlogits, added.dlogits, ignored.dlogits, "dlogits");
    compare(once.dgates, doubled.dgates, added.dgates, ignored.dgates, "dgates");
    compare(once.dcontrol, doubled.dcontrol, added.dcontrol, ignored.dcontrol, "dcontrol");
    compare(once.dclean, doubled.dclean, added.dclean, ignored.dclean, "dclean");
    compare(once.ddeviation, doubled.ddeviation, added.ddeviation, ignored.ddeviation,
            "ddeviation");
    l.expect(returned_, [] { return std::string("backward keeps memory"); });
  }

  void same_bits() {
    law l(out_, "any number of threads and any repetition gives the same bits");
    // Enough tokens for loops to be cut into tasks.
    batch<T> layers{make_layer<T>(1500), make_layer<T>(1500)};
    cut(layers[1], 50);
    const outcome<T> one = evaluate<T>(layers, 1);
    for (const int threads : {1, 2, 3}) {
      l.expect_none(difference(evaluate<T>(layers, threads), one),
                    talpa::detail::concat(std::to_string(threads), " threads"));
    }
  }

  void nothing() {
    law l(out_, "no layers and layers of no tokens are legal");
    l.expect(std::isfinite(evaluate<T>(batch<T>{}).value), [] { return std::string("no layers"); });
    l.expect(std::isfinite(evaluate<T>({make_layer<T>(0)}).value),
             [] { return std::string("no tokens"); });
  }

  void gradients() {
    for (const index length : {index{0}, index{4}}) {
      batch<double> layers{make_layer<double>(8), make_layer<double>(8)};
      // Padding that could be read, so that a dependence would show.
      layers[0].real = vector<std::uint8_t, cpu>(8);
      for (index n = 0; n < 8; ++n) layers[0].real[n] = n % 4 == 1 ? 0 : 1;
      for (layer<double>& l : layers) cut(l, length);
      matrix<double, cpu> upstream(1, 1), value(1, 1);
      upstream(0, 0) = 1.0;
      const outcome<double> r = evaluate<double>(layers);
      std::vector<gradient_probe> probes;
      for (std::size_t l = 0; l < layers.size(); ++l) {
        const std::string name = talpa::detail::concat("layers[", std::to_string(l), "].");
        if (claims_.constant_logits) {
          law none(out_, "logits that are constants get no gradient");
          none.expect(largest(r.dlogits[l].view()) == 0.0, [&] { return name; });
        } else {
          probes.push_back({name + "logits", layers[l].logits.view(), r.dlogits[l].view()});
        }
        probes.push_back({name + "gates", layers[l].routed.gates.view(), r.dgates[l].view()});
        if (claims_.control) {
          probes.push_back({name + "control", layers[l].control.view(), r.dcontrol[l].view()});
        }
        if (claims_.noise) {
          probes.push_back({name + "clean", layers[l].clean.view(), r.dclean[l].view()});
          probes.push_back(
              {name + "deviation", layers[l].deviation.view(), r.ddeviation[l].view()});
        }
      }
      out_.add(gradient_check(
          length == 0 ? "value" : "value with sequences", probes, upstream,
          {.roundings = claims_.amplification * (2.0 * 8.0 + static_cast<double>(experts_) + 32.0),
           .magnitude = std::max(1.0, std::abs(r.value)),
           .expect_nonzero = experts_ > 1},
          [&] {
            value(0, 0) = evaluate(layers, 1, 1.0, grad_mode::ignore, 0.0, 0).value;
            return value.view();
          },
          [] { return 0; }));
    }
  }

  const loss_subject<T>& loss_;
  const loss_subject<double>& in_double_;
  index experts_;
  loss_claims claims_;
  generator random_;
  bool returned_ = true;
  report out_;
};

}  // namespace detail

/// Laws of a loss on layers of `experts` experts in scalar T, on the CPU.
///
/// The value at perfect balance is the claimed one; duplicating the batch changes nothing where
/// claimed; padding is the same as removing tokens, and gets no gradient; masked experts (-inf) get
/// none either; backward overwrites, adds or does nothing as it is told and scales with dvalue; any
/// number of threads gives the same bits; no layers and no tokens are legal; gradients of logits
/// and gates, and of controls and noise where the loss reads them, equal central differences in
/// double, with and without sequences and padding.
template <floating T, class Loss>
report loss_laws(const Loss& loss, index experts, const loss_claims& claims = {},
                 std::uint64_t seed = 1) {
  static_assert(talpa::detail::explain_loss<Loss>());
  const detail::loss_model<T, Loss> subject(loss);
  const detail::loss_model<double, Loss> in_double(loss);
  return detail::loss_trial<T>(subject, in_double, experts, claims, seed).run();
}

}  // namespace talpa::testing
