#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# kernel_stack.sh ROOT COMPILER FLAG...: no loop that multiplies vectors of ROOT/tests/meta/kernels.cpp
# touches the stack or reads one vector for several multiply-adds, with vectors of 16, 32 and 64 bytes and
# as g++ 12 tunes for Intel's processors and for AMD's. For g++ on x86-64 and objdump of binutils.
root=$1
shift
cd "$root" || exit 2
object=$(mktemp) || exit 2
trap 'rm -f "$object"' EXIT
bad=0
for machine in x86-64 haswell znver3 skylake-avx512 'znver3 -mavx512f -mavx512vl -mavx512bw -mavx512dq'; do
  # shellcheck disable=SC2086
  "$@" -O2 -march=$machine -Iinclude -c tests/meta/kernels.cpp -o "$object" || exit 2
  objdump -d -C --no-show-raw-insn "$object" | awk -v machine="$machine" '
  # A loop goes from the target of a backward jump to the jump. Inner ones contain no other; with a
  # return in between it is a block that the compiler put behind the function.
  function judge(i, j, l, inner, multiplies, stack, again, read) {
    for (i = 1; i <= loops; i++) {
      inner = 1
      for (j = 1; j <= loops; j++)
        if (j != i && first[j] >= first[i] && last[j] <= last[i]) inner = 0
      if (!inner) continue
      multiplies = stack = returns = again = 0
      delete read
      for (l = first[i]; l <= last[i]; l++) {
        # Another address behind the same words.
        if (text[l] !~ /^v/ && text[l] ~ /%r[0-9a-z]+$/) delete read
        if (text[l] ~ /^(vfn?madd[0-9]*|v?mul)p[sd] /) {
          multiplies++
          if (match(text[l], /[-0-9a-fx]*\(%[^)]*\)[^{]/) && read[substr(text[l], RSTART, RLENGTH)]++) again++
        }
        if (text[l] ~ /\(%r[sb]p[,)]/) stack++
        if (text[l] ~ /^ret/) returns++
      }
      if (multiplies < 4 || returns) continue
      found++
      if ((stack || again) && !(name in told)) {
        told[name] = 1
        print "tests/meta/kernels.cpp: the loop of " name " (" machine ") " \
          (stack ? "touches the stack" : "reads one vector several times")
        bad = 1
      }
    }
    loops = 0
  }
  /^[0-9a-f]+ <.*>:$/ {
    judge()
    name = $0
    sub(/^[0-9a-f]+ </, "", name)
    sub(/\(.*$/, "", name)
    lines = 0
    delete at
  }
  /^ +[0-9a-f]+:\t/ {
    address = $1
    sub(/:/, "", address)
    text[++lines] = $0
    sub(/^ +[0-9a-f]+:\t/, "", text[lines])
    at[address] = lines
    if ($2 ~ /^j/ && ($3 in at)) {
      first[++loops] = at[$3]
      last[loops] = lines
    }
  }
  END {
    judge()
    if (!found) {
      print "tests/meta/kernels.cpp: no loop multiplies vectors (" machine ")"
      bad = 1
    }
    exit bad
  }' || bad=1
done
exit $bad
