// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace talpa::support {

/// Calls of operator new so far, of any kind and on any thread: the test programs replace it by one
/// that counts, and that fills the memory with bytes 0xff, NaN in every floating format.
long allocations();

/// False where a sanitizer has replaced operator new itself.
bool allocations_are_counted();

/// Calls of operator new while f runs.
template <class F>
long allocations_of(F f) {
  const long before = allocations();
  f();
  return allocations() - before;
}

}  // namespace talpa::support
