// The CPU kernels. Arguments are those of the CUDA launches; `ranges` adds how chunks share out.
#pragma once

#include <functional>
#include <vector>

#include "../core/arguments.h"

namespace fastremedy::cpu {

// 64 KiB of float32 each of parameter, gradient and moments: together a share of L2.
inline constexpr int64_t kChunkSize = 16384;

// Consecutive chunks that make a fair piece of work for a thread: range i is [begins[i],
// begins[i+1]).
std::vector<int32_t> make_ranges(const std::vector<Chunk>& chunks, const GradTensor* tensors);

// Writes partials [first, last) of grad_norm.
void grad_norm_partials(const GradNormArgs& args, int32_t first, int32_t last);
// `has_partials`: they have been written already.
void grad_norm(const GradNormArgs& args, const std::vector<int32_t>& ranges, bool has_partials);
void scale_grads(const GradNormArgs& args, const std::vector<int32_t>& ranges);
void adamw_prepare(const AdamWArgs& args, const std::vector<int32_t>& ranges, bool has_partials);
// Unless the step is skipped. The calling thread begins with meanwhile().
void adamw_update(const AdamWArgs& args, const std::vector<int32_t>& ranges,
                  const std::function<void()>& meanwhile);

void batch_norm_relu_forward(const BatchNormForwardArgs& args);
void batch_norm_relu_backward(const BatchNormBackwardArgs& args);

// Position of the first label that is no class, -1 if there is none. Reads no element.
int64_t find_bad_label(const FocalLossArgs& args);
// With grad_input it also writes the gradient of the loss itself, in the same pass.
void focal_loss_forward(const FocalLossArgs& args);
void focal_loss_backward(const FocalLossArgs& args);

void activation_stats(const ActivationStatsArgs& args);

}  // namespace fastremedy::cpu
