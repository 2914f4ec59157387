// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/workspace.hpp>
#include <talpa/ops/group_loss.hpp>
#include <talpa/routing/routing.hpp>

#include <span>
#include <string>
#include <type_traits>

namespace talpa {

/// Which tokens a loss looks at together.
enum class token_groups {
  layer,       ///< one value a layer, summed over layers
  all_layers,  ///< one value for the tokens of all layers, which must have equally many experts
  sequence     ///< one value a sequence, mean over a layer's sequences with a real token, summed
};

/// What the backward of a loss over groups reads: its value, and the derivatives of the value by
/// the totals of every group of every layer, one group behind the other. Nothing is kept per token.
template <class T, class B>
struct group_loss_saved {
  matrix_view<T, B> value;              // [1, 1]
  vector_view<T, B> probability;        // [sum of G E over layers], empty where not used
  vector_view<T, B> importance;         // likewise
  vector_view<T, B> squared_logsumexp;  // [sum of G over layers]
  vector_view<T, B> affinity;           // [sum of G E over layers]
  vector_view<T, B> row_term;           // [sum of G over layers]
};

/// Forms of losses over groups: which tokens are looked at together.
namespace balance {

/// One loss a layer, summed over layers (MoLA).
struct per_layer {
  static constexpr token_groups groups = token_groups::layer;
};
/// The tokens of all layers together, one loss (Mixtral in transformers, PERFT, MixLoRA, DynMoLE).
/// Layers must have equally many experts; imbalances of different layers can cancel.
struct pooled {
  static constexpr token_groups groups = token_groups::all_layers;
};
/// One loss a sequence (sequence_length of the batch), mean over sequences with a real token,
/// summed over layers (DeepSeek).
struct per_sequence {
  static constexpr token_groups groups = token_groups::sequence;
};

}  // namespace balance

namespace detail {

/// The row term of a group loss: its member `term`, where it has one.
template <class Loss>
auto row_term_of(const Loss& loss) {
  if constexpr (requires { loss.term; }) {
    return loss.term;
  } else {
    return no_row_term{};
  }
}

/// A group loss as backward sees it when it has no row term.
template <class Loss>
struct without_term {
  static constexpr used_totals uses = Loss::uses;
};

/// Whether a group loss takes padding for tokens: its member `include_padding`, where it has one.
template <class Loss>
bool includes_padding(const Loss& loss) {
  if constexpr (requires { loss.include_padding; }) {
    return loss.include_padding;
  } else {
    return false;
  }
}

/// Group loss that is the mean of a row term over the tokens of a group.
template <class Term>
struct mean_row_term {
  static constexpr used_totals uses{.row_term = true};

  Term term;
  bool include_padding = false;

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>&) const {
    const T count = in.tokens > T{0} ? in.tokens : T{1};
    return {g.uniform(in.row_term / count), g.uniform(T{0}), g.uniform(in.tokens / count / count)};
  }
};

/// Tokens of one group of `layer`, 0 for all of them.
template <class T, class B>
index group_rows_of(token_groups groups, const routed_view<T, B>& layer) {
  return groups == token_groups::sequence ? layer.sequence_length : 0;
}

template <class T, class B>
routed_rows<T, B> rows_of(token_groups groups, const routed_view<T, B>& layer,
                          bool include_padding = false) {
  routed_rows<T, B> rows{layer.logits,       layer.routing.gates,          layer.routing.mask,
                         layer.padding_mask, group_rows_of(groups, layer), layer.control,
                         layer.noise.clean,  layer.noise.deviation};
  if (include_padding) rows.padding_mask = {};
  return rows;
}

/// check_shape for a member of element l of a list: the name is put together for an error only.
template <class T, class B>
void check_member(const char* function, const char* list, std::size_t l, const char* member,
                  const matrix_view<T, B>& view, index rows, index cols, const char* meaning) {
  if (view.rows != rows || view.cols != cols) {
    throw_shape(function, concat(list, "[", std::to_string(l), "].", member).c_str(), view.rows,
                view.cols, rows, cols, meaning);
  }
}

/// Shapes of each layer against its logits; equal numbers of experts where layers are pooled.
template <class T, class B>
void check_layers(const char* function, token_groups groups,
                  std::span<const routed_view<T, B>> layers, const row_term_uses& uses = {}) {
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const routed_view<T, B>& layer = layers[l];
    const index n = layer.logits.rows, e = layer.logits.cols;
    const index expected = groups == token_groups::all_layers ? layers[0].logits.cols : e;
    check_member(function, "layers", l, "logits", layer.logits, n, expected,
                 "tokens, experts of the first of the pooled layers");
    check_at_least(function, "experts", e, 1, "columns of logits");
    check_member(function, "layers", l, "gates", layer.routing.gates, n, e, "shape of logits");
    check_member(function, "layers", l, "mask", layer.routing.mask, n, mask_words(e),
                 "tokens, mask words of the experts");
    if (!layer.padding_mask.empty()) {
      check_size(function, "padding_mask", layer.padding_mask, n, "one flag a token");
    }
    check_sequence_length(function, layer.sequence_length, n);
    if (uses.control || !layer.control.empty()) {
      check_member(function, "layers", l, "control", layer.control, n, 1, "one number a token");
    }
    if (uses.noise || !layer.noise.clean.empty()) {
      check_member(function, "layers", l, "noise.clean", layer.noise.clean, n, e,
                   "shape of logits, from a scorer that adds noise");
    }
    if (!layer.noise.deviation.empty()) {
      check_member(function, "layers", l, "noise.deviation", layer.noise.deviation, n, e,
                   "shape of logits");
    }
  }
}

