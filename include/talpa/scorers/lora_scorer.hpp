// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/low_rank.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/scorers/explain.hpp>

#include <string>
#include <utility>

namespace talpa {

/// Scorer that is another with a low-rank update: logits = Inner(x) + s B A dropout(x),
/// s = alpha / r or alpha / sqrt(r).
///
/// Backward, with u = A dropout(x) and z = s u: dB += z^T dlogits, du = s dlogits B^T, dA += du^T
/// dropout(x), dx = that of Inner + du A through the dropout mask.
/// Shapes: x [N, D], A [R, D], B transposed [R, E], logits [N, E]; saved: u [N, R].
/// Initialisation: that of Inner, A as init_a says, B zero, so that the first logits are those of
/// Inner. Inner trains until it is frozen.
/// Edges: dropout in training only, with a fresh stream of batch.random; Inner sees all of x. Noise
/// of Inner is not shown to losses: the update would be lacking in its clean logits;
/// noisy<lora_scorer<Inner>> shows its own.
/// Cost: that of Inner and 2 N R (D + E) flop forward, twice that backward.
/// Determinism: same bits for any number of threads.
/// Throws: value_error for a rank below 1, an alpha that is not finite, a dropout outside [0, 1),
/// or without a generator where dropout needs one; shape_error from the front doors of ops.
/// Source: Hu et al. 2021, LoRA (arXiv 2106.09685), on the router as in router tuning of Router
/// Lens (arXiv 2508.19594), rank 8 and alpha 32.
template <class Inner>
struct lora_scorer {
  static_assert(detail::explain_scorer<Inner>());

  static constexpr const char* name = "lora_scorer";

  index rank = 8;       ///< R, >= 1
  double alpha = 16.0;  ///< finite
  lora_scaling scaling = lora_scaling::by_rank;
  double dropout = 0.0;  ///< share of the input of A that is dropped, [0, 1)
  lora_init init_a = lora_init::kaiming;
  Inner inner{};  ///< what is adapted

  template <class T, class B>
  struct params {
    typename Inner::template params<T, B> inner;
    parameter<T, B> a;  // [R, D]
    parameter<T, B> b;  // [R, E]

    template <class F>
    void visit(F f) {
      inner.visit(f);
      f(a);
      f(b);
    }
  };

  template <class T, class B>
  struct saved {
    typename Inner::template saved<T, B> inner;
    matrix_view<T, B> u;  // [N, R]
    random_stream stream;
    bool drops;  // in training, with dropout
  };

  /// Parameters of Inner with `prefix`, then `prefix`lora.A and `prefix`lora.B.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    return adapt<T, B>(inner.template init<T, B>(inputs, experts, random, prefix), inputs, experts,
                       random, prefix);
  }
  /// The same on parameters of Inner that are there, which keep their trainability: freeze them
  /// first for adapter tuning.
  template <class T, class B>
  params<T, B> adapt(typename Inner::template params<T, B> base, index inputs, index experts,
                     generator& random, const std::string& prefix) const {
    detail::check_low_rank(name, rank, alpha, dropout);
    params<T, B> p;
    p.inner = std::move(base);
    p.a = parameter<T, B>(prefix + "lora.A",
                          detail::make_low_rank_a<T, B>(init_a, rank, inputs, rank, random));
    p.b = parameter<T, B>(prefix + "lora.B",
                          detail::make_low_rank_b<T, B>(init_a, rank, experts, random));
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory, an upper bound.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    std::size_t sum = workspace<B>::rounded(static_cast<std::size_t>(tokens * rank) * sizeof(T));
    if constexpr (requires { inner.template saved_bytes<T, B>(tokens, inputs, experts); }) {
      sum += inner.template saved_bytes<T, B>(tokens, inputs, experts);
    }
    return sum;
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode m, const batch_info<T, B>& batch) const {
    saved<T, B> kept{};
    kept.drops = m == mode::training && dropout > 0.0;
    if (kept.drops && batch.random == nullptr) {
      detail::throw_value(name, "batch.random", "null",
                          "a generator = source of the dropout mask in training");
    }
    kept.u = ctx.memory.template take<T>(x.rows, p.a.rows());
    kept.inner = inner.forward(ctx, p.inner, x, logits, m, batch);
    if (kept.drops) kept.stream = batch.random->next();
    const typename workspace<B>::scope scope(ctx.scratch);
    ops::gemm(ctx, dropped<T, B>(ctx, kept, x), transpose::no, p.a.value(), transpose::yes, T{0},
              kept.u);
    ops::gemm(ctx, scaled<T, B>(ctx, kept), transpose::no, p.b.value(), transpose::no, T{1},
              logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    inner.backward(ctx, p.inner, kept.inner, x, dlogits, dx, dx_mode);
    const typename workspace<B>::scope scope(ctx.scratch);
    if (p.b.trainable()) add_gradient(ctx, p.b, scaled<T, B>(ctx, kept), dlogits);
    const auto du = ctx.scratch.template take<T>(x.rows, p.a.rows());  // [N, R]
    ops::gemm(ctx, dlogits, transpose::no, p.b.value(), transpose::yes, T{0}, du);
    ops::scale(ctx, factor<T>(), du, du);
    if (p.a.trainable()) add_gradient(ctx, p.a, du, dropped<T, B>(ctx, kept, x));
    if (dx_mode == grad_mode::ignore) return;
    if (!kept.drops) {
      input_gradient(ctx, p.a, du, dx, grad_mode::accumulate);
      return;
    }
    const auto share = ctx.scratch.template take<T>(x.rows, x.cols);  // [N, D]
    input_gradient(ctx, p.a, du, share, grad_mode::overwrite);
    ops::dropout_backward(ctx, kept.stream, keep(), share, dx, grad_mode::accumulate);
  }

 private:
  float keep() const { return static_cast<float>(1.0 - dropout); }
  template <class T>
  T factor() const {
    return static_cast<T>(detail::low_rank_scale(scaling, alpha, rank));
  }

  /// x itself, or x after dropout in scratch of the caller's scope. [N, D]
  template <class T, class B>
  matrix_view<const T, B> dropped(context<B>& ctx, const saved<T, B>& kept, input<T, B> x) const {
    if (!kept.drops) return x;
    const auto rest = ctx.scratch.template take<T>(x.rows, x.cols);
    ops::dropout(ctx, kept.stream, keep(), x, rest);
    return rest;
  }
  /// z = s u, likewise. [N, R]
  template <class T, class B>
  matrix_view<const T, B> scaled(context<B>& ctx, const saved<T, B>& kept) const {
    const auto z = ctx.scratch.template take<T>(kept.u.rows, kept.u.cols);
    ops::scale(ctx, factor<T>(), kept.u, z);
    return z;
  }
};

}  // namespace talpa
