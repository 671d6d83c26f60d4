// Numbers of a step: the hyper-parameters of a param group, read again only where they may have
// changed, and the scalars of AMP.
#pragma once

#include <vector>

#include "../core/adamw.h"
#include "device.h"

namespace fastremedy::host {

class HyperReader {
 public:
  // Reads lr, betas, eps, weight_decay and flags of a param group. A bad value throws, now and at
  // every later call. False if amsgrad changed: another state tensor is needed.
  bool read(const py::dict& group, DLDevice device, AdamWHyper* hyper);

 private:
  std::vector<py::object> known_;  // the values as last read; empty at first
};

// Where a float32 scalar on the device is; null for None. With `dtype`, which then tells, it may be
// float64 too.
const void* scalar_pointer(const py::object& value, const char* name, DLDevice device,
                           DType* dtype = nullptr);

}  // namespace fastremedy::host
