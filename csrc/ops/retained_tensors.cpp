// clang-format off: stable_abi.h first
#include "stable_abi.h"
// clang-format on

#include "../host/retained_tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastremedy {
namespace {

struct Retained {
  Retained(torch::stable::Tensor kept) : tensor(std::move(kept)), data(tensor.data_ptr()) {
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      layout.push_back(tensor.size(d));
      layout.push_back(tensor.stride(d));
    }
  }

  // The handle is asked directly: the methods of stable::Tensor check an error code every time.
  bool has_its_data() const {
    void* now = nullptr;
    aoti_torch_get_data_ptr(tensor.get(), &now);
    return now == data;
  }

  bool has_its_layout() const {
    int64_t dim = 0;
    int64_t *sizes = nullptr, *strides = nullptr;
    aoti_torch_get_dim(tensor.get(), &dim);
    aoti_torch_get_sizes(tensor.get(), &sizes);
    aoti_torch_get_strides(tensor.get(), &strides);
    if (static_cast<size_t>(2 * dim) != layout.size()) return false;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != layout[2 * d] || strides[d] != layout[2 * d + 1]) return false;
    }
    return true;
  }

  torch::stable::Tensor tensor;
  void* data;
  std::vector<int64_t> layout;  // size and stride of every dimension
};

}  // namespace

struct RetainedTensors {
  std::vector<Retained> params;
  std::vector<Retained> state;
};

bool is_in_place(const RetainedTensors* retained) {
  for (const Retained& param : retained->params) {
    if (!param.has_its_data() || !param.has_its_layout()) return false;
  }
  for (const Retained& tensor : retained->state) {
    if (!tensor.has_its_data()) return false;
  }
  return true;
}

void release(RetainedTensors* retained) { delete retained; }

namespace {

int64_t retain_tensors(std::vector<torch::stable::Tensor> params,
                       std::vector<torch::stable::Tensor> state) {
  auto* retained = new RetainedTensors;
  retained->params.assign(params.begin(), params.end());
  retained->state.assign(state.begin(), state.end());
  return reinterpret_cast<int64_t>(retained);
}

}  // namespace
}  // namespace fastremedy

// The schema stands in fastremedy/_native.py.
STABLE_TORCH_LIBRARY_IMPL(fastremedy, CompositeExplicitAutograd, m) {
  m.impl("_retain_tensors", TORCH_BOX(&fastremedy::retain_tensors));
}
