// SPDX-License-Identifier: Apache-2.0
// What blocks of cuda/kernel.hpp promise of tensor cores and copies: the same on the simulated
// device and on a real one.
#include "support/parity.hpp"
#include "support/stored.hpp"

#include <talpa/cuda/kernel.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <utility>

namespace talpa::tensor_block_test {
using support::device;

namespace {

/// One warp: lines of 8 numbers through shared memory into fragments, out again word by word.
template <bool Transposed>
struct fragments_body {
  const bfloat16* from;  // [32, 8]
  std::uint32_t* to;     // [32, 4]

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    bfloat16* const lines = block.template shared<bfloat16>();
    const int lane = block.thread();
    block.copy_async(lines + 8 * lane, from + 8 * lane);
    block.commit_copies();
    block.template wait_copies<0>();
    block.sync();
    std::uint32_t words[4];
    block.template load_fragments<Transposed>(words, lines + 8 * lane);
    for (int i = 0; i < 4; ++i) to[4 * lane + i] = words[i];
  }
};

/// c [16, 16] = a [16, 16] b [16, 16]^T by one warp.
template <class S>
struct product_body {
  const S *a, *b;
  float* c;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const int lane = block.thread(), line = lane / 4, pair = lane % 4 * 2;
    std::uint32_t x[1][4], y[1][4];
    TALPA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int left = (line + i % 2 * 8) * 16 + pair + i / 2 * 8;
      const int right = (line + i / 2 * 8) * 16 + pair + i % 2 * 8;
      x[0][i] = a[left].bits | static_cast<std::uint32_t>(a[left + 1].bits) << 16;
      y[0][i] = b[right].bits | static_cast<std::uint32_t>(b[right + 1].bits) << 16;
    }
    float sums[1][2][4] = {};
    block.template multiply_add<S>(sums, x, y);
    TALPA_UNROLL
    for (int n = 0; n < 2; ++n) {
      TALPA_UNROLL
      for (int i = 0; i < 4; ++i) {
        c[(line + i / 2 * 8) * 16 + 8 * n + pair + i % 2] = sums[0][n][i];
      }
    }
  }
};

/// Two groups of copies, of which the first is waited for alone.
struct copies_body {
  const std::uint32_t* from;  // [32, 4]
  std::uint32_t* to;          // [2, 32, 4]

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    std::uint32_t* const words = block.template shared<std::uint32_t>();  // [2, 32, 4]
    const int lane = block.thread();
    for (int i = 0; i < 8; ++i) words[i * 32 + lane] = 7;
    block.sync();
    block.copy_async(words + 4 * lane, from + 4 * lane);
    block.commit_copies();
    block.copy_async(words + 128 + 4 * lane, from + 4 * lane);
    block.commit_copies();
    block.template wait_copies<1>();
    for (int i = 0; i < 4; ++i) to[4 * lane + i] = words[4 * lane + i];
    block.template wait_copies<0>();
    for (int i = 0; i < 4; ++i) to[128 + 4 * lane + i] = words[128 + 4 * lane + i];
  }
};

matrix<bfloat16, cpu> numbered(index rows, index cols) {
  matrix<bfloat16, cpu> m(rows, cols);
  for (index i = 0; i < m.size(); ++i) m.data()[i].bits = static_cast<std::uint16_t>(i);
  return m;
}

template <bool Transposed>
void check_fragments() {
  context<device> ctx;
  const auto lines = numbered(32, 8);
  const auto from = to_device<device>(lines.view());
  matrix<std::uint32_t, device> to(32, 4);
  detail::launch<32>(ctx, 1, 512, fragments_body<Transposed>{from.data(), to.data()});
  ctx.synchronise();
  const auto words = to_host(std::as_const(to).view());
  for (index lane = 0; lane < 32; ++lane) {
    for (index i = 0; i < 4; ++i) {
      for (index half = 0; half < 2; ++half) {
        const index outer = lane / 4, inner = lane % 4 * 2 + half;
        const index wanted = Transposed ? (8 * i + inner) * 8 + outer : (8 * i + outer) * 8 + inner;
        CHECK((words(lane, i) >> (16 * half) & 0xffffu) == static_cast<std::uint32_t>(wanted));
      }
    }
  }
}

}  // namespace

TEST_SUITE("cuda/tensor_block") {
  TEST_CASE("fragments are the numbers that kernel.hpp says") {
    check_fragments<false>();
    check_fragments<true>();
  }

  TEST_CASE_TEMPLATE("multiply_add is a product with its second operand by columns", S, bfloat16,
                     float16) {
    support::test_random random(5);
    context<device> ctx;
    // Small whole numbers: every sum is exact, in any order.
    matrix<S, cpu> a(16, 16), b(16, 16);
    for (index i = 0; i < a.size(); ++i) {
      a.data()[i] = static_cast<S>(static_cast<float>(random.below(33) - 16));
      b.data()[i] = static_cast<S>(static_cast<float>(random.below(33) - 16));
    }
    const auto a_on = to_device<device>(a.view()), b_on = to_device<device>(b.view());
    matrix<float, device> c(16, 16);
    detail::launch<32>(ctx, 1, 0, product_body<S>{a_on.data(), b_on.data(), c.data()});
    ctx.synchronise();
    const auto got = to_host(std::as_const(c).view());
    for (index m = 0; m < 16; ++m) {
      for (index n = 0; n < 16; ++n) {
        float sum = 0.0f;
        for (index k = 0; k < 16; ++k) sum += float(a(m, k)) * float(b(n, k));
        CHECK(got(m, n) == sum);
      }
    }
  }

  TEST_CASE("copies arrive group by group") {
    context<device> ctx;
    matrix<std::uint32_t, cpu> words(32, 4);
    for (index i = 0; i < words.size(); ++i) {
      words.data()[i] = 0x10001u * static_cast<std::uint32_t>(i + 1);
    }
    const auto from = to_device<device>(words.view());
    matrix<std::uint32_t, device> to(64, 4);
    detail::launch<32>(ctx, 1, 1024, copies_body{from.data(), to.data()});
    ctx.synchronise();
    const auto got = to_host(std::as_const(to).view());
    for (index lane = 0; lane < 32; ++lane) {
      for (index i = 0; i < 4; ++i) {
        CHECK(got(lane, i) == words(lane, i));
        CHECK(got(32 + lane, i) == words(lane, i));
      }
    }
  }
}

}  // namespace talpa::tensor_block_test
