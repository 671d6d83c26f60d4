#include "dtensor.h"

#include <utility>

namespace fastremedy::host {
namespace {

py::object attribute(const py::object& object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// Objects that are identical are equal; only others are asked, in Python.
bool have_equal(const py::object& a, const py::object& b, PyObject* name) {
  const int is_equal =
      PyObject_RichCompareBool(attribute(a, name).ptr(), attribute(b, name).ptr(), Py_EQ);
  if (is_equal < 0) throw py::error_already_set();
  return is_equal != 0;
}

}  // namespace

Distribution::Distribution(const py::object& param, py::object spec)
    : type_(Py_TYPE(param.ptr())), spec_(std::move(spec)) {}

py::object Distribution::local_memory_of(const py::object& grad) const {
  static PyObject* const spec = PyUnicode_InternFromString("_spec");
  static PyObject* const memory = PyUnicode_InternFromString("_local_tensor");
  if (Py_TYPE(grad.ptr()) != type_ || !matches(attribute(grad, spec))) return {};
  return attribute(grad, memory);
}

bool Distribution::matches(const py::object& spec) const {
  static PyObject* const mesh = PyUnicode_InternFromString("mesh");
  static PyObject* const placements = PyUnicode_InternFromString("placements");
  if (spec.is(spec_)) return true;  // as FSDP2 leaves them
  return have_equal(spec, spec_, mesh) && have_equal(spec, spec_, placements);
}

}  // namespace fastremedy::host
