// Which kernels a device gets, and the memory that its kernels need beside the tensors.
#pragma once

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launch.h"
#include "dlpack.h"

namespace fastremedy::host {

// In the emulation build the CUDA kernels run on CPU tensors.
#ifdef FASTREMEDY_EMULATION
inline constexpr DLDeviceType kCudaDevice = kDLCPU;
#else
inline constexpr DLDeviceType kCudaDevice = kDLCUDA;
#endif

inline bool is_cuda(DLDevice device) { return device.device_type == kCudaDevice; }

inline bool same_device(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

inline void check_cuda(int code) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
  if (code != 0) throw std::runtime_error(std::string("CUDA error: ") + cuda::error_string(code));
#else
  static_cast<void>(code);
#endif
}

// Makes a device current for launches, and restores the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(DLDevice device) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    if (!is_cuda(device)) return;
    previous_ = cuda::current_device();
    if (previous_ == device.device_id) {
      previous_ = -1;
    } else {
      check_cuda(cuda::set_device(device.device_id));
    }
#else
    static_cast<void>(device);
#endif
  }
  ~DeviceGuard() {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    if (previous_ >= 0) cuda::set_device(previous_);
#endif
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Lays arrays out in one piece of device memory, 256 bytes aligned each.
class Workspace {
 public:
  template <class T>
  size_t reserve(size_t count) {
    const size_t offset = bytes_;
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return offset;
  }
  size_t bytes() const { return bytes_; }

  template <class T>
  static T* at(uintptr_t base, size_t offset) {
    return reinterpret_cast<T*>(base + offset);
  }

 private:
  size_t bytes_ = 0;
};

}  // namespace fastremedy::host
