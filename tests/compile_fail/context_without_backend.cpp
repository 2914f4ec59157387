// SPDX-License-Identifier: Apache-2.0
// A context for which no header was included says which one to include.
// expect: talpa: context<B> has no definition yet, include talpa/talpa.hpp for context<cpu>
#include <talpa/core/backend.hpp>

template <class B>
inline constexpr auto bytes = sizeof(talpa::context<B>);

#ifdef TALPA_MISTAKE
static_assert(bytes<talpa::cpu> > 0);
#endif
