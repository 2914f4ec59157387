// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "golden/case.hpp"

#include <nlohmann/json.hpp>

namespace talpa::golden {

struct golden_case::node {
  nlohmann::json value;
};

}  // namespace talpa::golden
