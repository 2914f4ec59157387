// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>

namespace talpa {

/// Scalars the library computes in.
template <class T>
concept floating = std::same_as<T, float> || std::same_as<T, double>;

}  // namespace talpa
