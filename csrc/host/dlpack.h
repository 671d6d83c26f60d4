// Tensors as DLPack shows them. No torch header: one binary serves every torch from 2.11 on.
#pragma once

#include <ATen/dlpack.h>  // DLPack's own header, which torch ships
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../core/types.h"

namespace fastremedy::host {

namespace py = pybind11;

// Fills `out`, valid while the caller holds the tensor. False, with no Python error set, for what
// has no plain memory: sparse tensors, meta tensors, subclasses that wrap others.
bool read_tensor(PyObject* tensor, DLTensor* out);

// Whether the elements carry torch's lazy minus sign, which DLPack does not show.
bool has_minus_sign(PyObject* tensor);

// The same where it is asked of a thousand tensors. torch gives the sign to imaginary parts: views
// with stride 2, dense only if there is one element. Others are not asked.
bool is_negated(PyObject* tensor, int64_t numel);

// Returns tensor.grad, a new reference.
py::object grad_of(PyObject* tensor);

// As read_tensor, for tensors that have to be readable.
DLTensor require_tensor(py::handle tensor, const char* name);

// A tensor of the memory that `managed` describes; its deleter runs when torch needs it no more.
py::object to_tensor(DLManagedTensorVersioned* managed);

// The stream that torch works on, for a CUDA device; null for a CPU.
void* current_stream(DLDevice device);

inline void* data_of(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

int64_t numel_of(const DLTensor& tensor);

// False for dtypes without a kernel (integers, complex, float8).
bool dtype_of(const DLTensor& tensor, DType* dtype);

// Whether the elements fill one piece of memory without gaps or overlap, in any order.
bool is_dense(const DLTensor& tensor);

// Shape and strides, kept to compare with later tensors. Strides of dimensions of size 1 do not
// count.
class Layout {
 public:
  explicit Layout(const DLTensor& tensor)
      : shape_(tensor.shape, tensor.shape + tensor.ndim),
        strides_(tensor.strides, tensor.strides + tensor.ndim) {}

  bool matches(const DLTensor& tensor) const {
    if (static_cast<size_t>(tensor.ndim) != shape_.size()) return false;
    for (int32_t d = 0; d < tensor.ndim; ++d) {
      if (tensor.shape[d] != shape_[d]) return false;
      if (tensor.strides[d] != strides_[d] && shape_[d] > 1) return false;
    }
    return true;
  }

 private:
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
};

}  // namespace fastremedy::host
