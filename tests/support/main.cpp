// SPDX-License-Identifier: Apache-2.0
// The main function of every test binary, compiled once.
#include "support/sanitized.hpp"

#include <talpa/testing/gradient_check.hpp>

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

int main(int argc, char** argv) {
  // Sanitizers look at how elements are reached: the sum along a direction reaches them all.
  if (talpa::support::sanitized) talpa::testing::most_elements = 4;
  return doctest::Context(argc, argv).run();
}
