# SPDX-License-Identifier: Apache-2.0
# talpa::talpa hands its users include paths, C++20, Eigen and OpenMP, and nothing else: no compiler
# flag, no definition, none of its own tests or install rules.

get_target_property(aliased talpa::talpa ALIASED_TARGET)
set(target talpa::talpa)
if(aliased)
  set(target ${aliased})
endif()
foreach(property INTERFACE_COMPILE_OPTIONS INTERFACE_COMPILE_DEFINITIONS INTERFACE_LINK_OPTIONS)
  get_target_property(value ${target} ${property})
  if(value)
    message(FATAL_ERROR "talpa::talpa has ${property} ${value}")
  endif()
endforeach()

foreach(option TALPA_BUILD_TESTS TALPA_BUILD_BENCHMARKS TALPA_BUILD_EXAMPLES TALPA_INSTALL)
  if(${option})
    message(FATAL_ERROR "${option} is on although talpa is not the project being built")
  endif()
endforeach()
if(TARGET talpa_dev)
  message(FATAL_ERROR "talpa brought its own development targets along")
endif()

if(EXPECTED_EIGEN AND NOT Eigen3_DIR STREQUAL EXPECTED_EIGEN)
  message(FATAL_ERROR "took the Eigen of ${Eigen3_DIR}, not of ${EXPECTED_EIGEN}")
endif()
