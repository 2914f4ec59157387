#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# gpu_stage.sh DIR: gathers what tests/gpu_check.sh needs beside the sources and the CUDA toolkit, for
# a machine that can install nothing: the headers of Eigen and doctest, from this one, in DIR.
set -e
[ $# -eq 1 ] || { echo "Usage: sh tests/gpu_stage.sh DIR" >&2; exit 2; }
for header in eigen3/Eigen/Core doctest/doctest.h; do
  if [ ! -f "/usr/include/$header" ]; then
    echo "gpu_stage.sh: /usr/include/$header is missing, install libeigen3-dev and doctest-dev" >&2
    exit 1
  fi
done
mkdir -p "$1/eigen3" "$1/doctest"
cp -R /usr/include/eigen3/Eigen "$1/eigen3/"
cp /usr/include/doctest/doctest.h "$1/doctest/"
du -sh "$1"
