// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/copy.hpp>
#include <talpa/ops/noise.hpp>
#include <talpa/scorers/explain.hpp>

#include <string>
#include <type_traits>

namespace talpa {

/// Scorer that adds learned normal noise to the logits of another, in training only.
///
/// Forward: clean = Inner(x), r = x Wn^T, deviation = softplus(r) + floor, logits = clean + z
/// deviation with z normal numbers from a fresh stream of batch.random. At inference the logits are
/// the clean ones.
/// Backward: dclean = dlogits, dr = dlogits z sigmoid(r), dWn += dr^T x, dx gets dr Wn; z is drawn
/// again. Losses on the chance to be selected (load_cv2) read the clean logits and the deviation
/// (`noise`); with their gradients dclean += dclean', dr += ddeviation' sigmoid(r).
/// Shapes: x [N, D], Wn [E, D], logits, clean and deviation [N, E].
/// Initialisation: Wn zero, so the deviation begins at ln 2 + floor for every token.
/// Edges: at inference Wn gets no gradient and no number is drawn.
/// Cost: that of Inner, 2 N D E flop and a normal number for each logit; keeps 3 N E numbers in
/// training.
/// Determinism: same bits for the same stream, for any number of threads.
/// Throws: value_error without a generator in training, or for a negative floor.
/// Source: Shazeer et al. 2017 (arXiv 1701.06538) section 4; floor 0.01 and the zero start as in
/// LLaMA-MoE (arXiv 2406.16554).
template <class Inner>
struct noisy {
  static_assert(detail::explain_scorer<Inner>());

  static constexpr const char* name = "noisy";

  double floor = 0.01;  ///< least deviation, >= 0
  Inner inner{};        ///< what makes the clean logits

  template <class T, class B>
  struct params {
    typename Inner::template params<T, B> inner;
    affine_params<T, B> noise;  // Wn [E, D]

    template <class F>
    void visit(F f) {
      inner.visit(f);
      noise.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    typename Inner::template saved<T, B> inner;
    matrix_view<T, B> clean;      // [N, E], empty at inference
    matrix_view<T, B> raw;        // [N, E] x Wn^T, likewise
    matrix_view<T, B> deviation;  // [N, E], likewise
    random_stream stream;
    bool active;  // in training
  };

  /// Parameters of Inner with `prefix`, then `prefix`noise.weight.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    check_value(floor >= 0.0, name, "floor", floor, ">= 0");
    params<T, B> p;
    p.inner = inner.template init<T, B>(inputs, experts, random, prefix);
    p.noise.weight = parameter<T, B>(prefix + "noise.weight", matrix<T, B>(experts, inputs));
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory, an upper bound.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    std::size_t sum =
        3 * workspace<B>::rounded(static_cast<std::size_t>(tokens * experts) * sizeof(T));
    if constexpr (requires { inner.template saved_bytes<T, B>(tokens, inputs, experts); }) {
      sum += inner.template saved_bytes<T, B>(tokens, inputs, experts);
    }
    return sum;
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode m, const batch_info<T, B>& batch) const {
    saved<T, B> kept{};
    if (m == mode::inference) {
      kept.inner = inner.forward(ctx, p.inner, x, logits, m, batch);
      return kept;
    }
    if (batch.random == nullptr) {
      detail::throw_value(name, "batch.random", "null",
                          "a generator = source of the noise in training");
    }
    kept.active = true;
    kept.stream = batch.random->next();
    kept.clean = ctx.memory.template take<T>(x.rows, logits.cols);
    kept.raw = ctx.memory.template take<T>(x.rows, logits.cols);
    kept.deviation = ctx.memory.template take<T>(x.rows, logits.cols);
    kept.inner = inner.forward(ctx, p.inner, x, kept.clean, m, batch);
    affine_forward(ctx, p.noise, x, kept.raw);
    ops::add_learned_noise(ctx, kept.stream, floor, kept.clean, kept.raw, kept.deviation, logits);
    return kept;
  }

  /// What losses may read of a forward whose result was `logits`.
  template <class T, class B>
  routed_noise<T, B> noise(const saved<T, B>& kept, matrix_view<const T, B> logits) const {
    if (!kept.active) return {logits, {}};
    return {kept.clean, kept.deviation};
  }

  /// Either member of `extra`, the gradients of losses on `noise`, may be empty.
  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_noise_gradient<T, B>>& extra = {}) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    input<T, B> dclean = dlogits;
    if (!extra.dclean.empty()) {
      const auto sum = ctx.scratch.template take<T>(x.rows, dlogits.cols);  // [N, E]
      ops::copy(ctx, dlogits, sum);
      ops::axpy(ctx, T{1}, extra.dclean, sum);
      dclean = sum;
    }
    inner.backward(ctx, p.inner, kept.inner, x, dclean, dx, dx_mode);
    if (!kept.active) return;
    const auto draw = ctx.scratch.template take<T>(x.rows, dlogits.cols);  // [N, E]
    ops::add_learned_noise_backward(ctx, kept.stream, kept.raw, dlogits, extra.ddeviation, draw);
    affine_backward(ctx, p.noise, x, draw, dx,
                    dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate);
  }
};

