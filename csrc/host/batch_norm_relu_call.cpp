// The usual call: plain tensors that lie as kernels take them. One native function a pass finds out
// whether it is one, makes what is written and runs the kernels; in Python each of these steps
// takes as long as the kernels of a small map.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>

#include "batch_norm_relu.h"
#include "device.h"
#include "results.h"

namespace fastremedy::host {
namespace {

// Of torch, kept for good.
PyObject* attribute(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

// torch.Tensor or torch.nn.Parameter: other types may mean something else by their elements.
bool has_plain_type(py::handle tensor) {
  static PyObject* const types[] = {attribute("torch", "Tensor"),
                                    attribute("torch.nn", "Parameter")};
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  return type == types[0] || type == types[1];
}

bool read_plain(py::handle tensor, DLTensor* view, DType* dtype) {
  return has_plain_type(tensor) && read_tensor(tensor.ptr(), view) && dtype_of(*view, dtype) &&
         !has_minus_sign(tensor.ptr());
}

// Whether the elements [N, C, *] lie without gaps in the order of memory N, C, * or N, *, C.
bool has_order(const DLTensor& view, bool channels_last) {
  int64_t expected = 1;
  const auto follows = [&](int32_t d) {
    if (view.shape[d] == 1) return true;
    const bool is_next = view.strides[d] == expected;
    expected *= view.shape[d];
    return is_next;
  };
  if (channels_last && !follows(1)) return false;
  for (int32_t d = view.ndim - 1; d >= 0; --d) {
    if (!(channels_last && d == 1) && !follows(d)) return false;
  }
  return true;
}

bool is_alike(const DLTensor& a, const DLTensor& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape) &&
         same_device(a.device, b.device);
}

// Whether a second tensor of elements can be read along with the first.
bool lies_like(py::handle tensor, const DLTensor& input, DType dtype, bool channels_last) {
  DLTensor view;
  DType other;
  return read_plain(tensor, &view, &other) && other == dtype && is_alike(view, input) &&
         has_order(view, channels_last);
}

bool is_channel_vector(py::handle tensor, const DLTensor& input) {
  DLTensor view;
  DType dtype;
  return read_plain(tensor, &view, &dtype) && view.ndim == 1 && view.shape[0] == input.shape[1] &&
         (view.shape[0] == 1 || view.strides[0] == 1) && same_device(view.device, input.device);
}

bool is_counter(py::handle tensor, const DLTensor& input) {
  DLTensor view;
  return has_plain_type(tensor) && read_tensor(tensor.ptr(), &view) && numel_of(view) == 1 &&
         view.dtype.code == kDLInt && view.dtype.bits == 64 &&
         same_device(view.device, input.device);
}

// Whether kernels do with these tensors what torch would do, and need no other layout. The caller
// knows that nothing transforms or traces the call.
bool takes(const DLTensor& view, DType dtype, bool channels_last, py::handle residual,
           py::handle weight, py::handle bias, py::handle running_mean, py::handle running_var,
           py::handle num_batches_tracked, bool training, double eps) {
  const bool has_mean = !running_mean.is_none(), has_var = !running_var.is_none();
  const int64_t numel = numel_of(view);
  if (training ? !(eps > 0) || numel <= view.shape[1] || has_mean != has_var
               : !(eps >= 0) || numel == 0 || !has_mean || !has_var) {
    return false;
  }
  if (!residual.is_none() && !lies_like(residual, view, dtype, channels_last)) return false;
  for (const py::handle vector : {weight, bias, running_mean, running_var}) {
    if (!vector.is_none() && !is_channel_vector(vector, view)) return false;
  }
  return num_batches_tracked.is_none() || is_counter(num_batches_tracked, view);
}

// --- memory for what is written ---

// For gradients of weight and bias.
py::object new_vector(py::handle values, bool is_wanted) {
  if (!is_wanted || values.is_none()) return py::none();
  return new_like(values, require_tensor(values, "values"));
}

// What new_empty and new_zeros of torch return: a vector without columns, of the input's dtype
// without one, which takes half as long.
py::object new_tensor(PyObject* method, py::handle input, int64_t rows,
                      std::optional<int64_t> columns, PyObject* dtype) {
  static PyObject* const names = py::make_tuple("dtype").release().ptr();
  const py::int_ sizes[] = {rows, columns.value_or(0)};
  std::array<PyObject*, 4> arguments = {input.ptr(), sizes[0].ptr(), sizes[1].ptr()};
  const size_t count = columns ? 3 : 2;
  arguments[count] = dtype;
  PyObject* result = PyObject_VectorcallMethod(method, arguments.data(), count,
                                               dtype == nullptr ? nullptr : names);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// [4, C], float32 or float64.
py::object new_saved(py::handle input, int64_t channels, DType dtype) {
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  static PyObject* const float32 = attribute("torch", "float32");
  const bool is_wide = dtype == DType::kFloat32 || dtype == DType::kFloat64;
  return new_tensor(new_empty, input, 4, channels, is_wide ? nullptr : float32);
}

// A bit of every element.
py::object new_mask(py::handle input, const BatchNormShape& shape) {
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  static PyObject* const uint8 = attribute("torch", "uint8");
  return new_tensor(new_empty, input, shape.num_rows(), shape.mask_row_size(), uint8);
}

py::object new_dead(py::handle input, int64_t channels) {
  static PyObject* const new_zeros = PyUnicode_InternFromString("new_zeros");
  static PyObject* const int64 = attribute("torch", "int64");
  return new_tensor(new_zeros, input, channels, std::nullopt, int64);
}

// Addresses that CUDA kernels need beside, and what owns them; `scratch` is None on a CPU.
py::args scratch_of(const py::object& scratch, py::handle input, bool channels_last) {
  return scratch.is_none() ? py::args() : py::args(scratch(input, channels_last));
}

void increment_versions(py::handle a, py::handle b, py::handle c) {
  static const py::handle increment = attribute("torch.autograd.graph", "increment_version");
  py::list changed;
  for (const py::handle tensor : {a, b, c}) {
    if (!tensor.is_none()) changed.append(tensor);
  }
  if (!changed.empty()) increment(changed);
}

// --- the two passes ---

// Output, saved, mask and dead, of which the last two may be None, and the number of elements of a
// channel, for which torch would take 4 us; None alone if it is another call.
py::object run_forward(py::handle input, py::handle residual, py::handle weight, py::handle bias,
                       py::handle running_mean, py::handle running_var,
                       py::handle num_batches_tracked, bool training,
                       std::optional<double> momentum, double eps, int activation,
                       double negative_slope, bool wants_mask, bool wants_dead,
                       const py::object& scratch) {
  DLTensor view;
  DType dtype;
  if (!read_plain(input, &view, &dtype) || view.ndim < 2) return py::none();
  const bool channels_last = has_order(view, true);
  if (!channels_last && !has_order(view, false)) return py::none();
  if (!takes(view, dtype, channels_last, residual, weight, bias, running_mean, running_var,
             num_batches_tracked, training, eps)) {
    return py::none();
  }
  const py::object output = new_like(input, view);
  const py::object saved = new_saved(input, view.shape[1], dtype);
  const py::object mask =
      wants_mask ? new_mask(input, batch_norm_shape_of(view, channels_last)) : py::none();
  const py::object dead = wants_dead ? new_dead(input, view.shape[1]) : py::none();
  batch_norm_relu_forward(input, channels_last, residual, output, mask, dead, saved, weight, bias,
                          running_mean, running_var, num_batches_tracked, py::none(),
                          static_cast<int>(BatchNormPhase::kBoth), training, momentum, eps,
                          activation, negative_slope, scratch_of(scratch, input, channels_last));
  if (training) increment_versions(running_mean, running_var, num_batches_tracked);
  return py::make_tuple(output, saved, mask, dead, numel_of(view) / view.shape[1]);
}

// Gradients of input, residual, weight and bias, None where none is wanted; None alone if
// something lies in another order than in the forward pass.
py::object run_backward(py::handle grad_output, py::handle input, py::handle residual,
                        py::handle mask, py::handle saved, py::handle weight, py::handle bias,
                        bool mask_is_channels_last, bool training, int activation,
                        double negative_slope, bool wants_input, bool wants_residual,
                        bool wants_weight, bool wants_bias, const py::object& scratch) {
  DLTensor view;
  DType dtype;
  if (!read_plain(input, &view, &dtype)) return py::none();
  const bool channels_last = has_order(view, true);
  if ((!channels_last && !has_order(view, false)) ||
      (!mask.is_none() && mask_is_channels_last != channels_last) ||
      !lies_like(grad_output, view, dtype, channels_last) ||
      (!residual.is_none() && !lies_like(residual, view, dtype, channels_last))) {
    return py::none();
  }
  const py::object grad_input = wants_input ? new_like(input, view) : py::none();
  const py::object grad_residual = wants_residual ? new_like(input, view) : py::none();
  const py::object grad_weight = new_vector(weight, wants_weight);
  const py::object grad_bias = new_vector(bias, wants_bias);
  batch_norm_relu_backward(grad_output, input, channels_last, residual, mask, saved, weight, bias,
                           grad_input, grad_residual, grad_weight, grad_bias, py::none(),
                           static_cast<int>(BatchNormPhase::kBoth), training, activation,
                           negative_slope, scratch_of(scratch, input, channels_last));
  return py::make_tuple(grad_input, grad_residual, grad_weight, grad_bias);
}

}  // namespace

void bind_batch_norm_relu_call(py::module_& module) {
  module.def("batch_norm_relu_run_forward", &run_forward);
  module.def("batch_norm_relu_run_backward", &run_backward);
}

}  // namespace fastremedy::host
