// The native library: tensor tables and launches. Operators of csrc/ops register themselves.
#include <pybind11/pybind11.h>

#include "activation_stats.h"
#include "adamw.h"
#include "batch_norm_relu.h"
#include "clip_grad_norm.h"
#include "device.h"
#include "focal_loss.h"
#include "results.h"

#ifdef FASTREMEDY_EMULATION
#define FASTREMEDY_MODULE _emulation
#else
#define FASTREMEDY_MODULE _C
#endif

PYBIND11_MODULE(FASTREMEDY_MODULE, module) {
  namespace host = fastremedy::host;
  module.attr("has_cuda") = host::kHasCuda;
#ifdef FASTREMEDY_WITH_CUDA
  module.attr("cuda_archs") = FASTREMEDY_CUDA_ARCHS;
#endif
  module.def("cuda_device_count", [] {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    return fastremedy::cuda::device_count();
#else
    return 0;
#endif
  });
  host::bind_clip_grad_norm(module);
  host::bind_adamw(module);
  host::bind_batch_norm_relu(module);
  host::bind_focal_loss(module);
  host::bind_activation_stats(module);
#ifndef FASTREMEDY_EMULATION
  host::bind_results(module);
#endif
}
