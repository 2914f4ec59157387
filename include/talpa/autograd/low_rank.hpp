// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/initialise.hpp>
#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>

#include <cmath>

namespace talpa {

/// What alpha is divided by.
enum class lora_scaling {
  by_rank,       ///< s = alpha / r (LoRA, arXiv 2106.09685)
  by_root_rank,  ///< s = alpha / sqrt(r), for larger ranks (rsLoRA, arXiv 2312.03732)
};

/// How the factor A begins. B begins at zero, so that a fresh adapter changes nothing, but for
/// perft, with which it changes nearly nothing.
enum class lora_init {
  kaiming,   ///< uniform in +-1 / sqrt(D): Kaiming with a = sqrt 5, as PEFT and MoLA
  gaussian,  ///< normal with standard deviation 1 / r, as PEFT's "gaussian"
  /// normal with standard deviation sqrt(2 / r), B normal with 1e-6: as PERFT's code, whose fan is
  /// the output's (arXiv 2411.08212)
  perft,
};

namespace detail {

/// What the numbers of a low-rank update must be.
inline void check_low_rank(const char* name, index rank, double alpha, double dropout) {
  check_at_least(name, "rank", rank, 1, "width of the adapter");
  check_value(std::isfinite(alpha), name, "alpha", alpha, "a finite number");
  check_value(dropout >= 0.0 && dropout < 1.0, name, "dropout", dropout, "0 <= dropout < 1");
}

inline double low_rank_scale(lora_scaling scaling, double alpha, index rank) {
  const double r = static_cast<double>(rank);
  return scaling == lora_scaling::by_rank ? alpha / r : alpha / std::sqrt(r);
}

/// A factor A [rows, D] as `init` says.
template <class T, class B>
matrix<T, B> make_low_rank_a(lora_init init, index rows, index inputs, index rank,
                             generator& random) {
  matrix<T, B> a(rows, inputs);
  if (init == lora_init::kaiming) {
    fill_uniform(a.view(), 1.0 / std::sqrt(static_cast<double>(inputs)), random);
  } else {
    const double r = static_cast<double>(rank);
    fill_normal(a.view(), init == lora_init::gaussian ? 1.0 / r : std::sqrt(2.0 / r), random);
  }
  return a;
}
/// A factor B [rows, O] as `init` says.
template <class T, class B>
matrix<T, B> make_low_rank_b(lora_init init, index rows, index outputs, generator& random) {
  matrix<T, B> b(rows, outputs);
  if (init == lora_init::perft) fill_normal(b.view(), 1e-6, random);
  return b;
}

}  // namespace detail

}  // namespace talpa
