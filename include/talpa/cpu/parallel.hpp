// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

// The only file that may test _OPENMP. Without it the same tasks run in order on the caller.
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace talpa::detail {

/// True in translation units compiled with OpenMP.
#if defined(_OPENMP)
inline constexpr bool has_openmp = true;
inline int available_threads() { return omp_get_max_threads(); }
#else
inline constexpr bool has_openmp = false;
inline int available_threads() { return 1; }
#endif

/// Runs task(i, thread) for i in [0, tasks) on up to `threads` threads, 0 <= thread < threads. How
/// the work is cut into tasks must depend on shapes only: then results have the same bits for any
/// number of threads. Tasks must not throw.
template <class Task>
void parallel_for(int threads, index tasks, Task task) {
#if defined(_OPENMP)
  const int team = static_cast<int>(tasks < threads ? (tasks > 0 ? tasks : 1) : threads);
#pragma omp parallel num_threads(team)
  {
    // Libraries called inside (Eigen) ask how many threads a new region would get: one.
    omp_set_num_threads(1);
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (index i = 0; i < tasks; ++i) task(i, thread);
  }
#else
  static_cast<void>(threads);
  for (index i = 0; i < tasks; ++i) task(i, 0);
#endif
}

/// parallel_for over the blocks of `count` rows of at most `block_rows` each: task(first, rows,
/// thread).
template <class Task>
void parallel_for_blocks(int threads, index count, index block_rows, Task task) {
  parallel_for(threads, ceil_div(count, block_rows), [&](index block, int thread) {
    const index first = block * block_rows;
    const index rest = count - first;
    task(first, rest < block_rows ? rest : block_rows, thread);
  });
}

}  // namespace talpa::detail
