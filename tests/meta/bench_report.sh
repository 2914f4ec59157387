#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# bench_report.sh ROOT PYTHON: bench/report.py makes of the runs in tests/meta/fixtures/bench_report the
# table beside them and a page that needs no other file, and leaves nothing where it cannot write.
cd "$1/tests/meta/fixtures/bench_report" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
bad=0
complain() { echo "bench/report.py: $*"; bad=1; }
report() { "$python" ../../../../bench/report.py "$@"; }
python=$2

report cpu.json device.json --title "A | B" --markdown "$work/table.md" --html "$work/page.html" ||
  complain "failed"
diff report.md "$work/table.md" || complain "another table"
report cpu.json device.json --title "A | B" | diff report.md - || complain "another table on the output"
[ "$(grep -o '<svg' "$work/page.html" | wc -l)" -eq 6 ] || complain "not six charts"
grep -q 'overhead_pct over its prediction' "$work/page.html" || complain "no chart of predictions"
[ "$(grep -o '<circle' "$work/page.html" | wc -l)" -eq 11 ] || complain "not eleven points"
grep -q 'A | B' "$work/page.html" || complain "no title"
if grep -E 'https?:|src=|somewhere' "$work/page.html"; then complain "something from elsewhere"; fi

refuses() {
  wanted=$1
  shift
  got=$(report "$@" 2>&1 >/dev/null)
  status=$?
  [ $status -eq 2 ] || complain "status $status for $*"
  [ "$got" = "bench/report.py: $wanted" ] || complain "says '$got', not '$wanted'"
}
refuses "'broken.json' has no benchmarks" broken.json
refuses "'report.md' is not JSON" report.md
refuses "cannot read 'none.json': No such file or directory" none.json
echo '[]' >"$work/empty.json"
refuses "the runs have no lines" "$work/empty.json"
refuses "cannot write '$work/none/page.html': No such file or directory" cpu.json --html "$work/none/page.html"
mkdir "$work/taken"
refuses "cannot write '$work/taken': Is a directory" cpu.json --markdown "$work/taken"
[ ! -e "$work/taken.partial" ] || complain "a file half written"
exit $bad
