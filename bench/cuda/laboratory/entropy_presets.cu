// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/presets.cuh"

void talpa::bench::entropy_preset_lines(laboratory& lab) { layer_lines(lab, entropy_presets{}); }
