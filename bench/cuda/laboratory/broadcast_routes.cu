// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/routes.cuh"

#include <talpa/cuda/overlay_rows.hpp>

void talpa::bench::broadcast_lines(laboratory& lab) { route_lines(lab, broadcast_selectors{}); }
