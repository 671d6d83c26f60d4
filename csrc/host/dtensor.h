// DTensors: what this rank has of them, read from the wrapper without torch's dispatcher.
#pragma once

#include "dlpack.h"

namespace fastremedy::host {

// How a parameter is distributed.
class Distribution {
 public:
  // `spec`: the DTensorSpec of a DTensor; None says that `param` is a plain tensor.
  Distribution(const py::object& param, py::object spec);

  // The memory of a gradient on this rank; itself, if the parameter is a plain tensor. Null if it
  // is not a DTensor with the same mesh and placements. (torch sees to it that shapes are the
  // same.)
  py::object memory_of(py::object grad) const {
    return spec_.is_none() ? grad : local_memory_of(grad);
  }

 private:
  py::object local_memory_of(const py::object& grad) const;
  bool matches(const py::object& spec) const;

  PyTypeObject* type_;
  py::object spec_;
};

}  // namespace fastremedy::host
