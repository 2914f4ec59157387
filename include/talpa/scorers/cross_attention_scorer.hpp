// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/sequence_rows.hpp>
#include <talpa/scorers/explain.hpp>

#include <cmath>
#include <string>

namespace talpa {

/// Scorer that lets one token of a sequence ask the rows beside the sequence, such as the text that
/// belongs to an image: all tokens of a sequence have the same logits.
///
/// Forward, for each sequence with rows H_t [L, C] of batch.conditioning: q = token `query_row` of
/// the sequence, a = softmax over present rows of q H_t^T / sqrt(C), u = a H_t, logits of all its
/// tokens = u G^T. There are no projections of queries, keys or values.
/// Backward: dlogits are summed over the tokens of a sequence, in order; dG += drow^T u, and
/// through u to H_t (added to conditioning.drows, where that is not empty), and through a to H_t
/// and to the query row of x. Other rows of x get zero.
/// Shapes: x [N, C], H_t [S L, C], present [S L] or empty, G [E, C], logits [N, E].
/// Initialisation: G uniform in +-1 / sqrt(C).
/// Edges: a sequence without present rows, or L = 0, has u = 0 and logits 0: uniform; L = 1 gives
/// a = 1 and the query no gradient. Large scores saturate to one row without overflow.
/// Cost: S (4 L C + 2 C E) flop; keeps S (L + C + E) numbers.
/// Determinism: same bits for any number of threads.
/// Throws: value_error for a query_row outside a sequence or conditioning rows that sequences do
/// not divide; shape_error when C is not the width of x.
/// Source: Parrot (arXiv 2406.02539), whose query is the class token of the vision tower, row 0,
/// and whose text is the embedded prompt without padding, image places and answer. Its code takes
/// sqrt(C) in float32; ours is in T.
struct cross_attention_scorer {
  static constexpr const char* name = "cross_attention_scorer";

  index query_row = 0;  ///< token of each sequence that asks, 0..sequence length - 1

  template <class T, class B>
  using params = affine_params<T, B>;  // G [E, C]

  template <class T, class B>
  struct saved {
    conditioning<T, B> beside;    // of the batch
    matrix_view<T, B> attention;  // [S, L]
    matrix_view<T, B> summary;    // u [S, C]
    matrix_view<T, B> logits;     // [S, E]
    index sequences = 0;
  };

  /// Parameter named `prefix`weight.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    check_at_least(name, "query_row", query_row, 0, "token of a sequence");
    return init_affine<T, B>(inputs, experts, false, true, random, prefix);
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory, an upper bound but for the attention
  /// [S, L], whose length only the batch knows.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    const auto bytes = [](index count) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * sizeof(T));
    };
    return bytes(tokens * inputs) + bytes(tokens * experts);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode, const batch_info<T, B>& batch) const {
    check_batch(name, batch, x.rows, logits.cols);
    saved<T, B> kept{};
    kept.beside = batch.conditioning;
    kept.sequences = batch.sequences(x.rows);
    if (kept.sequences == 0) return kept;
    check_range(name, "query_row", query_row, 0, x.rows / kept.sequences - 1,
                "last token of a sequence");
    if (kept.beside.rows.rows > 0) {
      check_shape(name, "conditioning.rows", kept.beside.rows, kept.beside.rows.rows, x.cols,
                  "rows, width of the tokens");
    } else {
      // No text at all: any width.
      kept.beside.rows = {nullptr, 0, x.cols};
    }
    kept.attention =
        ctx.memory.template take<T>(kept.sequences, kept.beside.rows.rows / kept.sequences);
    kept.summary = ctx.memory.template take<T>(kept.sequences, x.cols);
    kept.logits = ctx.memory.template take<T>(kept.sequences, logits.cols);
    ops::attend_rows(ctx, scale<T>(x.cols), queries(x, kept.sequences), kept.beside.rows,
                     kept.beside.present, kept.attention, kept.summary);
    affine_forward(ctx, p, kept.summary, kept.logits);
    ops::repeat_rows(ctx, kept.logits, logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    if (kept.sequences == 0) return;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto drow = ctx.scratch.template take<T>(kept.sequences, dlogits.cols);  // [S, E]
    const auto du = ctx.scratch.template take<T>(kept.sequences, x.cols);          // [S, C]
    ops::sum_rows(ctx, dlogits, drow);
    affine_backward(ctx, p, kept.summary, drow, du, grad_mode::overwrite);
    if (dx_mode == grad_mode::overwrite) ops::fill(ctx, T{0}, dx);
    const output<T, B> dq =
        dx_mode == grad_mode::ignore ? matrix_view<T, B>() : queries(dx, kept.sequences);
    ops::attend_rows_backward(ctx, scale<T>(x.cols), queries(x, kept.sequences), kept.beside.rows,
                              kept.attention, du, dq, dx_mode, kept.beside.drows);
  }

 private:
  template <class T>
  static T scale(index width) {
    return static_cast<T>(1.0 / std::sqrt(static_cast<double>(width)));
  }
  /// Token query_row of each sequence [S, C], in place.
  template <class T, class B>
  matrix_view<T, B> queries(matrix_view<T, B> x, index sequences) const {
    return {x.row(query_row), sequences, x.cols, x.rows / sequences * x.stride};
  }
};

static_assert(scorer_policy<cross_attention_scorer>);

}  // namespace talpa
