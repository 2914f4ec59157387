// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/analysis/neuron_split.hpp>
#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/assign_balanced.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

// Splits that look at the network: neurons that resemble one another, or work together, form an
// expert. All sums are in double and in a fixed order, on one thread.

namespace talpa {

namespace detail {

using points = matrix<double, cpu>;  // a row a neuron

inline double squared_distance(const double* a, const double* b, index size) {
  double sum = 0.0;
  for (index i = 0; i < size; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}
inline double absolute_distance(const double* a, const double* b, index size) {
  double sum = 0.0;
  for (index i = 0; i < size; ++i) sum += std::abs(a[i] - b[i]);
  return sum;
}

/// Gives every point one centre, each centre equally many points, with the least sum of distances.
template <class Distance>
std::vector<index> assign_points(context<cpu>& ctx, const points& at, const points& centres,
                                 Distance distance) {
  matrix<double, cpu> nearness(at.rows(), centres.rows());
  matrix<std::uint32_t, cpu> mask(at.rows(), mask_words(centres.rows()));
  for (index i = 0; i < at.rows(); ++i) {
    for (index c = 0; c < centres.rows(); ++c) {
      nearness(i, c) = -distance(at.view().row(i), centres.view().row(c), at.cols());
    }
  }
  ops::assign_balanced<cpu, double>(ctx, nearness.view(), {}, mask.view());
  std::vector<index> centre_of;
  for (index i = 0; i < at.rows(); ++i) {
    index c = 0;
    while (((mask(i, c / mask_word_bits) >> (c % mask_word_bits)) & 1u) == 0) ++c;
    centre_of.push_back(c);
  }
  return centre_of;
}

/// The means of the points of each centre, which has `size` of them.
inline void move_centres(const points& at, const std::vector<index>& centre_of, index size,
                         points& centres) {
  std::fill_n(centres.data(), centres.size(), 0.0);
  for (index i = 0; i < at.rows(); ++i) {
    double* const centre = centres.view().row(centre_of[static_cast<std::size_t>(i)]);
    for (index d = 0; d < at.cols(); ++d) centre[d] += at(i, d);
  }
  for (index i = 0; i < centres.size(); ++i) centres.data()[i] /= static_cast<double>(size);
}

/// Assigns and moves the centres until nothing changes, `iterations` times at most.
template <class Distance>
std::vector<index> cluster_points(context<cpu>& ctx, const points& at, points& centres,
                                  index iterations, Distance distance) {
  std::vector<index> centre_of;
  for (index step = 0; step < iterations; ++step) {
    std::vector<index> now = assign_points(ctx, at, centres, distance);
    if (now == centre_of) break;
    centre_of = std::move(now);
    move_centres(at, centre_of, at.rows() / centres.rows(), centres);
  }
  return centre_of;
}

/// First centres by k-means++: a point at random, then points with probability proportional to
/// their squared distance from the nearest centre so far.
inline points spread_centres(const points& at, index count, std::uint64_t seed) {
  const random_stream stream = generator(seed).next();
  points centres(count, at.cols());
  std::vector<double> nearest(static_cast<std::size_t>(at.rows()));
  index taken = static_cast<index>(uniform_index(stream, 0, static_cast<std::uint64_t>(at.rows())));
  for (index c = 0; c < count; ++c) {
    std::copy_n(at.view().row(taken), at.cols(), centres.view().row(c));
    double sum = 0.0;
    for (index i = 0; i < at.rows(); ++i) {
      double& d = nearest[static_cast<std::size_t>(i)];
      const double now = squared_distance(at.view().row(i), centres.view().row(c), at.cols());
      d = c == 0 ? now : std::min(d, now);
      sum += d;
    }
    const double mark = sum * uniform<double>(stream, static_cast<std::uint64_t>(c) + 1);
    double below = 0.0;
    taken = 0;
    while (taken + 1 < at.rows()) {
      below += nearest[static_cast<std::size_t>(taken)];
      if (below > mark) break;
      ++taken;
    }
  }
  return centres;
}

/// Appends the neurons of each centre, in ascending order.
inline void append_clusters(const std::vector<index>& neurons, const std::vector<index>& centre_of,
                            index centres, std::vector<index>& order) {
  for (index c = 0; c < centres; ++c) {
    for (std::size_t i = 0; i < neurons.size(); ++i) {
      if (centre_of[i] == c) order.push_back(neurons[i]);
    }
  }
}

inline std::vector<index> count_up(index size) {
  std::vector<index> all;
  for (index i = 0; i < size; ++i) all.push_back(i);
  return all;
}

/// Per token 1 for the `active` neurons with the largest |h|, ties to the lower one, else 0; a row
/// a neuron [F, S].
template <class T>
points activity(const char* function, matrix_view<const T, cpu> h, index active) {
  check_range(function, "active", active, 1, h.cols, "neurons");
  check_at_least(function, "tokens", h.rows, 1, "rows of activations");
  points on(h.cols, h.rows);
  for (index s = 0; s < h.rows; ++s) {
    std::vector<index> order = count_up(h.cols);
    for (index f = 0; f < h.cols; ++f) {
      const double v = static_cast<double>(h(s, f));
      check_value(std::isfinite(v), function, "activations", v, "finite numbers");
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](index a, index b) { return std::abs(h(s, a)) > std::abs(h(s, b)); });
    for (index i = 0; i < active; ++i) on(order[static_cast<std::size_t>(i)], s) = 1.0;
  }
  return on;
}

/// Exchanges pairs of neurons of different experts for as long as that puts more co-activation
/// within experts, `sweeps` times through all pairs at most. `on` holds zeros and ones.
inline void exchange_neurons(const points& on, index experts, index sweeps,
                             std::vector<index>& expert_of) {
  const index neurons = on.rows();
  matrix<std::int64_t, cpu> together(neurons, neurons);  // tokens for which both work
  matrix<std::int64_t, cpu> with(neurons, experts);      // sums of it over an expert
  for (index s = 0; s < on.cols(); ++s) {
    std::vector<index> working;
    for (index f = 0; f < neurons; ++f) {
      if (on(f, s) != 0.0) working.push_back(f);
    }
    for (const index f : working) {
      for (const index g : working) ++together(f, g);
    }
  }
  const auto expert = [&](index f) -> index& { return expert_of[static_cast<std::size_t>(f)]; };
  for (index f = 0; f < neurons; ++f) {
    for (index g = 0; g < neurons; ++g) with(f, expert(g)) += together(f, g);
  }
  bool changed = true;
  for (index sweep = 0; sweep < sweeps && changed; ++sweep) {
    changed = false;
    for (index f = 0; f < neurons; ++f) {
      for (index g = f + 1; g < neurons; ++g) {
        const index a = expert(f), b = expert(g);
        if (a == b) continue;
        const std::int64_t gain = with(f, b) - with(f, a) + together(f, f) + with(g, a) -
                                  with(g, b) + together(g, g) - 2 * together(f, g);
        if (gain <= 0) continue;
        for (index h = 0; h < neurons; ++h) {
          const std::int64_t moved = together(h, g) - together(h, f);
          with(h, a) += moved;
          with(h, b) -= moved;
        }
        std::swap(expert(f), expert(g));
        changed = true;
      }
    }
  }
}

}  // namespace detail

/// Experts of neurons with similar weights: k-means with equally many neurons a cluster, on rows of
/// length 1.
///
/// Forward: centres by k-means++ from `seed`; then in turns the assignment of F / E neurons to each
/// centre with the least sum of squared distances (ops::assign_balanced), and centres that are the
/// means of their neurons, until nothing changes.
/// Shapes: weights [F, D]: those of gate or of up; one clustering for all three matrices.
/// Edges: a row of zeros stays one.
/// Cost: F E D multiply-adds and an assignment a step. Determinism: same split for the same seed.
/// Throws: value_error when E does not divide F, for iterations below 1 and weights that are not
/// finite.
/// Source: MoEfication (arXiv 2110.01786), on rows of the first matrix; LLaMA-MoE
/// (arXiv 2406.16554) on those of up. Both take an approximate assignment; this one is the best.
struct weight_split {
  static constexpr const char* name = "weight_split";

