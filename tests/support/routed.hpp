// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/random.hpp"
#include "support/reference.hpp"

#include <talpa/core/mode.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/token_pack.hpp>
#include <talpa/ops/group_loss.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/testing/sim.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

// Routings for the tests of losses and statistics, and those quantities once more by plain loops in
// double that share no code with the library.

namespace talpa::support {

/// What one router did to one batch, owned.
template <class T>
struct routed_layer {
  matrix<T, cpu> logits;              // [N, E]
  matrix<T, cpu> gates;               // [N, E]
  matrix<std::uint32_t, cpu> mask;    // [N, ceil(E / 32)]
  vector<std::uint8_t, cpu> padding;  // [N] or empty
  index sequence_length = 0;
  matrix<T, cpu> control;            // [N, 1] or empty
  vector<std::int32_t, cpu> labels;  // [S] or empty
  matrix<T, cpu> clean, deviation;   // [N, E] or empty

  routed_layer() = default;
  routed_layer(index tokens, index experts)
      : logits(tokens, experts), gates(tokens, experts), mask(tokens, mask_words(experts)) {}

  index tokens() const { return logits.rows(); }
  index experts() const { return logits.cols(); }
  bool on(index n, index e) const { return ((mask(n, e / 32) >> (e % 32)) & 1u) != 0; }
  bool real(index n) const { return padding.size() == 0 || padding[n] != 0; }
  void turn_on(index n, index e, double gate) {
    mask(n, e / 32) |= 1u << (e % 32);
    gates(n, e) = static_cast<T>(gate);
  }
  routed_view<T, cpu> view() const {
    return {logits.view(),
            {gates.view(), mask.view()},
            padding.view(),
            sequence_length,
            control.view(),
            labels.view(),
            {clean.view(), deviation.view()}};
  }
};

template <class T>
std::vector<routed_view<T, cpu>> views(const std::vector<routed_layer<T>>& layers) {
  std::vector<routed_view<T, cpu>> v;
  for (const auto& layer : layers) v.push_back(layer.view());
  return v;
}

/// Experts of token n by descending logit, ties to the lower index.
template <class T>
std::vector<index> ranked(const routed_layer<T>& layer, index n) {
  std::vector<index> order(static_cast<std::size_t>(layer.experts()));
  std::iota(order.begin(), order.end(), index{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](index a, index b) { return layer.logits(n, a) > layer.logits(n, b); });
  return order;
}

/// A layer whose real tokens use their top K experts with gates in (0, 1). About one token in
/// `padding_every` is padding with logits that no sum may ever see; 0: none.
template <class T>
routed_layer<T> random_layer(test_random& random, index tokens, index experts, index top,
                             index padding_every = 0) {
  routed_layer<T> layer(tokens, experts);
  layer.logits = random_matrix<T>(random, tokens, experts, 1.5);
  if (padding_every > 0) layer.padding = vector<std::uint8_t, cpu>(tokens);
  for (index n = 0; n < tokens; ++n) {
    if (padding_every > 0) {
      const bool real = random.below(padding_every) != 0;
      layer.padding[n] = real ? 1 : 0;
      if (!real) {
        for (index e = 0; e < experts; ++e) {
          layer.logits(n, e) = std::numeric_limits<T>::quiet_NaN();
        }
        continue;
      }
    }
    const std::vector<index> order = ranked(layer, n);
    for (index k = 0; k < top; ++k) {
      layer.turn_on(n, order[static_cast<std::size_t>(k)], random.uniform(0.05, 1.0));
    }
  }
  return layer;
}

/// The same layer without its padding.
template <class T>
routed_layer<T> without_padding(const routed_layer<T>& layer) {
  index real = 0;
  for (index n = 0; n < layer.tokens(); ++n) real += layer.real(n) ? 1 : 0;
  routed_layer<T> kept(real, layer.experts());
  index to = 0;
  for (index n = 0; n < layer.tokens(); ++n) {
    if (!layer.real(n)) continue;
    for (index e = 0; e < layer.experts(); ++e) {
      kept.logits(to, e) = layer.logits(n, e);
      if (layer.on(n, e)) kept.turn_on(to, e, static_cast<double>(layer.gates(n, e)));
    }
    if (layer.clean.size() > 0) {
      if (to == 0) kept.clean = kept.deviation = matrix<T, cpu>(real, layer.experts());
      for (index e = 0; e < layer.experts(); ++e) {
        kept.clean(to, e) = layer.clean(n, e);
        kept.deviation(to, e) = layer.deviation(n, e);
      }
    }
    ++to;
  }
  return kept;
}

template <class T>
routed_layer<double> widened(const routed_layer<T>& layer) {
  routed_layer<double> w(layer.tokens(), layer.experts());
  for (index i = 0; i < layer.logits.size(); ++i) {
    w.logits.data()[i] = static_cast<double>(layer.logits.data()[i]);
    w.gates.data()[i] = static_cast<double>(layer.gates.data()[i]);
  }
  w.mask = layer.mask;
  w.padding = layer.padding;
  w.sequence_length = layer.sequence_length;
  w.control = matrix<double, cpu>(layer.control.rows(), layer.control.cols());
  for (index n = 0; n < layer.control.size(); ++n) {
    w.control.data()[n] = static_cast<double>(layer.control.data()[n]);
  }
  w.labels = layer.labels;
  w.clean = matrix<double, cpu>(layer.clean.rows(), layer.clean.cols());
  w.deviation = matrix<double, cpu>(layer.deviation.rows(), layer.deviation.cols());
  for (index i = 0; i < layer.clean.size(); ++i) {
    w.clean.data()[i] = static_cast<double>(layer.clean.data()[i]);
  }
  for (index i = 0; i < layer.deviation.size(); ++i) {
    w.deviation.data()[i] = static_cast<double>(layer.deviation.data()[i]);
  }
  return w;
}

/// softmax of the logits of token n.
inline std::vector<double> probabilities(const routed_layer<double>& layer, index n) {
  double largest = -std::numeric_limits<double>::infinity();
  for (index e = 0; e < layer.experts(); ++e) largest = std::max(largest, layer.logits(n, e));
  std::vector<double> p;
  double sum = 0.0;
  for (index e = 0; e < layer.experts(); ++e) {
    p.push_back(std::exp(layer.logits(n, e) - largest));
    sum += p.back();
  }
  for (double& x : p) x /= sum;
  return p;
}

/// ln sum exp of the logits of token n.
inline double log_sum_exp(const routed_layer<double>& layer, index n) {
  double largest = -std::numeric_limits<double>::infinity();
  for (index e = 0; e < layer.experts(); ++e) largest = std::max(largest, layer.logits(n, e));
  double sum = 0.0;
  for (index e = 0; e < layer.experts(); ++e) sum += std::exp(layer.logits(n, e) - largest);
  return largest + std::log(sum);
}

enum class share { per_selection, per_token, per_rank, soft_mass };
enum class pool { per_layer, pooled, per_sequence };

/// One token of one layer.
struct token_of {
  const routed_layer<double>* layer;
  index token;
};

/// E sum_e f_e P_e over the real ones among `tokens`. per_rank forms the share of every rank by
/// itself, from the order of the logits, and sums the products over ranks last.
inline double balance_of(share kind, const std::vector<token_of>& tokens, index experts) {
  const auto size = static_cast<std::size_t>(experts);
  std::vector<double> mean(size, 0.0), amount(size, 0.0);
  std::vector<std::vector<double>> by_rank(size, std::vector<double>(size, 0.0));
  double real = 0.0, selections = 0.0;
  for (const token_of& t : tokens) {
    if (!t.layer->real(t.token)) continue;
    real += 1.0;
    const std::vector<double> p = probabilities(*t.layer, t.token);
    std::size_t rank = 0;
    for (const index e : ranked(*t.layer, t.token)) {
      const auto i = static_cast<std::size_t>(e);
      mean[i] += p[i];
      if (!t.layer->on(t.token, e)) continue;
      selections += 1.0;
      amount[i] += kind == share::soft_mass ? t.layer->gates(t.token, e) : 1.0;
      by_rank[rank++][i] += 1.0;
    }
  }
  if (real == 0.0 || (kind == share::per_selection && selections == 0.0)) return 0.0;
  double sum = 0.0;
  for (std::size_t e = 0; e < size; ++e) {
    const double p = mean[e] / real;
    if (kind == share::per_rank) {
      for (std::size_t r = 0; r < size; ++r) sum += by_rank[r][e] / real * p;
    } else {
      sum += amount[e] / (kind == share::per_selection ? selections : real) * p;
    }
  }
  return static_cast<double>(experts) * sum;
}

inline double balance(share kind, pool pooling, const std::vector<routed_layer<double>>& layers) {
  double total = 0.0;
  std::vector<token_of> all;
  for (const routed_layer<double>& layer : layers) {
    const index length = pooling == pool::per_sequence && layer.sequence_length > 0
                             ? layer.sequence_length
                             : layer.tokens();
    double sum = 0.0, live = 0.0;
    for (index first = 0; first < layer.tokens(); first += length) {
      std::vector<token_of> group;
      bool any = false;
      for (index n = first; n < first + length; ++n) {
        group.push_back({&layer, n});
        all.push_back({&layer, n});
        any = any || layer.real(n);
      }
      sum += balance_of(kind, group, layer.experts());
      live += any ? 1.0 : 0.0;
    }
    total += live > 0.0 ? sum / (pooling == pool::per_sequence ? live : 1.0) : 0.0;
  }
  if (pooling == pool::pooled) {
    return layers.empty() ? 0.0 : balance_of(kind, all, layers[0].experts());
  }
  return total;
}

/// Mean squared ln sum exp over real tokens, summed over layers.
inline double z_loss(const std::vector<routed_layer<double>>& layers) {
  double total = 0.0;
  for (const routed_layer<double>& layer : layers) {
    double sum = 0.0, real = 0.0;
    for (index n = 0; n < layer.tokens(); ++n) {
      if (!layer.real(n)) continue;
      const double z = log_sum_exp(layer, n);
      sum += z * z;
      real += 1.0;
    }
    total += real > 0.0 ? sum / real : 0.0;
  }
  return total;
}

/// Squared coefficient of variation of some numbers.
inline double variation(const std::vector<double>& amounts, double epsilon) {
  const auto experts = static_cast<double>(amounts.size());
  if (amounts.size() == 1) return 0.0;
  double mean = 0.0, squares = 0.0;
  for (const double x : amounts) mean += x / experts;
  for (const double x : amounts) squares += (x - mean) * (x - mean);
  return squares / (experts - 1.0) / (mean * mean + epsilon);
}

/// Squared coefficient of variation of the summed gates, summed over layers.
inline double variation(const std::vector<routed_layer<double>>& layers, double epsilon) {
  double total = 0.0;
  for (const routed_layer<double>& layer : layers) {
    const index experts = layer.experts();
    std::vector<double> importance(static_cast<std::size_t>(experts), 0.0);
    for (index n = 0; n < layer.tokens(); ++n) {
      if (!layer.real(n)) continue;
      for (index e = 0; e < experts; ++e) {
        if (layer.on(n, e)) importance[static_cast<std::size_t>(e)] += layer.gates(n, e);
      }
    }
    total += variation(importance, epsilon);
  }
  return total;
}

/// Value and gradients of one call of a loss policy.
template <class T>
struct loss_result {
  T value;
  std::vector<matrix<T, cpu>> dlogits;
  std::vector<matrix<T, cpu>> dgates;
  std::vector<matrix<T, cpu>> dcontrol;
  std::vector<matrix<T, cpu>> dclean, ddeviation;
};

template <class T, class Loss>
loss_result<T> run_loss(context<cpu>& ctx, const Loss& loss,
                        const std::vector<routed_layer<T>>& layers, T dvalue = T{1},
                        grad_mode mode = grad_mode::overwrite, T before = T{0}) {
  const workspace<cpu>::scope scope(ctx.memory);
  const std::vector<routed_view<T, cpu>> in = views(layers);
  const std::span<const routed_view<T, cpu>> span(in);
  const auto saved = loss.forward(ctx, span);
  loss_result<T> result{saved.value(0, 0), {}, {}, {}, {}, {}};
  std::vector<routed_gradient<T, cpu>> out;
  for (const auto& layer : layers) {
    result.dlogits.emplace_back(layer.tokens(), layer.experts());
    result.dgates.emplace_back(layer.tokens(), layer.experts());
    result.dcontrol.emplace_back(layer.control.rows(), layer.control.cols());
    result.dclean.emplace_back(layer.deviation.rows(), layer.deviation.cols());
    result.ddeviation.emplace_back(layer.deviation.rows(), layer.deviation.cols());
    std::fill_n(result.dclean.back().data(), result.dclean.back().size(), before);
    std::fill_n(result.ddeviation.back().data(), result.ddeviation.back().size(), before);
    std::fill_n(result.dcontrol.back().data(), result.dcontrol.back().size(), before);
    std::fill_n(result.dlogits.back().data(), result.dlogits.back().size(), before);
    std::fill_n(result.dgates.back().data(), result.dgates.back().size(), before);
  }
  for (std::size_t l = 0; l < layers.size(); ++l) {
    out.push_back({result.dlogits[l].view(),
                   result.dgates[l].view(),
                   result.dcontrol[l].view(),
                   {result.dclean[l].view(), result.ddeviation[l].view()}});
  }
  matrix<T, cpu> upstream(1, 1);
  upstream(0, 0) = dvalue;
  loss.backward(ctx, span, saved, upstream, out, mode);
  return result;
}

/// Value and derivatives of a group loss for one row of totals, over lane groups of every width:
/// empty when all have the bits of `serial`.
template <class T, class Group>
std::string lane_group_difference(const Group& loss, test_random& random, index experts) {
  matrix<T, cpu> totals(4, experts);  // counts, probability, importance, affinity
  for (index e = 0; e < experts; ++e) {
    totals(0, e) = static_cast<T>(random.below(5));
    totals(1, e) = static_cast<T>(random.uniform(0.0, 3.0));
    totals(2, e) = static_cast<T>(random.uniform(0.0, 3.0));
    totals(3, e) = static_cast<T>(random.uniform(0.0, 3.0));
  }
  std::vector<std::byte> memory(lane_scratch::bytes_for(experts, 32));
  const auto run = [&](auto make) {
    // By probability, by importance, by affinity, value and by z and by the row term.
    matrix<T, cpu> out(4, experts + 2);
    lane_scratch scratch(memory.data(), memory.size());
    const totals_row<T> in{T{7},
                           {totals.view().row(0), 0},
                           {totals.view().row(1), 0},
                           {totals.view().row(2), 0},
                           T{5},
                           {totals.view().row(3), 0},
                           T{6}};
    const auto result =
        loss(make(&scratch), in,
             totals_derivative_row<T>{
                 {out.view().row(0), 0}, {out.view().row(1), 0}, {out.view().row(2), 0}});
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(result.value)>, T>) {
      out(3, 0) = result.value;
      out(3, 1) = result.squared_logsumexp;
      out(3, 2) = result.row_term;
    } else {
      out(3, 0) = result.value.v[0];
      out(3, 1) = result.squared_logsumexp.v[0];
      out(3, 2) = result.row_term.v[0];
    }
    return out;
  };
  const matrix<T, cpu> expected = run([&](lane_scratch* s) { return serial(experts, s); });
  const auto same = [&](const matrix<T, cpu>& found) {
    return std::equal(found.data(), found.data() + found.size(), expected.data());
  };
  if (!std::isfinite(expected(3, 0))) return "the value is not finite";
  if (!same(run([&](lane_scratch* s) { return sim<4>(experts, s); }))) return "sim<4> differs";
  if (!same(run([&](lane_scratch* s) { return sim<8>(experts, s); }))) return "sim<8> differs";
  if (!same(run([&](lane_scratch* s) { return sim<32>(experts, s); }))) return "sim<32> differs";
  return "";
}

