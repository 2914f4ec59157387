#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# include_ranks.sh ROOT: a header of ROOT/include/talpa includes headers of lower rank only. Inside
# a folder it may also include its own folder, but a policy sees of its own folder only the concept
# and its explanation, and of the other policies nothing.
cd "$1" || exit 2
find include/talpa -name '*.hpp' -o -name '*.cuh' | LC_ALL=C sort | awk '
BEGIN {
  rank["core"] = 2
  rank["ops"] = 3
  rank["cpu"] = rank["cuda"] = rank["routing"] = 4
  rank["autograd"] = 5
  rank["scorers"] = rank["selectors"] = rank["experts"] = rank["losses"] = rank["placements"] = 6
  rank["optim"] = rank["analysis"] = rank["io"] = 6
  rank["layers"] = 7
  rank["presets"] = rank["testing"] = 8
  # Files that stand lower than their folder, and the files beside the folders.
  rank["fwd.hpp"] = rank["version.hpp"] = rank["core/config.hpp"] = 0
  rank["autograd/grad_mode.hpp"] = rank["autograd/parameter.hpp"] = 4
  rank["talpa.hpp"] = rank["cuda.cuh"] = 9
  split("scorers selectors experts losses placements", names, " ")
  for (i in names) policy[names[i]] = 1
}
function folder(file) { return file ~ /\// ? substr(file, 1, index(file, "/") - 1) : file }
function rank_of(file) {
  if (file in rank) return rank[file]
  return folder(file) in rank && file ~ /\// ? rank[folder(file)] : -1
}
function complain(text) { print path ":" line ": " text; bad = 1 }
function exists(file,   dummy, found) {
  found = (getline dummy < file) >= 0
  close(file)
  return found
}
{
  path = $0
  from = substr(path, length("include/talpa/") + 1)
  if (rank_of(from) < 0) {
    line = 1
    complain("has no rank: add its folder to the table in tests/meta/include_ranks.sh")
    next
  }
  # Read whole: exists() may have to open the same file.
  count = 0
  while ((getline lines[count + 1] < path) > 0) count++
  close(path)
  for (line = 1; line <= count; line++) {
    text = lines[line]
    if (text !~ /^[ \t]*#[ \t]*include[ \t]/) continue
    if (text ~ /"/) { complain("quoted include, write <talpa/...>"); continue }
    if (text !~ /<talpa\//) continue
    to = text
    sub(/^[^<]*<talpa\//, "", to)
    sub(/>.*$/, "", to)
    same = folder(from) == folder(to) && from ~ /\//
    if (!exists("include/talpa/" to)) {
      complain("includes <talpa/" to ">, which does not exist")
    } else if (rank_of(to) < 0) {
      continue  # complained about where that file is read
    } else if (from ~ /[.]hpp$/ && to ~ /[.]cuh$/) {
      complain("includes <talpa/" to ">: a .hpp must compile without nvcc")
    } else if (to ~ /^cuda\/kernels\// && folder(from) != "cuda") {
      complain("includes <talpa/" to ">: shared kernel bodies are for cuda/ only")
    } else if (folder(from) in policy && folder(to) in policy) {
      if (!same || to !~ /\/(concept|explain)[.]hpp$/)
        complain("includes <talpa/" to ">: policies see only the concept.hpp and explain.hpp of their own folder")
    } else if (rank_of(to) >= rank_of(from) && !(same && !(from in rank))) {
      complain("includes <talpa/" to ">: rank " rank_of(to) " from rank " rank_of(from))
    }
  }
}
END { exit bad }'
