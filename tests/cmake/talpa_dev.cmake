# SPDX-License-Identifier: Apache-2.0
# talpa_dev: what talpa's own programs are compiled with. Users of talpa::talpa get none of it.

include(CheckCXXCompilerFlag)

add_library(talpa_dev INTERFACE)
target_link_libraries(talpa_dev INTERFACE talpa::talpa)

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  target_compile_options(talpa_dev INTERFACE
    -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
    $<$<BOOL:${TALPA_WERROR}>:-Werror>
    $<$<CXX_COMPILER_ID:GNU>:-fconcepts-diagnostics-depth=3>)
  # Tests form packs and tiles of every width, also of those wider than a register of this machine. How
  # a compiler hands these over is one within a program.
  target_compile_options(talpa_dev INTERFACE -Wno-psabi)
  # gcc 12 takes its own AVX-512 intrinsics for uses of uninitialised values, certain or possible, and
  # joining two std::string for overlapping copies (gcc bugs 105593 and 105651).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(talpa_dev INTERFACE
      -Wno-uninitialized -Wno-maybe-uninitialized -Wno-restrict)
  endif()
endif()

if(TALPA_NATIVE)
  check_cxx_compiler_flag(-march=native TALPA_HAS_MARCH_NATIVE)
  if(NOT TALPA_HAS_MARCH_NATIVE)
    message(FATAL_ERROR "talpa: TALPA_NATIVE is ON, but this compiler has no -march=native")
  endif()
  target_compile_options(talpa_dev INTERFACE -march=native)
endif()

if(TALPA_SANITIZE)
  set(sanitizer_flags -fsanitize=${TALPA_SANITIZE})
  target_compile_options(talpa_dev INTERFACE
    ${sanitizer_flags} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  # A null pointer ends the program anyway and no object is taken for one of another class. Reports name
  # functions; for lines as well add -DCMAKE_CXX_FLAGS=-g1, at a third more time to compile.
  target_compile_options(talpa_dev INTERFACE -fno-sanitize=null,vptr)
  # Nor is a function called through a pointer of another type: every instantiation would carry its own
  # for this check, a sixth of the code to compile.
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    target_compile_options(talpa_dev INTERFACE -fno-sanitize=function)
  endif()
  if(TALPA_SANITIZE_TRAP)
    target_compile_options(talpa_dev INTERFACE -fsanitize-trap=undefined)
  endif()
  target_link_options(talpa_dev INTERFACE ${sanitizer_flags})
endif()

# talpa_require(package version debian_name option): find_package that ends with a sentence.
macro(talpa_require package version debian_name option)
  find_package(${package} ${version} QUIET)
  if(NOT ${package}_FOUND)
    message(FATAL_ERROR "talpa: ${option} needs ${package} ${version}, which was not found. Install "
                        "it (Debian and Ubuntu: apt-get install ${debian_name}) or pass "
                        "-D${option}=OFF.")
  endif()
endmacro()
