// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

namespace talpa::testing::detail {

template class selector_trial<float>;
template class selector_trial<double>;
template class scorer_trial<float>;
template class scorer_trial<double>;
template class expert_trial<float>;
template class expert_trial<double>;
template class loss_trial<float>;
template class loss_trial<double>;
template class layer_trial<float>;
template class layer_trial<double>;

}  // namespace talpa::testing::detail
