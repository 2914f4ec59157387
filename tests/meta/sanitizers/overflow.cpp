// SPDX-License-Identifier: Apache-2.0
// Adds one to the largest int; the one comes from argc so that no compiler sees it.
#include <cstdio>
#include <limits>

int main(int argc, char**) { std::printf("%d\n", std::numeric_limits<int>::max() + argc); }
