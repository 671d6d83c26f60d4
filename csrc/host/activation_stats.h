#pragma once

#include "dlpack.h"

namespace fastremedy::host {

void bind_activation_stats(py::module_& module);

}  // namespace fastremedy::host
