// CUDA, or its emulation on the CPU for a C++ compiler (FASTREMEDY_EMULATION).
#pragma once

#ifdef FASTREMEDY_EMULATION

#include "../emulation/cuda_on_cpu.h"

#else

#include <cuda_runtime.h>

#include <cassert>

// A variable of the block: FASTREMEDY_SHARED(Type, name);
#define FASTREMEDY_SHARED(Type, name) __shared__ Type name

#define FASTREMEDY_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)

// Stops the kernel, and the context with it, also where NDEBUG takes assert away.
#define FASTREMEDY_DEVICE_ASSERT(condition) \
  (condition) ? void() : __assert_fail(#condition, __FILE__, __LINE__, __func__)

#endif

#define FASTREMEDY_DEVICE __device__ __forceinline__

namespace fastremedy::cuda {

inline int status_of(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // reported here, not by the next launch as well
  return static_cast<int>(error);
}

}  // namespace fastremedy::cuda
