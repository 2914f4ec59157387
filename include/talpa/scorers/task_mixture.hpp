// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/copy.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/mix_logits.hpp>
#include <talpa/ops/sequence_rows.hpp>
#include <talpa/scorers/explain.hpp>

#include <cmath>
#include <string>

namespace talpa {

/// Scorer that mixes the probabilities of a token's own scorer with those of the task of its
/// sequence.
///
/// Forward: p = softmax(Token(x)), t = softmax(Task(row of the sequence)), the rows being
/// batch.conditioning, one a sequence; logits = ln ((1 - s) p + s t) with s = sigmoid(alpha), so
/// that the softmax of a selector gives the mixture itself.
/// Backward: to both scorers, the task's summed over the tokens of a sequence in order; to x, and
/// to the rows (added to conditioning.drows, where that is not empty). alpha is a constant.
/// Shapes: x [N, D], conditioning.rows [S, C], logits [N, E].
/// Edges: alpha far below 0 leaves the token's scorer, far above 0 the task's, both in the limit.
/// NaN or +inf, or -inf everywhere, in either scorer gives NaN.
/// Cost: both scorers and four exponentials a logit; keeps N (3 E + 6) + S E numbers and what the
/// scorers keep.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error unless there is exactly one conditioning row of width C a sequence;
/// value_error where rows are marked present or absent, for an alpha that is not finite or a width
/// below 1; what the scorers throw.
/// Source: HMoRA (ICLR 2025, openreview lTkHiXeuDl); alpha grows linearly with depth, see
/// `alpha_at`. Its code adds 1e-9 inside logarithms; here nothing is added.
template <class Token, class Task>
struct task_mixture {
  static_assert(detail::explain_scorer<Token>() && detail::explain_scorer<Task>());

  static constexpr const char* name = "task_mixture";

  double alpha = 0.0;  ///< weight of the task before the sigmoid, finite
  Token token{};       ///< scores a token
  Task task{};         ///< scores the row of a sequence
  index width = 0;     ///< C, >= 1

  /// alpha of layer 0..layers - 1: from -a in the first to +a in the last, 0 for a single layer.
  static double alpha_at(index layer, index layers, double a) {
    check_at_least(name, "layers", layers, 1, "layers of the model");
    check_range(name, "layer", layer, 0, layers - 1, "last layer");
    if (layers == 1) return 0.0;
    return a * (2.0 * static_cast<double>(layer) / static_cast<double>(layers - 1) - 1.0);
  }

  template <class T, class B>
  struct params {
    typename Token::template params<T, B> token;
    typename Task::template params<T, B> task;

    template <class F>
    void visit(F f) {
      token.visit(f);
      task.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    typename Token::template saved<T, B> token;
    typename Task::template saved<T, B> task;
    conditioning<T, B> beside;     // of the batch
    matrix_view<T, B> both;        // [N, 2 E] logits of the token, of the task
    mix_weights<T, B> weights;     // [N, 2]
    matrix_view<T, B> normaliser;  // [N, 2]
    matrix_view<T, B> logits;      // [N, E]
    index sequences = 0;
  };

  /// Parameters named `prefix`token.* and `prefix`task.*.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    check_value(std::isfinite(alpha), name, "alpha", alpha, "a finite number");
    check_at_least(name, "width", width, 1, "columns of the conditioning rows");
    params<T, B> p;
    p.token = token.template init<T, B>(inputs, experts, random, prefix + "token.");
    p.task = task.template init<T, B>(width, experts, random, prefix + "task.");
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory, an upper bound: every token may be a
  /// sequence.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    const auto bytes = [](index count) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * sizeof(T));
    };
    std::size_t sum =
        bytes(2 * tokens * experts) + 3 * bytes(2 * tokens) + 2 * bytes(tokens * experts);
    if constexpr (requires { token.template saved_bytes<T, B>(tokens, inputs, experts); }) {
      sum += token.template saved_bytes<T, B>(tokens, inputs, experts);
    }
    if constexpr (requires { task.template saved_bytes<T, B>(tokens, width, experts); }) {
      sum += task.template saved_bytes<T, B>(tokens, width, experts);
    }
    return sum;
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode m, const batch_info<T, B>& batch) const {
    check_batch(name, batch, x.rows, logits.cols);
    const index n = x.rows, e = logits.cols;
    saved<T, B> kept{};
    kept.beside = batch.conditioning;
    kept.sequences = batch.sequences(n);
    if (kept.sequences == 0) return kept;
    check_shape(name, "conditioning.rows", kept.beside.rows, kept.sequences, width,
                "sequences, width of the task");
    if (!kept.beside.present.empty()) {
      detail::throw_value(name, "conditioning.present", "given",
                          "empty = every sequence has its task");
    }
    kept.both = ctx.memory.template take<T>(n, 2 * e);
    kept.weights.gates = ctx.memory.template take<T>(n, 2);
    kept.weights.log_gates = ctx.memory.template take<T>(n, 2);
    kept.normaliser = ctx.memory.template take<T>(n, 2);
    kept.logits = ctx.memory.template take<T>(n, e);
    const auto task_logits = ctx.memory.template take<T>(kept.sequences, e);
    kept.token = token.forward(ctx, p.token, x, kept.both.col_range(0, e), m, batch);
    kept.task = task.forward(ctx, p.task, kept.beside.rows, task_logits, m, task_batch(batch));
    ops::repeat_rows(ctx, task_logits, kept.both.col_range(e, e));
    const T a = static_cast<T>(alpha);
    ops::fill(ctx, math::sigmoid(-a), kept.weights.gates.col_range(0, 1));
    ops::fill(ctx, math::sigmoid(a), kept.weights.gates.col_range(1, 1));
    ops::fill(ctx, -math::softplus(a), kept.weights.log_gates.col_range(0, 1));
    ops::fill(ctx, -math::softplus(-a), kept.weights.log_gates.col_range(1, 1));
    ops::mix_logits(ctx, mix::probability{}, kept.both, kept.weights, kept.normaliser, kept.logits);
    ops::copy(ctx, kept.logits, logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    if (kept.sequences == 0) return;
    const typename workspace<B>::scope scope(ctx.scratch);
    const index e = dlogits.cols;
    const auto dboth = ctx.scratch.template take<T>(x.rows, 2 * e);      // [N, 2 E]
    const auto dweights = ctx.scratch.template take<T>(x.rows, 2);       // [N, 2], not used
    const auto dtask = ctx.scratch.template take<T>(kept.sequences, e);  // [S, E]
    ops::mix_logits_backward(ctx, mix::probability{}, kept.both, kept.weights, kept.normaliser,
                             kept.logits, dlogits, dboth, dweights);
    ops::sum_rows(ctx, dboth.col_range(e, e), dtask);
    token.backward(ctx, p.token, kept.token, x, dboth.col_range(0, e), dx, dx_mode);
    const bool wanted = !kept.beside.drows.empty();
    task.backward(ctx, p.task, kept.task, kept.beside.rows, dtask, kept.beside.drows,
                  wanted ? grad_mode::accumulate : grad_mode::ignore);
  }

 private:
  /// The batch of the task's scorer: its tokens are the sequences.
  template <class T, class B>
  static batch_info<T, B> task_batch(const batch_info<T, B>& batch) {
    batch_info<T, B> rows;
    rows.random = batch.random;
    return rows;
  }
};

}  // namespace talpa
