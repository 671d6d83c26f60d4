// Tensors held through the stable ABI. Asking one for its data pointer takes a few nanoseconds,
// where DLPack takes twenty: that makes it affordable to notice `tensor.data = ...` at every step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/types.h"

namespace fastremedy {

struct RetainedTensors;

int64_t num_retained(const RetainedTensors* tensors);

// Whether tensors [begin, end) still lie where they lay when they were retained, and those that are
// parameters have the same sizes and strides.
bool is_in_place(const RetainedTensors* tensors, int64_t begin, int64_t end);

// Where in a Python object of torch.Tensor its at::Tensor lies: the address of one is a handle of
// the stable ABI. Reading it takes no reference and no Python, so any thread can while another sees
// to it that the object lives; DLPack does both. `params`: the objects of the parameters, of at
// least `num_bytes`, whose handles are known. 0 if they do not all tell the same place.
size_t find_handle(const RetainedTensors* tensors, const std::vector<const void*>& params,
                   size_t num_bytes);

// Where the gradient of a parameter lies. False if its device, shape or strides are not those of
// the parameter, or there is no kernel for its dtype.
bool read_grad(const RetainedTensors* tensors, int64_t param, const void* handle, void** data,
               DType* dtype);

void release(RetainedTensors* tensors);

}  // namespace fastremedy
