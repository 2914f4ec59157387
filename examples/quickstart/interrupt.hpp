// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <csignal>
#include <cstddef>
#include <pthread.h>
#include <unistd.h>

namespace talpa::examples {

namespace detail {

/// What a signal handler has to tidy up. It may only read lock-free atomics and make
/// async-signal-safe calls.
struct tidy_state {
  static constexpr std::size_t capacity = 8;
  /// Names of the temporary files that exist now.
  std::array<std::atomic<const char*>, capacity> temporary{};
  /// Descriptor of the terminal whose last line is not finished, or -1.
  std::atomic<int> open_line{-1};

  /// A slot for `remove_temporary`, or `capacity` when there is none left.
  std::size_t add_temporary(const char* name) {
    for (std::size_t i = 0; i < capacity; ++i) {
      const char* empty = nullptr;
      if (temporary[i].compare_exchange_strong(empty, name)) return i;
    }
    return capacity;
  }
  void remove_temporary(std::size_t slot) { temporary[slot].store(nullptr); }
};
static_assert(std::atomic<const char*>::is_always_lock_free);
static_assert(std::atomic<int>::is_always_lock_free);

inline tidy_state tidy;

/// Signals that end a run in good order.
inline constexpr std::array<int, 4> ending_signals{SIGINT, SIGTERM, SIGHUP, SIGPIPE};

/// Holds these signals back in this thread, so that a file and its entry in `tidy` come together.
class hold_signals {
 public:
  hold_signals() {
    ::sigset_t set;
    ::sigemptyset(&set);
    for (const int number : ending_signals) ::sigaddset(&set, number);
    ::pthread_sigmask(SIG_BLOCK, &set, &before_);
  }
  hold_signals(const hold_signals&) = delete;
  hold_signals& operator=(const hold_signals&) = delete;
  ~hold_signals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  ::sigset_t before_;
};

inline void tidy_up_and_leave(int signal_number) {
  for (const auto& slot : tidy.temporary) {
    if (const char* name = slot.load()) ::unlink(name);
  }
  const int terminal = tidy.open_line.load();
  if (terminal >= 0 && ::write(terminal, "\n", 1) < 0) {
    // The terminal is gone; there is nobody to tell.
  }
  std::signal(signal_number, SIG_DFL);
  // The signal is blocked while its handler runs: its default action comes when this returns.
  ::raise(signal_number);
}

}  // namespace detail

/// From here on SIGINT, SIGTERM, SIGHUP and SIGPIPE remove the temporary file of every open
/// atomic_file before they end the program. A signal that is ignored (nohup) stays ignored.
inline void tidy_up_on_signals() {
  for (const int number : detail::ending_signals) {
    struct sigaction old {};
    if (::sigaction(number, nullptr, &old) != 0 || old.sa_handler == SIG_IGN) continue;
    struct sigaction action {};
    action.sa_handler = detail::tidy_up_and_leave;
    ::sigemptyset(&action.sa_mask);
    ::sigaction(number, &action, nullptr);
  }
}

}  // namespace talpa::examples
