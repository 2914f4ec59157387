#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# file_heads.sh ROOT: every source file begins with its licence line (a script with #! has it on the
# second line), and every header goes on with #pragma once.
cd "$1" || exit 2
for start in include tests bench examples .ci CMakeLists.txt .clang-format .clang-tidy .gitignore; do
  [ ! -e "$start" ] || find "$start" -path '*/fixtures' -prune -o -type f -print
done | LC_ALL=C sort | awk '
function complain(line, what) { print path ":" line ": " what; bad = 1 }
{
  path = $0
  name = path
  sub(/^.*\//, "", name)
  if (name ~ /[.](hpp|cuh|cpp|cu)$/) mark = "//"
  else if (name ~ /^CMakeLists[.]txt$|[.](cmake|sh|py)$|[.](cmake|pc)[.]in$/ ||
           name ~ /^[.](clang-format|clang-tidy|gitignore)$/ || path ~ /^[.]ci\//) mark = "#"
  else next
  licence = mark " SPDX-License-Identifier: Apache-2.0"
  first = second = ""
  getline first < path
  getline second < path
  close(path)
  if (first ~ /^#!/ ? second != licence : first != licence)
    complain(1, "does not begin with: " licence)
  if (name ~ /[.](hpp|cuh)$/ && second != "#pragma once")
    complain(2, "is not: #pragma once")
}
END { exit bad }'
