// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

// 1 under AddressSanitizer or ThreadSanitizer.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TALPA_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TALPA_SANITIZED 1
#endif
#endif
#ifndef TALPA_SANITIZED
#define TALPA_SANITIZED 0
#endif

namespace talpa::support {

/// Whether this program runs under AddressSanitizer or ThreadSanitizer.
inline constexpr bool sanitized = TALPA_SANITIZED;

/// Rows of a comparison with a slow reference: a sixteenth under a sanitizer, which looks at how
/// the rows are reached and runs ten to forty times slower.
constexpr index many_rows(index rows) { return sanitized ? (rows + 15) / 16 : rows; }

}  // namespace talpa::support
