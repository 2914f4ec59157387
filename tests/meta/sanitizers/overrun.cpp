// SPDX-License-Identifier: Apache-2.0
// Reads one element behind a vector; the size comes from argc so that no compiler sees it.
#include <cstddef>
#include <cstdio>
#include <vector>

int main(int argc, char**) {
  const std::vector<int> values(static_cast<std::size_t>(argc), 1);
  std::printf("%d\n", values.data()[argc]);
}
