// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/scorers/concept.hpp>

namespace talpa::detail {

/// One sentence for the first thing that a would-be scorer lacks.
template <class S>
consteval bool explain_scorer() {
  static_assert(scorer_has_name<S>,
                "talpa: a scorer needs a name, add: static constexpr const char* name = ...; "
                "(docs/policies/scorer.md)");
  if constexpr (scorer_has_name<S>) {
    static_assert(scorer_has_params<S>,
                  "talpa: a scorer needs parameters, add: template <class T, class B> struct "
                  "params; (docs/policies/scorer.md)");
  }
  if constexpr (scorer_has_name<S> && scorer_has_params<S>) {
    static_assert(scorer_has_saved<S>,
                  "talpa: a scorer says what backward reads, add a trivially destructible: "
                  "template <class T, class B> struct saved; (docs/policies/scorer.md)");
  }
  if constexpr (scorer_has_name<S> && scorer_has_params<S> && scorer_has_saved<S>) {
    static_assert(scorer_has_init<S>,
                  "talpa: a scorer needs init, add: template <class T, class B> params<T, B> "
                  "init(index inputs, index experts, generator&, const std::string& prefix) "
                  "const; (docs/policies/scorer.md)");
    static_assert(!scorer_has_init<S> || scorer_has_forward<S>,
                  "talpa: a scorer needs forward, add: template <class T, class B> saved<T, B> "
                  "forward(context<B>&, const params<T, B>&, input<T, B> x, output<T, B> logits, "
                  "mode, const batch_info<T, B>&) const; (docs/policies/scorer.md)");
  }
  if constexpr (scorer_has_name<S> && scorer_has_params<S> && scorer_has_saved<S>) {
    static_assert(!scorer_has_forward<S> || scorer_has_backward<S>,
                  "talpa: a scorer needs backward, add: template <class T, class B> void "
                  "backward(context<B>&, params<T, B>&, const saved<T, B>&, input<T, B> x, "
                  "input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const; "
                  "(docs/policies/scorer.md)");
  }
  return scorer_policy<S>;
}

}  // namespace talpa::detail
