#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# proves_itself.sh CHECK [COMPILER FLAG...]: the check, run on its fixture tree, fails with exactly
# the complaints of the fixture's expected.txt.
here=$(cd "$(dirname "$0")" && pwd) || exit 2
check=$1
shift
fixture=$here/fixtures/$check
if found=$(sh "$here/$check.sh" "$fixture" "$@"); then
  echo "$check.sh accepts $fixture, which violates the rule"
  exit 1
fi
if [ "$found" != "$(cat "$fixture/expected.txt")" ]; then
  echo "$check.sh says of its fixture:"
  printf '%s\n' "$found"
  echo "but expected.txt says:"
  cat "$fixture/expected.txt"
  exit 1
fi
