// SPDX-License-Identifier: Apache-2.0
// The same kernel with its barrier.
#include "kernel.hpp"

int main() { return run_neighbours<true>(); }