/// Scorer that multiplies each number of its input by one from [1 - width, 1 + width), in training
/// only, and gives the result to another scorer.
///
/// Forward: logits = Inner(x u), u uniform from a fresh stream of batch.random, one number for each
/// element of x. x itself is left alone, so the experts see the clean tokens. At inference logits =
/// Inner(x).
/// Backward: dx = d(x u) u, with u drawn again.
/// Shapes: x [N, D], logits [N, E].
/// Edges: width 0 draws nothing and is Inner itself.
/// Cost: that of Inner and one uniform number for each element of x; keeps N D numbers in training.
/// Determinism: same bits for the same stream, for any number of threads.
/// Throws: value_error without a generator in training, or for a width outside [0, 1).
/// Source: Fedus et al. 2021, Switch Transformers (arXiv 2101.03961); width 0.01 as in its port to
/// transformers. Released code may multiply in place, which changes what the experts see, and at
/// inference; neither happens here.
template <class Inner>
struct jittered {
  static_assert(detail::explain_scorer<Inner>());

  static constexpr const char* name = "jittered";

  double width = 0.01;  ///< half the width of the interval round 1, [0, 1)
  Inner inner{};        ///< what scores the tokens

  template <class T, class B>
  using params = typename Inner::template params<T, B>;

  template <class T, class B>
  struct saved {
    typename Inner::template saved<T, B> inner;
    matrix_view<T, B> moved;  // [N, D] x u, empty where nothing was drawn
    random_stream stream;
    bool active;
  };

  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    check_value(width >= 0.0 && width < 1.0, name, "width", width, "a number in [0, 1)");
    return inner.template init<T, B>(inputs, experts, random, prefix);
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory, an upper bound.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    std::size_t sum = workspace<B>::rounded(static_cast<std::size_t>(tokens * inputs) * sizeof(T));
    if constexpr (requires { inner.template saved_bytes<T, B>(tokens, inputs, experts); }) {
      sum += inner.template saved_bytes<T, B>(tokens, inputs, experts);
    }
    return sum;
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx,
                      const std::type_identity_t<typename Inner::template params<T, B>>& p,
                      input<T, B> x, output<T, B> logits, mode m,
                      const batch_info<T, B>& batch) const {
    saved<T, B> kept{};
    if (m == mode::inference || width == 0.0) {
      kept.inner = inner.forward(ctx, p, x, logits, m, batch);
      return kept;
    }
    if (batch.random == nullptr) {
      detail::throw_value(name, "batch.random", "null",
                          "a generator = source of the jitter in training");
    }
    kept.active = true;
    kept.stream = batch.random->next();
    kept.moved = ctx.memory.template take<T>(x.rows, x.cols);
    ops::jitter(ctx, kept.stream, width, x, kept.moved);
    kept.inner = inner.forward(ctx, p, kept.moved, logits, m, batch);
    return kept;
  }

  /// What losses may read of the noise of Inner.
  template <class T, class B>
  requires noisy_scorer<Inner> routed_noise<T, B> noise(const saved<T, B>& kept,
                                                        matrix_view<const T, B> logits)
  const { return inner.noise(kept.inner, logits); }

  template <class T, class B>
  void backward(context<B>& ctx, std::type_identity_t<typename Inner::template params<T, B>>& p,
                const saved<T, B>& kept, input<T, B> x, input<T, B> dlogits, output<T, B> dx,
                grad_mode dx_mode) const {
    run_backward<T, B>(ctx, p, kept, x, dlogits, dx, dx_mode);
  }
  /// The same with gradients of losses on `noise`.
  template <class T, class B>
  requires noisy_scorer<Inner>
  void backward(context<B>& ctx, std::type_identity_t<typename Inner::template params<T, B>>& p,
                const saved<T, B>& kept, input<T, B> x, input<T, B> dlogits, output<T, B> dx,
                grad_mode dx_mode,
                const std::type_identity_t<routed_noise_gradient<T, B>>& extra) const {
    run_backward<T, B>(ctx, p, kept, x, dlogits, dx, dx_mode, extra);
  }

 private:
  template <class T, class B, class... Extra>
  void run_backward(context<B>& ctx, typename Inner::template params<T, B>& p,
                    const saved<T, B>& kept, input<T, B> x, input<T, B> dlogits, output<T, B> dx,
                    grad_mode dx_mode, const Extra&... extra) const {
    if (!kept.active) {
      inner.backward(ctx, p, kept.inner, x, dlogits, dx, dx_mode, extra...);
      return;
    }
    const typename workspace<B>::scope scope(ctx.scratch);
    matrix_view<T, B> dmoved;
    if (dx_mode != grad_mode::ignore) dmoved = ctx.scratch.template take<T>(x.rows, x.cols);
    inner.backward(ctx, p, kept.inner, kept.moved, dlogits, dmoved,
                   dx_mode == grad_mode::ignore ? dx_mode : grad_mode::overwrite, extra...);
    ops::jitter_backward(ctx, kept.stream, width, dmoved, dx, dx_mode);
  }
};

}  // namespace talpa
