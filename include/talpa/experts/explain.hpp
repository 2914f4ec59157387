// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/concept.hpp>

namespace talpa::detail {

/// One sentence for the first thing that a would-be expert lacks.
template <class X>
consteval bool explain_expert() {
  static_assert(expert_has_name<X>,
                "talpa: an expert needs a name and validate, add: static constexpr const char* "
                "name = ...; void validate() const; (docs/policies/expert.md)");
  if constexpr (expert_has_name<X>) {
    static_assert(expert_has_params<X>,
                  "talpa: an expert needs its bank and what backward reads, add: template <class "
                  "T, class B> struct params; and a trivially destructible saved; "
                  "(docs/policies/expert.md)");
  }
  if constexpr (expert_has_name<X> && expert_has_params<X>) {
    static_assert(expert_has_init<X>,
                  "talpa: an expert needs init, add: template <class T, class B> params<T, B> "
                  "init(index inputs, index outputs, index experts, generator&, const "
                  "std::string& prefix) const; (docs/policies/expert.md)");
    static_assert(!expert_has_init<X> || expert_has_width<X>,
                  "talpa: an expert says its size, add: index width() const; double "
                  "input_dropout() const; (docs/policies/expert.md)");
    static_assert(!expert_has_init<X> || !expert_has_width<X> || expert_has_forward<X>,
                  "talpa: an expert needs forward_grouped, add: template <class T, class B> "
                  "saved<T, B> forward_grouped(context<B>&, const params<T, B>&, const "
                  "segments<B>&, vector_input<T, B> gates, input<T, B> x, output<T, B> y) const; "
                  "(docs/policies/expert.md)");
    static_assert(!expert_has_init<X> || !expert_has_width<X> || !expert_has_forward<X> ||
                      expert_has_backward<X>,
                  "talpa: an expert needs backward_grouped, see the exact signature "
                  "(docs/policies/expert.md)");
  }
  return expert_policy<X>;
}

}  // namespace talpa::detail
