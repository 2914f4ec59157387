// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/timing.cuh"

#include <talpa/routing/statistics.hpp>

#include <cstdio>
#include <string>

namespace talpa::bench {

/// One run: where lines go, which are wanted, and what went wrong.
struct laboratory {
  context<gpu>& ctx;
  report& out;
  std::string filter;        ///< what the name of a line must hold
  double copy_bytes_per_us;  ///< of today
  int failed = 0;

  bool wants(const std::string& name) const { return name.find(filter) != std::string::npos; }

  /// Runs what measures one or more lines; an error is told, and other lines go on.
  template <class Run>
  void attempt(const std::string& name, Run run) {
    try {
      run();
    } catch (const error& e) {
      std::fprintf(stderr, "%s: %s\n", name.c_str(), e.what());
      ++failed;
    }
  }
};

/// Turns short enough for a thousand lines. What takes longer than a turn has one replay in it.
inline constexpr turns short_turns{.rounds = 7, .us = 2e3, .least = 1};

/// What statistics say of the load.
inline void append_load(report::counters& counters, const statistics_report& load) {
  counters.emplace_back("active", load.active_experts());
  counters.emplace_back("entropy", load.mean_entropy());
  counters.emplace_back("violation", load.max_violation());
}

// Each in a source of its own, for compilers that run beside each other.
void top_k_lines(laboratory& lab);
void row_lines(laboratory& lab);
void mass_lines(laboratory& lab);
void broadcast_lines(laboratory& lab);
void control_lines(laboratory& lab);
void capacity_lines(laboratory& lab);
void coupled_lines(laboratory& lab);
void controlled_preset_lines(laboratory& lab);
void entropy_preset_lines(laboratory& lab);
void top_k_preset_lines(laboratory& lab);
void biased_preset_lines(laboratory& lab);
void dense_preset_lines(laboratory& lab);
void fused_preset_lines(laboratory& lab);
void network_preset_lines(laboratory& lab);
void fused_network_preset_lines(laboratory& lab);

}  // namespace talpa::bench
