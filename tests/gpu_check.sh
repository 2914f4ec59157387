#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -u

usage() {
  cat <<'TEXT'
Usage: bash tests/gpu_check.sh [--deps DIR] [--out DIR] [--jobs N] [--no-bench] [--no-sanitizers]
                               [--laboratory]

Builds and runs on this machine's CUDA device what a device should prove: every op, policy and layer
of tests/cuda and tests/cuda_policies beside the host, twice; a training step captured in a graph;
compute-sanitizer on small shapes where it works; then the times of bench/cuda and, where python3 has
torch, of its peers, in report.json and report.md.
Needs nvcc and g++. Exits with 77 where no device answers.

  --deps DIR   Eigen and doctest as tests/gpu_stage.sh gathers them (default: /usr/include)
  --out DIR    where report, JSON and logs go (default: build/gpu)
  --jobs N     compilers at a time (default: the number of processors)
  --laboratory builds and runs bench/cuda/laboratory as well: every selector and preset over sizes
               and skew of the logits, minutes more of both
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
deps=/usr/include out=$root/build/gpu jobs=$(nproc) bench=yes sanitizers=yes laboratory=no
while [ $# -gt 0 ]; do
  case $1 in
    --deps) deps=$(cd "$2" && pwd); shift ;;
    --out) mkdir -p "$2"; out=$(cd "$2" && pwd); shift ;;
    --jobs) jobs=$2; shift ;;
    --no-bench) bench=no ;;
    --no-sanitizers) sanitizers=no ;;
    --laboratory) laboratory=yes ;;
    --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done
cd "$root" || exit 2
mkdir -p "$out"
objects=$out/objects
mkdir -p "$objects"
rm -f "$out"/{bench,peers,laboratory}.{json,md}
failed=0
say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

command -v nvcc >/dev/null || { echo "gpu_check.sh: nvcc is not on the PATH" >&2; exit 2; }
if ! nvidia-smi -L >"$out/device.txt" 2>&1; then
  echo "no CUDA device answers: skipped"
  exit 77
fi
cat "$out/device.txt"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
libraries=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")/lib64
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

nvcc_flags=(-std=c++20 -O2 --split-compile 4 "-gencode=arch=compute_$capability,code=sm_$capability"
  --extended-lambda --expt-relaxed-constexpr -diag-suppress 1675,20012,177 -diag-error 20014,20011 -Iinclude)
test_flags=(-x cu -Itests -Itests/support/gpu -isystem "$deps/eigen3" -isystem "$deps"
  -Xcompiler -fopenmp)

# compile OBJECT COMMAND...: runs the command, with its messages beside the object.
compile() {
  local object=$1
  shift
  if ! "$@" -o "$object" >"$object.log" 2>&1; then
    echo "FAILED to compile: $object"
    grep -m 5 error "$object.log"
    return 1
  fi
}

say "build"
pids=() built=0
wait_for_slot() {
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
}
if [ "$bench" = yes ]; then
  wait_for_slot
  compile "$objects/device_bench" nvcc "${nvcc_flags[@]}" bench/cuda/device_bench.cu -lcublasLt &
  pids+=($!)
