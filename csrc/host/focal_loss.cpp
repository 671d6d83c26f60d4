// Tensors of one call as the kernels see them. fastremedy/ops/focal_loss_dispatch.py has checked
// shapes and layouts, and allocated what is written.
#include "focal_loss.h"

#include "arguments.h"
#include "device.h"

#ifndef FASTREMEDY_EMULATION
#include "../cpu/launch.h"
#endif

namespace fastremedy::host {
namespace {

// What both directions get from Python, in this order.
struct Call {
  DLTensor input;
  FocalLossArgs args{};

  Call(py::handle input_tensor, int64_t outer, int64_t classes, int64_t inner, py::handle target,
       bool softmax, int reduction, double gamma, double alpha, py::handle alphas,
       py::handle weight, py::handle pos_weight, double label_smoothing, int64_t ignore_index,
       int64_t background)
      : input(require_tensor(input_tensor, "input")) {
    args.shape = {outer, classes, inner, floating_dtype_of(input, "input")};
    args.form = softmax ? FocalForm::kSoftmax : FocalForm::kSigmoid;
    args.reduction = static_cast<Reduction>(reduction);
    args.input = data_of(input);
    const DLTensor view = require_tensor(target, "target");
    if (view.dtype.code == kDLInt) {
      args.labels = static_cast<const int64_t*>(data_of(view));
    } else {
      args.probabilities = data_of(view);
      args.probabilities_dtype = floating_dtype_of(view, "target");
    }
    args.gamma = gamma;
    args.alpha = alpha;
    args.alphas = channel_values(alphas, "alpha");
    args.weight = channel_values(weight, "weight");
    args.pos_weight = channel_values(pos_weight, "pos_weight");
    args.label_smoothing = label_smoothing;
    args.ignore_index = ignore_index;
    args.background = background;
  }
};

#ifndef FASTREMEDY_EMULATION
void check_labels(const FocalLossArgs& args) {
  const int64_t position = args.labels ? cpu::find_bad_label(args) : -1;
  if (position < 0) return;
  throw py::index_error("Target " + std::to_string(args.labels[position]) +
                        " is out of bounds: target.flatten()[" + std::to_string(position) +
                        "] must be in [0, " + std::to_string(args.shape.classes) +
                        ") or ignore_index (" + std::to_string(args.ignore_index) + ")");
}
#endif

void forward(py::handle input, int64_t outer, int64_t classes, int64_t inner, py::handle target,
             bool softmax, int reduction, double gamma, double alpha, py::handle alphas,
             py::handle weight, py::handle pos_weight, double label_smoothing, int64_t ignore_index,
             int64_t background, py::handle loss, py::handle saved, py::handle normalizer,
             py::handle stats, py::handle grad_input, const py::args& scratch) {
  Call call(input, outer, classes, inner, target, softmax, reduction, gamma, alpha, alphas, weight,
            pos_weight, label_smoothing, ignore_index, background);
  FocalLossArgs& args = call.args;
  const DLTensor loss_view = require_tensor(loss, "loss");
  args.loss = data_of(loss_view);
  args.loss_dtype = floating_dtype_of(loss_view, "loss");
  args.saved = data_or_null(saved, "saved");
  args.normalizer = static_cast<double*>(data_or_null(normalizer, "normalizer"));
  args.stats = static_cast<int64_t*>(data_or_null(stats, "stats"));
  args.grad_input = data_or_null(grad_input, "grad_input");
  if (is_cuda(call.input.device)) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    const DeviceGuard guard(call.input.device);
    const cuda::FocalLossScratch addresses{
        reinterpret_cast<uint32_t*>(scratch[0].cast<uintptr_t>()),
        reinterpret_cast<double*>(scratch[1].cast<uintptr_t>())};
    check_cuda(cuda::launch_focal_loss_forward(args, addresses, current_stream(call.input.device)));
    return;
#endif
  }
#ifndef FASTREMEDY_EMULATION
  static_cast<void>(scratch);
  check_labels(args);
  const py::gil_scoped_release release;
  cpu::focal_loss_forward(args);
#endif
}

void backward(py::handle grad_output, py::handle input, int64_t outer, int64_t classes,
              int64_t inner, py::handle target, bool softmax, int reduction, double gamma,
              double alpha, py::handle alphas, py::handle weight, py::handle pos_weight,
              double label_smoothing, int64_t ignore_index, int64_t background, py::handle saved,
              py::handle normalizer, py::handle grad_input) {
  Call call(input, outer, classes, inner, target, softmax, reduction, gamma, alpha, alphas, weight,
            pos_weight, label_smoothing, ignore_index, background);
  FocalLossArgs& args = call.args;
  const DLTensor grad_view = require_tensor(grad_output, "grad_output");
  args.grad_output = data_of(grad_view);
  args.grad_output_dtype = floating_dtype_of(grad_view, "grad_output");
  args.saved = data_or_null(saved, "saved");
  args.normalizer = static_cast<double*>(data_or_null(normalizer, "normalizer"));
  args.grad_input = data_or_null(grad_input, "grad_input");
  if (is_cuda(call.input.device)) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    const DeviceGuard guard(call.input.device);
    check_cuda(cuda::launch_focal_loss_backward(args, current_stream(call.input.device)));
    return;
#endif
  }
#ifndef FASTREMEDY_EMULATION
  check_labels(args);  // they may have changed since
  const py::gil_scoped_release release;
  cpu::focal_loss_backward(args);
#endif
}

// How many doubles of partial sums the CUDA kernels need for an input.
int64_t num_partials(py::handle input, int64_t outer, int64_t classes, int64_t inner,
                     bool softmax) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
  const DLTensor view = require_tensor(input, "input");
  return cuda::focal_loss_num_partials({outer, classes, inner, floating_dtype_of(view, "input")},
                                       softmax ? FocalForm::kSoftmax : FocalForm::kSigmoid);
#else
  static_cast<void>(input);
  return 0 * (outer + classes + inner + softmax);
#endif
}

}  // namespace

// Arguments are positional: names would double the time of a call.
void bind_focal_loss(py::module_& module) {
  module.def("focal_loss_forward", &forward);
  module.def("focal_loss_backward", &backward);
  module.def("focal_loss_num_partials", &num_partials);
}

}  // namespace fastremedy::host
