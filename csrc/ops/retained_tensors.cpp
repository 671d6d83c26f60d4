// clang-format off: stable_abi.h first
#include "stable_abi.h"
// clang-format on

#include "../host/retained_tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

// c10::TensorImpl::grad() const, which returns a `const at::Tensor&`. The stable ABI has no way to
// a gradient, so this is torch's own function: weak, as a torch without it has to load the library,
// too, and called only where it is known to be what it is named.
extern "C" __attribute__((weak)) void* torch_grad_of(const void* impl) __asm__(
    "_ZNK3c1010TensorImpl4gradEv");

namespace fastremedy {
namespace {

constexpr uint64_t kNewestKnownTorch = 0x020f;  // major and minor version; the oldest is the floor

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

  // Strides of dimensions of size 1 do not count.
  bool has_its_layout(AtenTensorHandle other) const {
    int64_t dim = 0;
    int64_t *sizes = nullptr, *strides = nullptr;
    aoti_torch_get_dim(other, &dim);
    aoti_torch_get_sizes(other, &sizes);
    aoti_torch_get_strides(other, &strides);
    if (static_cast<size_t>(2 * dim) != layout.size()) return false;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != layout[2 * d]) return false;
      if (strides[d] != layout[2 * d + 1] && sizes[d] > 1) return false;
    }
    return true;
  }

  torch::stable::Tensor tensor;
  void* data;
  std::vector<int64_t> layout;  // size and stride of every dimension
};

bool dtype_of(AtenTensorHandle tensor, DType* out) {
  static const int32_t known[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()};
  int32_t dtype = 0;
  aoti_torch_get_dtype(tensor, &dtype);
  for (int32_t i = 0; i < 4; ++i) {  // in the order of DType
    if (dtype != known[i]) continue;
    *out = static_cast<DType>(i);
    return true;
  }
  return false;
}

bool is_strided(AtenTensorHandle tensor) {
  int32_t layout = 0;
  aoti_torch_get_layout(tensor, &layout);
  return layout == aoti_torch_layout_strided();
}

bool have_same_device(AtenTensorHandle a, AtenTensorHandle b) {
  int32_t type[2], index[2];
  aoti_torch_get_device_type(a, &type[0]);
  aoti_torch_get_device_type(b, &type[1]);
  if (type[0] != type[1]) return false;
  if (type[0] == aoti_torch_device_type_cpu()) return true;
  aoti_torch_get_device_index(a, &index[0]);
  aoti_torch_get_device_index(b, &index[1]);
  return index[0] == index[1];
}

torch::stable::Tensor undefined_tensor() {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&handle));
  return torch::stable::Tensor(handle);
}

// A parameter, and the gradient that is held for it.
struct RetainedParam : Retained {
  RetainedParam(torch::stable::Tensor kept)
      : Retained(std::move(kept)), numel(tensor.numel()), grad(undefined_tensor()) {}

  Gradient read_grad(GradTensor* out) {
    if (numel < 2) return Gradient::kUnknown;  // may carry a minus sign, which only Python shows
    const void* impl = *reinterpret_cast<void* const*>(tensor.get());  // at::Tensor is its pointer
    auto* now = static_cast<AtenTensorHandle>(torch_grad_of(impl));
    bool is_defined = false;
    aoti_torch_is_defined(now, &is_defined);
    if (!is_defined) return Gradient::kNone;
    void* memory = nullptr;
    if (!is_strided(now) || !have_same_device(now, tensor.get()) || !dtype_of(now, &out->dtype) ||
        !has_its_layout(now) || aoti_torch_get_data_ptr(now, &memory) != AOTI_TORCH_SUCCESS ||
        memory == nullptr) {
      return Gradient::kUnknown;
    }
    out->data = memory;
    aoti_torch_assign_tensors(now, grad.get());
    return Gradient::kRead;
  }

  int64_t numel;
  torch::stable::Tensor grad;
};

}  // namespace

struct RetainedTensors {
  std::vector<RetainedParam> params;
  std::vector<Retained> state;
  torch::stable::Tensor undefined = undefined_tensor();
};

bool is_in_place(const RetainedTensors* retained) {
  for (const Retained& param : retained->params) {
    if (!param.has_its_data() || !param.has_its_layout(param.tensor.get())) return false;
  }
  for (const Retained& tensor : retained->state) {
    if (!tensor.has_its_data()) return false;
  }
  return true;
}

bool can_read_grads() {
  return torch_grad_of != nullptr && aoti_torch_abi_version() >> 48 <= kNewestKnownTorch;
}

Gradient read_grad(RetainedTensors* retained, size_t param, GradTensor* out) {
  return retained->params[param].read_grad(out);
}

void release_grads(RetainedTensors* retained) {
  for (RetainedParam& param : retained->params) {
    aoti_torch_assign_tensors(retained->undefined.get(), param.grad.get());
  }
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
