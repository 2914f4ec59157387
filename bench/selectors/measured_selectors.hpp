// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/base_assignment.hpp>
#include <talpa/selectors/biased_top_k.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/expert_choice.hpp>
#include <talpa/selectors/intervene.hpp>
#include <talpa/selectors/learned_threshold.hpp>
#include <talpa/selectors/rectified.hpp>
#include <talpa/selectors/sinkhorn.hpp>
#include <talpa/selectors/sparsegen.hpp>
#include <talpa/selectors/straight_through.hpp>
#include <talpa/selectors/threshold.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/selectors/top_p.hpp>

#include <string>
#include <vector>

// Which selectors the benchmarks measure, at which sizes and under which names, on every backend.

namespace talpa::bench {

struct route_sizes {
  index tokens = 4096;
  std::vector<index> experts = {8, 16, 64, 128};
  std::vector<index> ks = {1, 2, 8};  ///< 0: the selector has none, and top-2 stands beside it
};

/// Deviation of the experts' mean logits in lines with `skew`.
inline constexpr double skewed = 2.0;

inline std::string route_name(const std::string& name, index tokens, index experts, index k,
                              double skew, const char* backend = "cpu") {
  return name + "/N:" + std::to_string(tokens) + "/E:" + std::to_string(experts) +
         (k > 0 ? "/K:" + std::to_string(k) : std::string()) +
         (skew != 0.0 ? "/skew:" + std::to_string(static_cast<int>(skew)) : std::string()) +
         "/f32/" + backend;
}

template <class... Measured>
struct selector_list {};

/// What lines call a selector, its sizes, and `make(experts, k)`.
namespace measured {

struct with_k {
  static route_sizes sizes() { return {}; }
};
struct without_k {
  static route_sizes sizes() { return {.ks = {0}}; }
};

struct top_k_raw : with_k {
  static constexpr const char* name = "top_k_raw";
  static auto make(index, index k) { return talpa::top_k<gate::raw>{.k = k}; }
};
struct top_k_renormalised : with_k {
  static constexpr const char* name = "top_k_renormalised";
  static auto make(index, index k) { return talpa::top_k<gate::renormalised>{.k = k}; }
};
struct top_k_softmax_selected : with_k {
  static constexpr const char* name = "top_k_softmax_selected";
  static auto make(index, index k) { return talpa::top_k<gate::softmax_selected>{.k = k}; }
};
struct top_k_softmax_probability : with_k {
  static constexpr const char* name = "top_k_softmax_probability";
  static auto make(index, index k) { return talpa::top_k<gate::softmax_probability>{.k = k}; }
};
struct top_k_hard : with_k {
  static constexpr const char* name = "top_k_hard";
  static auto make(index, index k) { return talpa::top_k<gate::hard>{.k = k}; }
};

struct dense : without_k {
  static constexpr const char* name = "dense";
  static auto make(index, index) { return talpa::dense{}; }
};
struct rectified : without_k {
  static constexpr const char* name = "rectified";
  static auto make(index, index) { return talpa::rectified{}; }
};
struct straight_through : with_k {
  static constexpr const char* name = "straight_through";
  static auto make(index, index k) { return talpa::straight_through{.k = k, .training = false}; }
};
struct intervene : with_k {
  static constexpr const char* name = "intervene";
  static auto make(index experts, index k) {
    return talpa::intervene<talpa::top_k<gate::renormalised>>{
        .inner = {.k = k}, .blocked = {0}, .stimulated = {experts - 1}};
  }
};
struct biased_top_k : with_k {
  static constexpr const char* name = "biased_top_k";
  static auto make(index, index k) { return talpa::biased_top_k<>{.k = k}; }
};
struct biased_top_k_groups {
  static constexpr const char* name = "biased_top_k_groups";
  /// With 8 experts the 4 groups that stay have fewer than 8.
  static route_sizes sizes() { return {.experts = {16, 64, 128}}; }
  static auto make(index, index k) {
    return talpa::biased_top_k<>{.k = k, .n_groups = 8, .topk_groups = 4};
  }
};

struct threshold : without_k {
  static constexpr const char* name = "threshold";
  static auto make(index experts, index) {
    return talpa::threshold<gate::renormalised>{.least = 1.0 / static_cast<double>(experts)};
  }
};
struct top_p : without_k {
  static constexpr const char* name = "top_p";
  static auto make(index, index) { return talpa::top_p<gate::raw>{}; }
};
struct dynamic_entropy : without_k {
  static constexpr const char* name = "dynamic_entropy";
  static auto make(index, index) { return talpa::dynamic_entropy<>{}; }
};
struct broadcast : with_k {
  static constexpr const char* name = "broadcast";
  static auto make(index, index k) {
    return talpa::broadcast<talpa::top_k<gate::raw>>{.inner = {.k = k}};
  }
};
struct broadcast_slots : with_k {
  static constexpr const char* name = "broadcast_slots";
  static auto make(index, index k) {
    return talpa::broadcast<talpa::top_k<gate::raw>, entropy::shannon, slots::per_sequence>{
        .inner = {.k = k}};
  }
};

struct learned_threshold : without_k {
  static constexpr const char* name = "learned_threshold";
  static auto make(index, index) {
    return talpa::learned_threshold<linear_scorer>{.control = {.bias = true}};
  }
};
struct sparsegen : without_k {
  static constexpr const char* name = "sparsegen";
  static auto make(index, index) { return talpa::sparsegen<linear_scorer>{}; }
};
struct fixed_sparsegen : without_k {
  static constexpr const char* name = "fixed_sparsegen";
  static auto make(index, index) { return talpa::fixed_sparsegen{}; }
};

struct capacity_top_k_position : with_k {
  static constexpr const char* name = "capacity_top_k_position";
  static auto make(index, index k) { return talpa::capacity_top_k<gate::renormalised>{.k = k}; }
};
struct capacity_top_k_probability : with_k {
  static constexpr const char* name = "capacity_top_k_probability";
  static auto make(index, index k) {
    return talpa::capacity_top_k<gate::renormalised, overflow::by_probability>{.k = k};
  }
};
struct expert_choice : without_k {
  static constexpr const char* name = "expert_choice";
  static auto make(index, index) { return talpa::expert_choice{}; }
};
// The last two run on fewer tokens, because they take long.
struct sinkhorn {
  static constexpr const char* name = "sinkhorn";
  static route_sizes sizes() { return {.tokens = 1024}; }
  static auto make(index, index k) { return talpa::sinkhorn{.k = k}; }
};
struct base_assignment {
  static constexpr const char* name = "base_assignment";
  static route_sizes sizes() { return {.tokens = 512, .ks = {0}}; }
  static auto make(index, index) { return talpa::base_assignment{}; }
};

}  // namespace measured

/// Top-k with each of its gates.
using top_k_selectors = selector_list<measured::top_k_raw, measured::top_k_renormalised,
                                      measured::top_k_softmax_selected,
                                      measured::top_k_softmax_probability, measured::top_k_hard>;
/// The others without a parameter of their own.
using row_selectors =
    selector_list<measured::dense, measured::rectified, measured::straight_through,
                  measured::intervene, measured::biased_top_k, measured::biased_top_k_groups>;
/// Those whose number of experts follows from probabilities.
using mass_selectors =
    selector_list<measured::threshold, measured::top_p, measured::dynamic_entropy>;
using broadcast_selectors = selector_list<measured::broadcast, measured::broadcast_slots>;
/// Those that read a number a token, and projections.
using control_selectors =
    selector_list<measured::learned_threshold, measured::sparsegen, measured::fixed_sparsegen>;
/// Those whose choice for one token depends on the others.
using capacity_selectors =
    selector_list<measured::capacity_top_k_position, measured::capacity_top_k_probability>;
using coupled_selectors =
    selector_list<measured::expert_choice, measured::sinkhorn, measured::base_assignment>;

}  // namespace talpa::bench
