// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/selectors/concept.hpp>

namespace talpa::detail {

/// One sentence for the first thing that a would-be selector lacks.
template <class S>
consteval bool explain_selector() {
  static_assert(selector_has_name<S>,
                "talpa: a selector needs a name, add: static constexpr const char* name = ...; "
                "(docs/policies/selector.md)");
  if constexpr (selector_has_name<S>) {
    static_assert(selector_has_validate<S>,
                  "talpa: a selector needs validate, add: void validate(talpa::index experts) "
                  "const; (docs/policies/selector.md)");
  }
  if constexpr (selector_has_name<S> && selector_has_validate<S>) {
    static_assert(selector_has_max_selected<S>,
                  "talpa: a selector needs max_selected, add: talpa::index "
                  "max_selected(talpa::index experts) const; (docs/policies/selector.md)");
  }
  if constexpr (selector_has_name<S> && selector_has_validate<S> && selector_has_max_selected<S>) {
    static_assert(selector_has_unit_mass<S>,
                  "talpa: a selector says whether its gates sum to one, add: static constexpr "
                  "bool unit_mass = ...; (docs/policies/selector.md)");
  }
  if constexpr (selector_has_name<S> && selector_has_validate<S> && selector_has_max_selected<S> &&
                selector_has_unit_mass<S>) {
    static_assert(selector_has_select<S> || coupled_selector<S>,
                  "talpa: a selector needs select, add: template <class G, class T> TALPA_HD void "
                  "select(const G& g, const talpa::select_row<T>& row) const; "
                  "(docs/policies/selector.md)");
    static_assert(selector_has_select<S> || !coupled_selector<S>,
                  "talpa: a selector that couples rows needs assign, add: template <class T, "
                  "class B> void assign(talpa::context<B>&, const talpa::assign_batch<T, B>&, "
                  "talpa::matrix_view<std::uint32_t, B> mask) const; "
                  "(docs/policies/selector.md)");
  }
  if constexpr (selector_has_name<S> && selector_has_validate<S> && selector_has_max_selected<S> &&
                selector_has_unit_mass<S> && selector_has_select<S>) {
    static_assert(selector_has_replay<S>,
                  "talpa: a selector needs replay, add: template <class G, class T> TALPA_HD void "
                  "replay(const G& g, const talpa::select_row<T>& row) const; "
                  "(docs/policies/selector.md)");
  }
  if constexpr (selector_has_name<S> && selector_has_validate<S> && selector_has_max_selected<S> &&
                selector_has_unit_mass<S> && selector_has_select<S> && selector_has_replay<S>) {
    static_assert(selector_has_backward<S>,
                  "talpa: a selector needs select_backward, add: template <class G, class T> "
                  "TALPA_HD void select_backward(const G& g, const "
                  "talpa::select_gradient_row<T>& row) const; (docs/policies/selector.md)");
  }
  if constexpr (tuned_selector<S>) {
    static_assert(
        S::thread_registers >= 64 && S::thread_registers <= 255,
        "talpa: thread_registers of a selector are 64 to 255 (docs/policies/selector.md)");
  }
  return selector_policy<S>;
}

}  // namespace talpa::detail
