// What the host asks of the CUDA runtime.
#include <algorithm>
#include <cstring>

#include "multi_tensor.cuh"

namespace fastremedy::cuda {
namespace {

// Kernel arguments may take 4096 bytes on every device.
constexpr size_t kPayloadBytes = 3968;
constexpr int kUploadBlockSize = 128;

struct Payload {
  char* destination;
  uint32_t size;
  char bytes[kPayloadBytes];
};
static_assert(sizeof(Payload) <= 4096);

__global__ void upload_kernel(const __grid_constant__ Payload payload) {
  for (uint32_t i = threadIdx.x; i < payload.size; i += kUploadBlockSize) {
    payload.destination[i] = payload.bytes[i];
  }
}

}  // namespace

int upload(void* destination, const void* host_source, size_t bytes, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (!is_capturing(stream)) {
    return status_of(
        cudaMemcpyAsync(destination, host_source, bytes, cudaMemcpyHostToDevice, cuda_stream));
  }
  for (size_t begin = 0; begin < bytes; begin += kPayloadBytes) {
    Payload payload;
    payload.destination = static_cast<char*>(destination) + begin;
    payload.size = static_cast<uint32_t>(std::min(kPayloadBytes, bytes - begin));
    std::memcpy(payload.bytes, static_cast<const char*>(host_source) + begin, payload.size);
    FASTREMEDY_LAUNCH(upload_kernel, 1, kUploadBlockSize, cuda_stream, payload);
    const int code = status_of(cudaGetLastError());
    if (code != 0) return code;
  }
  return 0;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const int code = status_of(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return code == 0 && status == cudaStreamCaptureStatusActive;
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int find_kernels() {
  cudaFuncAttributes attributes;
  return status_of(cudaFuncGetAttributes(&attributes, upload_kernel));
}

int set_device(int device) { return status_of(cudaSetDevice(device)); }

int current_device() {
  int device = 0;
  status_of(cudaGetDevice(&device));
  return device;
}

}  // namespace fastremedy::cuda
