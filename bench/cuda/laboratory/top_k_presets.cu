// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/presets.cuh"

void talpa::bench::top_k_preset_lines(laboratory& lab) { layer_lines(lab, top_k_presets{}); }
