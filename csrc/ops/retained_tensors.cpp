// clang-format off: stable_abi.h first
#include "stable_abi.h"
// clang-format on

#include "../host/retained_tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastremedy {

// What is looked at in every step lies side by side.
struct RetainedTensors {
  struct Place {
    AtenTensorHandle tensor;
    const void* data;
    int64_t layout;  // where it begins in `layouts`; -1 of state
  };
  std::vector<torch::stable::Tensor> owners;  // parameters, then state
  std::vector<Place> places;                  // of the owners
  std::vector<int64_t> layouts;               // number of dimensions, then size and stride of each
};

namespace {

// The handle is asked directly: the methods of stable::Tensor check an error code every time.
bool has_layout(AtenTensorHandle tensor, const int64_t* layout) {
  int64_t dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  if (dim != *layout++) return false;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != *layout++ || strides[d] != *layout++) return false;
  }
  return true;
}

}  // namespace

int64_t num_retained(const RetainedTensors* retained) {
  return static_cast<int64_t>(retained->places.size());
}

bool is_in_place(const RetainedTensors* retained, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const RetainedTensors::Place& place = retained->places[i];
    void* data = nullptr;
    aoti_torch_get_data_ptr(place.tensor, &data);
    if (data != place.data) return false;
    if (place.layout >= 0 && !has_layout(place.tensor, &retained->layouts[place.layout])) {
      return false;
    }
  }
  return true;
}

void release(RetainedTensors* retained) { delete retained; }

namespace {

int64_t retain_tensors(std::vector<torch::stable::Tensor> params,
                       std::vector<torch::stable::Tensor> state) {
  auto* retained = new RetainedTensors;
  std::vector<int64_t>& layouts = retained->layouts;
  for (const torch::stable::Tensor& param : params) {
    retained->places.push_back(
        {param.get(), param.data_ptr(), static_cast<int64_t>(layouts.size())});
    layouts.push_back(param.dim());
    for (int64_t d = 0; d < param.dim(); ++d) {
      layouts.push_back(param.size(d));
      layouts.push_back(param.stride(d));
    }
  }
  for (const torch::stable::Tensor& tensor : state) {
    retained->places.push_back({tensor.get(), tensor.data_ptr(), -1});
  }
  retained->owners = std::move(params);
  retained->owners.insert(retained->owners.end(), state.begin(), state.end());
  return reinterpret_cast<int64_t>(retained);
}

}  // namespace
}  // namespace fastremedy

// The schema stands in fastremedy/_native.py.
STABLE_TORCH_LIBRARY_IMPL(fastremedy, CompositeExplicitAutograd, m) {
  m.impl("_retain_tensors", TORCH_BOX(&fastremedy::retain_tensors));
}
