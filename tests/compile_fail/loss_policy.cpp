// SPDX-License-Identifier: Apache-2.0
// A loss that lacks something is told what, with the signature and the page.
// expect 1: talpa: a loss needs a name, add: static constexpr const char* name = ...; (docs/policies/loss.md)
// expect 2: talpa: a loss says what backward reads, add a trivially destructible: template <class T, class B> struct saved; (docs/policies/loss.md)
// expect 3: talpa: a loss keeps its value in saved, add to it: talpa::matrix_view<T, B> value; with shape [1, 1] (docs/policies/loss.md)
// expect 4: talpa: a loss needs forward, add: template <class T, class B> saved<T, B> forward(talpa::context<B>&, std::span<const talpa::routed_view<T, B>> layers) const; (docs/policies/loss.md)
// expect 5: talpa: a loss needs backward, add: template <class T, class B> void backward(talpa::context<B>&, std::span<const talpa::routed_view<T, B>> layers, const saved<T, B>&, talpa::input<T, B> dvalue, std::span<const talpa::routed_gradient<T, B>> out, talpa::grad_mode) const; (docs/policies/loss.md)
#include <talpa/losses/explain.hpp>

#include <vector>

#ifndef TALPA_MISTAKE
#define TALPA_MISTAKE 0
#endif

struct policy {
#if TALPA_MISTAKE != 1
  static constexpr const char* name = "policy";
#endif
  template <class T, class B>
#if TALPA_MISTAKE != 2
  struct saved {
#else
  struct kept {
#endif
#if TALPA_MISTAKE != 3
    talpa::matrix_view<T, B> value;
#endif
  };
#if TALPA_MISTAKE == 2
  template <class T, class B>
  using saved = std::vector<kept<T, B>>;
#endif
#if TALPA_MISTAKE != 4
  template <class T, class B>
  saved<T, B> forward(talpa::context<B>&, std::span<const talpa::routed_view<T, B>>) const {
    return {};
  }
#endif
#if TALPA_MISTAKE != 5
  template <class T, class B>
  void backward(talpa::context<B>&, std::span<const talpa::routed_view<T, B>>, const saved<T, B>&,
                talpa::input<T, B>, std::span<const talpa::routed_gradient<T, B>>,
                talpa::grad_mode) const {}
#endif
};

static_assert(talpa::detail::explain_loss<policy>());