  index iterations = 100;  ///< steps at most, >= 1
  std::uint64_t seed = 0;

  template <class U>
  neuron_split operator()(context<cpu>& ctx, matrix_view<U, cpu> weights, index experts) const {
    check_at_least(name, "iterations", iterations, 1, "steps of k-means at most");
    neuron_split split;
    split.hidden = detail::neurons_of_expert(name, weights.rows, experts);
    detail::points at(weights.rows, weights.cols);
    for (index f = 0; f < weights.rows; ++f) {
      double squares = 0.0;
      for (index d = 0; d < weights.cols; ++d) {
        const double w = static_cast<double>(weights(f, d));
        check_value(std::isfinite(w), name, "weights", w, "finite numbers");
        squares += w * w;
      }
      const double length = squares > 0.0 ? std::sqrt(squares) : 1.0;
      for (index d = 0; d < weights.cols; ++d) {
        at(f, d) = static_cast<double>(weights(f, d)) / length;
      }
    }
    detail::points centres = detail::spread_centres(at, experts, seed);
    const auto expert_of =
        detail::cluster_points(ctx, at, centres, iterations, detail::squared_distance);
    detail::append_clusters(detail::count_up(at.rows()), expert_of, experts, split.order);
    return split;
  }
};

/// Experts of neurons that work together: a neuron works for a token when its |h| is among the
/// `active` largest. Looks for the greatest co-activation within experts, the number of (token,
/// pair of neurons of one expert that both work for it).
///
/// Forward: balanced k-means as weight_split, of what tokens each neuron works for, which has the
/// same optimum for experts of one size; then two neurons of different experts are exchanged as
/// long as the co-activation rises, so that at the end no exchange of two raises it.
/// Shapes: activations h [S, F] of S tokens, as dense_ffn::neurons gives them.
/// Cost: F E S multiply-adds and an assignment a step of k-means, F^2 a sweep of exchanges; F^2
/// integers of memory. Determinism: same split for the same seed.
/// Throws: as weight_split; value_error for `active` outside 1..F or no tokens.
/// Source: the co-activation graph of MoEfication (arXiv 2110.01786), which cuts it with METIS;
/// exchanges as Kernighan and Lin 1970.
struct coactivation_split {
  static constexpr const char* name = "coactivation_split";

