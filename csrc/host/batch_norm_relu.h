#pragma once

#include <optional>

#include "../core/arguments.h"
#include "dlpack.h"

namespace fastremedy::host {

BatchNormShape batch_norm_shape_of(const DLTensor& input, bool channels_last);

// Run kernels; the definition in fastremedy/ops/batch_norm_relu.py says what the arguments are.
void batch_norm_relu_forward(py::handle input, bool channels_last, py::handle residual,
                             py::handle output, py::handle mask, py::handle dead, py::handle saved,
                             py::handle weight, py::handle bias, py::handle running_mean,
                             py::handle running_var, py::handle num_batches_tracked,
                             py::handle sums, int phase, bool training,
                             std::optional<double> momentum, double eps, int activation,
                             double negative_slope, const py::args& scratch);

void batch_norm_relu_backward(py::handle grad_output, py::handle input, bool channels_last,
                              py::handle residual, py::handle mask, py::handle saved,
                              py::handle weight, py::handle bias, py::handle grad_input,
                              py::handle grad_residual, py::handle grad_weight,
                              py::handle grad_bias, py::handle sums, int phase, bool training,
                              int activation, double negative_slope, const py::args& scratch);

void bind_batch_norm_relu(py::module_& module);
void bind_batch_norm_relu_call(py::module_& module);

}  // namespace fastremedy::host
