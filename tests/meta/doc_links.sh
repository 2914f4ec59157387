#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# doc_links.sh ROOT: relative links in README.md and docs/ lead somewhere, heading anchors included,
# and so does every page of docs/ that a header or an example names (error messages name pages).
cd "$1" || exit 2
{
  [ ! -e README.md ] || echo README.md
  [ ! -d docs ] || find docs -name '*.md'
  for start in include examples; do
    [ ! -d "$start" ] || find "$start" -type f \( -name '*.[hc]pp' -o -name '*.cu' -o -name '*.cuh' \)
  done
} | LC_ALL=C sort | awk '
function complain(what) { print path ":" line ": " what; bad = 1 }
# A file or a folder: mawk and gawk differ on reading a folder, the shell does not.
function exists(file) {
  if (!(file in known)) {
    if (file ~ /[^A-Za-z0-9_.\/+-]/) known[file] = 0
    else known[file] = system("test -e \"" file "\"") == 0
  }
  return known[file]
}
function normal(file,   part, count, i, n, out, kept) {
  count = split(file, part, "/")
  n = 0
  for (i = 1; i <= count; i++) {
    if (part[i] == "" || part[i] == ".") continue
    if (part[i] == ".." && n > 0 && kept[n] != "..") n--
    else kept[++n] = part[i]
  }
  out = n > 0 ? kept[1] : "."
  for (i = 2; i <= n; i++) out = out "/" kept[i]
  return out
}
# The anchor of a heading, as GitHub makes it: lower case, no punctuation, dashes for blanks.
function slug(text) {
  text = tolower(text)
  gsub(/\]\([^)]*\)/, "", text)
  gsub(/[^a-z0-9 _-]/, "", text)
  gsub(/ /, "-", text)
  return text
}
function has_anchor(file, anchor,   text, name, seen, fenced, found) {
  while ((getline text < file) > 0) {
    if (text ~ /^ *```/) fenced = !fenced
    if (fenced || text !~ /^#+ /) continue
    sub(/^#+ +/, "", text)
    sub(/ +#* *$/, "", text)
    name = slug(text)
    if (seen[name]++) name = name "-" (seen[name] - 1)
    if (name == anchor) found = 1
  }
  close(file)
  return found
}
function check(target, base,   anchor, file) {
  anchor = ""
  if (target ~ /#/) {
    anchor = target
    sub(/^[^#]*#/, "", anchor)
    sub(/#.*$/, "", target)
  }
  file = target == "" ? path : normal(base target)
  if (!exists(file)) complain("dead link: " target)
  else if (anchor != "" && file ~ /[.]md$/ && !has_anchor(file, slug(anchor)))
    complain("no such heading: " target "#" anchor)
}
{
  path = $0
  base = path
  if (!sub(/[^\/]*$/, "", base)) base = ""
  fenced = 0
  # Read whole: has_anchor may have to read the same file.
  count = 0
  while ((getline lines[count + 1] < path) > 0) count++
  close(path)
  for (line = 1; line <= count; line++) {
    text = lines[line]
    if (path ~ /[.]md$/) {
      if (text ~ /^ *```/) fenced = !fenced
      if (fenced) continue
      gsub(/`[^`]*`/, "", text)
      while (match(text, /\]\([^) ]+/)) {
        target = substr(text, RSTART + 2, RLENGTH - 2)
        text = substr(text, RSTART + RLENGTH)
        if (target !~ /^[a-z]+:/) check(target, base)
      }
    } else {
      while (match(text, /docs\/[A-Za-z0-9_\/.-]+[.]md(#[A-Za-z0-9_-]+)?/)) {
        target = substr(text, RSTART, RLENGTH)
        text = substr(text, RSTART + RLENGTH)
        check(target, "")
      }
    }
  }
}
END { exit bad }'