  index active = 10;       ///< neurons that count as working for a token, 1..F
  index iterations = 100;  ///< steps, and sweeps of exchanges, at most, >= 1
  std::uint64_t seed = 0;

  template <class U, class T = std::remove_const_t<U>>
  neuron_split operator()(context<cpu>& ctx, matrix_view<U, cpu> h, index experts) const {
    check_at_least(name, "iterations", iterations, 1, "steps of k-means at most");
    neuron_split split;
    split.hidden = detail::neurons_of_expert(name, h.cols, experts);
    const detail::points on = detail::activity<T>(name, h, active);
    detail::points centres = detail::spread_centres(on, experts, seed);
    auto expert_of = detail::cluster_points(ctx, on, centres, iterations, detail::squared_distance);
    detail::exchange_neurons(on, experts, iterations, expert_of);
    detail::append_clusters(detail::count_up(h.cols), expert_of, experts, split.order);
    return split;
  }
};

/// Experts by how often neurons work: the most active ones form the shared experts, the others
/// gather round the most active of them.
///
/// Forward: rate_f = share of tokens for which |h_f| is among the `active` largest. The
/// shared F / (E + shared) neurons of highest rate are shared. Of the rest the E of highest rate
/// are the first centres; `iterations` times the others are assigned, equally many to each centre,
/// with the least sum of absolute distances between what they work for, and centres become means.
/// The representative of an expert is its neuron nearest to the last centre.
/// Shapes: activations h [S, F]; experts E are the routed ones, E + shared divides F.
/// Edges: ties to the lower neuron.
/// Cost: F E S and an assignment a step. Determinism: no random numbers.
/// Throws: value_error as coactivation_split, also for shared below 0.
/// Source: CMoE (arXiv 2502.04416) and its code: active = 10, one iteration, activations of tokens
/// and weights of length 1 (dense_ffn::neurons with unit_length). The rows of gate and up of the
/// representatives, divided by their lengths, are its router (glu_scorer).
struct activation_split {
  static constexpr const char* name = "activation_split";

  index active = 10;     ///< neurons that count as working for a token, 1..F
  index shared = 0;      ///< experts that are always on, >= 0
  index iterations = 1;  ///< steps at most, >= 1

  template <class U, class T = std::remove_const_t<U>>
  neuron_split operator()(context<cpu>& ctx, matrix_view<U, cpu> h, index experts) const {
    check_at_least(name, "shared", shared, 0, "experts that are always on");
    check_at_least(name, "experts", experts, 1, "at least one expert");
    check_at_least(name, "iterations", iterations, 1, "steps of k-means at most");
    neuron_split split;
    split.hidden = detail::neurons_of_expert(name, h.cols, experts + shared);
    split.shared = shared;
    const detail::points on = detail::activity<T>(name, h, active);

    std::vector<double> count(static_cast<std::size_t>(h.cols), 0.0);
    for (index f = 0; f < h.cols; ++f) {
      for (index s = 0; s < h.rows; ++s) count[static_cast<std::size_t>(f)] += on(f, s);
    }
    std::vector<index> by_rate = detail::count_up(h.cols);
    std::stable_sort(by_rate.begin(), by_rate.end(), [&](index a, index b) {
      return count[static_cast<std::size_t>(a)] > count[static_cast<std::size_t>(b)];
    });
    const auto always = static_cast<std::ptrdiff_t>(shared * split.hidden);
    split.order.assign(by_rate.begin(), by_rate.begin() + always);
    std::vector<index> rest(by_rate.begin() + always, by_rate.end());
    detail::points centres(experts, h.rows);
    for (index e = 0; e < experts; ++e) {
      std::copy_n(on.view().row(rest[static_cast<std::size_t>(e)]), h.rows, centres.view().row(e));
    }
    std::sort(rest.begin(), rest.end());
    detail::points at(static_cast<index>(rest.size()), h.rows);
    for (index i = 0; i < at.rows(); ++i) {
      std::copy_n(on.view().row(rest[static_cast<std::size_t>(i)]), h.rows, at.view().row(i));
    }
    const auto centre_of =
        detail::cluster_points(ctx, at, centres, iterations, detail::absolute_distance);
    detail::append_clusters(rest, centre_of, experts, split.order);
    for (index e = 0; e < experts; ++e) {
      index best = -1;
      double least = 0.0;
      for (index i = 0; i < at.rows(); ++i) {
        if (centre_of[static_cast<std::size_t>(i)] != e) continue;
        const double d = detail::absolute_distance(at.view().row(i), centres.view().row(e), h.rows);
        if (best >= 0 && d >= least) continue;
        best = rest[static_cast<std::size_t>(i)];
        least = d;
      }
      split.representative.push_back(best);
    }
    return split;
  }
};

}  // namespace talpa
