#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# preprocessor.sh ROOT: the headers of ROOT/include/talpa have conditionals in three files only, each
# about symbols of its own, and define no macro but TALPA_HD and the version numbers.
cd "$1" || exit 2
find include/talpa -name '*.hpp' -o -name '*.cuh' | LC_ALL=C sort | awk '
BEGIN {
  symbol["include/talpa/core/config.hpp"] = "__CUDACC__"
  symbol["include/talpa/core/registers.hpp"] = "__CUDACC__ or __SSE2__ or __AVX__ or __AVX2__ or __FMA__ or __AVX512F__ or __aarch64__ or _OPENMP or __GNUC__ or __clang__"
  symbol["include/talpa/cpu/parallel.hpp"] = "_OPENMP"
}
function complain(what) { print path ":" line ": " what; bad = 1 }
{
  path = $0
  line = 0
  while ((getline text < path) > 0) {
    line++
    if (text !~ /^[ \t]*#/) continue
    sub(/^[ \t]*#[ \t]*/, "", text)
    sub(/[ \t]*\/\/.*$/, "", text)
    word = text
    sub(/[^a-z].*$/, "", word)
    if (word ~ /^(if|ifdef|ifndef|elif|elifdef|elifndef|else|endif)$/) {
      if (!(path in symbol)) {
        complain("preprocessor conditional: #" text)
        continue
      }
      names = text
      sub(/^[a-z]+/, "", names)
      gsub(/defined|[^A-Za-z0-9_]/, " ", names)
      count = split(names, name, " ")
      for (i = 1; i <= count; i++)
        if (!index(" " symbol[path] " ", " " name[i] " ")) complain("tests " name[i] ", only " symbol[path] " may be")
    } else if (word == "define") {
      sub(/^define[ \t]+/, "", text)
      sub(/[^A-Za-z0-9_].*$/, "", text)
      if (!(path == "include/talpa/core/config.hpp" && text ~ /^TALPA_(HD|DEVICE|UNROLL)$/) &&
          !(path == "include/talpa/version.hpp" && text ~ /^TALPA_VERSION_(MAJOR|MINOR|PATCH)$/))
        complain("defines the macro " text)
    } else if (word == "undef") {
      complain("takes a macro away: #" text)
    }
  }
  close(path)
}
END { exit bad }'
