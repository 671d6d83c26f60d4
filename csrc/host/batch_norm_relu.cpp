// Tensors of one call as the kernels see them. The caller (batch_norm_relu_call.cpp, or in general
// fastremedy/ops/batch_norm_relu_dispatch.py) has checked shapes and layouts, and allocated what is
// written.
#include "batch_norm_relu.h"

#include <pybind11/stl.h>

#include "arguments.h"
#include "device.h"

#ifndef FASTREMEDY_EMULATION
#include "../cpu/launch.h"
#endif

namespace fastremedy::host {
BatchNormShape batch_norm_shape_of(const DLTensor& input, bool channels_last) {
  BatchNormShape shape{};
  shape.batch = input.shape[0];
  shape.channels = input.shape[1];
  shape.spatial = 1;
  for (int32_t d = 2; d < input.ndim; ++d) shape.spatial *= input.shape[d];
  shape.channels_last = channels_last;
  shape.dtype = floating_dtype_of(input, "input");
  return shape;
}

namespace {

#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
// Addresses of counters and partial sums, which CUDA kernels need.
cuda::BatchNormScratch scratch_of(const py::args& scratch) {
  return {reinterpret_cast<uint32_t*>(scratch[0].cast<uintptr_t>()),
          reinterpret_cast<void*>(scratch[1].cast<uintptr_t>())};
}
#endif

// How many counters and bytes of partial sums the CUDA kernels need for an input.
std::pair<size_t, size_t> scratch_size(py::handle input, bool channels_last) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
  const cuda::BatchNormScratchSize size = cuda::batch_norm_scratch_size(
      batch_norm_shape_of(require_tensor(input, "input"), channels_last));
  return {size.num_counters, size.partial_bytes};
#else
  static_cast<void>(input);
  static_cast<void>(channels_last);
  return {0, 0};
#endif
}

}  // namespace

void batch_norm_relu_forward(py::handle input, bool channels_last, py::handle residual,
                             py::handle output, py::handle mask, py::handle dead, py::handle saved,
                             py::handle weight, py::handle bias, py::handle running_mean,
                             py::handle running_var, py::handle num_batches_tracked,
                             py::handle sums, int phase, bool training,
                             std::optional<double> momentum, double eps, int activation,
                             double negative_slope, const py::args& scratch) {
  const DLTensor view = require_tensor(input, "input");
  BatchNormForwardArgs args{};
  args.shape = batch_norm_shape_of(view, channels_last);
  args.phase = static_cast<BatchNormPhase>(phase);
  args.activation = static_cast<Activation>(activation);
  args.training = training;
  args.cumulative = !momentum.has_value();
  args.momentum = momentum.value_or(0);
  args.eps = eps;
  args.negative_slope = negative_slope;
  args.input = data_of(view);
  args.residual = data_or_null(residual, "residual");
  args.output = data_or_null(output, "output");
  args.mask = static_cast<uint8_t*>(data_or_null(mask, "mask"));
  args.dead = static_cast<int64_t*>(data_or_null(dead, "dead"));
  args.saved = data_or_null(saved, "saved");
  args.weight = channel_values(weight, "weight");
  args.bias = channel_values(bias, "bias");
  args.running_mean = channel_values(running_mean, "running_mean");
  args.running_var = channel_values(running_var, "running_var");
  args.num_batches_tracked =
      static_cast<int64_t*>(data_or_null(num_batches_tracked, "num_batches_tracked"));
  args.sums = static_cast<double*>(data_or_null(sums, "sums"));
  if (is_cuda(view.device)) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    const DeviceGuard guard(view.device);
    check_cuda(cuda::launch_batch_norm_relu_forward(args, scratch_of(scratch),
                                                    current_stream(view.device)));
    return;
#endif
  }
#ifndef FASTREMEDY_EMULATION
  static_cast<void>(scratch);
  const py::gil_scoped_release release;
  cpu::batch_norm_relu_forward(args);
#endif
}

void batch_norm_relu_backward(py::handle grad_output, py::handle input, bool channels_last,
                              py::handle residual, py::handle mask, py::handle saved,
                              py::handle weight, py::handle bias, py::handle grad_input,
                              py::handle grad_residual, py::handle grad_weight,
                              py::handle grad_bias, py::handle sums, int phase, bool training,
                              int activation, double negative_slope, const py::args& scratch) {
  const DLTensor view = require_tensor(input, "input");
  BatchNormBackwardArgs args{};
  args.shape = batch_norm_shape_of(view, channels_last);
  args.phase = static_cast<BatchNormPhase>(phase);
  args.activation = static_cast<Activation>(activation);
  args.training = training;
  args.negative_slope = negative_slope;
  args.grad_output = data_or_null(grad_output, "grad_output");
  args.input = data_of(view);
  args.residual = data_or_null(residual, "residual");
  args.mask = static_cast<const uint8_t*>(data_or_null(mask, "mask"));
  args.saved = data_or_null(saved, "saved");
  args.weight = channel_values(weight, "weight");
  args.bias = channel_values(bias, "bias");
  args.grad_input = data_or_null(grad_input, "grad_input");
  args.grad_residual = data_or_null(grad_residual, "grad_residual");
  args.grad_weight = channel_values(grad_weight, "grad_weight");
  args.grad_bias = channel_values(grad_bias, "grad_bias");
  args.sums = static_cast<double*>(data_or_null(sums, "sums"));
  if (is_cuda(view.device)) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    const DeviceGuard guard(view.device);
    check_cuda(cuda::launch_batch_norm_relu_backward(args, scratch_of(scratch),
                                                     current_stream(view.device)));
    return;
#endif
  }
#ifndef FASTREMEDY_EMULATION
  static_cast<void>(scratch);
  const py::gil_scoped_release release;
  cpu::batch_norm_relu_backward(args);
#endif
}

// Arguments are positional: names would double the time of a call.
void bind_batch_norm_relu(py::module_& module) {
  module.def("batch_norm_relu_forward", &batch_norm_relu_forward);
  module.def("batch_norm_relu_backward", &batch_norm_relu_backward);
  module.def("batch_norm_relu_scratch_size", &scratch_size);
  bind_batch_norm_relu_call(module);
}

}  // namespace fastremedy::host
