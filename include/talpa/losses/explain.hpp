// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/losses/concept.hpp>

namespace talpa::detail {

/// One sentence for the first thing that a would-be loss lacks.
template <class L>
consteval bool explain_loss() {
  static_assert(loss_has_name<L>,
                "talpa: a loss needs a name, add: static constexpr const char* name = ...; "
                "(docs/policies/loss.md)");
  if constexpr (loss_has_name<L>) {
    static_assert(loss_has_saved<L>,
                  "talpa: a loss says what backward reads, add a trivially destructible: "
                  "template <class T, class B> struct saved; (docs/policies/loss.md)");
  }
  if constexpr (loss_has_name<L> && loss_has_saved<L>) {
    static_assert(loss_has_value<L>,
                  "talpa: a loss keeps its value in saved, add to it: talpa::matrix_view<T, B> "
                  "value; with shape [1, 1] (docs/policies/loss.md)");
  }
  if constexpr (loss_has_name<L> && loss_has_saved<L>) {
    static_assert(!loss_has_value<L> || loss_has_forward<L>,
                  "talpa: a loss needs forward, add: template <class T, class B> saved<T, B> "
                  "forward(talpa::context<B>&, std::span<const talpa::routed_view<T, B>> layers) "
                  "const; (docs/policies/loss.md)");
  }
  if constexpr (loss_has_name<L> && loss_has_saved<L>) {
    static_assert(!(loss_has_value<L> && loss_has_forward<L>) || loss_has_backward<L>,
                  "talpa: a loss needs backward, add: template <class T, class B> void "
                  "backward(talpa::context<B>&, std::span<const talpa::routed_view<T, B>> layers, "
                  "const saved<T, B>&, talpa::input<T, B> dvalue, std::span<const "
                  "talpa::routed_gradient<T, B>> out, talpa::grad_mode) const; "
                  "(docs/policies/loss.md)");
  }
  return loss_policy<L>;
}

}  // namespace talpa::detail