/// Hands out the parts of a group_loss_saved in the order of layers.
template <class T, class B>
class derivative_walk {
 public:
  derivative_walk(const used_totals& uses, const group_loss_saved<T, B>& saved)
      : uses_(uses), saved_(saved) {}
  routing_totals_gradient<T, B> next(index groups, index experts) {
    routing_totals_gradient<T, B> part;
    if (uses_.probability) {
      part.probability = {saved_.probability.data + elements_, groups, experts};
    }
    if (uses_.importance) part.importance = {saved_.importance.data + elements_, groups, experts};
    if (uses_.squared_logsumexp) {
      part.squared_logsumexp = {saved_.squared_logsumexp.data + groups_, groups};
    }
    if (uses_.affinity) part.affinity = {saved_.affinity.data + elements_, groups, experts};
    if (uses_.row_term) part.row_term = {saved_.row_term.data + groups_, groups};
    elements_ += groups * experts;
    groups_ += groups;
    return part;
  }

 private:
  used_totals uses_;
  group_loss_saved<T, B> saved_;
  index elements_ = 0;
  index groups_ = 0;
};

/// Numbers of groups and of (group, expert) pairs that a loss keeps derivatives for.
struct group_sizes {
  index groups = 0;
  index elements = 0;
};

template <class T, class B>
group_sizes sizes_of(token_groups groups, std::span<const routed_view<T, B>> layers) {
  if (groups == token_groups::all_layers) {
    return {1, layers.empty() ? 0 : layers[0].logits.cols};
  }
  group_sizes sizes;
  for (const routed_view<T, B>& layer : layers) {
    const index count = rows_of(groups, layer).groups();
    sizes.groups += count;
    sizes.elements += count * layer.logits.cols;
  }
  return sizes;
}

template <class T, class B>
routing_totals<T, B> take_totals(workspace<B>& memory, const used_totals& uses, index groups,
                                 index experts) {
  routing_totals<T, B> totals;
  totals.tokens = memory.template take<index>(groups);
  if (uses.counts) totals.counts = memory.template take<index>(groups, experts);
  if (uses.probability) totals.probability = memory.template take<T>(groups, experts);
  if (uses.importance) totals.importance = memory.template take<T>(groups, experts);
  if (uses.squared_logsumexp) totals.squared_logsumexp = memory.template take<T>(groups);
  if (uses.affinity) totals.affinity = memory.template take<T>(groups, experts);
  if (uses.row_term) totals.row_term = memory.template take<T>(groups);
  return totals;
}

