#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# line_length.sh ROOT: no source line, comments included, is longer than 100 columns, but for the
# sentences that compile-fail tests look for.
cd "$1" || exit 2
for start in include tests bench examples; do
  [ ! -d "$start" ] || find "$start" -path '*/fixtures' -prune -o -type f \
    \( -name '*.[hc]pp' -o -name '*.cuh' -o -name '*.cu' \) -print
done | LC_ALL=C sort | while read -r file; do
  awk -v file="$file" 'length($0) > 100 && !/^\/\/ expect( [0-9]+)?: / {
    print file ":" FNR ": " length($0) " columns"
  }' "$file"
done | awk '{ print } END { exit NR > 0 }'
