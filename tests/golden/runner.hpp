// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "golden/case.hpp"

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

namespace talpa::golden {

/// Computes what a case says with the library and compares it.
using method = void (*)(const golden_case&, checker&);

/// Declared at namespace scope of the method's own file: runs `run` on the cases of
/// FOLDER/FILE.json for `name` = "FOLDER/FILE".
struct registration {
  registration(const char* name, method run);
};

/// What happened to the cases of one file, or of all. A case passes when every expected field was
/// compared and agrees; it is skipped when a field had to be left out, or when there is no method
/// for its file; otherwise it failed. A file that cannot be read counts as one failed case.
struct tally {
  index passed = 0;
  index failed = 0;
  index skipped = 0;
  std::string note;  ///< first failure, and the reasons for skipping
};

/// The cases of FOLDER/FILE.json.
tally run_file(const std::filesystem::path& file);

/// `talpa_golden --dir DIR [--method NAME]`: a line a file, then `N passed, N failed, N skipped`.
/// Returns 0, or 1 when a case failed, or 2 for flags that make no sense.
int run(const std::vector<std::string>& arguments, std::FILE* out, std::FILE* err);

}  // namespace talpa::golden
