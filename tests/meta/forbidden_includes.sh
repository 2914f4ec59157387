#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# forbidden_includes.sh ROOT: compile time is a feature, so the headers of ROOT/include/talpa stay
# away from the slow ones, and third-party headers stay in the folder that needs them.
cd "$1" || exit 2
find include/talpa -name '*.hpp' -o -name '*.cuh' | LC_ALL=C sort | awk '
BEGIN {
  slow = "^(iostream|regex|ranges|functional|random|sstream|cub/cub[.]cuh|thrust/.*)$"
}
function complain(why) { print path ":" line ": includes <" header ">: " why; bad = 1 }
{
  path = $0
  file = substr(path, length("include/talpa/") + 1)
  line = 0
  while ((getline text < path) > 0) {
    line++
    if (text !~ /^[ \t]*#[ \t]*include[ \t]*</) continue
    header = text
    sub(/^[^<]*</, "", header)
    sub(/>.*$/, "", header)
    if (header ~ slow) complain("too slow to compile for a library header")
    else if (header ~ /^bits\//) complain("private to the standard library")
    else if (header ~ /^(doctest|gtest|gmock|catch2|benchmark)\//) complain("a test framework")
    else if (header ~ /^(Eigen|unsupported)\//) {
      if (file !~ /^cpu\//) complain("Eigen is for cpu/ only")
      else if (header != "Eigen/Core") complain("of Eigen only <Eigen/Core>")
    }
    else if (header ~ /^nlohmann\//) { if (file !~ /^io\//) complain("JSON is for io/ only") }
    else if (header ~ /^(cub\/|cuda|cublas|curand)/ || header ~ /[.]cuh$/) {
      if (file !~ /[.]cuh$/) complain("CUDA is for .cuh only")
    }
  }
  close(path)
}
END { exit bad }'
