#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# output.sh PAGE SOURCE PROGRAM: the block below the line <!-- output: SOURCE --> of a page is what
# PROGRAM, built from SOURCE, prints.
page=$1
mark="<!-- output: $2 -->"
printed=$("$3") || { echo "$3 failed"; exit 1; }
shown=$(awk -v mark="$mark" '
  $0 == mark { wait = 1; next }
  wait && /^```/ { wait = 0; inside = 1; next }
  inside && /^```/ { exit }
  inside { print }
' "$page")
if [ -z "$shown" ]; then
  echo "$page has no block below $mark"
  exit 1
fi
if [ "$shown" != "$printed" ]; then
  echo "$page says of $2:"
  printf '%s\n' "$shown"
  echo "but it prints:"
  printf '%s\n' "$printed"
  exit 1
fi
