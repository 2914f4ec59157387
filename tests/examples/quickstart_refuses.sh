#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# quickstart_refuses.sh PROGRAM DATA: with a wrong flag or file the quickstart says so in one line
# on standard error, prints nothing else, leaves the folder as it was and ends with 2. Ctrl-C ends
# it by that signal and leaves no half-written file.
program=$1
data=$2
scratch=$(mktemp -d "${TMPDIR:-/tmp}/talpa-refuses-XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
out=$scratch/out err=$scratch/err
mkdir "$scratch/work" "$scratch/work/folder" && cd "$scratch/work" || exit 1
bad=0

complain() {
  echo "$*"
  echo "  standard error:"
  sed 's/^/    /' "$err"
  bad=1
}

# Names, sizes and sums of everything here.
listing() {
  find . | LC_ALL=C sort
  find . -type f -exec cksum {} + | LC_ALL=C sort
}

# refuses TEXT ARGUMENT...: TEXT is part of the one line.
refuses() {
  text=$1
  shift
  status=0
  "$program" "$@" >"$out" 2>"$err" || status=$?
  [ "$status" -eq 2 ] || complain "quickstart $*: ends with $status, expected 2"
  [ "$(wc -l <"$err")" -eq 1 ] || complain "quickstart $*: more or less than one line"
  grep -qF -- "$text" "$err" || complain "quickstart $*: does not say: $text"
  [ ! -s "$out" ] || complain "quickstart $*: prints to standard output"
  [ "$(listing)" = "$before" ] || complain "quickstart $*: changes its folder"
}

# What an earlier run left must stay.
echo earlier >quickstart.html
echo earlier >quickstart.jsonl
: >empty.csv
# Ends in the middle of a row.
head -c 20000 "$data" >cut.csv
before=$(listing)

refuses "'--sed' is unknown" --sed 1
refuses "'--methods' has 'molla', expected 'mola' = the nearest key" --methods lora,molla
refuses "'--seeds' has no value" --seeds
refuses "'--seeds' is '0', expected 1..16" --seeds 0
refuses "'--device' is 'tpu', expected cpu or gpu = where the networks train" --device tpu
refuses "'missing.csv' is unreadable" --data missing.csv
refuses "'folder' is unreadable" --data folder
refuses "'empty.csv' is empty" --data empty.csv
refuses "'cut.csv' line" --data cut.csv
refuses "'missing/report.html' is unwritable" --report missing/report.html
refuses "'folder' is a folder" --report folder
refuses "'missing/log.jsonl' is unwritable" --log missing/log.jsonl
refuses "'folder' is a folder" --log folder

# Ctrl-C. The program runs in the foreground, because a shell starts background programs with the
# signal ignored; its length makes sure that it does not end by itself. The watcher sends the signal
# once both files are begun, and something stronger should that not be enough.
(
  tries=0
  until ls .quickstart.html.tmp-* .quickstart.jsonl.tmp-* >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 20 ] || exit 1
    sleep 1
  done
  echo begun >"$scratch/begun"
  pid=$(cat "$scratch/pid")
  kill -INT "$pid"
  for _ in 1 2 3 4 5; do
    sleep 1
    kill -0 "$pid" || exit 0
  done
  kill -KILL "$pid"
) >/dev/null 2>&1 &
watcher=$!
status=0
sh -c 'echo $$ >"$0" && exec "$@"' "$scratch/pid" \
  "$program" --data "$data" --quiet --seeds 16 --epochs 1000 >"$out" 2>"$err" || status=$?
kill "$watcher" 2>/dev/null
[ -e "$scratch/begun" ] || complain "quickstart: did not begin its files"
[ "$status" -eq 130 ] || complain "quickstart after Ctrl-C: ends with $status, expected 130"
[ ! -s "$out" ] || complain "quickstart after Ctrl-C: prints to standard output"
[ "$(listing)" = "$before" ] || complain "quickstart after Ctrl-C: changes its folder"

exit "$bad"
