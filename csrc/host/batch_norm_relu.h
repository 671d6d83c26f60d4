#pragma once

#include "dlpack.h"

namespace fastremedy::host {

void bind_batch_norm_relu(py::module_& module);

}  // namespace fastremedy::host
