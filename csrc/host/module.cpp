// The native library: tensor tables and launches. Operators of csrc/ops register themselves.
#include <pybind11/pybind11.h>

#include <memory>

#include "activation_stats.h"
#include "adamw.h"
#include "batch_norm_relu.h"
#include "clip_grad_norm.h"
#include "device.h"
#include "focal_loss.h"
#include "results.h"

#ifdef FASTREMEDY_EMULATION
#include "../emulation/grid.h"
#define FASTREMEDY_MODULE _emulation
#else
#define FASTREMEDY_MODULE _C
#endif

PYBIND11_MODULE(FASTREMEDY_MODULE, module) {
  namespace host = fastremedy::host;
  module.attr("has_cuda") = host::kHasCuda;
#ifdef FASTREMEDY_WITH_CUDA
  module.attr("cuda_archs") = FASTREMEDY_CUDA_ARCHS;
  module.def("check_cuda_device", [](int index) {
    const host::DeviceGuard guard({kDLCUDA, index});
    host::check_cuda(fastremedy::cuda::find_kernels());
  });
#endif
  host::bind_clip_grad_norm(module);
  host::bind_adamw(module);
  host::bind_batch_norm_relu(module);
  host::bind_focal_loss(module);
  host::bind_activation_stats(module);
#ifndef FASTREMEDY_EMULATION
  host::bind_results(module);
#else
  // Returns a function that runs what `step` has launched; the step itself runs nothing.
  module.def("capture", [](const pybind11::function& step) {
    using fastremedy::emulation::captured_graph;
    struct Capture {
      std::shared_ptr<fastremedy::emulation::Graph> graph =
          std::make_shared<fastremedy::emulation::Graph>();
      Capture() { captured_graph() = graph.get(); }
      ~Capture() { captured_graph() = nullptr; }
    };
    const Capture capture;
    step();
    return pybind11::cpp_function([graph = capture.graph] {
      for (const auto& launch : *graph) launch();
    });
  });
#endif
}
