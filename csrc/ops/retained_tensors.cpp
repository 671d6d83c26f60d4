// clang-format off: stable_abi.h first
#include "stable_abi.h"
// clang-format on

#include "../host/retained_tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <vector>

namespace fastremedy {

// What is looked at in every step lies side by side.
struct RetainedTensors {
  struct Place {
    AtenTensorHandle tensor;
    const void* data;
    int64_t layout;  // where it begins in `layouts`; -1 of state
  };
  struct Device {
    int32_t type = -1, index = -1;
    bool operator==(const Device& other) const {
      return type == other.type && index == other.index;
    }
  };
  std::vector<torch::stable::Tensor> owners;  // parameters, then state
  std::vector<Place> places;                  // of the owners
  std::vector<int64_t> layouts;               // number of dimensions, then size and stride of each
  Device device;                              // of all
};

namespace {

// Handles are asked directly: the methods of stable::Tensor check an error code every time.

// Strides of dimensions of size 1 do not count.
bool has_layout(AtenTensorHandle tensor, const int64_t* layout) {
  int64_t dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  if (dim != *layout++) return false;
  for (int64_t d = 0; d < dim; ++d, layout += 2) {
    if (sizes[d] != layout[0] || (strides[d] != layout[1] && sizes[d] > 1)) return false;
  }
  return true;
}

RetainedTensors::Device device_of(AtenTensorHandle tensor) {
  RetainedTensors::Device device;
  aoti_torch_get_device_type(tensor, &device.type);
  aoti_torch_get_device_index(tensor, &device.index);
  return device;
}

bool kernel_dtype_of(AtenTensorHandle tensor, DType* dtype) {
  int32_t number = -1;
  aoti_torch_get_dtype(tensor, &number);
  switch (static_cast<torch::headeronly::ScalarType>(number)) {
    case torch::headeronly::ScalarType::Float:
      *dtype = DType::kFloat32;
      return true;
    case torch::headeronly::ScalarType::Double:
      *dtype = DType::kFloat64;
      return true;
    case torch::headeronly::ScalarType::Half:
      *dtype = DType::kFloat16;
      return true;
    case torch::headeronly::ScalarType::BFloat16:
      *dtype = DType::kBFloat16;
      return true;
    default:
      return false;
  }
}

const void* word_at(const void* memory, size_t offset) {
  const void* word;
  std::memcpy(&word, static_cast<const char*>(memory) + offset, sizeof(word));
  return word;
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

size_t find_handle(const RetainedTensors* retained, const std::vector<const void*>& params,
                   size_t num_bytes) {
  size_t found = 0;
  // The first words of an object are Python's.
  for (size_t offset = 2 * sizeof(void*); offset + sizeof(void*) <= num_bytes;
       offset += sizeof(void*)) {
    size_t num_equal = 0;
    for (size_t i = 0; i < params.size(); ++i) {
      num_equal += word_at(params[i], offset) == word_at(retained->places[i].tensor, 0);
    }
    if (num_equal == 0) continue;
    if (num_equal < params.size() || found != 0) return 0;
    found = offset;
  }
  return found;
}

bool read_grad(const RetainedTensors* retained, int64_t param, const void* handle, void** data,
               DType* dtype) {
  const auto grad = static_cast<AtenTensorHandle>(const_cast<void*>(handle));
  const RetainedTensors::Place& place = retained->places[param];
  // Sparse tensors and those that wrap others have no pointer, or a null one.
  return aoti_torch_get_data_ptr(grad, data) == AOTI_TORCH_SUCCESS &&
         kernel_dtype_of(grad, dtype) && device_of(grad) == retained->device &&
         has_layout(grad, &retained->layouts[place.layout]);
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
  if (!params.empty()) retained->device = device_of(params.front().get());
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
