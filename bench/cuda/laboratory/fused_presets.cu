// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/presets.cuh"

namespace talpa::bench {

void fused_preset_lines(laboratory& lab) {
  using namespace measured;
  fused_lines(lab, preset_list<dyn_mole, gw_moe, goat, mola, lora_moe, re_moe>{});
}

}  // namespace talpa::bench
