// SPDX-License-Identifier: Apache-2.0
// Gates that are a softmax of probabilities do not weigh what a capacity drops.
// expect: talpa::capacity_top_k: gate::softmax_probability does not weigh what is dropped; use raw, renormalised, softmax_selected or hard
#include <talpa/selectors/capacity.hpp>

#ifdef TALPA_MISTAKE
using weight = talpa::gate::softmax_probability;
#else
using weight = talpa::gate::renormalised;
#endif

talpa::capacity_top_k<weight> made;
