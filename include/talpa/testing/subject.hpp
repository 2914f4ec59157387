// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>

namespace talpa::testing::detail {

/// The subject in scalar U of a policy that is given in T and in double.
template <class U, template <class> class Subject, class T>
const Subject<U>& subject_in(const Subject<T>& in_t, const Subject<double>& in_double) {
  if constexpr (std::same_as<U, T>) {
    return in_t;
  } else {
    return in_double;
  }
}

}  // namespace talpa::testing::detail
