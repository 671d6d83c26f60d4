#include "results.h"

#ifndef FASTREMEDY_EMULATION  // it is built without the CPU kernels
#include "../cpu/caching_allocator.h"

namespace fastremedy::host {
namespace {

// A tensor's memory with its shape and strides, as long as torch needs it.
struct Result {
  DLManagedTensorVersioned managed;
  cpu::MemoryBlock block;
  std::vector<int64_t> sizes;  // shape, then strides

  static void release(DLManagedTensorVersioned* managed) {
    const auto* result = static_cast<Result*>(managed->manager_ctx);
    cpu::release_block(result->block);
    delete result;
  }
};

// A new tensor of the same shape, strides and dtype. None where there is no memory, or if those
// strides have gaps.
py::object empty_like(py::handle tensor) {
  const DLTensor like = require_tensor(tensor, "tensor");
  if (!is_dense(like)) return py::none();
  const size_t bytes = static_cast<size_t>(numel_of(like)) * like.dtype.bits / 8;
  const cpu::MemoryBlock block = cpu::allocate_block(bytes);
  if (block.data == nullptr) return py::none();
  auto* result = new Result{{}, block, {}};
  result->sizes.assign(like.shape, like.shape + like.ndim);
  result->sizes.insert(result->sizes.end(), like.strides, like.strides + like.ndim);
  DLManagedTensorVersioned& managed = result->managed;
  managed.version = {1, 0};
  managed.manager_ctx = result;
  managed.deleter = &Result::release;
  managed.dl_tensor = like;
  managed.dl_tensor.data = block.data;
  managed.dl_tensor.byte_offset = 0;
  managed.dl_tensor.shape = result->sizes.data();
  managed.dl_tensor.strides = result->sizes.data() + like.ndim;
  return to_tensor(&managed);
}

}  // namespace

void bind_results(py::module_& module) {
  module.def("empty_like", &empty_like);
  module.def("cached_bytes", &cpu::cached_bytes);
  module.def("empty_cache", &cpu::empty_cache);
}

}  // namespace fastremedy::host
#endif

namespace fastremedy::host {

py::object new_like(py::handle tensor, const DLTensor& view) {
#ifndef FASTREMEDY_EMULATION
  const size_t bytes = static_cast<size_t>(numel_of(view)) * view.dtype.bits / 8;
  if (view.device.device_type == kDLCPU && bytes >= cpu::kHugePage) {
    py::object result = empty_like(tensor);
    if (!result.is_none()) return result;
  }
#else
  static_cast<void>(view);
#endif
  static PyObject* const empty_like_of_torch =
      py::object(py::module_::import("torch").attr("empty_like")).release().ptr();
  PyObject* result = PyObject_CallOneArg(empty_like_of_torch, tensor.ptr());
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

}  // namespace fastremedy::host
