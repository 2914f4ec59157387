#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# cuda_kernels.sh ROOT [SOURCE]: assembled for compute capability 8.0 and 9.0, no kernel of SOURCE
# keeps anything on the stack or spills a register, and the umbrella of a device reads nothing of
# Eigen. Compiled once, as no header asks for the architecture, and for the device alone. 77 where
# there is no nvcc.
cd "$1" || exit 2
source=${2:-tests/meta/cuda_kernels.cu}
command -v nvcc >/dev/null || { echo "no nvcc: skipped"; exit 77; }
flags="-std=c++20 --extended-lambda --expt-relaxed-constexpr -diag-suppress 1675,177"
flags="$flags -diag-error 20014,20011 -Iinclude"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log
echo '#include <talpa/cuda.cuh>' >"$work/umbrella.cu"
# shellcheck disable=SC2086
nvcc $flags -M "$work/umbrella.cu" >"$log" || exit 2
if grep -q '/Eigen/' "$log"; then
  echo "include/talpa/cuda.cuh: reads Eigen"
  exit 1
fi
# shellcheck disable=SC2086
nvcc $flags -gencode "arch=compute_80,code=[sm_80,sm_90]" -Xptxas -v \
  -fatbin "$source" -o "$work/kernels" >"$log" 2>&1 || { cat "$log"; exit 2; }
awk '
/Compiling entry function/ { name = $0; sub(/^[^\047]*\047/, "", name) }
/bytes stack frame/ {
  kernels++
  if ($0 !~ /(^| )0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads/) {
    sub(/^ */, "")
    print name ": " $0
    bad = 1
  }
}
END {
  if (kernels == 0) { print "no kernel was compiled"; bad = 1 }
  exit bad
}' "$log"
