// Tensors held through the stable ABI. Asking one for its data pointer takes a few nanoseconds,
// where DLPack takes forty: that makes it affordable to notice `param.data = ...` at every step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastremedy {

struct RetainedTensors;

// Whether every tensor still has the data pointer that it had when it was retained.
bool is_in_place(const RetainedTensors* tensors);

void release(RetainedTensors* tensors);

}  // namespace fastremedy
