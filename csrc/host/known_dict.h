// A dict as it was, to see whether it still holds the same objects.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fastremedy::host {

namespace py = pybind11;

class KnownDict {
 public:
  explicit KnownDict(py::dict dict);

  const py::dict& dict() const { return dict_; }
  // Whether keys and values are the same objects, in the same order.
  bool is_unchanged();

 private:
  bool holds_the_same() const;

  py::dict dict_;
  std::vector<py::object> items_;  // key, value, key, value
  uint64_t version_;
};

}  // namespace fastremedy::host
