// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/laws.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/testing/expert_laws.hpp>

// Claims and sizes that the laws of experts with an activation share.

namespace talpa::support {

/// Networks begin with weights that do something. An activation and its derivative cost some eight
/// roundings where a product has one.
inline constexpr testing::expert_claims network{.fresh_is_zero = false, .amplification = 8.0};
inline constexpr testing::expert_claims adapter{.fresh_is_zero = true, .amplification = 8.0};

inline constexpr testing::expert_sizes one{.tokens = 5, .inputs = 1, .outputs = 1, .experts = 1};
inline constexpr testing::expert_sizes many{.tokens = 9, .inputs = 2, .outputs = 3, .experts = 33};

}  // namespace talpa::support
