# SPDX-License-Identifier: Apache-2.0
# cmake -DSOURCE=folder -DBUILD=folder -DOPTIONS=option;... -DCONFIGURE_ONLY=bool -DCUDA=bool
#       -P consume.cmake
# Configures, builds and runs a project from nothing, on a machine that seems to have no nvcc unless
# CUDA is set; where there is none the project is then skipped.

if(CUDA)
  find_program(nvcc nvcc)
  if(NOT nvcc)
    message(STATUS "no nvcc: skipped")
    return()
  endif()
else()
  set(path "")
  string(REPLACE ":" ";" folders "$ENV{PATH}")
  foreach(folder IN LISTS folders)
    if(NOT EXISTS "${folder}/nvcc")
      list(APPEND path "${folder}")
    endif()
  endforeach()
  list(JOIN path ":" path)
  set(ENV{PATH} "${path}")
  foreach(variable CUDACXX CUDA_PATH CUDA_HOME CUDAToolkit_ROOT)
    unset(ENV{${variable}})
  endforeach()
endif()
foreach(variable talpa_DIR talpa_ROOT)
  unset(ENV{${variable}})
endforeach()

file(REMOVE_RECURSE "${BUILD}")
execute_process(COMMAND "${CMAKE_COMMAND}" -S "${SOURCE}" -B "${BUILD}" ${OPTIONS}
                COMMAND_ERROR_IS_FATAL ANY)
if(NOT CONFIGURE_ONLY)
  execute_process(COMMAND "${CMAKE_COMMAND}" --build "${BUILD}" COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND "${BUILD}/consumer" COMMAND_ERROR_IS_FATAL ANY)
endif()
