#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# counts.sh RESULTS: N passed, N failed, N skipped of the JUnit report that ctest wrote. The report's
# own totals call a test skipped whose program or fixture is missing; here it has failed.
count() { grep -c "$1" "$results" || true; }
results=$1
passed=$(count '^[[:space:]]*<testcase .*status="run"')
skipped=$(($(count '^[[:space:]]*<testcase .*status="disabled"') +
           $(count '^[[:space:]]*<skipped message="SKIP_')))
failed=$(($(count '^[[:space:]]*<testcase ') - passed - skipped))
echo "$passed passed, $failed failed, $skipped skipped"
