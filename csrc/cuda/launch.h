// The border between host code and kernels: pointers and a stream in, a CUDA error code out.
//
// Pointers are device pointers unless named host_*. Launches return at once; nothing synchronises.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/arguments.h"

namespace fastremedy::cuda {

// 512 threads take 128 elements each: long enough to hide the latency of the first load, short
// enough that a tensor of 1 M elements spreads over 16 blocks.
inline constexpr int64_t kChunkSize = 65536;

// Copies host bytes into device memory on the stream. Inside a graph capture the bytes travel as
// kernel arguments, so that a replay never reads host memory that has changed since.
int upload(void* destination, const void* host_source, size_t bytes, void* stream);

// Computes the norm; the last block writes result and total_norm.
int launch_grad_norm(const GradNormArgs& args, void* stream);

// Multiplies the gradients by result->grad_factor, unless nothing needs clipping.
int launch_scale_grads(const GradNormArgs& args, void* stream);

// Computes the norm; the last block also advances the steps and writes the corrections.
int launch_adamw_prepare(const AdamWArgs& args, void* stream);

// Updates parameters and state, walking the chunks backwards: the gradients read last by the norm
// are still in L2.
int launch_adamw_update(const AdamWArgs& args, void* stream);

// What launch_batch_norm_relu_* need beside the tensors.
struct BatchNormScratch {
  uint32_t* counters;  // 0 before and after every launch
  void* partials;
};
struct BatchNormScratchSize {
  size_t num_counters;
  size_t partial_bytes;
};
BatchNormScratchSize batch_norm_scratch_size(const BatchNormShape& shape);

// Two launches where the elements have to be summed up first, one otherwise.
int launch_batch_norm_relu_forward(const BatchNormForwardArgs& args,
                                   const BatchNormScratch& scratch, void* stream);
int launch_batch_norm_relu_backward(const BatchNormBackwardArgs& args,
                                    const BatchNormScratch& scratch, void* stream);

// What launch_focal_loss_forward needs beside the tensors, if it sums up.
struct FocalLossScratch {
  uint32_t* counter;  // 0 before and after every launch
  double* partials;   // [focal_loss_num_partials]
};
int64_t focal_loss_num_partials(const FocalLossShape& shape, FocalForm form);

// One launch each. A label that is no class stops the kernel, as in torch.
int launch_focal_loss_forward(const FocalLossArgs& args, const FocalLossScratch& scratch,
                              void* stream);
int launch_focal_loss_backward(const FocalLossArgs& args, void* stream);

// What launch_activation_stats needs beside the tensors.
struct ActivationStatsScratch {
  uint32_t* counters;  // 0 before and after every launch
  void* partials;
};
struct ActivationStatsScratchSize {
  size_t num_counters;
  size_t partial_bytes;
};
ActivationStatsScratchSize activation_stats_scratch_size(const StatsTensor* host_tensors,
                                                         int32_t num_tensors);

// Tensors travel as kernel arguments: one launch for each kMaxStatsTensors of them.
inline constexpr int32_t kMaxStatsTensors = 64;
int launch_activation_stats(const ActivationStatsArgs& args, const ActivationStatsScratch& scratch,
                            void* stream);

bool is_capturing(void* stream);

const char* error_string(int code);

// An error where the current device or its driver cannot run what this library was built for.
int find_kernels();

int set_device(int device);
int current_device();

}  // namespace fastremedy::cuda
