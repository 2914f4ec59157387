// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only file that may test __CUDACC__. It changes attributes, never layouts or bodies, so that
// objects compiled by a host compiler and by nvcc can meet in one program.
//
// Lambdas that become kernels are TALPA_DEVICE, never TALPA_HD: what nvcc makes of one for both
// sides copies itself through pointers that only the translation unit which made it has set, and
// functions that two translation units share are then entered with those of the other.
#if defined(__CUDACC__)
#define TALPA_HD __host__ __device__
#define TALPA_DEVICE __device__
#define TALPA_UNROLL _Pragma("unroll")
#else
#define TALPA_HD
#define TALPA_DEVICE
#define TALPA_UNROLL
#endif
