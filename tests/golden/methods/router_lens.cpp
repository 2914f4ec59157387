// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/analysis/router_lens.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/selectors/top_k.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace talpa::golden::router_lens_method {

namespace {

/// Empty when the lists of the file, layer by layer, are those chosen; as sets unless `in_order`.
std::string compare_selection(const golden_case& c, const std::string& field,
                              const expert_selection& chosen, bool in_order) {
  if (c.length(field) != static_cast<index>(chosen.size())) return "other layers";
  for (std::size_t l = 0; l < chosen.size(); ++l) {
    const std::string list = field + "." + std::to_string(l);
    std::vector<index> ours = chosen[l], theirs;
    for (index i = 0; i < c.length(list); ++i) {
      theirs.push_back(c.integer(list + "." + std::to_string(i)));
    }
    if (!in_order) {
      std::sort(ours.begin(), ours.end());
      std::sort(theirs.begin(), theirs.end());
    }
    if (ours != theirs) return "layer " + std::to_string(l) + " has other experts";
  }
  return {};
}

/// The names that the original gives the modules of chosen experts, as a sorted list.
std::string compare_modules(const golden_case& c, const expert_selection& chosen) {
  std::vector<std::string> ours, theirs;
  for (std::size_t l = 0; l < chosen.size(); ++l) {
    for (const index e : chosen[l]) {
      for (const char* const part : {".gate_proj", ".up_proj", ".down_proj"}) {
        ours.push_back("layers." + std::to_string(l) + ".mlp.experts." + std::to_string(e) + part);
      }
    }
  }
  for (index i = 0; i < c.length("outputs.target_modules"); ++i) {
    theirs.push_back(c.text("outputs.target_modules." + std::to_string(i)));
  }
  std::sort(ours.begin(), ours.end());
  std::sort(theirs.begin(), theirs.end());
  return ours == theirs ? "" : "other modules";
}

void count(const golden_case& c, checker& check) {
  const index layers = c.integer("hyper.layers"), experts = c.integer("hyper.experts");
  const index k = c.integer("hyper.k"), n = c.integer("hyper.select_per_layer");
  router_lens lens(layers, experts, k);
  context<cpu> ctx;
  for (index s = 0; s < c.length("inputs.router_logits"); ++s) {
    const matrix<double, cpu> logits = c.at("inputs.router_logits." + std::to_string(s)).rows();
    const index tokens = logits.rows() / layers;
    for (index l = 0; l < layers; ++l) {
      routing<double, cpu> r(tokens, experts);
      ops::select(ctx, top_k<gate::raw>{.k = k}, logits.view().row_range(l * tokens, tokens), {},
                  r.gates.view(), r.mask.view());
      lens.add(l, r.view());
    }
  }
  check.equal("outputs.activation_counts", lens.counts(), {});
  const expert_selection chosen = top_experts(lens.counts(), n);
  check.account("outputs.selected", compare_selection(c, "outputs.selected", chosen, false));
  check.account("outputs.target_modules", compare_modules(c, chosen));
  std::string problem;
  const expert_selection all = top_experts(lens.counts(), experts);
  for (index l = 0; l < layers && n < experts; ++l) {
    const auto& order = all[static_cast<std::size_t>(l)];
    const double gap = lens.counts()(l, order[static_cast<std::size_t>(n - 1)]) -
                       lens.counts()(l, order[static_cast<std::size_t>(n)]);
    if (gap != c.number("outputs.selection_gap." + std::to_string(l))) problem = "another gap";
  }
  check.account("outputs.selection_gap", problem);
}

/// [layer][expert] of a field: scores that the file rounds to four decimals.
void compare_scores(const golden_case& c, checker& check, const std::string& field,
                    const matrix<double, cpu>& scores) {
  std::string problem;
  for (index l = 0; l < scores.rows(); ++l) {
    for (index e = 0; e < scores.cols(); ++e) {
      const std::string at = field + "." + std::to_string(l) + "." + std::to_string(e);
      // null is 0 / 0 in the original, and 0 here. Half a decimal, and what is left of its middle.
      const double theirs = c.has(at) ? c.number(at) : 0.0;
      if (std::abs(scores(l, e) - theirs) > 0.5e-4 + rounding_floor) {
        problem = "another score at " + at;
      }
    }
  }
  check.account(field, problem);
}

void scores(const golden_case& c, checker& check) {
  const index layers = c.integer("hyper.layers"), experts = c.integer("hyper.experts");
  const index tokens = c.integer("hyper.tokens"), k = c.integer("hyper.k");
  router_lens lens(layers, experts, k);
  for (index l = 0; l < layers; ++l) {
    routing<double, cpu> r(tokens, experts);
    for (index n = 0; n < tokens; ++n) {
      for (index i = 0; i < k; ++i) {
        const std::string at =
            std::to_string(l) + "." + std::to_string(n) + "." + std::to_string(i);
        const index e = c.integer("inputs.topk_ids." + at);
        r.gates(n, e) = c.number("inputs.topk_weights." + at);
        r.mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
      }
    }
    lens.add(l, r.view());
  }
  const std::string ours = "outputs.per_layer_normalised.", released = "outputs.released_script.";
  const matrix<double, cpu> token = lens.token_scores(), gate = lens.gate_scores();
  compare_scores(c, check, ours + "token_scores", scale_scores(token, score_scale::per_layer));
  compare_scores(c, check, ours + "gate_mean", gate);
  compare_scores(c, check, released + "token_scores",
                 scale_scores(token, score_scale::released_script));
  compare_scores(c, check, released + "gate_scores",
                 scale_scores(gate, score_scale::released_script));
  const double p = c.number("hyper.top_p");
  const auto compare = [&](const std::string& field, const cumulative_experts& by,
                           const matrix<double, cpu>& from) {
    // p = 0 chooses no expert: refused here.
    expert_selection chosen(static_cast<std::size_t>(layers));
    bool refused = false;
    try {
      chosen = by(from);
    } catch (const value_error&) {
      refused = true;
    }
    std::string problem = compare_selection(c, field, chosen, true);
    if (refused != (p == 0.0)) problem = "an empty selection is refused, and no other";
    check.account(field, problem);
  };
  compare(ours + "selected_token", {.p = p, .decimals = 4}, token);
  compare(ours + "selected_gate", {.p = p / 2.0, .scale = score_scale::none, .decimals = 4}, gate);
}

const registration entries[] = {{"perft/routerlens_count", count}, {"perft/esft_scores", scores}};

}  // namespace

}  // namespace talpa::golden::router_lens_method
