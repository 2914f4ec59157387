#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# pkg_config.sh PKG_CONFIG FOLDER VERSION PROGRAM COMPILER ARGUMENT...: compiles PROGRAM with the
# flags that pkg-config finds in FOLDER, and runs it.
set -e
pkg_config=$1
PKG_CONFIG_PATH=$2
export PKG_CONFIG_PATH
version=$3
program=$4
shift 4
found=$("$pkg_config" --modversion talpa)
if [ "$found" != "$version" ]; then
  echo "pkg-config says version $found, expected $version"
  exit 1
fi
# Split into words on purpose: flags, not a file name.
# shellcheck disable=SC2046
"$@" $("$pkg_config" --cflags --libs talpa) -o "$program"
"$program"
