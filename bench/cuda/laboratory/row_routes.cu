// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/routes.cuh"

void talpa::bench::row_lines(laboratory& lab) { route_lines(lab, row_selectors{}); }
