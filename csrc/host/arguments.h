// Tensors that Python passes to one call, as kernels take them.
#pragma once

#include <string>

#include "../core/arguments.h"
#include "dlpack.h"

namespace fastremedy::host {

inline DType floating_dtype_of(const DLTensor& view, const char* name) {
  DType dtype;
  if (!dtype_of(view, &dtype)) {
    throw py::type_error(std::string(name) + " must have a floating-point dtype");
  }
  return dtype;
}

// None becomes null.
inline void* data_or_null(py::handle tensor, const char* name) {
  return tensor.is_none() ? nullptr : data_of(require_tensor(tensor, name));
}

inline ChannelValues channel_values(py::handle tensor, const char* name) {
  ChannelValues values{};
  if (tensor.is_none()) return values;
  const DLTensor view = require_tensor(tensor, name);
  values.dtype = floating_dtype_of(view, name);
  values.data = data_of(view);
  return values;
}

}  // namespace fastremedy::host
