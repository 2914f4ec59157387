// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/placements/concept.hpp>

namespace talpa::detail {

/// One sentence for the first thing that a would-be placement lacks.
template <class P>
consteval bool explain_placement() {
  static_assert(placement_has_name<P>,
                "talpa: a placement needs a name and a check, add: static constexpr const char* "
                "name = ...; void validate(talpa::index adapters, talpa::index base_experts) "
                "const; (docs/policies/placement.md)");
  if constexpr (placement_has_name<P>) {
    static_assert(placement_has_params<P>,
                  "talpa: a placement needs template <class T, class B> struct params with visit, "
                  "and struct saved with talpa::routing_view<const T, B> routing "
                  "(docs/policies/placement.md)");
  }
  if constexpr (placement_has_name<P> && placement_has_params<P>) {
    static_assert(placement_has_max_selected<P>,
                  "talpa: a placement needs max_selected, add: talpa::index "
                  "max_selected(talpa::index adapters, talpa::index base_selected) const; "
                  "(docs/policies/placement.md)");
    static_assert(placement_runs<P>,
                  "talpa: a placement needs init, forward and backward with the signatures of "
                  "docs/policies/placement.md");
  }
  return placement_policy<P>;
}

}  // namespace talpa::detail
