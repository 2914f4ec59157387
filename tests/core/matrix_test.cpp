// SPDX-License-Identifier: Apache-2.0
#include <talpa/core/matrix.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace talpa::matrix_test {

TEST_SUITE("core/matrix") {
  TEST_CASE_TEMPLATE("a matrix begins as zeros in aligned memory", T, float, double, std::int32_t,
                     std::uint8_t) {
    {
      // Memory that most allocators hand out again next.
      matrix<T, cpu> used(5, 3);
      for (index i = 0; i < 15; ++i) used.data()[i] = T{77};
    }
    matrix<T, cpu> m(5, 3);
    CHECK(m.rows() == 5);
    CHECK(m.cols() == 3);
    CHECK(m.size() == 15);
    for (index i = 0; i < 15; ++i) CHECK(m.data()[i] == T{});
    CHECK(reinterpret_cast<std::uintptr_t>(m.data()) % detail::host_alignment == 0);
    m(4, 2) = T{7};
    CHECK(std::as_const(m)(4, 2) == T{7});
    CHECK(m.data()[14] == T{7});
  }

  TEST_CASE("a matrix copies by value and moves without copying") {
    matrix<double, cpu> m(2, 2);
    m(1, 0) = 3.0;
    matrix<double, cpu> copy = m;
    copy(1, 0) = 4.0;
    CHECK(m(1, 0) == 3.0);
    const double* const data = m.data();
    matrix<double, cpu> moved = std::move(m);
    CHECK(moved.data() == data);
    CHECK(moved(1, 0) == 3.0);
    copy = std::move(moved);
    CHECK(copy.data() == data);
    copy = matrix<double, cpu>(1, 3);
    CHECK(copy.rows() == 1);
    CHECK(copy(0, 2) == 0.0);
    matrix<double, cpu>& same = copy;
    copy = same;
    CHECK(copy.cols() == 3);
  }

  TEST_CASE("a matrix copies what a strided view shows") {
    matrix<int, cpu> m(3, 4);
    for (index i = 0; i < 12; ++i) m.data()[i] = static_cast<int>(i);
    const matrix<int, cpu> inner(
        matrix_view<const int, cpu>(m.view().row_range(1, 2).col_range(1, 2)));
    CHECK(inner.rows() == 2);
    CHECK(inner(0, 0) == 5);
    CHECK(inner(1, 1) == 10);
  }

  TEST_CASE("matrices and vectors convert to views of their memory") {
    matrix<float, cpu> m(2, 3);
    const matrix_view<float, cpu> v = m;
    const matrix_view<const float, cpu> c = std::as_const(m);
    CHECK(v.data == m.data());
    CHECK(c.data == m.data());
    CHECK(v.stride == 3);
    vector<float, cpu> w(4);
    const vector_view<float, cpu> wv = w;
    const vector_view<const float, cpu> wc = std::as_const(w);
    CHECK(wv.data == w.data());
    CHECK(wc.size == 4);
    w[3] = 5.0f;
    CHECK(std::as_const(w)[3] == 5.0f);
  }

  TEST_CASE("a vector begins as zeros") {
    {
      vector<std::int32_t, cpu> used(3);
      for (index i = 0; i < 3; ++i) used[i] = 77;
    }
    const vector<std::int32_t, cpu> v(3);
    CHECK(v.size() == 3);
    for (index i = 0; i < 3; ++i) CHECK(v[i] == 0);
  }

  TEST_CASE("empty matrices and vectors own nothing and can be copied") {
    const matrix<float, cpu> none, rows(5, 0), cols(0, 5);
    const vector<float, cpu> nothing, zero(0);
    CHECK(none.data() == nullptr);
    CHECK(rows.data() == nullptr);
    CHECK(rows.rows() == 5);
    CHECK(cols.view().cols == 5);
    const matrix<float, cpu> copied = cols;
    CHECK(copied.cols() == 5);
    CHECK(copied.size() == 0);
    CHECK(nothing.size() == 0);
    CHECK(zero.data() == nullptr);
    const matrix<float, cpu> of_view{matrix_view<const float, cpu>()};
    CHECK(of_view.size() == 0);
  }
}

}  // namespace talpa::matrix_test
