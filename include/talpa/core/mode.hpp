// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace talpa {

/// Whether a call belongs to training (dropout, noise, broadcast) or to inference. Always an
/// explicit argument: nothing guesses.
enum class mode { training, inference };

/// What backward does with a gradient it produces: leave it out, overwrite the output or add to it.
/// The rule of signs: activation gradients are overwritten and parameter gradients are added to;
/// only the tape adds activation gradients at a fan-out.
enum class grad_mode { ignore, overwrite, accumulate };

}  // namespace talpa
