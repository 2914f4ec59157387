// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/routes.cuh"

void talpa::bench::top_k_lines(laboratory& lab) { route_lines(lab, top_k_selectors{}); }