/// Whether `known`, the totals of a layer, are those that a loss asks for.
template <class T, class B>
bool are_known(const used_totals& uses, const routed_rows<T, B>& rows,
               const wanted_totals<T, B>& known) {
  const routing_totals<T, B>& out = known.out;
  const auto there = [](bool used, const auto& view) { return !used || view.data != nullptr; };
  return !uses.affinity && !uses.row_term && known.mode == grad_mode::overwrite &&
         known.group_rows == rows.group_rows && there(true, out.tokens) &&
         there(uses.counts, out.counts) && there(uses.probability, out.probability) &&
         there(uses.importance, out.importance) &&
         there(uses.squared_logsumexp, out.squared_logsumexp);
}

}  // namespace detail

/// Forward of a loss that is a function of the totals of groups of tokens: what a loss policy whose
/// mathematics is one group loss (ops/group_loss.hpp) calls. A group loss may have a member `term`,
/// a row term (ops/routing_sums.hpp) whose sums it reads as `affinity` and `row_term`, and a member
/// `bool include_padding`, true to count padding as tokens.
///
/// Shapes: value [1, 1]; no layers, and layers without a real token, give what the loss gives for
/// zeros.
/// Cost: one pass over the logits of each layer, none where routed_view::totals of a layer has the
/// totals of these groups and layers are not pooled; ctx.memory keeps 2 numbers a group and expert
/// at most.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error, value_error; `function` names the policy in them.
template <class Loss, class T, class B>
group_loss_saved<T, B> group_loss_forward(context<B>& ctx, const char* function,
                                          token_groups groups, const Loss& loss,
                                          std::span<const routed_view<T, B>> layers) {
  const auto term = detail::row_term_of(loss);
  const bool padding = detail::includes_padding(loss);
  detail::check_layers(function, groups, layers, term.uses);
  const detail::group_sizes sizes = detail::sizes_of(groups, layers);
  group_loss_saved<T, B> saved;
  saved.value = ctx.memory.template take<T>(1, 1);
  if (Loss::uses.probability) saved.probability = ctx.memory.template take<T>(sizes.elements);
  if (Loss::uses.importance) saved.importance = ctx.memory.template take<T>(sizes.elements);
  if (Loss::uses.squared_logsumexp) {
    saved.squared_logsumexp = ctx.memory.template take<T>(sizes.groups);
  }
  if (Loss::uses.affinity) saved.affinity = ctx.memory.template take<T>(sizes.elements);
  if (Loss::uses.row_term) saved.row_term = ctx.memory.template take<T>(sizes.groups);
  detail::derivative_walk<T, B> walk(Loss::uses, saved);

  grad_mode mode = grad_mode::overwrite;
  if (groups == token_groups::all_layers && !layers.empty()) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const index experts = layers[0].logits.cols;
    const routing_totals<T, B> totals =
        detail::take_totals<T, B>(ctx.scratch, Loss::uses, 1, experts);
    for (const routed_view<T, B>& layer : layers) {
      ops::routing_sums<B, T>(ctx, detail::rows_of(groups, layer, padding), totals, mode, term);
      mode = grad_mode::accumulate;
    }
    ops::group_loss<B, Loss, T>(ctx, loss, group_reduction::sum, totals, walk.next(1, experts),
                                saved.value, grad_mode::overwrite);
    return saved;
  }
  const group_reduction reduction =
      groups == token_groups::sequence ? group_reduction::mean : group_reduction::sum;
  for (const routed_view<T, B>& layer : layers) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const routed_rows<T, B> rows = detail::rows_of(groups, layer, padding);
    routing_totals<T, B> totals = layer.totals.out;
    if (padding || !detail::are_known(Loss::uses, rows, layer.totals)) {
      totals = detail::take_totals<T, B>(ctx.scratch, Loss::uses, rows.groups(), rows.experts());
      ops::routing_sums<B, T>(ctx, rows, totals, grad_mode::overwrite, term);
    }
    ops::group_loss<B, Loss, T>(ctx, loss, reduction, totals,
                                walk.next(rows.groups(), rows.experts()), saved.value, mode);
    mode = grad_mode::accumulate;
  }
  if (layers.empty()) {
    ops::group_loss<B, Loss, T>(ctx, loss, group_reduction::sum,
                                detail::take_totals<T, B>(ctx.scratch, Loss::uses, 0, 1),
                                walk.next(0, 1), saved.value, mode);
  }
  return saved;
}

