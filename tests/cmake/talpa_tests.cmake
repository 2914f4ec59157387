# SPDX-License-Identifier: Apache-2.0
# Functions for the folders of tests/.

set(TALPA_TESTS_DIR "${CMAKE_CURRENT_LIST_DIR}/..")
cmake_path(NORMAL_PATH TALPA_TESTS_DIR)

# talpa_batch(target size): the compiler gets the sources of the target `size` at a time, so that what
# they share is read and instantiated once. Names of a file stay its own, see docs/testing.md.
function(talpa_batch target size)
  set_target_properties(${target} PROPERTIES
    UNITY_BUILD ${TALPA_TEST_UNITY} UNITY_BUILD_BATCH_SIZE ${size})
endfunction()

# talpa_add_test_family(NAME family [SINGLY] [BRIEF] [SOURCES file...])
#
# One binary talpa_test_<family> and one CTest <family> from SOURCES, by default every *_test.cpp of
# tests/<family>. A Release compiles those of TALPA_TEST_KERNELS at -O3. SINGLY: each source by itself.
# BRIEF: at -O0, for tests of which compiling is most; what others have precompiled is of another level.
function(talpa_add_test_family)
  cmake_parse_arguments(PARSE_ARGV 0 arg "SINGLY;BRIEF" "NAME" "SOURCES")
  if(NOT arg_SOURCES)
    file(GLOB arg_SOURCES CONFIGURE_DEPENDS "${TALPA_TESTS_DIR}/${arg_NAME}/*_test.cpp")
    if(NOT TALPA_TEST_ALL_LAWS)
      # One of each kind stays: the laws of all others run the same loops.
      set(kept "/(top_k|load_balance_affinity)_laws_test[.]cpp$")
      set(laws ${arg_SOURCES})
      list(FILTER laws INCLUDE REGEX "_laws_test[.]cpp$")
      list(FILTER laws EXCLUDE REGEX "${kept}|/testing/")
      if(laws)
        list(REMOVE_ITEM arg_SOURCES ${laws})
      endif()
    endif()
  endif()
  if(TALPA_SANITIZE)
    # A shell over fused_moe_ffn, whose test reaches the same kernels.
    list(FILTER arg_SOURCES EXCLUDE REGEX "/fused_factored_ffn_test[.]cpp$")
  endif()
  set(target talpa_test_${arg_NAME})
  list(JOIN TALPA_TEST_KERNELS "|" kernels)
  set(kernel_sources ${arg_SOURCES})
  list(FILTER kernel_sources INCLUDE REGEX "/(${kernels})_test[.]cpp$")
  if(kernel_sources)
    list(REMOVE_ITEM arg_SOURCES ${kernel_sources})
    add_library(${target}_kernels OBJECT EXCLUDE_FROM_ALL ${kernel_sources})
    target_link_libraries(${target}_kernels PRIVATE talpa_test_support)
    target_compile_options(${target}_kernels PRIVATE $<$<CONFIG:Release>:-O3>)
    target_precompile_headers(${target}_kernels REUSE_FROM talpa_test_support)
    talpa_batch(${target}_kernels 12)
    set(kernel_sources $<TARGET_OBJECTS:${target}_kernels>)
  endif()
  add_executable(${target} ${arg_SOURCES} ${kernel_sources})
  target_link_libraries(${target} PRIVATE talpa_test_support talpa_test_laws talpa_cpu_products)
  if(arg_BRIEF)
    target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O0>)
  else()
    target_precompile_headers(${target} REUSE_FROM talpa_test_laws)
  endif()
  if(NOT arg_SINGLY)
    talpa_batch(${target} 12)
  endif()
  add_test(NAME ${arg_NAME} COMMAND ${target})
  set_tests_properties(${arg_NAME} PROPERTIES LABELS unit)
endfunction()

# Command line of the compiler with C++20, talpa and Eigen on the include path, ready for a source
# file, in `variable`: for tests that look at what the compiler says.
function(talpa_compiler_command variable)
  set(eigen "$<TARGET_PROPERTY:Eigen3::Eigen,INTERFACE_INCLUDE_DIRECTORIES>")
  set(${variable}
    "${CMAKE_CXX_COMPILER}" ${CMAKE_CXX20_STANDARD_COMPILE_OPTION}
    "-I${PROJECT_SOURCE_DIR}/include" "-isystem$<JOIN:${eigen},$<SEMICOLON>-isystem>"
    PARENT_SCOPE)
endfunction()

# Arguments for add_test(COMMAND ...) in `variable`, put before a command that is to fail and to print
# the sentence.
function(talpa_refused variable sentence)
  set(${variable} "${CMAKE_COMMAND}" -P "${TALPA_TESTS_DIR}/cmake/refused.cmake" -- "${sentence}"
      PARENT_SCOPE)
endfunction()

# talpa_add_compile_fail(NAME name SOURCE file [COMPLAINT sentence])
#
# CTest compile_fail/<name>: the file compiles, and compiled with -DTALPA_MISTAKE it does not, and
# the compiler prints the sentence of each `// expect: sentence` line of the file. A file with several
# mistakes numbers them: `// expect 3: sentence` is for -DTALPA_MISTAKE=3. With COMPLAINT the file
# itself breaks these rules, and the test passes if that is what the check complains about.
function(talpa_add_compile_fail)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "NAME;SOURCE;COMPLAINT" "")
  cmake_path(ABSOLUTE_PATH arg_SOURCE)
  talpa_compiler_command(compiler)
  set(refused "")
  if(arg_COMPLAINT)
    talpa_refused(refused "${arg_COMPLAINT}")
  endif()
  add_test(NAME compile_fail/${arg_NAME}
    COMMAND ${refused}
            "${CMAKE_COMMAND}" "-DSOURCE=${arg_SOURCE}" "-DCOMPILE=${compiler};-fsyntax-only"
            -P "${TALPA_TESTS_DIR}/cmake/compile_fail.cmake")
  set_tests_properties(compile_fail/${arg_NAME} PROPERTIES LABELS compile_fail COST 100)
endfunction()
