// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only file that may test __CUDACC__. It changes attributes, never layouts or bodies, so that
// objects compiled by a host compiler and by nvcc can meet in one program.
#if defined(__CUDACC__)
#define TALPA_HD __host__ __device__
#define TALPA_UNROLL _Pragma("unroll")
#else
#define TALPA_HD
#define TALPA_UNROLL
#endif