/// Backward of group_loss_forward: writes or adds d value / d logits, d value / d gates and, where
/// they are there, d value / d control and by what a layer's noise shows, times dvalue.
///
/// Shapes: dvalue [1, 1]; out: one pair of [N, E] a layer, dcontrol [N, 1] or empty, dnoise [N, E]
/// or empty.
/// Throws: shape_error, also when `saved` is not of these layers.
template <class Loss, class T, class B>
void group_loss_backward(context<B>& ctx, const char* function, token_groups groups,
                         const Loss& loss, std::span<const routed_view<T, B>> layers,
                         const group_loss_saved<T, B>& saved, matrix_view<const T, B> dvalue,
                         std::span<const routed_gradient<T, B>> out, grad_mode mode) {
  const auto term = detail::row_term_of(loss);
  const bool padding = detail::includes_padding(loss);
  detail::check_layers(function, groups, layers, term.uses);
  if (out.size() != layers.size()) {
    detail::throw_size(function, "out", out.size(), layers.size(), "one pair of gradients a layer");
  }
  check_shape(function, "dvalue", dvalue, 1, 1, "one number");
  const detail::group_sizes sizes = detail::sizes_of(groups, layers);
  const auto check_saved = [&](bool used, const vector_view<T, B>& part, index size) {
    if (used) check_size(function, "saved", part, size, "groups and experts of layers");
  };
  check_saved(Loss::uses.probability, saved.probability, sizes.elements);
  check_saved(Loss::uses.importance, saved.importance, sizes.elements);
  check_saved(Loss::uses.squared_logsumexp, saved.squared_logsumexp, sizes.groups);
  check_saved(Loss::uses.affinity, saved.affinity, sizes.elements);
  check_saved(Loss::uses.row_term, saved.row_term, sizes.groups);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const index n = layers[l].logits.rows, e = layers[l].logits.cols;
    detail::check_member(function, "out", l, "dlogits", out[l].dlogits, n, e, "shape of logits");
    detail::check_member(function, "out", l, "dgates", out[l].dgates, n, e, "shape of logits");
    if (term.uses.control || !out[l].dcontrol.empty()) {
      detail::check_member(function, "out", l, "dcontrol", out[l].dcontrol, n, 1,
                           "one number a token");
    }
    const bool noise = term.uses.noise && !layers[l].noise.deviation.empty();
    const auto check_noise = [&](const char* member, const matrix_view<T, B>& view) {
      if (noise || !view.empty()) {
        detail::check_member(function, "out", l, member, view, n, e, "shape of logits");
      }
    };
    check_noise("dnoise.dclean", out[l].dnoise.dclean);
    check_noise("dnoise.ddeviation", out[l].dnoise.ddeviation);
  }
  if (mode == grad_mode::ignore) return;

  detail::derivative_walk<T, B> walk(Loss::uses, saved);
  routing_totals_gradient<T, B> derivative;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const routed_rows<T, B> rows = detail::rows_of(groups, layers[l], padding);
    if (l == 0 || groups != token_groups::all_layers) {
      derivative = walk.next(rows.groups(), rows.experts());
    }
    ops::routing_sums_backward<B, T>(
        ctx, rows, derivative, dvalue, out[l].dlogits, out[l].dgates, mode, term,
        {out[l].dcontrol, out[l].dnoise.dclean, out[l].dnoise.ddeviation});
  }
}

/// The same for a group loss without a row term, of which backward needs no object.
template <class Loss, class T, class B>
void group_loss_backward(context<B>& ctx, const char* function, token_groups groups,
                         std::span<const routed_view<T, B>> layers,
                         const group_loss_saved<T, B>& saved, matrix_view<const T, B> dvalue,
                         std::span<const routed_gradient<T, B>> out, grad_mode mode) {
  static_assert(
      !Loss::uses.affinity && !Loss::uses.row_term,
      "talpa: backward of a loss with a row term needs the loss, call "
      "group_loss_backward(ctx, name, groups, loss, layers, ...) (docs/policies/loss.md)");
  group_loss_backward(ctx, function, groups, detail::without_term<Loss>{}, layers, saved, dvalue,
                      out, mode);
}

}  // namespace talpa
