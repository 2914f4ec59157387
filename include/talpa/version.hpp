// SPDX-License-Identifier: Apache-2.0
#pragma once

// The one place of the version: CMake reads these three lines. Besides TALPA_HD they are the only
// macros of the library, because an #if in a user's file cannot see a constant.
#define TALPA_VERSION_MAJOR 0
#define TALPA_VERSION_MINOR 1
#define TALPA_VERSION_PATCH 0

namespace talpa {

/// Version of these headers. While the major number is 0, a new minor number may break source
/// compatibility and a new patch number may not.
inline constexpr int version_major = TALPA_VERSION_MAJOR;
inline constexpr int version_minor = TALPA_VERSION_MINOR;
inline constexpr int version_patch = TALPA_VERSION_PATCH;

}  // namespace talpa
