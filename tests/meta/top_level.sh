#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# top_level.sh ROOT: the top level has these entries and no others, but for git's own and for what
# .gitignore names.
cd "$1" || exit 2
entries="CMakeLists.txt include tests bench examples docs README.md CMakePresets.json LICENSE"
entries="$entries .ci .clang-format .clang-tidy .gitignore"

ignored() {
  [ -e .gitignore ] || return 1
  while read -r pattern; do
    pattern=${pattern#/}
    # shellcheck disable=SC2254
    case $1 in
      ${pattern%/}) return 0 ;;
    esac
  done <.gitignore
  return 1
}

bad=0
for entry in $entries; do
  [ -e "$entry" ] && continue
  echo "$entry: is missing"
  bad=1
done
LC_ALL=C
export LC_ALL
for entry in .[!.]* *; do
  [ -e "$entry" ] || continue
  case " $entries .git " in
    *" $entry "*) continue ;;
  esac
  ignored "$entry" && continue
  echo "$entry: does not belong to the top level"
  bad=1
done
exit "$bad"
