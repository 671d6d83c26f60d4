#include "../host/retained_tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "stable_abi.h"

namespace fastremedy {

struct RetainedTensors {
  std::vector<torch::stable::Tensor> tensors;
  std::vector<void*> pointers;
};

bool is_in_place(const RetainedTensors* retained) {
  for (size_t i = 0; i < retained->tensors.size(); ++i) {
    void* pointer = nullptr;
    // The handle is asked directly: Tensor::data_ptr would add a check of the error code per
    // tensor.
    aoti_torch_get_data_ptr(retained->tensors[i].get(), &pointer);
    if (pointer != retained->pointers[i]) return false;
  }
  return true;
}

void release(RetainedTensors* retained) { delete retained; }

namespace {

int64_t retain_tensors(std::vector<torch::stable::Tensor> tensors) {
  auto* retained = new RetainedTensors{std::move(tensors), {}};
  retained->pointers.reserve(retained->tensors.size());
  for (const auto& tensor : retained->tensors) retained->pointers.push_back(tensor.data_ptr());
  return reinterpret_cast<int64_t>(retained);
}

}  // namespace
}  // namespace fastremedy

// The schema stands in fastremedy/_native.py.
STABLE_TORCH_LIBRARY_IMPL(fastremedy, CompositeExplicitAutograd, m) {
  m.impl("_retain_tensors", TORCH_BOX(&fastremedy::retain_tensors));
}
