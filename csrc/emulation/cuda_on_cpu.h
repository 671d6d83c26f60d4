// The part of CUDA that the kernels use, for a C++ compiler without CUDA: see grid.h for how it
// runs.
//
// Compile with -fno-strict-aliasing (kernels read memory through vectors of another type) and with
// -Wno-unknown-pragmas (unroll).
#pragma once

#include <cmath>

#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::fastremedy::emulation::current_thread()->index)
#define blockIdx (::fastremedy::emulation::current_thread()->block->index)
#define blockDim (::fastremedy::emulation::current_thread()->block->size)
#define gridDim (::fastremedy::emulation::current_thread()->block->grid)

#define FASTREMEDY_SHARED(Type, name)                                                        \
  static const size_t name##_offset = ::fastremedy::emulation::reserve_shared(sizeof(Type)); \
  Type& name =                                                                               \
      *static_cast<Type*>(::fastremedy::emulation::shared_memory(name##_offset, sizeof(Type)))

#define FASTREMEDY_LAUNCH(kernel, grid, block, stream, ...) \
  static_cast<void>(stream),                                \
      ::fastremedy::emulation::launch(grid, block, [=] { kernel(__VA_ARGS__); })

// The kernel goes on, as threads that are ahead of the failing one do on a device.
#define FASTREMEDY_DEVICE_ASSERT(condition) \
  if (!(condition)) ::fastremedy::emulation::has_failed_assert() = true

// Beside the kernels rather than in the global namespace: nothing here may stand in for the real
// CUDA runtime of the same process.
namespace fastremedy::cuda {

using dim3 = emulation::Index;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() { emulation::current_thread()->block->barrier.wait(); }

inline int __syncthreads_or(int predicate) {
  emulation::Thread& thread = *emulation::current_thread();
  const auto& votes = thread.block->votes.gather(thread.place, thread.num_votes++, predicate != 0);
  return std::any_of(votes.begin(), votes.end(), [](uint64_t vote) { return vote != 0; });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane exchanges at most 8 bytes");
  if (mask != 0xffffffffu) emulation::fail("shuffles must name all lanes of the warp");
  emulation::Thread& thread = *emulation::current_thread();
  const int lane = thread.place % emulation::kWarpSize;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  emulation::Exchange& warp = thread.block->warps[thread.place / emulation::kWarpSize];
  bits = warp.gather(lane, thread.num_shuffles++, bits)[lane ^ lane_mask];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  if (mask != 0xffffffffu) emulation::fail("votes must name all lanes of the warp");
  emulation::Thread& thread = *emulation::current_thread();
  emulation::Exchange& warp = thread.block->warps[thread.place / emulation::kWarpSize];
  const int lane = thread.place % emulation::kWarpSize;
  const auto& votes = warp.gather(lane, thread.num_shuffles++, predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < emulation::kWarpSize; ++i) bits |= static_cast<unsigned>(votes[i]) << i;
  return bits;
}

// An atomic alone orders no other access. After a fence it releases, and a fence after it acquires
// what it read: so ThreadSanitizer sees a missing fence as a data race.
inline void __threadfence() {
  emulation::Thread& thread = *emulation::current_thread();
  thread.has_fenced = true;
  if (thread.last_atomic) __atomic_load_n(thread.last_atomic, __ATOMIC_ACQUIRE);
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  emulation::Thread& thread = *emulation::current_thread();
  thread.last_atomic = address;
  unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  bool is_done = false;
  while (!is_done) {
    unsigned next = old >= limit ? 0 : old + 1;
    is_done = thread.has_fenced ? __atomic_compare_exchange(address, &old, &next, false,
                                                            __ATOMIC_RELEASE, __ATOMIC_RELAXED)
                                : __atomic_compare_exchange(address, &old, &next, false,
                                                            __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }
  return old;
}

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorAssert = 710
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

struct Stream {
  bool is_capturing;
};
using cudaStream_t = const Stream*;

inline bool captures(cudaStream_t stream) {
  return emulation::captured_graph() != nullptr || (stream != nullptr && stream->is_capturing);
}

// On a device the code of a failed assert comes with the next synchronisation, and stays.
inline cudaError_t cudaGetLastError() {
  return emulation::has_failed_assert().exchange(false) ? cudaErrorAssert : cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

// Small enough to be quick, large enough that several blocks share the work. Tests change it.
inline int num_multiprocessors = 3;

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = num_multiprocessors;
  return cudaSuccess;
}
struct cudaFuncAttributes {};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = emulation::kResidentBlocks / 3;
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes,
                                   cudaMemcpyKind, cudaStream_t stream) {
  if (captures(stream)) return cudaErrorInvalidValue;
  if (bytes > 0) std::memcpy(destination, source, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = captures(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

}  // namespace fastremedy::cuda
