// SPDX-License-Identifier: Apache-2.0
// A selector that lacks something is told what, with the signature and the page.
// expect 1: talpa: a selector needs a name, add: static constexpr const char* name = ...; (docs/policies/selector.md)
// expect 2: talpa: a selector needs validate, add: void validate(talpa::index experts) const; (docs/policies/selector.md)
// expect 3: talpa: a selector needs max_selected, add: talpa::index max_selected(talpa::index experts) const; (docs/policies/selector.md)
// expect 4: talpa: a selector says whether its gates sum to one, add: static constexpr bool unit_mass = ...; (docs/policies/selector.md)
// expect 5: talpa: a selector needs select, add: template <class G, class T> TALPA_HD void select(const G& g, const talpa::select_row<T>& row) const; (docs/policies/selector.md)
// expect 6: talpa: a selector needs replay, add: template <class G, class T> TALPA_HD void replay(const G& g, const talpa::select_row<T>& row) const; (docs/policies/selector.md)
// expect 7: talpa: a selector needs select_backward, add: template <class G, class T> TALPA_HD void select_backward(const G& g, const talpa::select_gradient_row<T>& row) const; (docs/policies/selector.md)
// expect 8: talpa: a selector that couples rows needs assign, add: template <class T, class B> void assign(talpa::context<B>&, const talpa::assign_batch<T, B>&, talpa::matrix_view<std::uint32_t, B> mask) const; (docs/policies/selector.md)
// expect 9: talpa: thread_registers of a selector are 64 to 255 (docs/policies/selector.md)
#include <talpa/layers/router.hpp>
#include <talpa/scorers/linear_scorer.hpp>

#ifndef TALPA_MISTAKE
#define TALPA_MISTAKE 0
#endif

struct policy {
#if TALPA_MISTAKE != 1
  static constexpr const char* name = "policy";
#endif
#if TALPA_MISTAKE != 2
  void validate(talpa::index) const {}
#endif
#if TALPA_MISTAKE != 3
  talpa::index max_selected(talpa::index experts) const { return experts; }
#endif
#if TALPA_MISTAKE != 4
  static constexpr bool unit_mass = true;
#endif
#if TALPA_MISTAKE != 5
  template <class G, class T>
  void select(const G&, const talpa::select_row<T>&) const {}
#endif
#if TALPA_MISTAKE == 9
  static constexpr int thread_registers = 32;
#else
  static constexpr int thread_registers = 64;
#endif
#if TALPA_MISTAKE == 8
  static constexpr bool couples_rows = true;
#endif
#if TALPA_MISTAKE != 6
  template <class G, class T>
  void replay(const G&, const talpa::select_row<T>&) const {}
#endif
#if TALPA_MISTAKE != 7
  template <class G, class T>
  void select_backward(const G&, const talpa::select_gradient_row<T>&) const {}
#endif
};

talpa::router<talpa::linear_scorer, policy> made;
