// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/testing/simulated.hpp>

#include <cstdio>

/// Every thread of a block writes its number to shared memory and reads that of its neighbour.
template <bool WithBarrier>
struct neighbour {
  int* out;

  template <class Block>
  void operator()(Block& block) const {
    int* const numbers = block.template shared<int>();
    numbers[block.thread()] = block.thread();
    if (WithBarrier) block.sync();
    out[block.thread()] = numbers[(block.thread() + 1) % Block::threads()];
  }
};

template <bool WithBarrier>
int run_neighbours() {
  constexpr int threads = 64;
  talpa::context<talpa::simulated> ctx;
  talpa::matrix<int, talpa::simulated> out(1, threads);
  talpa::detail::launch<threads>(ctx, 1, threads * sizeof(int), neighbour<WithBarrier>{out.data()});
  std::printf("%d\n", out.data()[0]);
  return 0;
}
