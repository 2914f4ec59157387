// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/routes.cuh"

#include <talpa/cuda/assign_balanced.hpp>
#include <talpa/cuda/limit_experts.hpp>
#include <talpa/cuda/sinkhorn.hpp>

void talpa::bench::coupled_lines(laboratory& lab) { route_lines(lab, coupled_selectors{}); }