/// Number, array and gradients of a row term for the rows of a layer with a control or noise, over
/// lane groups of every width: empty when all have the bits of `serial`.
template <class T, class Term>
std::string row_term_difference(const Term& term, const routed_layer<T>& layer) {
  constexpr int width = 8;
  const index n = layer.tokens(), experts = layer.experts();
  std::vector<std::byte> memory(lane_scratch::bytes_for(experts, 32));
  matrix<T, cpu> wanted(1, experts);
  for (index e = 0; e < experts; ++e) wanted(0, e) = static_cast<T>(0.25 * static_cast<double>(e));
  const auto run = [&](auto make, index step) {
    // A row of each: array, dlogits, dgates, the number and dcontrol, dclean, ddeviation.
    matrix<T, cpu> out(n, 5 * experts + 2);
    const routed_view<T, cpu> view = layer.view();
    for (index r = 0; r < n; r += step) {
      lane_scratch scratch(memory.data(), memory.size());
      const auto group = make(&scratch, static_cast<int>(std::min(step, n - r)));
      routed_row<T> in{{view.logits.row(r), view.logits.stride},
                       {view.routing.gates.row(r), view.routing.gates.stride},
                       {view.routing.mask.row(r), view.routing.mask.stride},
                       {view.control.row(r), view.control.stride}};
      if (Term::uses.noise) {
        in.clean = {view.noise.clean.row(r), view.noise.clean.stride};
        in.deviation = {view.noise.deviation.row(r), view.noise.deviation.stride};
      }
      T* const to = out.view().row(r);
      const index stride = out.view().stride;
      const auto number = term.template forward<T>(group, in, row_pointer<T>{to, stride});
      group.store(row_scalar<T>{to + 3 * experts, stride}, number);
      scratch.reset();
      term.template backward<T>(group, in, row_term_gradient<T>{{wanted.data(), 0}, T{0.5}, T{2}},
                                routed_row_gradient<T>{{to + experts, stride},
                                                       {to + 2 * experts, stride},
                                                       {to + 3 * experts + 1, stride},
                                                       {to + 3 * experts + 2, stride},
                                                       {to + 4 * experts + 2, stride}});
    }
    return out;
  };
  const matrix<T, cpu> expected =
      run([&](lane_scratch* s, int) { return serial(experts, s); }, index{1});
  const auto same = [&](const matrix<T, cpu>& found) {
    return std::equal(found.data(), found.data() + found.size(), expected.data());
  };
  if (!same(run([&](lane_scratch* s, int v) { return token_pack<width>(experts, v, s); }, width))) {
    return "token_pack differs";
  }
  if (!same(run([&](lane_scratch* s, int) { return sim<4>(experts, s); }, 1))) {
    return "sim<4> differs";
  }
  if (!same(run([&](lane_scratch* s, int) { return sim<8>(experts, s); }, 1))) {
    return "sim<8> differs";
  }
  if (!same(run([&](lane_scratch* s, int) { return sim<32>(experts, s); }, 1))) {
    return "sim<32> differs";
  }
  return "";
}

