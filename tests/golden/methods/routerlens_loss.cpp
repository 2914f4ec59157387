// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/analysis/completion_labels.hpp>
#include <talpa/cpu/cross_entropy.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace talpa::golden::routerlens_loss_method {

namespace {

void routerlens_loss(const golden_case& c, checker& check) {
  const tensor given = c.at("inputs.labels"), masked = c.at("outputs.masked_labels");
  const index sequences = given.dim(0), length = given.dim(1);
  matrix<std::int32_t, cpu> tokens(sequences, length);
  for (index i = 0; i < tokens.size(); ++i) {
    tokens.data()[i] = static_cast<std::int32_t>(given.data[static_cast<std::size_t>(i)]);
  }
  std::vector<std::int32_t> end;
  for (index i = 0; i < c.length("hyper.end_of_prompt_ids"); ++i) {
    end.push_back(
        static_cast<std::int32_t>(c.integer("hyper.end_of_prompt_ids." + std::to_string(i))));
  }
  const completion_labels by{end, static_cast<std::int32_t>(c.integer("hyper.eos_token_id"))};
  const vector<std::int32_t, cpu> labels = by(tokens.view());

  // The file's labels stand at their own position and say -100 for none; ours one earlier.
  std::string problem;
  for (index s = 0; s < sequences; ++s) {
    for (index t = 0; t < length; ++t) {
      std::int32_t expected = ignore_label;
      if (t + 1 < length) {
        const double next = masked.data[static_cast<std::size_t>(s * length + t + 1)];
        expected = next < 0.0 ? ignore_label : static_cast<std::int32_t>(next);
      }
      if (labels[s * length + t] != expected) problem = "another label in " + std::to_string(s);
    }
    if (masked.data[static_cast<std::size_t>(s * length)] >= 0.0) problem = "a first token counts";
  }
  check.account("outputs.masked_labels", problem);

  const matrix<double, cpu> logits = c.at("inputs.logits").rows();
  context<cpu> ctx;
  matrix<double, cpu> loss(1, 1), one(1, 1), dlogits(logits.rows(), logits.cols());
  one(0, 0) = 1.0;
  const auto kept = ops::cross_entropy<cpu, double>(ctx, logits.view(), labels.view(), loss.view());
  ops::cross_entropy_backward<cpu, double>(ctx, kept, logits.view(), labels.view(), one.view(),
                                           dlogits.view(), grad_mode::overwrite);
  check.equal("outputs.loss", loss(0, 0), c.forward());
  check.equal("grads.logits", dlogits, c.gradient());
}

const registration entry{"perft/routerlens_loss", routerlens_loss};

}  // namespace

}  // namespace talpa::golden::routerlens_loss_method
