// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/routing/group_loss.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

namespace talpa {

/// What the backward of localized_balance reads.
template <class T, class B>
struct localized_balance_saved {
  matrix_view<T, B> value;       // [1, 1]
  vector_view<T, B> importance;  // [sum of S E over layers], derivative by each sum of gates
};

namespace detail {

/// var / (mean^2 + epsilon) over the (sequence, expert) of one layer, as the elements of one row.
struct localized_balance_group {
  static constexpr used_totals uses{.importance = true};
  static constexpr bool long_rows = true;

  double delta, epsilon;
  index experts;
  const std::int32_t* labels;  // [S]
  const index* tokens;         // [S] real tokens

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto zero = g.uniform(T{0}), one = g.uniform(T{1});
    const index size = g.experts();
    const auto live = [&](auto e) {
      return at<T>(e.expert(), size,
                   [&](index i) { return tokens[i / experts] > 0 ? T{1} : T{0}; });
    };
    const auto factor = [&](auto e) {
      return at<T>(e.expert(), size, [&](index i) {
        const std::int32_t half = i % experts < experts / 2 ? 1 : 0;
        return static_cast<T>(labels[i / experts] == half ? 1.0 + delta : 1.0 - delta);
      });
    };
    const auto z = [&](auto e) { return math::mul(factor(e), g.load(in.importance, e, T{0})); };
    const auto count = g.template sum<T>([&](auto e) { return live(e); });
    const auto several = count > one;
    const auto whole = talpa::select(several, count, one);
    const auto free = talpa::select(several, count - one, one);
    const auto mean = g.template sum<T>([&](auto e) {
      return talpa::select(live(e) > zero, z(e), zero);
    }) / whole;
    const auto deviation = [&](auto e) {
      const auto counted = several & (live(e) > zero);
      return talpa::select(counted, z(e) - mean, zero);
    };
    const auto variance =
        g.template sum<T>([&](auto e) { return math::mul(deviation(e), deviation(e)); }) / free;
    const auto norm = math::fma(mean, mean, g.uniform(static_cast<T>(epsilon)));
    const auto value = variance / norm;
    // The deviations sum to zero, so the mean in them adds nothing.
    const auto by_mean = math::mul(value, (mean + mean) / math::mul(norm, whole));
    g.for_each([&](auto e) {
      const auto d = deviation(e);
      const auto counted = several & (live(e) > zero);
      const auto by_z = talpa::select(counted, (d + d) / math::mul(norm, free) - by_mean, zero);
      g.store(out.importance, e, math::mul(factor(e), by_z));
    });
    return {value, zero};
  }

 private:
  /// f(i) of an element, or of each lane's; elements beyond the row read the last.
  template <class T, class F>
  TALPA_HD static T at(std::int32_t i, index size, F f) {
    return f(i < size ? i : size - 1);
  }
  template <class T, int W, class F>
  static pack<T, W> at(const pack<std::int32_t, W>& i, index size, F f) {
    return make_pack<T, W>([&](int l) { return f(i.v[l] < size ? i.v[l] : size - 1); });
  }
};

}  // namespace detail

/// Loss that lets each type of sequence prefer its own half of the experts, evenly within it.
///
/// Forward: for each layer z_se = I_se sum over the real tokens n of sequence s of g_ne, I_se =
/// 1 + delta when expert e is of the half of the sequence's label, 1 - delta otherwise; m mean and
/// v variance (divided by their number less one) of z over all (sequence, expert); value
/// v / (m^2 + epsilon), summed over layers. Label 1 is the first half, experts 0 .. floor(E / 2) -
/// 1, label 0 the other; any other label has no half.
/// Backward: with M the number of (s, e), dgates_ne = dvalue I_se (2 (z_se - m) / ((M - 1) (m^2 +
/// epsilon)) - v 2 m / (M (m^2 + epsilon)^2)) where the mask is set; dlogits is zero.
/// Shapes: per layer gates [N, E], labels [S] with S the sequences of the batch; value [1, 1].
/// Value: 0 when all z are equal, its minimum, which is where the gates of a half are in the
/// ratio of 1 / (1 + delta) to 1 / (1 - delta); S E when one (s, e) has everything, its greatest.
/// Edges: 0 and no gradient for a single (sequence, expert); sequences without real tokens and
/// padding count as absent; for odd E the second half is the larger.
/// Cost: one pass over the gates forward, one backward; keeps S E numbers a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error unless 0 <= delta <= 1 and epsilon > 0; shape_error for a layer without
/// labels; shape_error, value_error as the other losses.
/// Source: Dou et al. 2023, LoRAMoE (arXiv 2312.09979) eq. 6-8; unbiased variance, epsilon and the
/// halves as its code, which counts padding.
struct localized_balance {
  static constexpr const char* name = "localized_balance";

