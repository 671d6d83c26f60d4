// The hyper-parameters of a param group, read again only where they may have changed.
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

}  // namespace fastremedy::host
