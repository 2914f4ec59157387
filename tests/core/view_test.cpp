// SPDX-License-Identifier: Apache-2.0
#include <talpa/core/view.hpp>

#include <doctest/doctest.h>

#include <concepts>
#include <type_traits>

namespace talpa::view_test {

namespace {

// An op in miniature: T and B come from the output alone.
template <class T, class B>
T first_of(input<T, B> x, matrix_view<T, B> y) {
  y(0, 0) = x(0, 0);
  return y(0, 0);
}

template <class T, class B>
concept converts_to_first = requires(matrix_view<const T, B> x, matrix_view<T, cpu> y) {
  first_of(x, y);
};

}  // namespace

TEST_SUITE("core/view") {
  TEST_CASE("a view addresses rows by its stride") {
    int data[12];
    for (int i = 0; i < 12; ++i) data[i] = i;
    const matrix_view<int, cpu> v(data + 1, 3, 2, 4);
    CHECK(v.rows == 3);
    CHECK(v.cols == 2);
    CHECK(v.stride == 4);
    CHECK(v.size() == 6);
    CHECK(!v.empty());
    CHECK(v(0, 0) == 1);
    CHECK(v(2, 1) == 10);
    CHECK(v.row(1) == data + 5);
    v(1, 0) = 50;
    CHECK(data[5] == 50);
    const matrix_view<int, cpu> dense(data, 3, 4);
    CHECK(dense.stride == 4);
  }

  TEST_CASE("row and column ranges keep the stride and share memory") {
    int data[12];
    for (int i = 0; i < 12; ++i) data[i] = i;
    const matrix_view<int, cpu> v(data, 3, 4);
    const matrix_view<int, cpu> inner = v.row_range(1, 2).col_range(2, 1);
    CHECK(inner.rows == 2);
    CHECK(inner.cols == 1);
    CHECK(inner.stride == 4);
    CHECK(inner(1, 0) == 10);
    CHECK(v.row_range(3, 0).empty());
    CHECK(v.col_range(0, 0).empty());
    CHECK(v.row_range(3, 0).size() == 0);
  }

  TEST_CASE("a mutable view converts to a const one and never back") {
    int data[4] = {1, 2, 3, 4};
    const matrix_view<int, cpu> v(data, 2, 2);
    const matrix_view<const int, cpu> c = v;
    CHECK(c(1, 1) == 4);
    CHECK(c.stride == 2);
    static_assert(!std::is_convertible_v<matrix_view<const int, cpu>, matrix_view<int, cpu>>);
    static_assert(!std::is_convertible_v<matrix_view<float, cpu>, matrix_view<const double, cpu>>);
    const vector_view<int, cpu> w(data, 4);
    const vector_view<const int, cpu> r = w;
    CHECK(r[3] == 4);
    CHECK(r.size == 4);
    static_assert(!std::is_convertible_v<vector_view<const int, cpu>, vector_view<int, cpu>>);
  }

  TEST_CASE("views of different backends do not mix") {
    static_assert(!std::is_convertible_v<matrix_view<int, gpu>, matrix_view<int, cpu>>);
    static_assert(!std::is_convertible_v<matrix_view<int, gpu>, matrix_view<const int, cpu>>);
    static_assert(converts_to_first<float, cpu>);
    static_assert(!converts_to_first<float, gpu>);
    static_assert(std::same_as<matrix_view<int, gpu>::backend_type, gpu>);
  }

  TEST_CASE("an op deduces from its output and takes a mutable view as input") {
    float data[2] = {7.0f, 0.0f};
    const matrix_view<float, cpu> x(data, 1, 1), y(data + 1, 1, 1);
    CHECK(first_of(x, y) == 7.0f);
    CHECK(data[1] == 7.0f);
  }

  TEST_CASE("default-made views are empty") {
    const matrix_view<float, cpu> m;
    const vector_view<float, cpu> v;
    CHECK(m.data == nullptr);
    CHECK(m.empty());
    CHECK(v.data == nullptr);
    CHECK(v.empty());
    static_assert(std::is_trivially_copyable_v<matrix_view<float, cpu>>);
    static_assert(std::is_trivially_destructible_v<vector_view<float, gpu>>);
  }
}

}  // namespace talpa::view_test
