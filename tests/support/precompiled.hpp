// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every test includes and what changes seldom, parsed once. Tests include what they use all
// the same: this file only saves time.

#include "support/cpu_products.hpp"

#include <talpa/talpa.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>
