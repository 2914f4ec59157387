#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -u

usage() {
  cat <<'TEXT'
Usage: bash bench/compile_time.sh [--check FILE] [COMPILER FLAG...]

What including talpa costs: user seconds of the compiler for each public header by itself and for one
program that assembles a layer, trains it a step and prints it (examples/00_readme.cpp), as ratios to
a file that includes <vector> and <string>. That file is compiled twice before and twice after each
other one, and a ratio is to the least of the four: other programs on a machine only add time. Prints
a table in Markdown, the slowest first.

  --check FILE    compile only what FILE names, a line each: NAME RATIO, a whole number; fail where a
                  ratio is larger, of the least times in up to three measurements
  --help          this text

COMPILER FLAG... is g++ -std=c++20 -O2 by default, with the flags that pkg-config has for Eigen.
TEXT
}

budget=""
case ${1-} in
  --help) usage; exit 0 ;;
  --check)
    [[ $# -ge 2 ]] || { echo "bench/compile_time.sh: --check needs a file" >&2; exit 2; }
    budget=$(realpath -e -- "$2" 2>/dev/null) ||
      { echo "bench/compile_time.sh: no file $2" >&2; exit 2; }
    shift 2
    ;;
  -*) echo "bench/compile_time.sh: unknown flag '$1', see --help" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if (($# > 0)); then
  compiler=("$@")
else
  read -ra eigen < <(pkg-config --cflags eigen3) || exit 2
  compiler=(g++ -std=c++20 -O2 -fopenmp "${eigen[@]}")
fi

work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
printf '#include <vector>\n#include <string>\n' >"$work/base.cpp"

# Microseconds of user time that compiling the file takes.
compile_us() {
  local TIMEFORMAT=%3U seconds
  seconds=$({ time "${compiler[@]}" -Iinclude -c "$1" -o "$work/out.o" 2>"$work/errors"; } 2>&1) || {
    cat "$work/errors" >&2
    return 1
  }
  echo $((10#${seconds/./} * 1000))
}

# measure NAME: lowers least_own and least_base, microseconds, to what compiling NAME, a header below
# include/ or a source file, and the base take now.
measure() {
  local file=$1 us
  if [[ $1 != *.cpp ]]; then
    file=$work/header.cpp
    echo "#include <$1>" >"$file"
  fi
  local each
  for each in base base own base base; do
    if [[ $each == own ]]; then
      us=$(compile_us "$file") || return 1
      ((least_own == 0 || us < least_own)) && least_own=$us
    else
      us=$(compile_us "$work/base.cpp") || return 1
      ((least_base == 0 || us < least_base)) && least_base=$us
    fi
  done
  found=$((least_own * 100 / least_base))
}

# hundredths NAME [MOST]: sets found to the hundredths of the base that NAME takes, measured again
# where they are more than MOST.
hundredths() {
  local left
  least_own=0 least_base=0
  for left in 2 1 0; do
    measure "$1" || return 1
    ((left > 0 && $# > 1 && found > $2)) || return 0
  done
}

ratio() { printf '%d.%02d' $(($1 / 100)) $(($1 % 100)); }

if [[ -n $budget ]]; then
  status=0
  while read -r name most; do
    [[ -n $name && $name != \#* ]] || continue
    [[ $most =~ ^[0-9]+$ ]] ||
      { echo "bench/compile_time.sh: the budget of $name is '$most', no whole number" >&2; exit 2; }
    hundredths "$name" $((most * 100)) || { echo "$name does not compile"; status=1; continue; }
    echo "$name: $(ratio "$found") times <vector> and <string>, budget $most"
    if ((found > most * 100)); then
      echo "$name is over its budget"
      status=1
    fi
  done <"$budget"
  exit $status
fi

{
  for name in examples/00_readme.cpp $(cd include && find talpa -name '*.hpp' | LC_ALL=C sort); do
    hundredths "$name" || exit 1
    echo "$found $name"
  done
} >"$work/all" || exit 1
echo '| file | time over that of `<vector>` and `<string>` |'
echo '| --- | --- |'
sort -k1,1nr -k2 "$work/all" | while read -r found name; do
  echo "| $name | $(ratio "$found") |"
done
