// Tensors for what the CPU kernels write, in memory that outlives them.
#pragma once

#include "dlpack.h"

namespace fastremedy::host {

void bind_results(py::module_& module);

}  // namespace fastremedy::host
