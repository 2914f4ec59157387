#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# doc_code.sh ROOT: every block of C++ in README.md and docs/ is a copy of something that is compiled.
# A line <!-- code: FILE --> or <!-- code: FILE#REGION --> stands above it. A region of a file lies
# between the lines "// [region REGION]" and "// [end REGION]"; their indentation is taken off.
cd "$1" || exit 2
{
  [ ! -e README.md ] || echo README.md
  [ ! -d docs ] || find docs -name '*.md'
} | LC_ALL=C sort | awk '
function complain(what) { print path ":" line ": " what; bad = 1 }
# The text of a file or of its region in `source`; false when there is none.
function load(file, region,   text, bare, indent, inside, found) {
  source = ""
  found = inside = region == ""
  indent = 0
  while ((getline text < file) > 0) {
    bare = text
    sub(/^ +/, "", bare)
    if (region != "" && bare == "// [region " region "]") {
      inside = found = 1
      indent = length(text) - length(bare)
      continue
    }
    if (region != "" && bare == "// [end " region "]") inside = 0
    if (inside) source = source (bare == "" ? "" : substr(text, indent + 1)) "\n"
  }
  close(file)
  return found && source != ""
}
function begin_block(   mark, file, region) {
  block = ""
  expected = 0
  if (above !~ /^ *<!-- code: [^ ]+ -->$/) {
    complain("a block of C++ without a line <!-- code: FILE --> above it")
    return
  }
  mark = above
  sub(/^ *<!-- code: /, "", mark)
  sub(/ -->$/, "", mark)
  file = region = mark
  sub(/#.*$/, "", file)
  if (!sub(/^[^#]*#/, "", region)) region = ""
  if (load(file, region)) expected = 1
  else complain("no such code: " mark)
}
{
  path = $0
  line = 0
  above = ""
  fenced = 0
  while ((getline text < path) > 0) {
    line++
    if (fenced && text ~ /^ *```/) {
      if (fenced == 2 && expected && block != source) complain("the block above is not " above)
      fenced = 0
    } else if (fenced) {
      block = block text "\n"
    } else if (text ~ /^ *```/) {
      fenced = text ~ /^ *```(cpp|c[+][+]|cc)/ ? 2 : 1
      if (fenced == 2) begin_block()
    } else {
      above = text
    }
  }
  close(path)
  if (fenced) complain("a block without an end")
}
END { exit bad }'
