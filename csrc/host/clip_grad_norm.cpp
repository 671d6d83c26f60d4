#include "clip_grad_norm.h"

#include <limits>

#ifndef FASTREMEDY_EMULATION
#include "../cpu/launch.h"
#endif

namespace fastremedy::host {
GradList::GradList(const py::list& tensors, bool from_grad) {
  const size_t count = py::len(tensors);
  owners_.reserve(count);
  grads_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* item = PyList_GET_ITEM(tensors.ptr(), i);
    add(from_grad ? grad_of(item) : py::reinterpret_borrow<py::object>(item));
  }
}

void GradList::add(py::object tensor) {
  if (tensor.is_none()) return;
  DLTensor view;
  GradTensor grad{};
  if (!read_tensor(tensor.ptr(), &view) || !dtype_of(view, &grad.dtype) || !is_dense(view) ||
      is_negated(tensor.ptr(), numel_of(view))) {
    is_uniform_ = false;
  } else {
    if (grads_.empty()) device_ = view.device;
    is_uniform_ &= same_device(device_, view.device);
    has_float64_ |= grad.dtype == DType::kFloat64;
    grad.data = data_of(view);
    grad.numel = numel_of(view);
  }
  grads_.push_back(grad);
  owners_.push_back(std::move(tensor));
}

// Open addressing at half load: the tensors of one call, a few microseconds per thousand.
bool GradList::has_duplicates() const {
  size_t capacity = 2;
  while (capacity < 2 * grads_.size()) capacity *= 2;
  std::vector<const void*> slots(capacity);
  for (const GradTensor& grad : grads_) {
    if (grad.data == nullptr) continue;
    const uint64_t hash = reinterpret_cast<uintptr_t>(grad.data) * 0x9e3779b97f4a7c15ull;
    size_t i = (hash >> 32) & (capacity - 1);
    for (; slots[i] != nullptr; i = (i + 1) & (capacity - 1)) {
      if (slots[i] == grad.data) return true;
    }
    slots[i] = grad.data;
  }
  return false;
}

py::list GradList::tensors() const {
  py::list list(owners_.size());
  for (size_t i = 0; i < owners_.size(); ++i) list[i] = owners_[i];
  return list;
}

void GradList::make_chunks(int64_t chunk_size) {
  chunks_.clear();
  for (size_t i = 0; i < grads_.size(); ++i) {
    const int64_t count = num_chunks(grads_[i].numel, chunk_size);
    for (int64_t c = 0; c < count; ++c) {
      chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(c)});
    }
  }
}

namespace {

struct CudaLayout {
  CudaLayout(size_t num_grads, size_t num_chunks) {
    result = workspace.reserve<ClipResult>(1);  // first: counter and result keep their place
    counter = workspace.reserve<uint32_t>(1);
    grads = workspace.reserve<GradTensor>(num_grads);
    chunks = workspace.reserve<Chunk>(num_chunks);
    uploaded = workspace.bytes() - grads;
    partials = workspace.reserve<double>(num_chunks);
  }
  Workspace workspace;
  size_t result, counter, grads, chunks, uploaded, partials;
};

}  // namespace

size_t GradList::workspace_bytes() {
  if (!is_cuda(device_)) return 0;
  make_chunks(cuda::kChunkSize);
  return CudaLayout(grads_.size(), chunks_.size()).workspace.bytes();
}

bool GradList::clip(double max_norm, double norm_type, uintptr_t total_norm, uintptr_t tensor_norms,
                    uintptr_t workspace) {
  GradNormArgs args{};
  args.kind = norm_kind(norm_type);
  args.options.max_norm = max_norm;
  args.options.norm_type = norm_type;
  args.total_norm = reinterpret_cast<void*>(total_norm);
  args.total_norm_dtype = has_float64_ ? DType::kFloat64 : DType::kFloat32;
  args.tensor_norms = reinterpret_cast<double*>(tensor_norms);
  if (!is_cuda(device_)) return clip_on_cpu(args);
  return clip_on_cuda(args, workspace);
}

bool GradList::clip_on_cpu(GradNormArgs args) {
#ifdef FASTREMEDY_EMULATION
  static_cast<void>(args);
  throw std::runtime_error("the emulation has no CPU kernels");
#else
  const py::gil_scoped_release release;
  make_chunks(cpu::kChunkSize);
  const std::vector<int32_t> ranges = cpu::make_ranges(chunks_, grads_.data());
  std::vector<double> partials(chunks_.size());
  ClipResult result;
  args.grads = grads_.data();
  args.chunks = chunks_.data();
  args.num_chunks = static_cast<int32_t>(chunks_.size());
  args.partials = partials.data();
  args.result = &result;
  cpu::grad_norm(args, ranges, false);
  cpu::scale_grads(args, ranges);
  return result.is_clipped != 0;
#endif
}

bool GradList::clip_on_cuda(GradNormArgs args, uintptr_t workspace) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
  const CudaLayout layout(grads_.size(), chunks_.size());
  args.grads = Workspace::at<GradTensor>(workspace, layout.grads);
  args.chunks = Workspace::at<Chunk>(workspace, layout.chunks);
  args.num_chunks = static_cast<int32_t>(chunks_.size());
  args.partials = Workspace::at<double>(workspace, layout.partials);
  args.counter = Workspace::at<uint32_t>(workspace, layout.counter);
  args.result = Workspace::at<ClipResult>(workspace, layout.result);

  std::vector<char> upload(layout.uploaded);
  std::memcpy(upload.data(), grads_.data(), grads_.size() * sizeof(GradTensor));
  std::memcpy(upload.data() + (layout.chunks - layout.grads), chunks_.data(),
              chunks_.size() * sizeof(Chunk));
  void* stream = current_stream(device_);
  const DeviceGuard guard(device_);
  check_cuda(cuda::upload(Workspace::at<char>(workspace, layout.grads), upload.data(),
                          upload.size(), stream));
  check_cuda(cuda::launch_grad_norm(args, stream));
  if (args.options.max_norm == std::numeric_limits<double>::infinity()) return false;
  check_cuda(cuda::launch_scale_grads(args, stream));
  return true;
#else
  static_cast<void>(args);
  static_cast<void>(workspace);
  throw std::runtime_error("fastremedy was built without CUDA kernels");
#endif
}

void bind_clip_grad_norm(py::module_& module) {
  py::class_<GradList>(module, "GradList", py::module_local())
      .def(py::init<const py::list&, bool>(), py::arg("tensors"), py::arg("from_grad"))
      .def_property_readonly("is_uniform", &GradList::is_uniform)
      .def_property_readonly("has_duplicates", &GradList::has_duplicates)
      .def_property_readonly("has_float64", &GradList::has_float64)
      .def_property_readonly("tensors", &GradList::tensors)
      .def("workspace_bytes", &GradList::workspace_bytes)
      .def("__len__", &GradList::size)
      .def("clip", &GradList::clip, py::arg("max_norm"), py::arg("norm_type"),
           py::arg("total_norm"), py::arg("tensor_norms"), py::arg("workspace"));
}

}  // namespace fastremedy::host
