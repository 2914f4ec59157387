// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/testing/expert_laws.hpp>
#include <talpa/testing/layer_laws.hpp>
#include <talpa/testing/loss_laws.hpp>
#include <talpa/testing/report.hpp>
#include <talpa/testing/scorer_laws.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

// The laws take seconds to instantiate; tests share one instantiation of each.
namespace talpa::testing::detail {

extern template class selector_trial<float>;
extern template class selector_trial<double>;
extern template class scorer_trial<float>;
extern template class scorer_trial<double>;
extern template class expert_trial<float>;
extern template class expert_trial<double>;
extern template class loss_trial<float>;
extern template class loss_trial<double>;
extern template class layer_trial<float>;
extern template class layer_trial<double>;

}  // namespace talpa::testing::detail

namespace talpa::support {

/// A report of talpa/testing/ as one doctest check: `obeys(testing::selector_laws<float>(...))`.
inline void obeys(const testing::report& found) { CHECK_MESSAGE(found.passed(), found.text()); }

}  // namespace talpa::support
