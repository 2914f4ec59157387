#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# umbrella.sh ROOT COMPILER FLAG...: no CUDA header is among the files that talpa/talpa.hpp reads.
root=$1
shift
cd "$root" || exit 2
files=$("$@" -Iinclude -M -x c++ include/talpa/talpa.hpp) || exit 2
# Relative for talpa's own files, so that a path like /home/cuda/talpa means nothing here.
printf '%s\n' "$files" | tr -s ' \\' '\n\n' |
  grep -E '(^|/)(cub|thrust|nv|cooperative_groups)/|(^|/)cu(da|blas|rand)[^/]*$|[.]cuh$|/cuda/(std|include)/' |
  sed 's,^,include/talpa/talpa.hpp:1: reads ,' | LC_ALL=C sort | awk '{ print } END { exit NR > 0 }'
