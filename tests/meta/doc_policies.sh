#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# doc_policies.sh ROOT: every policy is linked from the table of README.md and from the page of its
# role, every page of docs/ but those of docs/benchmarks/ from docs/index.md.
cd "$1" || exit 2
{
  for role in scorer selector expert placement loss; do
    case $role in loss) folder=losses ;; *) folder=${role}s ;; esac
    for header in include/talpa/"$folder"/*.hpp; do
      case $header in */concept.hpp | */explain.hpp | *'*'*) continue ;; esac
      grep -q "]($header)" README.md || echo "README.md:1: no link to $header"
      page=docs/policies/$role.md
      grep -q "](../../$header)" "$page" || echo "$page:1: no link to $header"
    done
  done
  find docs -name '*.md' ! -path docs/index.md ! -path 'docs/benchmarks/*' | LC_ALL=C sort | while read -r page; do
    grep -q "](${page#docs/})" docs/index.md || echo "docs/index.md:1: no link to $page"
  done
} | awk '{ print } END { exit NR > 0 }'
