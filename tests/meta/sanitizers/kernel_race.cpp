// SPDX-License-Identifier: Apache-2.0
// A kernel on the simulated device from which a barrier was taken away.
#include "kernel.hpp"

int main() { return run_neighbours<false>(); }
