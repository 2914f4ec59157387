// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "golden/case.hpp"
#include "support/cpu_products.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/scorers/linear_scorer.hpp>

#include <string>
#include <utility>

namespace talpa::golden {

/// A layer of LoRA experts behind a linear router without bias, with the weights of a case.
template <class Selector>
using mole = mole_linear<router<linear_scorer, Selector>, lora>;

template <class Selector>
mole<Selector> make_mole(const Selector& selector, index experts, index rank, double scaling,
                         strategy execution) {
  return {.router = {.scorer = {}, .selector = selector},
          .expert = {.rank = rank, .alpha = scaling * static_cast<double>(rank)},
          .experts = experts,
          .execution = execution};
}

/// base [O, D] frozen, router [E, D], A [E R, D], B [E R, O], the rest trained.
template <class Selector>
typename mole<Selector>::template params<double, cpu> mole_params(matrix<double, cpu> base,
                                                                  matrix<double, cpu> router,
                                                                  matrix<double, cpu> a,
                                                                  matrix<double, cpu> b) {
  typename mole<Selector>::template params<double, cpu> p;
  p.base.weight = parameter<double, cpu>("weight", std::move(base));
  p.base.freeze();
  p.router.scorer.weight = parameter<double, cpu>("router.weight", std::move(router));
  p.expert.a = parameter<double, cpu>("expert.A", std::move(a));
  p.expert.b = parameter<double, cpu>("expert.B", std::move(b));
  return p;
}

/// The gradient of a bank B [E R, O] in the layout of the files, [E][O][R].
inline matrix<double, cpu> in_blocks(matrix_view<const double, cpu> bank, index experts) {
  tensor t;
  t.shape = {experts, bank.rows / experts, bank.cols};
  for (index r = 0; r < bank.rows; ++r)
    t.data.insert(t.data.end(), bank.row(r), bank.row(r) + bank.cols);
  return t.transposed_blocks();
}

}  // namespace talpa::golden
