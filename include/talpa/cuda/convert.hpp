// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/convert.hpp>

namespace talpa::kernels {

template <class From, class To, class B>
struct convert_element {
  matrix_view<const From, B> x;
  matrix_view<To, B> to;
  TALPA_HD void operator()(index r, index c) const {
    to(r, c) = static_cast<To>(static_cast<sum_type<From>>(x(r, c)));
  }
};

/// One thread a number of x, so that reading is coalesced; the writes are a column apart.
template <class From, class To, class B>
struct convert_element_transposed {
  matrix_view<const From, B> x;
  matrix_view<To, B> to;
  TALPA_HD void operator()(index r, index c) const {
    to(c, r) = static_cast<To>(static_cast<sum_type<From>>(x(r, c)));
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct convert_impl<B> {
  template <class From, class To>
  static void run(context<B>& ctx, matrix_view<const From, B> x, matrix_view<To, B> to) {
    kernels::for_each_element(ctx, x.rows, x.cols, kernels::convert_element<From, To, B>{x, to});
  }
  template <class From, class To>
  static void run_transposed(context<B>& ctx, matrix_view<const From, B> x, matrix_view<To, B> to) {
    kernels::for_each_element(ctx, x.rows, x.cols,
                              kernels::convert_element_transposed<From, To, B>{x, to});
  }
};

}  // namespace talpa::ops
