// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/routes.cuh"

void talpa::bench::control_lines(laboratory& lab) { route_lines(lab, control_selectors{}); }