/// Gives a layer controls in (-2, 2).
template <class T>
void add_control(test_random& random, routed_layer<T>& layer) {
  layer.control = matrix<T, cpu>(layer.tokens(), 1);
  for (index n = 0; n < layer.tokens(); ++n) {
    layer.control(n, 0) = static_cast<T>(random.uniform(-2.0, 2.0));
  }
}

/// Gives a layer clean logits within `noise` of its logits, and deviations in (0.5, 1.5).
template <class T>
void add_noise(test_random& random, routed_layer<T>& layer, double noise) {
  layer.clean = layer.deviation = matrix<T, cpu>(layer.tokens(), layer.experts());
  for (index i = 0; i < layer.clean.size(); ++i) {
    layer.clean.data()[i] = layer.logits.data()[i] + static_cast<T>(random.uniform(-noise, noise));
    layer.deviation.data()[i] = static_cast<T>(random.uniform(0.5, 1.5));
  }
}

/// Mean of f(layer, n) over the real tokens of each layer, summed over layers.
template <class F>
double mean_over_tokens(const std::vector<routed_layer<double>>& layers, F f) {
  double total = 0.0;
  for (const auto& layer : layers) {
    double sum = 0.0, real = 0.0;
    for (index n = 0; n < layer.tokens(); ++n) {
      if (!layer.real(n)) continue;
      sum += f(layer, n);
      real += 1.0;
    }
    total += real > 0.0 ? sum / real : 0.0;
  }
  return total;
}

