#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# self_contained.sh ROOT COMPILER FLAG...: each header of ROOT/include/talpa compiles by itself, twice
# in a row.
#
# What many headers read is precompiled. A header is compiled behind the one of these bases that it
# includes itself, directly or not, and that saves most: it sees no name that it does not ask for.
root=$1
shift
cd "$root" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT

# A line for each header: the base, or -, and the header; bases stand before those they serve.
find include/talpa -name '*.hpp' | LC_ALL=C sort | awk '
# What parsing costs, in bytes; headers of others by what they read themselves.
function cost_of(file) { return file in size ? size[file] : file ~ /^Eigen/ ? 2500000 : 200000 }
# Fills reads[file, other] and cost[file]: of all that it includes, and itself.
function close_over(file,   i, other, key) {
  if (file in cost) return
  cost[file] = cost_of(file)
  for (i = 1; i <= includes[file]; i++) {
    other = included[file, i]
    close_over(other)
    reads[file, other] = 1
    for (key = 1; key <= names; key++) if ((other, name[key]) in reads) reads[file, name[key]] = 1
  }
  for (key = 1; key <= names; key++) if ((file, name[key]) in reads) cost[file] += cost_of(name[key])
}
function add_name(file) { if (!(file in known)) { known[file] = 1; name[++names] = file } }
{
  file = substr($0, length("include/") + 1)
  header[++headers] = file
  add_name(file)
  while ((getline text < $0) > 0) {
    size[file] += length(text)
    if (text ~ /^#include </) {
      sub(/^#include </, "", text)
      sub(/>.*$/, "", text)
      included[file, ++includes[file]] = text
      add_name(text)
    }
  }
  close($0)
}
END {
  for (h = 1; h <= headers; h++) close_over(header[h])
  for (count = 0; count < 10; count++) {
    most = 0
    for (b = 1; b <= headers; b++) {
      saved = -cost[header[b]]
      for (h = 1; h <= headers; h++) {
        if (!((header[h], header[b]) in reads)) continue
        gain = cost[header[b]] - cost[base[h]]
        if (gain > 0) saved += gain
      }
      if (saved > most) { most = saved; best = header[b] }
    }
    if (most == 0) break
    for (h = 1; h <= headers; h++) {
      if ((header[h], best) in reads && cost[best] > cost[base[h]]) base[h] = best
    }
  }
  for (h = 1; h <= headers; h++) print base[h] == "" ? "-" : base[h], header[h]
}' | LC_ALL=C sort >"$work/list"

number=0 previous=- status=0
while read -r base header; do
  if [ "$base" != "$previous" ]; then
    previous=$base
    number=$((number + 1))
    echo "#include <$base>" >"$work/$number.hpp"
    "$@" -Iinclude -x c++-header "$work/$number.hpp" -o "$work/$number.hpp.gch" || exit 2
  fi
  printf '#include <%s>\n#include <%s>\n' "$header" "$header" >"$work/alone.cpp"
  if [ "$base" = - ]; then
    "$@" -Iinclude -fsyntax-only "$work/alone.cpp"
  else
    "$@" -Iinclude -include "$work/$number.hpp" -fsyntax-only "$work/alone.cpp"
  fi || {
    echo "include/$header:1: does not compile by itself"
    status=1
  }
done <"$work/list"
exit $status
