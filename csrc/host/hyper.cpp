#include "hyper.h"

#include <iterator>
#include <string>
#include <utility>

namespace fastremedy::host {
namespace {

// In the order in which HyperReader::read expects them.
constexpr const char* kHyperNames[] = {
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"};
constexpr size_t kNumHypers = std::size(kHyperNames);

PyObject* const* hyper_names() {
  static PyObject* const* const interned = [] {
    auto** names = new PyObject*[kNumHypers];
    for (size_t i = 0; i < kNumHypers; ++i) names[i] = PyUnicode_InternFromString(kHyperNames[i]);
    return names;
  }();
  return interned;
}

[[noreturn]] void throw_not_a_number(const py::object& value, const char* name) {
  PyErr_Clear();
  throw py::type_error(std::string(name) + " must be a number or a 1-element float tensor, got " +
                       std::string(py::repr(value)));
}

// A number, or a CPU tensor of one element; a CUDA tensor gives its pointer instead.
double number_from(const py::object& value, const char* name, DLDevice device,
                   const float** device_pointer) {
  if (PyFloat_Check(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  DLTensor tensor;
  if (PyLong_Check(value.ptr()) || !read_tensor(value.ptr(), &tensor)) {
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred() != nullptr) throw_not_a_number(value, name);
    return number;
  }
  if (numel_of(tensor) != 1) throw_not_a_number(value, name);
  DType dtype;
  const bool has_dtype = dtype_of(tensor, &dtype);
  const void* data = data_of(tensor);
  if (device_pointer != nullptr && is_cuda(device) && same_device(tensor.device, device) &&
      has_dtype && dtype == DType::kFloat32) {
    *device_pointer = static_cast<const float*>(data);
    return 0;
  }
  if (tensor.device.device_type == kDLCPU) {
    if (has_dtype && dtype == DType::kFloat32) return *static_cast<const float*>(data);
    if (has_dtype && dtype == DType::kFloat64) return *static_cast<const double*>(data);
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred() != nullptr) throw_not_a_number(value, name);
    return number;
  }
  throw py::value_error(std::string(name) +
                        " as a tensor must be float32 on the parameters' device, or on the CPU");
}

bool flag_from(const py::object& value, const char* name) {
  const int flag = PyObject_IsTrue(value.ptr());
  if (flag < 0) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be True or False, got " +
                         std::string(py::repr(value)));
  }
  return flag != 0;
}

// Whether the same object has the same value as before: a tensor, alone or in a tuple, may not.
bool is_immutable(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!is_immutable(PyTuple_GET_ITEM(value, i))) return false;
    }
    return true;
  }
  return PyFloat_CheckExact(value) || PyBool_Check(value) || PyLong_CheckExact(value);
}

}  // namespace

bool HyperReader::read(const py::dict& group, DLDevice device, AdamWHyper* hyper) {
  bool is_unchanged = !known_.empty();
  std::vector<py::object> values(kNumHypers);
  for (size_t i = 0; i < kNumHypers; ++i) {
    PyObject* value = PyDict_GetItemWithError(group.ptr(), hyper_names()[i]);
    if (value == nullptr) {
      throw py::key_error(std::string("param_groups: key '") + kHyperNames[i] + "' is missing");
    }
    is_unchanged = is_unchanged && known_[i].ptr() == value && is_immutable(value);
    values[i] = py::reinterpret_borrow<py::object>(value);
  }
  if (is_unchanged) return true;

  AdamWHyper next{};
  next.lr = number_from(values[0], "lr", device, &next.lr_tensor);
  if (!PySequence_Check(values[1].ptr()) || py::len(values[1]) != 2) {
    throw py::value_error("betas must be a pair of numbers, got " +
                          std::string(py::repr(values[1])));
  }
  const py::sequence betas = values[1];
  next.beta1 = number_from(betas[0], "betas[0]", device, nullptr);
  next.beta2 = number_from(betas[1], "betas[1]", device, nullptr);
  next.eps = number_from(values[2], "eps", device, nullptr);
  next.weight_decay = number_from(values[3], "weight_decay", device, nullptr);
  next.amsgrad = flag_from(values[4], kHyperNames[4]);
  next.maximize = flag_from(values[5], kHyperNames[5]);
  next.decoupled_weight_decay = flag_from(values[6], kHyperNames[6]);
  const bool same_state = next.amsgrad == hyper->amsgrad;
  *hyper = next;
  known_ = std::move(values);  // after everything that can throw: a bad value is read again
  return same_state;
}

const void* scalar_pointer(const py::object& value, const char* name, DLDevice device,
                           DType* dtype) {
  if (value.is_none()) return nullptr;
  const DLTensor tensor = require_tensor(value, name);
  DType found;
  const bool is_readable =
      dtype_of(tensor, &found) &&
      (found == DType::kFloat32 || (dtype != nullptr && found == DType::kFloat64));
  if (!is_readable || !same_device(tensor.device, device) || numel_of(tensor) != 1) {
    throw py::value_error(std::string(name) + " must be a float32 " +
                          (dtype == nullptr ? "" : "or float64 ") +
                          "tensor of one element on the parameters' device");
  }
  if (dtype != nullptr) *dtype = found;
  return data_of(tensor);
}

}  // namespace fastremedy::host
