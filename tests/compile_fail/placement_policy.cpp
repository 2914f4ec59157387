// SPDX-License-Identifier: Apache-2.0
// A placement that lacks something is told what, with the page.
// expect 1: talpa: a placement needs a name and a check, add: static constexpr const char* name = ...; void validate(talpa::index adapters, talpa::index base_experts) const; (docs/policies/placement.md)
// expect 2: talpa: a placement needs template <class T, class B> struct params with visit, and struct saved with talpa::routing_view<const T, B> routing (docs/policies/placement.md)
// expect 3: talpa: a placement needs max_selected, add: talpa::index max_selected(talpa::index adapters, talpa::index base_selected) const; (docs/policies/placement.md)
// expect 4: talpa: a placement needs init, forward and backward with the signatures of docs/policies/placement.md
#include <talpa/placements/explain.hpp>

#include <string>

#ifndef TALPA_MISTAKE
#define TALPA_MISTAKE 0
#endif

struct policy {
#if TALPA_MISTAKE != 1
  static constexpr const char* name = "policy";
#endif
  void validate(talpa::index, talpa::index) const {}
  template <class T, class B>
  using params = talpa::placement::no_params;
  template <class T, class B>
  struct saved {
#if TALPA_MISTAKE != 2
    talpa::routing_view<const T, B> routing;
#endif
  };
#if TALPA_MISTAKE != 3
  talpa::index max_selected(talpa::index adapters, talpa::index) const { return adapters; }
#endif
  template <class T, class B>
  params<T, B> init(talpa::index, talpa::index, talpa::generator&, const std::string&) const {
    return {};
  }
  template <class T, class B>
  saved<T, B> forward(talpa::context<B>&, const params<T, B>&,
                      const talpa::routing_view<const T, B>&, talpa::index, talpa::input<T, B>,
                      talpa::mode, const talpa::batch_info<T, B>&) const {
    return {};
  }
#if TALPA_MISTAKE != 4
  template <class T, class B>
  void backward(talpa::context<B>&, params<T, B>&, const saved<T, B>&, talpa::input<T, B>,
                talpa::output<T, B>, talpa::output<T, B>, talpa::output<T, B>, talpa::grad_mode,
                const std::type_identity_t<talpa::routed_gradient<T, B>>*) const {}
#endif
};

static_assert(talpa::detail::explain_placement<policy>());
