// SPDX-License-Identifier: Apache-2.0
#include <talpa/core/transfer.hpp>
#include <talpa/cuda/context.cuh>
#include <talpa/cuda/fill.hpp>
#include <talpa/ops/fill.hpp>

#include <cstdio>

// Runs where a device answers; elsewhere it has been compiled and linked.
int main() {
  try {
    talpa::context<talpa::gpu> ctx;
    talpa::matrix<float, talpa::gpu> x(2, 3);
    talpa::ops::fill(ctx, 1.5f, x.view());
    ctx.synchronise();
    return talpa::to_host(x.view())(1, 2) == 1.5f ? 0 : 1;
  } catch (const talpa::device_error& e) {
    std::printf("%s\n", e.what());
    return 0;
  }
}
