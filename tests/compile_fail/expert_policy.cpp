// SPDX-License-Identifier: Apache-2.0
// An expert that lacks something is told what, with the signature and the page.
// expect 1: talpa: an expert needs a name and validate, add: static constexpr const char* name = ...; void validate() const; (docs/policies/expert.md)
// expect 2: talpa: an expert needs its bank and what backward reads, add: template <class T, class B> struct params; and a trivially destructible saved; (docs/policies/expert.md)
// expect 3: talpa: an expert needs init, add: template <class T, class B> params<T, B> init(index inputs, index outputs, index experts, generator&, const std::string& prefix) const; (docs/policies/expert.md)
// expect 4: talpa: an expert says its size, add: index width() const; double input_dropout() const; (docs/policies/expert.md)
// expect 5: talpa: an expert needs forward_grouped, add: template <class T, class B> saved<T, B> forward_grouped(context<B>&, const params<T, B>&, const segments<B>&, vector_input<T, B> gates, input<T, B> x, output<T, B> y) const; (docs/policies/expert.md)
// expect 6: talpa: an expert needs backward_grouped, see the exact signature (docs/policies/expert.md)
// expect 7: talpa: mole_linear gates its experts in rank space, the expert needs forward_masked and backward_masked (docs/policies/expert.md)
#include <talpa/layers/mole_linear.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>

#ifndef TALPA_MISTAKE
#define TALPA_MISTAKE 0
#endif

using talpa::context, talpa::grad_mode, talpa::input, talpa::output, talpa::segments,
    talpa::vector_input, talpa::vector_output;

template <class T, class B>
struct state {
  template <class F>
  void visit(F) {}
};

struct policy {
#if TALPA_MISTAKE != 1
  static constexpr const char* name = "policy";
#endif
  void validate() const {}
#if TALPA_MISTAKE != 2
  template <class T, class B>
  using params = state<T, B>;
#endif
  template <class T, class B>
  struct saved {};
#if TALPA_MISTAKE != 3
  template <class T, class B>
  state<T, B> init(talpa::index, talpa::index, talpa::index, talpa::generator&,
                   const std::string&) const {
    return {};
  }
#endif
#if TALPA_MISTAKE != 4
  talpa::index width() const { return 1; }
#endif
  double input_dropout() const { return 0.0; }
#if TALPA_MISTAKE != 5
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>&, const state<T, B>&, const segments<B>&,
                              vector_input<T, B>, input<T, B>, output<T, B>) const {
    return {};
  }
#endif
#if TALPA_MISTAKE != 6
  template <class T, class B>
  void backward_grouped(context<B>&, state<T, B>&, const saved<T, B>&, const segments<B>&,
                        vector_input<T, B>, input<T, B>, input<T, B>, vector_output<T, B>,
                        output<T, B>, grad_mode) const {}
#endif
#if TALPA_MISTAKE != 7
  template <class T, class B>
  saved<T, B> forward_masked(context<B>&, const state<T, B>&, input<T, B>, input<T, B>,
                             output<T, B>) const {
    return {};
  }
  template <class T, class B>
  void backward_masked(context<B>&, state<T, B>&, const saved<T, B>&, input<T, B>, input<T, B>,
                       input<T, B>, output<T, B>, output<T, B>, grad_mode) const {}
#endif
};

talpa::mole_linear<talpa::router<talpa::linear_scorer, talpa::dense>, policy> made;
