// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/copy.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/mix_logits.hpp>
#include <talpa/scorers/explain.hpp>

#include <array>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa {

/// Scorer that mixes R scorers of one type: a learned main router weighs the sub-routers for each
/// token.
///
/// Forward: a_r = Inner_r(x), b = x W^T, g = softmax(b) over all r, or over the top_m largest b and
/// 0 elsewhere. mix::probability: logits = ln sum_r g_r softmax(a_r), so that the softmax of a
/// selector gives the mixed probabilities themselves; mix::logit: logits = sum_r g_r a_r.
/// Backward: to every a_r with g_r > 0, through g to b and W, and to x through all of them; which
/// sub-routers are kept is a constant. Losses on the sub-routers or the main router read
/// `main_view` and `sub_view` and hand their gradients to backward in `extra`.
/// Shapes: x [N, D], W [R, D], b [N, R], a_r and logits [N, E].
/// Initialisation: W uniform in +-1 / sqrt(D), the sub-routers one after another as Inner says.
/// Edges: R = 1 gives the logits of Inner bit for bit; equal sub-routers give, to rounding,
/// its softmax (probability) or its logits (logit); ties of b go to the lower index; top_m = 1
/// makes g constant, so W gets a gradient from losses only. NaN in b gives NaN.
/// Cost: R inner scorers, 2 N D R flop, and two exponentials for each of N R E sub-logits with
/// mix::probability; keeps N (R E + E + 4 R) numbers and what the R scorers keep.
/// Determinism: same bits for any number of threads.
/// Throws: value_error for sub_routers or top_m out of range; what Inner throws.
/// Source: Mixture of Routers (arXiv 2503.23362). No code is public; the paper fixes neither the
/// space of the mixture nor R nor top_m, so all are options. Defaults: three sub-routers, all kept.
template <class Mix, class Inner>
struct mixture_of_routers {
  static_assert(detail::explain_scorer<Inner>());

  static constexpr const char* name = "mixture_of_routers";
  static constexpr index max_sub_routers = 16;

  index sub_routers = 3;  ///< R, 1..16
  index top_m = 0;        ///< sub-routers that count for a token, 1..R, or 0 for all
  Inner inner{};          ///< what each sub-router is

  template <class T, class B>
  struct params {
    affine_params<T, B> main;                                // W [R, D]
    std::vector<typename Inner::template params<T, B>> sub;  // R of them

    template <class F>
    void visit(F f) {
      main.visit(f);
      for (auto& p : sub) p.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    std::array<typename Inner::template saved<T, B>, max_sub_routers> sub;
    matrix_view<T, B> sub_logits;        // [N, R E], router by router
    matrix_view<T, B> main_logits;       // [N, R]
    mix_weights<T, B> weights;           // gates and their logarithms [N, R]
    matrix_view<std::uint32_t, B> kept;  // [N, ceil(R / 32)]
    matrix_view<T, B> normaliser;        // [N, R]
    matrix_view<T, B> logits;            // [N, E]
    vector_view<const std::uint8_t, B> padding_mask;
    index sequence_length = 0;
    vector_view<const std::int32_t, B> labels;
  };

  /// Gradients of losses on what is inside; either may be empty.
  template <class T, class B>
  struct inner_gradient {
    matrix_view<const T, B> dmain;  // [N, R]
    matrix_view<const T, B> dsub;   // [N, R E]
  };

