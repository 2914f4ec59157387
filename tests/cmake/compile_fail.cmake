# SPDX-License-Identifier: Apache-2.0
# cmake -DSOURCE=file -DCOMPILE=command;argument... -P compile_fail.cmake
# See talpa_add_compile_fail.

# Brackets and semicolons mean something in CMake's lists; nothing here needs to tell them apart.
function(plain variable)
  string(REGEX REPLACE "[][;]" "|" text "${${variable}}")
  set(${variable} "${text}" PARENT_SCOPE)
endfunction()

# Compiles with the given definition, which must fail and print each of the sentences.
function(refuse definition sentences)
  execute_process(COMMAND ${COMPILE} ${definition} "${SOURCE}"
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(result EQUAL 0)
    message(FATAL_ERROR "${SOURCE} compiles in spite of its mistake (${definition})")
  endif()
  plain(output)
  foreach(sentence IN LISTS sentences)
    string(STRIP "${sentence}" sentence)
    string(FIND "${output}" "${sentence}" position)
    if(position EQUAL -1)
      message(FATAL_ERROR "${SOURCE} (${definition}): the compiler did not print\n"
                          "  ${sentence}\nbut\n${output}")
    endif()
  endforeach()
endfunction()

file(READ "${SOURCE}" text)
plain(text)
string(REGEX MATCHALL "// expect( [0-9]+)?: [^\n]+" expectations "${text}")
if(NOT expectations)
  message(FATAL_ERROR "${SOURCE} has no line '// expect: sentence'")
endif()

# What a file with several mistakes includes is parsed once.
string(REGEX MATCHALL "// expect [0-9]+: " numbered "${text}")
list(LENGTH numbered count)
if(count GREATER 2)
  string(REGEX REPLACE "\n#if.*" "" head "${text}")
  string(REGEX MATCHALL "\n#include <[^>]+>" includes "${head}")
  get_filename_component(name "${SOURCE}" NAME_WE)
  set(header "${CMAKE_CURRENT_BINARY_DIR}/${name}.hpp")
  file(WRITE "${header}" ${includes} "\n")
  set(precompile ${COMPILE})
  list(REMOVE_ITEM precompile -fsyntax-only)
  execute_process(COMMAND ${precompile} -x c++-header "${header}" -o "${header}.gch"
                  COMMAND_ERROR_IS_FATAL ANY)
  list(APPEND COMPILE -include "${header}")
endif()

execute_process(COMMAND ${COMPILE} "${SOURCE}"
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} does not compile without its mistake:\n${output}")
endif()

set(common "")
foreach(expectation IN LISTS expectations)
  string(REGEX REPLACE "^// expect( [0-9]+)?: " "" sentence "${expectation}")
  if(expectation MATCHES "^// expect ([0-9]+): ")
    refuse(-DTALPA_MISTAKE=${CMAKE_MATCH_1} "${sentence}")
  else()
    list(APPEND common "${sentence}")
  endif()
endforeach()
if(common)
  refuse(-DTALPA_MISTAKE "${common}")
endif()
