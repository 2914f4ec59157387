// SPDX-License-Identifier: Apache-2.0
// What meta/kernel_stack looks at.
#include <talpa/cpu/register_tile.hpp>

template struct talpa::detail::register_tile<float>;
template struct talpa::detail::register_tile<double>;
