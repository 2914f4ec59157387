# SPDX-License-Identifier: Apache-2.0
# cmake -DBUILD=folder -DSOURCE=folder -DSTAGE=folder -DMOVED=folder -P install.cmake
# Installs talpa into STAGE, moves that to MOVED, and looks for paths that would not survive a move.

file(REMOVE_RECURSE "${STAGE}" "${MOVED}")
execute_process(COMMAND "${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${STAGE}"
                COMMAND_ERROR_IS_FATAL ANY)
file(RENAME "${STAGE}" "${MOVED}")

file(GLOB_RECURSE files "${MOVED}/*")
foreach(file IN LISTS files)
  file(READ "${file}" text)
  foreach(path IN ITEMS "${STAGE}" "${BUILD}" "${SOURCE}")
    string(FIND "${text}" "${path}" position)
    if(NOT position EQUAL -1)
      message(FATAL_ERROR "${file} names ${path}")
    endif()
  endforeach()
endforeach()

file(GLOB_RECURSE expected RELATIVE "${SOURCE}/include" "${SOURCE}/include/talpa/*")
file(GLOB_RECURSE found RELATIVE "${MOVED}/include" "${MOVED}/include/*")
if(NOT "${expected}" STREQUAL "${found}")
  message(FATAL_ERROR "installed headers are\n  ${found}\nbut include/ has\n  ${expected}")
endif()
