// Tensors held through the stable ABI. Asking one for its data pointer takes a few nanoseconds,
// where DLPack takes twenty: that makes it affordable to notice `tensor.data = ...` at every step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastremedy {

struct RetainedTensors;

int64_t num_retained(const RetainedTensors* tensors);

// Whether tensors [begin, end) still lie where they lay when they were retained, and those that are
// parameters have the same sizes and strides.
bool is_in_place(const RetainedTensors* tensors, int64_t begin, int64_t end);

void release(RetainedTensors* tensors);

}  // namespace fastremedy
