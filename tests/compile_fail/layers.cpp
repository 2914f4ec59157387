// SPDX-License-Identifier: Apache-2.0
// What layers ask beyond the concepts of their policies.
// expect 1: talpa: moe_ffn asks its expert for the width of a bank, add: template <class T, class B> talpa::index output_width(const params<T, B>&) const; (docs/policies/expert.md)
// expect 2: talpa: merge needs gates that sum to one, so that those of one expert are constant (docs/policies/selector.md)
// expect 3: talpa: infer takes at most one batch_info behind y
// expect 4: talpa: merge needs adapters whose gates do not depend on the token, those of placement::dense or single, or the one behind a router whose gates sum to one (docs/policies/placement.md)
// expect 5: talpa: merge makes one adapter of several lora or parallel_adapter, whose sum is one of more ranks (docs/policies/placement.md)
// expect 6: talpa: factored_ffn rescales by the share k / E of a selector with a member k, for others write rescale::none as its second argument
// expect 7: talpa: fused_perft_block takes a fused_moe_ffn as its base, for others see perft_block (docs/cuda.md)
// expect 8: talpa: fused_perft_block knows placement::embedded, dense and single, and routed and base_weighted with a router of a linear_scorer, for others see perft_block (docs/cuda.md)
// expect 9: talpa: fused_perft_block takes selectors that read the logits of a token alone
// expect 10: talpa: fused_perft_block takes lora or parallel_adapter as its adapter, for others see perft_block (docs/cuda.md)
// expect 11: talpa: fused_factored_ffn rescales by the share k / E of a selector with a member k, for others write rescale::none as its second argument
#include <talpa/cpu/gemm.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/shared_lora.hpp>
#include <talpa/layers/factored_ffn.hpp>
#include <talpa/layers/fused_factored_ffn.hpp>
#include <talpa/layers/fused_perft_block.hpp>
#include <talpa/layers/infer.hpp>
#include <talpa/layers/merge.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/layers/perft_block.hpp>
#include <talpa/placements/dense.hpp>
#include <talpa/placements/embedded.hpp>
#include <talpa/placements/routed.hpp>
#include <talpa/scorers/cosine_scorer.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/expert_choice.hpp>
#include <talpa/selectors/top_k.hpp>

#ifndef TALPA_MISTAKE
#define TALPA_MISTAKE 0
#endif

using talpa::cpu;

struct wide : talpa::swiglu {
#if TALPA_MISTAKE == 1
  template <class T, class B>
  talpa::index output_width(const params<T, B>&) const = delete;
#endif
};
talpa::moe_ffn<talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::raw>>, wide> made;

#if TALPA_MISTAKE == 2
using weight = talpa::gate::raw;
#else
using weight = talpa::gate::renormalised;
#endif
using mole =
    talpa::mole_linear<talpa::router<talpa::linear_scorer, talpa::top_k<weight>>, talpa::lora>;
auto merged(talpa::context<cpu>& ctx, const mole& layer, const mole::params<float, cpu>& p) {
  return talpa::merge(ctx, layer, p);
}

#if TALPA_MISTAKE == 4
using place = talpa::placement::embedded;
#else
using place = talpa::placement::dense;
#endif
#if TALPA_MISTAKE == 5
using adapter = talpa::shared_a_lora;
#else
using adapter = talpa::lora;
#endif
using block =
    talpa::perft_block<talpa::moe_ffn<talpa::router<talpa::linear_scorer, talpa::top_k<weight>>>,
                       place, adapter>;
auto one_adapter(const block& layer, const block::params<float, cpu>& p) {
  return talpa::merge(layer, p);
}

/// Forwards nothing.
struct idle {
  template <class... Arguments>
  void forward(Arguments&&...) const {}
};
void nothing(talpa::context<cpu>& ctx, float x, float y) {
#if TALPA_MISTAKE == 3
  talpa::infer(ctx, idle{}, 0, x, y, 1, 2);
#else
  talpa::infer(ctx, idle{}, 0, x, y, 1);
#endif
}

#if TALPA_MISTAKE == 6
using compensation = talpa::rescale::exact;
#else
using compensation = talpa::rescale::none;
#endif
talpa::factored_ffn<talpa::router<talpa::linear_scorer, talpa::dense>, compensation> soft;

#if TALPA_MISTAKE == 7
using stored_base = talpa::moe_ffn<talpa::router<talpa::linear_scorer, talpa::top_k<weight>>>;
#else
using stored_base = talpa::fused_moe_ffn<talpa::top_k<weight>>;
#endif
#if TALPA_MISTAKE == 8
using scorer = talpa::cosine_scorer;
#else
using scorer = talpa::linear_scorer;
#endif
#if TALPA_MISTAKE == 9
using selector = talpa::expert_choice;
#else
using selector = talpa::top_k<weight>;
#endif
#if TALPA_MISTAKE == 10
using stored_adapter = talpa::shared_a_lora;
#else
using stored_adapter = talpa::lora;
#endif
talpa::fused_perft_block<stored_base, talpa::placement::routed<talpa::router<scorer, selector>>,
                         stored_adapter>
    stored;

#if TALPA_MISTAKE == 11
using stored_compensation = talpa::rescale::exact;
#else
using stored_compensation = talpa::rescale::none;
#endif
talpa::fused_factored_ffn<talpa::dense, stored_compensation> stored_soft;
