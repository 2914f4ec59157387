// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/noise.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/ops/sequence_rows.hpp>
#include <talpa/scorers/explain.hpp>

#include <string>

namespace talpa {

/// Scorer by the cluster of a sequence: all tokens of a sequence have the same logits, which depend
/// on its label alone.
///
/// Forward: logits of every token of sequence s = (M[labels_s] W^T + b + noise z) / temperature,
/// with z normal numbers from a fresh stream of batch.random in training, nothing at inference.
/// Backward: dlogits are summed over the tokens of a sequence, in order, and divided by the
/// temperature; then to W, b and the rows of M. dx is zero.
/// Shapes: labels [S], M [clusters, n], W [E, n], b [1, E], logits [N, E].
/// Initialisation: M normal with deviation 1, or copy the centroids of your clusters in and freeze
/// it; W uniform in +-1 / sqrt(n), b zero.
/// Edges: no tokens read no label. Padding does not change the row of a sequence.
/// Cost: 2 S n E flop; keeps S (n + E) numbers.
/// Determinism: same bits for the same stream, for any number of threads.
/// Throws: shape_error where labels are missing; value_error for hyperparameters or a label out of
/// range, or without a generator in training where noise > 0.
/// Source: MoCLE (arXiv 2312.12379), whose M holds embeddings of k-means centroids, with
/// temperature 0.05 and noise 0.1 in its code. The code's softmax is in float16, which overflows;
/// ours is in T.
struct cluster_scorer {
  static constexpr const char* name = "cluster_scorer";

  index clusters = 64;        ///< rows of M, >= 1
  index width = 384;          ///< n, >= 1
  double temperature = 0.05;  ///< what logits are divided by, > 0
  double noise = 0.0;         ///< deviation of the noise in training, >= 0
  bool bias = true;           ///< whether b exists

  template <class T, class B>
  struct params {
    parameter<T, B> embedding;  // M [clusters, n]
    affine_params<T, B> gate;   // W [E, n], b [1, E]

    template <class F>
    void visit(F f) {
      f(embedding);
      gate.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    vector_view<const std::int32_t, B> labels;  // [S], of the batch
    matrix_view<T, B> rows;                     // [S, n] M[labels]
    matrix_view<T, B> logits;                   // [S, E]
  };

  /// Parameters named `prefix`embedding, `prefix`gate.weight, `prefix`gate.bias.
  template <class T, class B>
  params<T, B> init(index, index experts, generator& random, const std::string& prefix) const {
    check_at_least(name, "clusters", clusters, 1, "rows of the embedding");
    check_at_least(name, "width", width, 1, "columns of the embedding");
    check_value(temperature > 0.0, name, "temperature", temperature, "> 0");
    check_value(noise >= 0.0, name, "noise", noise, ">= 0");
    params<T, B> p;
    matrix<T, B> m(clusters, width);
    fill_normal(m.view(), 1.0, random);
    p.embedding = parameter<T, B>(prefix + "embedding", std::move(m));
    p.gate = init_affine<T, B>(width, experts, bias, true, random, prefix + "gate.");
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory, an upper bound: every token may be a
  /// sequence.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index, index experts) const {
    const auto bytes = [](index count) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * sizeof(T));
    };
    return bytes(tokens * width) + bytes(tokens * experts);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode m, const batch_info<T, B>& batch) const {
    check_sequence_length(name, batch.sequence_length, x.rows);
    const index sequences = batch.sequences(x.rows);
    check_size(name, "batch.labels", batch.labels, sequences, "one cluster a sequence");
    saved<T, B> kept{batch.labels, ctx.memory.template take<T>(sequences, width),
                     ctx.memory.template take<T>(sequences, logits.cols)};
    ops::lookup_rows(ctx, name, batch.labels, p.embedding.value(), kept.rows);
    affine_forward(ctx, p.gate, kept.rows, kept.logits);
    if (m == mode::training && noise > 0.0) {
      if (batch.random == nullptr) {
        detail::throw_value(name, "batch.random", "null",
                            "a generator = source of the noise in training");
      }
      ops::add_noise(ctx, batch.random->next(), noise, kept.logits, kept.logits);
    }
    ops::scale(ctx, static_cast<T>(1.0 / temperature), kept.logits, kept.logits);
    ops::repeat_rows(ctx, kept.logits, logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B>,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto drow = ctx.scratch.template take<T>(kept.rows.rows, dlogits.cols);  // [S, E]
    const auto dembedding = ctx.scratch.template take<T>(kept.rows.rows, width);   // [S, n]
    ops::sum_rows(ctx, dlogits, drow);
    ops::scale(ctx, static_cast<T>(1.0 / temperature), drow, drow);
    affine_backward(ctx, p.gate, kept.rows, drow, dembedding, grad_mode::overwrite);
    for (const row_run& run : p.embedding.trained()) {
      ops::lookup_rows_backward(ctx, kept.labels, dembedding, run.first,
                                p.embedding.grad().row_range(run.grad_first, run.rows));
    }
    if (dx_mode == grad_mode::overwrite) ops::fill(ctx, T{0}, dx);
  }
};

static_assert(scorer_policy<cluster_scorer>);

}  // namespace talpa
