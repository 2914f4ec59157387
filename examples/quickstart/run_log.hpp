// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "atomic_file.hpp"
#include "run_info.hpp"

#include <nlohmann/json.hpp>

#include <memory>
#include <string>

namespace talpa::examples {

/// A log in JSON Lines: one object a line, each with an "event"; the first is the run's header. The
/// members keep the order in which they were given. Numbers that are not finite become null.
///
/// A log that was closed without `commit` leaves no file. With an empty path nothing is written.
class run_log {
 public:
  using object = nlohmann::ordered_json;

  run_log(const std::string& path, const run_info& info) {
    if (path.empty()) return;
    file_ = std::make_unique<atomic_file>(path);
    write({{"event", "run"},
           {"program", "quickstart"},
           {"talpa", info.version},
           {"compiler", info.compiler},
           {"build_type", info.build_type},
           {"flags", info.flags},
           {"isa", info.isa},
           {"optimised", info.optimised},
           {"device", info.device},
           {"threads", info.threads},
           {"seeds", info.seeds},
           {"arguments", info.command},
           {"started", info.started}});
  }

  void write(const object& line) {
    if (!file_) return;
    // Paths and arguments are bytes; what is not UTF-8 in them must not end the run.
    file_->write(line.dump(-1, ' ', false, object::error_handler_t::replace) + "\n");
  }

  void commit() {
    if (file_) file_->commit();
  }

 private:
  std::unique_ptr<atomic_file> file_;
};

}  // namespace talpa::examples
