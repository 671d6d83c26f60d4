#pragma once

#include "dlpack.h"

namespace fastremedy::host {

void bind_focal_loss(py::module_& module);

}  // namespace fastremedy::host
