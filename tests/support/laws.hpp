// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/testing/report.hpp>

#include <doctest/doctest.h>

namespace talpa::support {

/// A report of talpa/testing/ as one doctest check: `obeys(testing::selector_laws<float>(...))`.
inline void obeys(const testing::report& found) { CHECK_MESSAGE(found.passed(), found.text()); }

}  // namespace talpa::support