template <class T>
std::vector<routed_layer<double>> all_widened(const std::vector<routed_layer<T>>& layers) {
  std::vector<routed_layer<double>> wide;
  for (const auto& layer : layers) wide.push_back(widened(layer));
  return wide;
}

/// Central differences of a reference value by the logits and gates of layer l. Padding is left
/// out: nothing may depend on it.
struct layer_gradient {
  table dlogits;
  table dgates;
};
template <class F>
layer_gradient numeric_gradient(std::vector<routed_layer<double>> layers, std::size_t l,
                                double step, F value) {
  routed_layer<double>& layer = layers[l];
  layer_gradient g{table(layer.tokens(), layer.experts()), table(layer.tokens(), layer.experts())};
  const auto probe = [&](double& x) {
    const double at = x;
    x = at + step;
    const double above = value(layers);
    x = at - step;
    const double below = value(layers);
    x = at;
    return (above - below) / (2.0 * step);
  };
  for (index n = 0; n < layer.tokens(); ++n) {
    if (!layer.real(n)) continue;
    for (index e = 0; e < layer.experts(); ++e) {
      if (std::isfinite(layer.logits(n, e))) g.dlogits(n, e) = probe(layer.logits(n, e));
      if (layer.on(n, e)) g.dgates(n, e) = probe(layer.gates(n, e));
    }
  }
  return g;
}