fi
if [ "$laboratory" = yes ]; then
  for source in bench/cuda/laboratory/*.cu; do
    wait_for_slot
    compile "$objects/laboratory_$(basename "${source%.cu}").o" \
      nvcc "${nvcc_flags[@]}" -Ibench -c "$source" &
    pids+=($!)
  done
fi
for source in tests/cuda/*_test.cpp tests/cuda/*_test.cu tests/cuda_policies/*_test.cpp; do
  wait_for_slot
  compile "$objects/$(basename "${source%.*}").o" \
    nvcc "${nvcc_flags[@]}" "${test_flags[@]}" -c "$source" &
  pids+=($!)
done
wait_for_slot
compile "$objects/support_main.o" nvcc "${nvcc_flags[@]}" -isystem "$deps" -c \
  tests/support/gpu/main.cu &
pids+=($!)
compile "$objects/support_reference.o" g++ -std=c++20 -O2 -fopenmp -Iinclude -Itests \
  -isystem "$deps/eigen3" -isystem "$deps" -c tests/support/reference.cpp &
pids+=($!)
for pid in "${pids[@]}"; do
  if wait "$pid"; then ((++built)); else ((++failed)); fi
done
echo "$built compiled, $failed failed"
compile "$objects/device_tests" nvcc "${nvcc_flags[@]}" "$objects"/*_test.o "$objects"/support_*.o \
  -Xcompiler -fopenmp -lcublasLt || ((++failed))

if [ "$bench" = yes ]; then
  say "what the device can do today"
  "$objects/device_bench" --ceilings || ((++failed))
fi

# check NAME ARGUMENT...: the tests with these arguments; shows what failed.
check() {
  local log=$out/tests.$1.log
  shift
  if "$objects/device_tests" "$@" >"$log" 2>&1; then return 0; fi
  grep -B4 -A8 "ERROR" "$log" | head -n 60
  tail -n 4 "$log"
  return 1
}

say "parity, graphs and determinism"
# First each suite in a process of its own: what takes the device from one leaves it to the others.
"$objects/device_tests" -lts | grep / >"$out/suites.txt"
pids=()
while read -r suite; do
  while [ "$(jobs -rp | wc -l)" -ge 8 ]; do wait -n; done
  check "${suite//\//.}" "-ts=$suite" &
  pids+=($!)
done <"$out/suites.txt"
for pid in "${pids[@]}"; do wait "$pid" || ((++failed)); done
echo "${#pids[@]} suites, each by itself"
check together || ((++failed))
tail -n 4 "$out/tests.together.log" | head -n 3

if [ "$sanitizers" = yes ] && command -v compute-sanitizer >/dev/null; then
  # The tools wait for the host most of their time: beside each other they take that of the slowest.
  declare -A checker
  for tool in memcheck racecheck initcheck synccheck; do
    # Products come from a library whose kernels are not ours to check; initcheck does not come back
    # from the launch of a graph.
    unchecked='*fused*,*mole_linear*,*cuda_policies*'
    if [ "$tool" = initcheck ]; then unchecked+=',*graph*'; fi
    TALPA_DEVICE_SIZES=small timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$objects/device_tests" -tse="$unchecked" >"$out/$tool.log" 2>&1 &
    checker[$tool]=$!
  done
  for tool in memcheck racecheck initcheck synccheck; do
    wait "${checker[$tool]}"
    status=$?
    say "compute-sanitizer $tool"
    if ((status == 0)); then
      tail -n 1 "$out/$tool.log"
    elif grep -q "not supported\|LibraryNotLoaded" "$out/$tool.log"; then
      echo "does not work here"
    else
      ((++failed))
      if ((status == 124)); then echo "did not come to its end in 150 s"; fi
      tail -n 8 "$out/$tool.log"
    fi
  done
fi

if [ "$bench" = yes ]; then
  say "times"
  "$objects/device_bench" "$out/bench.json" >"$out/bench.md" 2>"$out/bench.log" || { ((++failed)); cat "$out/bench.log"; }
  cat "$out/bench.md"
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    say "peers"
    python3 bench/peers/torch_mole.py --json "$out/peers.json" >"$out/peers.md" 2>"$out/peers.log" || { ((++failed)); tail -n 5 "$out/peers.log"; }
    cat "$out/peers.md"
  fi
fi

if [ "$laboratory" = yes ]; then
  compile "$objects/laboratory" nvcc "${nvcc_flags[@]}" "$objects"/laboratory_*.o -lcublasLt || ((++failed))
  say "laboratory"
  "$objects/laboratory" "$out/laboratory.json" >"$out/laboratory.md" 2>"$out/laboratory.log" || { ((++failed)); cat "$out/laboratory.log"; }
  tail -n 5 "$out/laboratory.md"
fi

# All times in one file of each kind.
{
  printf '{'
  separator=
  for part in bench peers laboratory; do
    [ -s "$out/$part.json" ] || continue
    printf '%s\n"%s": ' "$separator" "$part"
    cat "$out/$part.json"
    separator=,
  done
  printf '}\n'
} >"$out/report.json"
{
  cat "$out/device.txt"
  for part in bench peers laboratory; do
    if [ -s "$out/$part.md" ]; then printf '\n## %s\n\n' "$part" && cat "$out/$part.md"; fi
  done
} >"$out/report.md"

say "done: $failed failed"
((failed == 0))
