#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
set -e

usage() {
  cat <<'TEXT'
Usage: sh examples/quickstart.sh [--no-install] [ARGUMENT...]

Installs the Debian packages that are missing (a C++ compiler, CMake, Ninja, Eigen,
nlohmann-json), builds the program of examples/quickstart and runs it in the current folder.

  --no-install    install nothing
  --help          this text

Other arguments go to the program. To see those it knows, once it is built:
  build/quickstart/examples/quickstart --help
TEXT
}

root=$(cd "$(dirname "$0")/.." && pwd)
install=yes
for argument do
  shift
  case $argument in
    --no-install) install=no ;;
    --help) usage; exit 0 ;;
    *) set -- "$@" "$argument" ;;
  esac
done

if [ "$install" = yes ]; then
  . "$root/tests/cmake/packages.sh"
  install_packages g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev
fi

# In a subshell: the program runs where the caller is.
(
  cd "$root"
  echo "Building the quickstart in $root/build/quickstart"
  if ! configured=$(cmake --preset quickstart 2>&1); then
    printf '%s\n' "$configured" >&2
    exit 1
  fi
  cmake --build --preset quickstart
)
exec "$root/build/quickstart/examples/quickstart" "$@"
