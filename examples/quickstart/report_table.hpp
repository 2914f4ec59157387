// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "report_data.hpp"
#include "text.hpp"

#include <algorithm>
#include <string>
#include <vector>

namespace talpa::examples {

/// A mean, and half the range over seeds where there are several: `97.1 +-0.3`.
inline std::string mean_and_range(const spread& s, std::size_t seeds, const char* plus_minus) {
  std::string text = percent(s.mean);
  if (seeds > 1) text += std::string(" ") + plus_minus + percent(0.5 * (s.high - s.low));
  return text;
}

/// The results for a terminal: ASCII, columns aligned, a heading in bold where `color` is set.
inline std::string result_table(const report_data& data, bool color) {
  std::vector<std::vector<std::string>> rows;
  rows.push_back(
      {"method", "adapters", "router", "active rank", "mean acc %", "worst task %", "", "seconds"});
  for (const method_result& m : data.methods) {
    const bool trained = m.trainable() > 0;
    rows.push_back({m.name, trained ? with_thousands(m.adapter_parameters) : "-",
                    m.router_parameters > 0 ? with_thousands(m.router_parameters) : "-",
                    trained ? fixed(m.active_rank, 1) : "-",
                    mean_and_range(m.mean_accuracy(), m.runs.size(), "+-"),
                    mean_and_range(m.worst_accuracy(), m.runs.size(), "+-"),
                    tasks[static_cast<std::size_t>(m.worst_task())].name,
                    trained ? fixed(m.seconds().mean, 2) : "-"});
  }
  const auto left_aligned = [](std::size_t column) { return column == 0 || column == 6; };
  std::vector<std::size_t> width(rows.front().size(), 0);
  for (const auto& row : rows) {
    for (std::size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  }

  std::string text;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    std::string line;
    for (std::size_t c = 0; c < rows[r].size(); ++c) {
      const std::string padding(width[c] - rows[r][c].size(), ' ');
      if (c > 0) line += c == 6 ? " " : "  ";
      line += left_aligned(c) ? rows[r][c] + padding : padding + rows[r][c];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    if (r == 0) {
      text += (color ? "\x1b[1m" + line + "\x1b[0m" : line) + "\n";
      std::size_t full = 0;
      for (std::size_t c = 0; c < width.size(); ++c) {
        full += width[c] + (c == 0 ? 0 : c == 6 ? 1 : 2);
      }
      text += std::string(full, '-') + "\n";
    } else {
      text += line + "\n";
    }
  }
  return text;
}

}  // namespace talpa::examples
