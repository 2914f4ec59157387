#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
set -e

usage() {
  cat <<'TEXT'
Usage: sh tests/run.sh [--no-install] [--preset NAME] [--] [CTEST ARGUMENT...]

Installs the Debian packages that are missing, configures, builds and runs talpa's tests and
examples, and ends with one line: N passed, N failed, N skipped.

  --no-install    install nothing
  --preset NAME   test (default: gcc, Release), release (with benchmarks), clang, asan, tsan
  --help          this text

Further arguments go to ctest, for example: sh tests/run.sh -R '^core$'
TEXT
}

root=$(cd "$(dirname "$0")/.." && pwd)
install=yes
preset=test
while [ $# -gt 0 ]; do
  case $1 in
    --no-install) install=no ;;
    --preset)
      [ $# -ge 2 ] || { echo "tests/run.sh: --preset needs a name" >&2; exit 2; }
      preset=$2
      shift
      ;;
    --preset=*) preset=${1#--preset=} ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) break ;;
  esac
  shift
done

packages="g++ cmake ninja-build libeigen3-dev doctest-dev nlohmann-json3-dev pkg-config"
case $preset in
  test) ;;
  release) packages="$packages libbenchmark-dev" ;;
  clang) packages="$packages clang libomp-dev" ;;
  asan | tsan) packages="$packages clang libomp-dev libclang-rt-dev" ;;
  *) echo "tests/run.sh: unknown preset '$preset', see --help" >&2; exit 2 ;;
esac
if [ "$install" = yes ]; then
  . "$root/tests/cmake/packages.sh"
  # shellcheck disable=SC2086
  install_packages $packages
fi

cd "$root"
build=build/$preset
jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
cmake --preset "$preset"
cmake --build --preset "$preset" --parallel "$jobs"

results=$root/$build/results.xml
rm -f "$results"
status=0
ctest --preset "$preset" --parallel "$jobs" --output-junit "$results" "$@" || status=$?

[ ! -f "$results" ] || sh tests/cmake/counts.sh "$results"
exit "$status"
