# SPDX-License-Identifier: Apache-2.0
# cmake -P refused.cmake -- SENTENCE COMMAND ARGUMENT...
# Passes if the command fails and prints the sentence, wherever its lines are broken.

set(command "")
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE 5 ${last})
  string(REPLACE ";" "\\;" argument "${CMAKE_ARGV${i}}")
  list(APPEND command "${argument}")
endforeach()

execute_process(COMMAND ${command}
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
message("${output}")
if(result EQUAL 0)
  message(FATAL_ERROR "not refused")
endif()
string(REGEX REPLACE "[ \n]+" " " output "${output}")
string(FIND "${output}" "${CMAKE_ARGV4}" position)
if(position EQUAL -1)
  message(FATAL_ERROR "refused without saying: ${CMAKE_ARGV4}")
endif()