  /// Parameters named `prefix`main.weight, then `prefix`sub0.* and so on.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    check_range(name, "sub_routers", sub_routers, 1, max_sub_routers, "sub-routers of a mixture");
    check_range(name, "top_m", top_m, 0, sub_routers, "sub-routers, or 0 for all");
    params<T, B> p;
    p.main = init_affine<T, B>(inputs, sub_routers, false, true, random, prefix + "main.");
    for (index r = 0; r < sub_routers; ++r) {
      p.sub.push_back(inner.template init<T, B>(
          inputs, experts, random, detail::concat(prefix, "sub", std::to_string(r), ".")));
    }
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory, an upper bound.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    const auto bytes = [](index count, std::size_t size) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * size);
    };
    std::size_t sum = bytes(tokens * sub_routers * experts, sizeof(T)) +
                      4 * bytes(tokens * sub_routers, sizeof(T)) +
                      bytes(tokens * mask_words(sub_routers), sizeof(std::uint32_t)) +
                      bytes(tokens * experts, sizeof(T));
    if constexpr (requires { inner.template saved_bytes<T, B>(tokens, inputs, experts); }) {
      sum += static_cast<std::size_t>(sub_routers) *
             inner.template saved_bytes<T, B>(tokens, inputs, experts);
    }
    return sum;
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode m, const batch_info<T, B>& batch) const {
    const index n = x.rows, e = logits.cols;
    saved<T, B> kept{};
    kept.sub_logits = ctx.memory.template take<T>(n, sub_routers * e);
    kept.main_logits = ctx.memory.template take<T>(n, sub_routers);
    kept.weights.gates = ctx.memory.template take<T>(n, sub_routers);
    kept.weights.log_gates = ctx.memory.template take<T>(n, sub_routers);
    kept.kept = ctx.memory.template take<std::uint32_t>(n, mask_words(sub_routers));
    kept.normaliser = ctx.memory.template take<T>(n, sub_routers);
    kept.logits = ctx.memory.template take<T>(n, e);
    kept.padding_mask = batch.padding_mask;
    kept.sequence_length = batch.sequence_length;
    kept.labels = batch.labels;
    for (index r = 0; r < sub_routers; ++r) {
      const auto i = static_cast<std::size_t>(r);
      kept.sub[i] = inner.forward(ctx, p.sub[i], x, kept.sub_logits.col_range(r * e, e), m, batch);
    }
    affine_forward(ctx, p.main, x, kept.main_logits);
    ops::mix_gates(ctx, top_m == 0 ? sub_routers : top_m, kept.main_logits, kept.weights,
                   kept.kept);
    ops::mix_logits(ctx, Mix{}, kept.sub_logits, kept.weights, kept.normaliser, kept.logits);
    ops::copy(ctx, kept.logits, logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode,
                const std::type_identity_t<inner_gradient<T, B>>& extra = {}) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const index e = dlogits.cols;
    const auto dsub = ctx.scratch.template take<T>(x.rows, sub_routers * e);  // [N, R E]
    const auto dlog_gates = ctx.scratch.template take<T>(x.rows, sub_routers);
    const auto dmain = ctx.scratch.template take<T>(x.rows, sub_routers);
    ops::mix_logits_backward(ctx, Mix{}, kept.sub_logits, kept.weights, kept.normaliser,
                             kept.logits, dlogits, dsub, dlog_gates);
    ops::mix_gates_backward(ctx, kept.weights.gates, dlog_gates, dmain);
    if (!extra.dmain.empty()) ops::axpy(ctx, T{1}, extra.dmain, dmain);
    if (!extra.dsub.empty()) ops::axpy(ctx, T{1}, extra.dsub, dsub);
    affine_backward(ctx, p.main, x, dmain, dx, dx_mode);
    const grad_mode then = dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate;
    for (index r = 0; r < sub_routers; ++r) {
      const auto i = static_cast<std::size_t>(r);
      inner.backward(ctx, p.sub[i], kept.sub[i], x, dsub.col_range(r * e, e), dx, then);
    }
  }

  /// The main router as losses read it: R columns, gates g, the kept sub-routers in the mask.
  template <class T, class B>
  static routed_view<T, B> main_view(const saved<T, B>& kept) {
    return {kept.main_logits,
            routing_view<T, B>(kept.weights.gates, kept.kept),
            kept.padding_mask,
            kept.sequence_length,
            {},
            kept.labels};
  }
  /// Sub-router r as losses on logits read it: it selects nothing, so gates and mask are zeros,
  /// taken from ctx.memory.
  template <class T, class B>
  static routed_view<T, B> sub_view(context<B>& ctx, const saved<T, B>& kept, index r) {
    const index n = kept.logits.rows, e = kept.logits.cols;
    const auto gates = ctx.memory.template take<T>(n, e);
    const auto mask = ctx.memory.template take<std::uint32_t>(n, mask_words(e));
    ops::fill(ctx, T{0}, gates);
    ops::fill(ctx, std::uint32_t{0}, mask);
    return {kept.sub_logits.col_range(r * e, e),
            routing_view<T, B>(gates, mask),
            kept.padding_mask,
            kept.sequence_length,
            {},
            kept.labels};
  }
};

}  // namespace talpa
