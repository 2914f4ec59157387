// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/index.hpp>

#include <string>

// The only file that may test _OPENMP. Without it the same tasks run in order on the caller.
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace talpa {

/// Threads of the host program that run the loops of a context in place of OpenMP's.
///
/// `run(host, threads, tasks, task, state)` calls task(state, i, thread) once for each i in
/// [0, tasks), in any order, with 0 <= thread < threads and no two calls at a time that share
/// `thread`, and returns after the last one; what the calls wrote is then visible to the caller. It
/// must not throw, and is called from one thread at a time for each context. Results do not depend
/// on it: how work is cut into tasks depends on shapes alone. A loop of one task, or for one
/// thread, runs on the caller.
struct executor {
  using task = void (*)(void* state, index i, int thread);

  void (*run)(void* host, int threads, index tasks, task call, void* state) = nullptr;
  void* host = nullptr;  ///< handed to run
};

}  // namespace talpa

namespace talpa::detail {

/// True in translation units compiled with OpenMP.
#if defined(_OPENMP)
inline constexpr bool has_openmp = true;
inline int available_threads() { return omp_get_max_threads(); }
#else
inline constexpr bool has_openmp = false;
inline int available_threads() { return 1; }
#endif

#if defined(_OPENMP)
// Libraries called inside (Eigen) ask how many threads a new region would get: one.
class alone {
 public:
  alone() { omp_set_num_threads(1); }
  ~alone() { omp_set_num_threads(before_); }
  alone(const alone&) = delete;
  alone& operator=(const alone&) = delete;

 private:
  int before_ = omp_get_max_threads();
};
#else
class alone {};
#endif

/// Runs task(state, i, thread) for i in [0, tasks), see parallel_for, which would else hold each
/// task three times: for one thread, for an executor and for OpenMP.
[[gnu::noinline]] inline void run_tasks(int threads, const executor& on, index tasks,
                                        executor::task task, void* state) {
  if (threads < 1) throw_value("context", "threads", std::to_string(threads), ">= 1");
  const int team = static_cast<int>(tasks < threads ? (tasks > 0 ? tasks : 1) : threads);
  if (team == 1) {
    [[maybe_unused]] const alone only;
    for (index i = 0; i < tasks; ++i) task(state, i, 0);
    return;
  }
  if (on.run != nullptr) {
    struct callee {
      executor::task task;
      void* state;
    } of{task, state};
    const auto call = [](void* callee_of, index i, int thread) {
      [[maybe_unused]] const alone only;
      const callee& to = *static_cast<const callee*>(callee_of);
      to.task(to.state, i, thread);
    };
    on.run(on.host, team, tasks, call, &of);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(team)
  {
    const alone only;
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (index i = 0; i < tasks; ++i) task(state, i, thread);
  }
#else
  for (index i = 0; i < tasks; ++i) task(state, i, 0);
#endif
}

/// Runs task(i, thread) for i in [0, tasks) on up to `ctx.threads` threads, 0 <= thread <
/// ctx.threads, of the context's executor or of OpenMP; a single task, or all for one thread, on
/// the caller. How the work is cut into tasks must depend on shapes only: then results have the
/// same bits for any number of threads. Tasks must not throw.
/// Throws: value_error, before any task, when somebody has set ctx.threads to less than 1.
template <class Context, class Task>
void parallel_for(const Context& ctx, index tasks, Task task) {
  const auto call = [](void* of, index i, int thread) { (*static_cast<Task*>(of))(i, thread); };
  run_tasks(ctx.threads, ctx.on, tasks, call, &task);
}

/// parallel_for over the blocks of `count` rows of at most `block_rows` each: task(first, rows,
/// thread).
template <class Context, class Task>
void parallel_for_blocks(const Context& ctx, index count, index block_rows, Task task) {
  parallel_for(ctx, ceil_div(count, block_rows), [&](index block, int thread) {
    const index first = block * block_rows;
    const index rest = count - first;
    task(first, rest < block_rows ? rest : block_rows, thread);
  });
}

/// Threads of some loops of a context.
struct loop_threads {
  int threads;
  executor on;
};
/// The context's threads for loops over at least `fewest` rows, else the caller alone: to call
/// others would take longer than the work.
template <class Context>
loop_threads threads_from(const Context& ctx, index rows, index fewest) {
  return {rows < fewest ? 1 : ctx.threads, ctx.on};
}

/// A function of rows [first, first + count) and a thread, by reference; none by default. What
/// takes one need not be instantiated for each.
class row_function {
 public:
  row_function() = default;
  template <class F>
  explicit row_function(const F& f)
      : of_(&f), call_([](const void* of, index first, index count, int thread) {
          (*static_cast<const F*>(of))(first, count, thread);
        }) {}

  explicit operator bool() const { return call_ != nullptr; }
  void operator()(index first, index count, int thread) const { call_(of_, first, count, thread); }

 private:
  const void* of_ = nullptr;
  void (*call_)(const void* of, index first, index count, int thread) = nullptr;
};

}  // namespace talpa::detail
