#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -u

usage() {
  cat <<'TEXT'
Usage: bash bench/compile_time.sh [--check FILE] [COMPILER FLAG...]

What including talpa costs: user seconds of the compiler for each public header by itself and for one
program that assembles a layer, trains it a step and prints it (examples/00_readme.cpp), as ratios to
a file that includes <vector> and <string>. That file is compiled before and after each other one,
and a ratio is to the mean of the two, so that a busy machine matters little. Prints a table in
Markdown, the slowest first.

  --check FILE    compile only what FILE names, a line each: NAME RATIO, a whole number; fail where a
                  ratio is larger
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

# Hundredths of the base that NAME takes: a header below include/, or a source file.
hundredths() {
  local file=$1 before own after
  if [[ $1 != *.cpp ]]; then
    file=$work/header.cpp
    echo "#include <$1>" >"$file"
  fi
  before=$(compile_us "$work/base.cpp") && own=$(compile_us "$file") &&
    after=$(compile_us "$work/base.cpp") || return 1
  echo $((own * 200 / (before + after)))
}

ratio() { printf '%d.%02d' $(($1 / 100)) $(($1 % 100)); }

if [[ -n $budget ]]; then
  status=0
  while read -r name most; do
    [[ -n $name && $name != \#* ]] || continue
    [[ $most =~ ^[0-9]+$ ]] ||
      { echo "bench/compile_time.sh: the budget of $name is '$most', no whole number" >&2; exit 2; }
    found=$(hundredths "$name") || { echo "$name does not compile"; status=1; continue; }
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
    found=$(hundredths "$name") || exit 1
    echo "$found $name"
  done
} >"$work/all" || exit 1
echo '| file | time over that of `<vector>` and `<string>` |'
echo '| --- | --- |'
sort -k1,1nr -k2 "$work/all" | while read -r found name; do
  echo "| $name | $(ratio "$found") |"
done
