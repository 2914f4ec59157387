// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/routes.cuh"

#include <talpa/cuda/limit_experts.hpp>

void talpa::bench::capacity_lines(laboratory& lab) { route_lines(lab, capacity_selectors{}); }
