#include "dlpack.h"

#include <algorithm>
#include <string>

namespace fastremedy::host {

const DLPackExchangeAPI* find_exchange_api() {
  const py::object tensor_type = py::module_::import("torch").attr("Tensor");
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  // Newer major versions come first in the chain; this code knows version 1.
  while (api != nullptr && api->header.version.major != 1) {
    api = reinterpret_cast<const DLPackExchangeAPI*>(api->header.prev_api);
  }
  if (api == nullptr) throw py::import_error("torch offers no DLPack exchange API of version 1");
  return api;
}

GradGetter::GradGetter() {
  const py::object base = py::module_::import("torch").attr("_C").attr("TensorBase");
  descriptor_ = base.attr("grad");
  name_ = PyUnicode_InternFromString("grad");
  if (Py_TYPE(descriptor_.ptr()) == &PyGetSetDescr_Type) {
    getset_ = reinterpret_cast<PyGetSetDescrObject*>(descriptor_.ptr())->d_getset;
  }
}

// A subclass may have a `grad` or a __getattr__ of its own.
void GradGetter::learn(PyTypeObject* type) {
  const auto attribute =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_));
  is_plain_ = getset_ != nullptr && attribute.is(descriptor_) &&
              type->tp_getattro == PyObject_GenericGetAttr;
  PyErr_Clear();
  known_type_ = type;
}

bool has_minus_sign(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, name);
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer).is(py::bool_(true));
}

DLTensor require_tensor(py::handle tensor, const char* name) {
  DLTensor out;
  if (read_tensor(tensor.ptr(), &out)) return out;
  throw py::type_error(std::string(name) + " must be a strided tensor, got " +
                       std::string(py::str(py::type::of(tensor))));
}

py::object to_tensor(DLManagedTensorVersioned* managed) {
  void* tensor = nullptr;
  if (exchange_api().managed_tensor_to_py_object_no_sync(managed, &tensor) != 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
}

void* current_stream(DLDevice device) {
  if (device.device_type != kDLCUDA) return nullptr;
  void* stream = nullptr;
  if (exchange_api().current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

bool is_dense(const DLTensor& tensor) {
  int64_t expected = 1;
  bool is_contiguous = true;
  for (int32_t d = tensor.ndim - 1; d >= 0 && is_contiguous; --d) {
    if (tensor.shape[d] == 0) return true;
    if (tensor.shape[d] == 1) continue;
    is_contiguous = tensor.strides[d] == expected;
    expected *= tensor.shape[d];
  }
  if (is_contiguous) return true;

  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int32_t d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] == 0) return true;
    if (tensor.shape[d] > 1) dims.emplace_back(tensor.strides[d], tensor.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace fastremedy::host