  double delta = 0.1;      ///< how much a half is preferred, 0..1
  double epsilon = 1e-10;  ///< added to the squared mean, > 0

  template <class T, class B>
  using saved = localized_balance_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    check_value(delta >= 0.0 && delta <= 1.0, name, "delta", delta, "0..1");
    check_value(epsilon > 0.0, name, "epsilon", epsilon, "a positive number");
    const index elements = check(layers);
    saved<T, B> kept{ctx.memory.template take<T>(1, 1), ctx.memory.template take<T>(elements)};
    ops::fill(ctx, T{0}, kept.value);
    index first = 0;
    for (const routed_view<T, B>& layer : layers) {
      if (layer.logits.rows == 0) {
        // One group without tokens or none.
        first += detail::rows_of(token_groups::sequence, layer).groups() * layer.logits.cols;
        continue;
      }
      const typename workspace<B>::scope scope(ctx.scratch);
      const routed_rows<T, B> rows = detail::rows_of(token_groups::sequence, layer);
      const index sequences = rows.groups(), experts = rows.experts();
      const routing_totals<T, B> totals =
          detail::take_totals<T, B>(ctx.scratch, group::uses, sequences, experts);
      ops::routing_sums<B, T>(ctx, rows, totals, grad_mode::overwrite);
      routing_totals<T, B> whole;
      whole.tokens = {totals.tokens.data, 1};
      whole.importance = {totals.importance.data, 1, sequences * experts};
      routing_totals_gradient<T, B> derivative;
      derivative.importance = {kept.importance.data + first, 1, sequences * experts};
      ops::group_loss<B, group, T>(
          ctx, {delta, epsilon, experts, layer.labels.data, totals.tokens.data},
          group_reduction::sum, whole, derivative, kept.value, grad_mode::accumulate);
      first += sequences * experts;
    }
    return kept;
  }
  /// The same for one layer.
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const routed_view<T, B>& layer) const {
    return forward(ctx, std::span<const routed_view<T, B>>(&layer, 1));
  }

  template <class T, class B>
  void backward(context<B>& ctx, std::type_identity_t<std::span<const routed_view<T, B>>> layers,
                const localized_balance_saved<T, B>& kept, input<T, B> dvalue,
                std::type_identity_t<std::span<const routed_gradient<T, B>>> out,
                grad_mode mode) const {
    // The derivatives in the form in which the backward of a group loss reads them.
    group_loss_saved<T, B> sums;
    sums.value = kept.value;
    sums.importance = kept.importance;
    group_loss_backward<group>(ctx, name, token_groups::sequence, layers, sums, dvalue, out, mode);
  }
  /// The same for one layer.
  template <class T, class B>
  void backward(context<B>& ctx, const std::type_identity_t<routed_view<T, B>>& layer,
                const localized_balance_saved<T, B>& kept, input<T, B> dvalue,
                const std::type_identity_t<routed_gradient<T, B>>& out, grad_mode mode) const {
    backward(ctx, std::span<const routed_view<T, B>>(&layer, 1), kept, dvalue,
             std::span<const routed_gradient<T, B>>(&out, 1), mode);
  }

 private:
  using group = detail::localized_balance_group;

  /// Checks the layers; the number of (sequence, expert) of all of them.
  template <class T, class B>
  static index check(std::span<const routed_view<T, B>> layers) {
    detail::check_layers(name, token_groups::sequence, layers);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const routed_view<T, B>& layer = layers[l];
      const index n = layer.logits.rows;
      const index sequences = layer.sequence_length > 0 ? n / layer.sequence_length : (n > 0);
      if (layer.labels.size != sequences) {
        detail::throw_shape(name, detail::concat("layers[", std::to_string(l), "].labels").c_str(),
                            detail::concat("[", std::to_string(layer.labels.size), "]"),
                            detail::concat("[", std::to_string(sequences), "]"),
                            "one class a sequence");
      }
    }
    return detail::sizes_of(token_groups::sequence, layers).elements;
  }
};

static_assert(loss_policy<localized_balance>);

}  // namespace talpa
