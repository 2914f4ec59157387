// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/ragged_gate.hpp>
#include <talpa/cuda/ragged_gate.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace talpa::cuda_ragged_gate_test {
using support::device;
using support::on_device;

namespace {

/// Segments with these numbers of elements: where each begins, and the end.
class segment_starts {
 public:
  explicit segment_starts(const std::vector<index>& sizes)
      : host_(1, static_cast<index>(sizes.size()) + 1) {
    for (std::size_t e = 0; e < sizes.size(); ++e) host_.data()[e + 1] = host_.data()[e] + sizes[e];
    device_ = to_device<device>(host_.view());
  }
  vector_view<const index, cpu> host() const { return {host_.data(), host_.size()}; }
  vector_view<const index, device> view() { return {device_.data(), device_.size()}; }
  index total() const { return host_.data()[host_.size() - 1]; }
  index operator[](index e) const { return host_.data()[e]; }
  /// The one that holds element i.
  index segment_of(index i) const {
    index e = 0;
    while (host_.data()[e + 1] <= i) ++e;
    return e;
  }

 private:
  matrix<index, cpu> host_;
  matrix<index, device> device_;
};

/// A vector on both backends.
template <class T>
struct both {
  matrix<T, cpu> values;
  matrix<T, device> copy;

  explicit both(matrix<T, cpu> v) : values(std::move(v)), copy(to_device<device>(values.view())) {}
  vector_view<const T, cpu> host() const { return {values.data(), values.size()}; }
  vector_view<T, device> view() { return {copy.data(), copy.size()}; }
};

}  // namespace

TEST_SUITE("cuda/ragged_gate") {
  // Products of two roundings have the bits of the host; sums run in another order.
  TEST_CASE_TEMPLATE("ragged_gate and its backward", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(61);
    segment_starts blocks({3, 0, 9, 1, 17, 0});
    const index experts = 6, ranks = blocks.total();
    both<T> scales(support::random_matrix<T>(random, 1, experts));
    for (const index tokens : {index{0}, index{1}, support::device_size(70, 3001)}) {
      on_device<T> gates(support::random_matrix<T>(random, tokens, experts));
      on_device<T> u(support::random_matrix<T>(random, tokens, ranks));
      on_device<T> dz(support::random_matrix<T>(random, tokens, ranks));
      on_device<T> z(matrix<T, cpu>(tokens, ranks)), du(matrix<T, cpu>(tokens, ranks));
      on_device<T> dgates(matrix<T, cpu>(tokens, experts));
      matrix<T, cpu> expected_z(tokens, ranks), expected_du(tokens, ranks);
      matrix<T, cpu> expected_dgates(tokens, experts);
      ops::ragged_gate(host, blocks.host(), scales.host(), gates.host(), u.host(),
                       expected_z.view());
      ops::ragged_gate_backward(host, blocks.host(), scales.host(), gates.host(), u.host(),
                                dz.host(), expected_du.view(), expected_dgates.view());
      ops::ragged_gate(ctx, blocks.view(), scales.view(), gates.view(), u.view(), z.view());
      ops::ragged_gate_backward(ctx, blocks.view(), scales.view(), gates.view(), u.view(),
                                dz.view(), du.view(), dgates.view());
      ctx.synchronise();
      CHECK(support::bit_difference(z.now(), expected_z) == "");
      CHECK(support::bit_difference(du.now(), expected_du) == "");
      CHECK(z.intact());
      CHECK(du.intact());
      CHECK(dgates.intact());

      support::table exact(tokens, experts), bounds(tokens, experts);
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          const double scale = static_cast<double>(scales.values(0, e));
          double size = 0.0;
          for (index j = blocks[e]; j < blocks[e + 1]; ++j) {
            const double term =
                static_cast<double>(dz.host()(n, j)) * static_cast<double>(u.host()(n, j));
            exact(n, e) += scale * term;
            size += std::abs(scale * term);
          }
          bounds(n, e) = support::sum_bound<T>(blocks[e + 1] - blocks[e] + 1, size);
        }
      }
      if (tokens > 0) CHECK(support::difference(dgates.now().view(), exact, bounds) == "");

      // In place.
      ops::ragged_gate_backward(ctx, blocks.view(), scales.view(), gates.view(), u.view(),
                                dz.view(), dz.view(), dgates.view());
      ops::ragged_gate(ctx, blocks.view(), scales.view(), gates.view(), u.view(), u.view());
      ctx.synchronise();
      CHECK(support::bit_difference(dz.now(), expected_du) == "");
      CHECK(support::bit_difference(u.now(), expected_z) == "");
    }
  }

  TEST_CASE_TEMPLATE("ragged_slot_gate leaves alone what no slot has", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(62);
    segment_starts blocks({3, 0, 9, 1});
    const index most = 9;
    both<T> scales(support::random_matrix<T>(random, 1, 4));
    // Rows beyond the last slot belong to nobody.
    for (const std::vector<index>& counts :
         {std::vector<index>{0, 0, 0, 0}, std::vector<index>{0, 5, 20, 0},
          std::vector<index>{support::device_size(40, 900), 2, 0, 31}}) {
      segment_starts offsets(counts);
      const index slots = offsets.total(), rows = slots + 2;
      both<T> gates(support::random_matrix<T>(random, 1, rows));
      both<T> dgates(support::random_matrix<T>(random, 1, rows));
      on_device<T> u(support::random_matrix<T>(random, rows, most));
      on_device<T> dz(support::random_matrix<T>(random, rows, most));
      on_device<T> z(support::random_matrix<T>(random, rows, most));
      on_device<T> du(support::random_matrix<T>(random, rows, most));
      matrix<T, cpu> expected_z = z.host(), expected_du = du.host();
      matrix<T, cpu> expected_dgates = dgates.values;
      ops::ragged_slot_gate(host, offsets.host(), blocks.host(), scales.host(), gates.host(),
                            u.host(), expected_z.view());
      ops::ragged_slot_gate_backward(host, offsets.host(), blocks.host(), scales.host(),
                                     gates.host(), u.host(), dz.host(), expected_du.view(),
                                     {expected_dgates.data(), rows});
      ops::ragged_slot_gate(ctx, offsets.view(), blocks.view(), scales.view(), gates.view(),
                            u.view(), z.view());
      ops::ragged_slot_gate_backward(ctx, offsets.view(), blocks.view(), scales.view(),
                                     gates.view(), u.view(), dz.view(), du.view(), dgates.view());
      ctx.synchronise();
      CHECK(support::bit_difference(z.now(), expected_z) == "");
      CHECK(support::bit_difference(du.now(), expected_du) == "");
      CHECK(z.intact());
      CHECK(du.intact());
      const matrix<T, cpu> found = to_host(dgates.copy.view());
      for (index s = 0; s < rows; ++s) {
        if (s >= slots) {
          CHECK(found(0, s) == dgates.values(0, s));
          continue;
        }
        const index e = offsets.segment_of(s);
        const double scale = static_cast<double>(scales.values(0, e));
        double sum = 0.0, size = 0.0;
        for (index r = 0; r < blocks[e + 1] - blocks[e]; ++r) {
          const double term =
              static_cast<double>(dz.host()(s, r)) * static_cast<double>(u.host()(s, r));
          sum += scale * term;
          size += std::abs(scale * term);
        }
        CHECK(support::within(static_cast<double>(found(0, s)), sum,
                              support::sum_bound<T>(blocks[e + 1] - blocks[e] + 1, size)));
      }
    }
  }
}

}  // namespace talpa::cuda_ragged_gate_test
