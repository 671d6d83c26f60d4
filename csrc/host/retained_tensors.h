// Tensors held through the stable ABI. Asking one for its data pointer takes a few nanoseconds,
// where DLPack takes twenty: that makes it affordable to notice `tensor.data = ...` at every step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/arguments.h"

namespace fastremedy {

struct RetainedTensors;

// Whether parameters and state still lie where they lay when they were retained, and the
// parameters have the same sizes and strides.
bool is_in_place(const RetainedTensors* tensors);

enum class Gradient { kNone, kRead, kUnknown };

// Looks at a parameter's gradient without Python, for which torch would wrap it: spares 80 ns a
// gradient, 150 to 200 in the first look after a backward pass. It stays alive until
// release_grads. kUnknown: Python has to tell. So it is with everything but a strided tensor of two
// elements or more that lies on the parameter's device as the parameter does.
Gradient read_grad(RetainedTensors* tensors, size_t param, GradTensor* out);
void release_grads(RetainedTensors* tensors);

// Whether this torch lets gradients be read.
bool can_read_grads();

void release(RetainedTensors* tensors);

}  // namespace fastremedy
