// SPDX-License-Identifier: Apache-2.0
#include "golden/runner.hpp"

#include <talpa/analysis/best_subset.hpp>

#include <algorithm>
#include <string>

namespace talpa::golden::factorllm_subset_label_method {

namespace {

void factorllm_subset_label(const golden_case& c, checker& check) {
  const index experts = c.integer("hyper.n");
  const matrix<double, cpu> target = c.at("inputs.ground_truth").rows();
  matrix<double, cpu> outputs(experts * target.rows(), target.cols());
  for (index e = 0; e < experts; ++e) {
    const matrix<double, cpu> part = c.at("inputs.expert_out." + std::to_string(e)).rows();
    std::copy_n(part.data(), part.size(), outputs.view().row(e * target.rows()));
  }
  const best_subset label{.k = c.integer("hyper.k")};
  const auto mask = label(outputs.view(), target, experts);
  matrix<double, cpu> bits(target.rows(), experts);
  for (index n = 0; n < bits.rows(); ++n) {
    for (index e = 0; e < experts; ++e) bits(n, e) = (mask(n, 0) >> e) & 1u;
  }
  check.equal("outputs.label", bits, c.forward());
}

const registration entry{"perft/factorllm_subset_label", factorllm_subset_label};

}  // namespace

}  // namespace talpa::golden::factorllm_subset_label_method
