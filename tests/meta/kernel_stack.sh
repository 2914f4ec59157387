#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# kernel_stack.sh ROOT COMPILER FLAG...: no loop that multiplies vectors of ROOT/tests/meta/kernels.cpp
# touches the stack, with vectors of 16, 32 and 64 bytes. For g++ on x86-64 and objdump of binutils.
root=$1
shift
cd "$root" || exit 2
object=$(mktemp) || exit 2
trap 'rm -f "$object"' EXIT
bad=0
for machine in x86-64 haswell skylake-avx512; do
  "$@" -O2 -march=$machine -Iinclude -c tests/meta/kernels.cpp -o "$object" || exit 2
  objdump -d -C --no-show-raw-insn "$object" | awk -v machine=$machine '
  # A loop goes from the target of a backward jump to the jump. Inner ones contain no other; with a
  # return in between it is a block that the compiler put behind the function.
  function judge(i, j, l, inner, multiplies, stack) {
    for (i = 1; i <= loops; i++) {
      inner = 1
      for (j = 1; j <= loops; j++)
        if (j != i && first[j] >= first[i] && last[j] <= last[i]) inner = 0
      if (!inner) continue
      multiplies = stack = returns = 0
      for (l = first[i]; l <= last[i]; l++) {
        if (text[l] ~ /^(vfn?madd[0-9]*|v?mul)p[sd] /) multiplies++
        if (text[l] ~ /\(%r[sb]p[,)]/) stack++
        if (text[l] ~ /^ret/) returns++
      }
      if (multiplies < 4 || returns) continue
      found++
      if (stack && !(name in told)) {
        told[name] = 1
        print "tests/meta/kernels.cpp: the loop of " name " (" machine ") touches the stack"
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
