// Tensors as DLPack shows them. No torch header: one binary serves every torch from 2.11 on.
#pragma once

#include <ATen/dlpack.h>  // DLPack's own header, which torch ships
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../core/types.h"

namespace fastremedy::host {

namespace py = pybind11;

// What a step asks of every gradient is inline: of a thousand, calls took 6 us of 73.

const DLPackExchangeAPI* find_exchange_api();

inline const DLPackExchangeAPI& exchange_api() {
  static const DLPackExchangeAPI* const api = find_exchange_api();
  return *api;
}

inline int64_t numel_of(const DLTensor& tensor) {
  int64_t numel = 1;
  for (int32_t d = 0; d < tensor.ndim; ++d) numel *= tensor.shape[d];
  return numel;
}

// False for dtypes without a kernel (integers, complex, float8).
inline bool dtype_of(const DLTensor& tensor, DType* dtype) {
  const DLDataType type = tensor.dtype;
  if (type.lanes != 1) return false;
  if (type.code == kDLFloat && type.bits == 32) {
    *dtype = DType::kFloat32;
  } else if (type.code == kDLFloat && type.bits == 64) {
    *dtype = DType::kFloat64;
  } else if (type.code == kDLFloat && type.bits == 16) {
    *dtype = DType::kFloat16;
  } else if (type.code == kDLBfloat && type.bits == 16) {
    *dtype = DType::kBFloat16;
  } else {
    return false;
  }
  return true;
}

// Fills `out`, valid while the caller holds the tensor. False, with no Python error set, for what
// has no plain memory: sparse tensors, meta tensors, subclasses that wrap others.
inline bool read_tensor(PyObject* tensor, DLTensor* out) {
  if (exchange_api().dltensor_from_py_object_no_sync(tensor, out) != 0) {
    PyErr_Clear();
    return false;
  }
  return out->data != nullptr || numel_of(*out) == 0;  // subclasses that wrap others have no memory
}

// Whether the elements carry torch's lazy minus sign, which DLPack does not show.
bool has_minus_sign(PyObject* tensor);

// The same where it is asked of a thousand tensors. torch gives the sign to imaginary parts: views
// with stride 2, dense only if there is one element. Others are not asked.
inline bool can_be_negated(int64_t numel) { return numel == 1; }
inline bool is_negated(PyObject* tensor, int64_t numel) {
  return can_be_negated(numel) && has_minus_sign(tensor);
}

// torch's own getter of Tensor.grad. Calling it directly saves the attribute look-up, a fifth of
// the time that a gradient takes.
class GradGetter {
 public:
  GradGetter();
  PyObject* get(PyObject* tensor) {
    if (Py_TYPE(tensor) != known_type_) learn(Py_TYPE(tensor));
    return is_plain_ ? getset_->get(tensor, getset_->closure) : PyObject_GetAttr(tensor, name_);
  }

 private:
  void learn(PyTypeObject* type);

  py::object descriptor_;
  PyObject* name_;
  PyGetSetDef* getset_ = nullptr;
  PyTypeObject* known_type_ = nullptr;
  bool is_plain_ = false;
};

// Returns tensor.grad, a new reference.
inline py::object grad_of(PyObject* tensor) {
  static GradGetter* const getter = new GradGetter;
  PyObject* grad = getter->get(tensor);
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

// As read_tensor, for tensors that have to be readable.
DLTensor require_tensor(py::handle tensor, const char* name);

// A tensor of the memory that `managed` describes; its deleter runs when torch needs it no more.
py::object to_tensor(DLManagedTensorVersioned* managed);

// The stream that torch works on, for a CUDA device; null for a CPU.
void* current_stream(DLDevice device);

inline void* data_of(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

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
