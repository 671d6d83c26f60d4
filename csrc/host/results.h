// Tensors for what kernels write; those of CPU kernels in memory that outlives them.
#pragma once

#include "dlpack.h"

namespace fastremedy::host {

// As torch.empty_like(tensor), of which `view` tells; large ones of the CPU lie in memory used
// before (fastremedy/ops/memory.py says why).
py::object new_like(py::handle tensor, const DLTensor& view);

void bind_results(py::module_& module);

}  // namespace fastremedy::host