/// Roundings on the way from logits to a softmax of E experts whose logits differ by `spread` at
/// most: an error of spread u in the difference to the largest is as large a relative error of its
/// exponential; exponential (2 u), E - 1 additions, division.
inline double softmax_roundings(index experts, double spread) {
  return static_cast<double>(experts) + spread + 4.0;
}

/// Largest difference between two logits of one token, over all layers.
inline double spread_of(const std::vector<routed_layer<double>>& layers) {
  double spread = 0.0;
  for (const auto& layer : layers) {
    for (index n = 0; n < layer.tokens(); ++n) {
      if (!layer.real(n)) continue;
      double low = std::numeric_limits<double>::infinity(), high = -low;
      for (index e = 0; e < layer.experts(); ++e) {
        if (!std::isfinite(layer.logits(n, e))) continue;
        low = std::min(low, layer.logits(n, e));
        high = std::max(high, layer.logits(n, e));
      }
      spread = std::max(spread, high - low);
    }
  }
  return spread;
}

/// Additions on the path of one of N terms of a canonical column sum, over `layers` layers: at most
/// 128 at each level of the tree.
inline double column_sum_roundings(index tokens, index layers = 1) {
  double roundings = 0.0;
  for (index left = tokens; left > 1; left = (left + 127) / 128) {
    roundings += static_cast<double>(std::min<index>(left, 128));
  }
  return roundings + static_cast<double>(layers);
}

}  // namespace talpa::support
