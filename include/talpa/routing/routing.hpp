// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/ops/routing_sums.hpp>

#include <cstdint>
#include <type_traits>

namespace talpa {

/// Window on a routing: dense gates [N, E], zero where an expert is off, and one bit per expert and
/// token, bit e mod 32 of word e / 32 of the token's row [N, ceil(E / 32)]. A gate that is not zero
/// has its bit set; a set bit may have a zero gate.
template <class T, backend B>
struct routing_view {
  using word = std::conditional_t<std::is_const_v<T>, const std::uint32_t, std::uint32_t>;

  matrix_view<T, B> gates;    // [N, E]
  matrix_view<word, B> mask;  // [N, ceil(E / 32)]

  routing_view() = default;
  routing_view(matrix_view<T, B> gates_, matrix_view<word, B> mask_) : gates(gates_), mask(mask_) {}
  template <class U>
  requires std::same_as<T, const U> routing_view(
      const routing_view<U, B>& other)  // NOLINT: conversion intended
      : gates(other.gates), mask(other.mask) {}

  TALPA_HD index tokens() const { return gates.rows; }
  TALPA_HD index experts() const { return gates.cols; }
  /// Whether expert e is on for token n. Host memory only.
  bool on(index n, index e) const {
    return ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
  }
};

/// What a router decided for a batch, as a plain value: it can be copied out of one forward
/// (recorded), given to another (replayed), compared and printed.
template <class T, backend B>
struct routing {
  matrix<T, B> gates;             // [N, E]
  matrix<std::uint32_t, B> mask;  // [N, ceil(E / 32)]

  routing() = default;
  routing(index tokens, index experts)
      : gates(tokens, experts), mask(tokens, mask_words(experts)) {}
  /// A copy of what a view shows.
  explicit routing(routing_view<const T, B> source)
      : gates(detail::copy_of(source.gates)), mask(detail::copy_of(source.mask)) {}

  routing_view<T, B> view() { return {gates.view(), mask.view()}; }
  routing_view<const T, B> view() const { return {gates.view(), mask.view()}; }

  /// Equal in every bit of the mask and every gate.
  friend bool operator==(const routing& a, const routing& b) requires std::same_as<B, cpu> {
    if (a.gates.rows() != b.gates.rows() || a.gates.cols() != b.gates.cols()) return false;
    return std::equal(a.gates.data(), a.gates.data() + a.gates.size(), b.gates.data()) &&
           std::equal(a.mask.data(), a.mask.data() + a.mask.size(), b.mask.data());
  }
};

/// Rows that belong to the sequences of a batch without being tokens of it: the text beside an
/// image, a task's description. Every sequence has the same number L of rows, some of which may be
/// absent.
template <class T, backend B>
struct conditioning {
  matrix_view<const T, B> rows{};                // [S L, C], the rows of a sequence together
  vector_view<const std::uint8_t, B> present{};  // [S L], 0 for a row to leave out; empty: none
  /// [S L, C] where backward adds the gradient of rows, as for a parameter; empty: not wanted.
  matrix_view<T, B> drows{};
};

/// What a call knows about its tokens beside their values. All members may stay empty.
template <class T, backend B>
struct batch_info {
  /// [N], 1 for a real token and 0 for padding, which gets no gates and enters no count, mean,
  /// entropy or capacity. Empty: every token is real.
  vector_view<const std::uint8_t, B> padding_mask{};
  /// Tokens per sequence, a divisor of N; 0: the batch is one sequence.
  index sequence_length = 0;
  /// Where dropout and noise take their streams from; required when a policy is random in training.
  generator* random = nullptr;
  /// A recorded mask [N, ceil(E / 32)] to use instead of selecting; gates are computed anew for it.
  matrix_view<const std::uint32_t, B> replay{};
  /// [S] a class of each sequence (its cluster, its type of task), for policies that ask for one.
  vector_view<const std::int32_t, B> labels{};
  /// What scorers that look beyond the token read.
  talpa::conditioning<T, B> conditioning{};

  /// Number S of sequences of N tokens.
  index sequences(index tokens) const {
    return sequence_length > 0 ? tokens / sequence_length : (tokens > 0 ? 1 : 0);
  }
};

/// What a scorer that adds noise shows of one forward. Without noise (at inference) the clean
/// logits are the logits and there is no deviation.
template <class T, backend B>
struct routed_noise {
  matrix_view<const T, B> clean{};      // [N, E] logits before noise, empty: a scorer without noise
  matrix_view<const T, B> deviation{};  // [N, E] of the noise that was drawn, empty: none was
};

/// Gradients of losses with respect to a routed_noise, empty where no noise was drawn.
template <class T, backend B>
struct routed_noise_gradient {
  matrix_view<T, B> dclean{};      // [N, E]
  matrix_view<T, B> ddeviation{};  // [N, E]
};

/// What one router did to one batch, as losses and statistics read it.
template <class T, backend B>
struct routed_view {
  matrix_view<const T, B> logits;                     // [N, E]
  routing_view<const T, B> routing;                   // gates [N, E], mask [N, ceil(E / 32)]
  vector_view<const std::uint8_t, B> padding_mask{};  // [N] or empty
  index sequence_length = 0;                          // 0: one sequence
  matrix_view<const T, B> control{};                  // [N, 1], empty without one
  vector_view<const std::int32_t, B> labels{};        // [S] or empty
  routed_noise<T, B> noise{};                         // empty where the scorer adds none
  /// What the forward that routed left; losses that look at the same groups read it instead of
  /// adding up again, so it must be there until they have. Empty: nothing was wanted.
  wanted_totals<T, B> totals{};
};

/// Gradients of losses with respect to what one router did.
template <class T, backend B>
struct routed_gradient {
  matrix_view<T, B> dlogits;     // [N, E]
  matrix_view<T, B> dgates;      // [N, E]
  matrix_view<T, B> dcontrol{};  // [N, 1], empty where the router has no control
  routed_noise_gradient<T, B> dnoise{};
};

/// Shapes of a batch_info against N tokens and E experts; throws shape_error or value_error.
template <class T, backend B>
void check_batch(const char* function, const batch_info<T, B>& batch, index tokens, index experts) {
  if (!batch.padding_mask.empty()) {
    check_size(function, "padding_mask", batch.padding_mask, tokens, "one flag a token");
  }
  check_sequence_length(function, batch.sequence_length, tokens);
  if (batch.replay.data != nullptr) {
    check_shape(function, "replay", batch.replay, tokens, mask_words(experts),
                "tokens, mask words of the experts");
  }
  const index sequences = batch.sequences(tokens);
  if (!batch.labels.empty()) {
    check_size(function, "labels", batch.labels, sequences, "one class a sequence");
  }
  const conditioning<T, B>& c = batch.conditioning;
  if (sequences > 0 ? c.rows.rows % sequences != 0 : c.rows.rows != 0) {
    detail::throw_value(
        function, "conditioning.rows", std::to_string(c.rows.rows),
        detail::concat("a multiple of ", std::to_string(sequences), " = sequences"));
  }
  if (!c.present.empty()) {
    check_size(function, "conditioning.present", c.present, c.rows.rows, "one flag a row");
  }
  if (!c.drows.empty()) {
    check_shape(function, "conditioning.drows", c.drows, c.rows.rows, c.rows.cols,
                "shape of conditioning.rows");
  }
}

}  // namespace talpa
