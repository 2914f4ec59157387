// SPDX-License-Identifier: Apache-2.0
// A scorer that lacks something is told what, with the signature and the page.
// expect 1: talpa: a scorer needs a name, add: static constexpr const char* name = ...; (docs/policies/scorer.md)
// expect 2: talpa: a scorer needs parameters, add: template <class T, class B> struct params; (docs/policies/scorer.md)
// expect 3: talpa: a scorer says what backward reads, add a trivially destructible: template <class T, class B> struct saved; (docs/policies/scorer.md)
// expect 4: talpa: a scorer needs init, add: template <class T, class B> params<T, B> init(index inputs, index experts, generator&, const std::string& prefix) const; (docs/policies/scorer.md)
// expect 5: talpa: a scorer needs forward, add: template <class T, class B> saved<T, B> forward(context<B>&, const params<T, B>&, input<T, B> x, output<T, B> logits, mode, const batch_info<T, B>&) const; (docs/policies/scorer.md)
// expect 6: talpa: a scorer needs backward, add: template <class T, class B> void backward(context<B>&, params<T, B>&, const saved<T, B>&, input<T, B> x, input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const; (docs/policies/scorer.md)
#include <talpa/layers/router.hpp>
#include <talpa/selectors/dense.hpp>

#ifndef TALPA_MISTAKE
#define TALPA_MISTAKE 0
#endif

template <class T, class B>
struct state {};

struct policy {
#if TALPA_MISTAKE != 1
  static constexpr const char* name = "policy";
#endif
#if TALPA_MISTAKE != 2
  template <class T, class B>
  using params = state<T, B>;
#endif
#if TALPA_MISTAKE != 3
  template <class T, class B>
  struct saved {};
#else
  template <class T, class B>
  struct saved {
    talpa::matrix<T, B> owned;
  };
#endif
#if TALPA_MISTAKE != 4
  template <class T, class B>
  state<T, B> init(talpa::index, talpa::index, talpa::generator&, const std::string&) const {
    return {};
  }
#endif
#if TALPA_MISTAKE != 5
  template <class T, class B>
  saved<T, B> forward(talpa::context<B>&, const state<T, B>&, talpa::input<T, B>,
                      talpa::output<T, B>, talpa::mode, const talpa::batch_info<T, B>&) const {
    return {};
  }
#endif
#if TALPA_MISTAKE != 6
  template <class T, class B>
  void backward(talpa::context<B>&, state<T, B>&, const saved<T, B>&, talpa::input<T, B>,
                talpa::input<T, B>, talpa::output<T, B>, talpa::grad_mode) const {}
#endif
};

talpa::router<policy, talpa::dense> made;
