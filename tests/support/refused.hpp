// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>

#include <string>

namespace talpa::support {

/// The text with which f refuses what it is given, empty where it does not.
template <class F>
std::string refused(F f) {
  try {
    f();
  } catch (const error& e) {
    return e.what();
  }
  return "";
}

}  // namespace talpa::support
