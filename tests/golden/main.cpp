// SPDX-License-Identifier: Apache-2.0
#include "golden/runner.hpp"

#include <cstdio>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  return talpa::golden::run(std::vector<std::string>(argv + (argc > 0 ? 1 : 0), argv + argc),
                            stdout, stderr);
}
