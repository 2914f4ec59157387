// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/parallel.hpp>

namespace talpa {

/// What executes on the host. One context serves one calling thread at a time; its results do not
/// depend on `threads`.
template <>
struct context<cpu> {
  /// As many threads for token-parallel loops as OpenMP offers, 1 without OpenMP.
  context() : threads(detail::available_threads()) {}
  /// So many, >= 1.
  explicit context(int threads_) : threads(threads_) {
    check_at_least("context", "threads", threads_, 1, "threads of token-parallel loops");
  }

  /// Loops run on `threads` threads of the host program, >= 1: OpenMP's beside them would share the
  /// cores.
  context(int threads_, const executor& on_) : threads(threads_), on(on_) {
    check_at_least("context", "threads", threads_, 1, "threads of the executor");
    if (on_.run == nullptr) {
      detail::throw_value("context", "executor.run", "null", "a function that runs tasks");
    }
  }

  int threads;
  executor on;  ///< what runs loops; OpenMP where `run` is null
  /// Looks at values too (NaN or all -inf logits) and throws value_error; costs a pass over them.
  bool checked = false;
  /// What forward saves for backward; the caller opens a scope round each step.
  workspace<cpu> memory;
  /// Temporaries of a single call. A second arena, so that saved values and temporaries, whose
  /// lifetimes interleave, never lie on top of each other.
  workspace<cpu> scratch;
};

}  // namespace talpa
