// The step of a table on a CUDA device: what the kernels read, and when it is uploaded.
#include <stdexcept>
#include <utility>

#include "adamw.h"

namespace fastremedy::host {
namespace {

struct CudaLayout {
  CudaLayout(size_t num_tensors, size_t num_chunks, size_t num_groups) {
    result = workspace.reserve<ClipResult>(1);
    counter = workspace.reserve<uint32_t>(1);
    tensors = workspace.reserve<AdamWTensor>(num_tensors);
    chunks = workspace.reserve<Chunk>(num_chunks);
    grads = workspace.reserve<GradTensor>(num_tensors);
    hypers = workspace.reserve<AdamWHyper>(num_groups);
    uploaded = workspace.bytes() - grads;
    partials = workspace.reserve<double>(num_chunks);
    corrections = workspace.reserve<AdamWCorrection>(num_tensors);
    update_counter = workspace.reserve<uint32_t>(1);
    update_partials = workspace.reserve<UpdateStats>(num_chunks);
  }
  Workspace workspace;
  size_t result, counter, tensors, chunks, grads, hypers, uploaded, partials, corrections;
  size_t update_counter, update_partials;
};

}  // namespace

size_t AdamWTable::workspace_bytes() const {
  if (!is_cuda(device_)) return 0;
  return CudaLayout(tensors_.size(), chunks_.size(), hypers_.size()).workspace.bytes();
}

void AdamWTable::step_on_cuda(AdamWArgs args, uintptr_t base) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
  const CudaLayout layout(tensors_.size(), chunks_.size(), hypers_.size());
  args.norm.grads = Workspace::at<GradTensor>(base, layout.grads);
  args.norm.chunks = Workspace::at<Chunk>(base, layout.chunks);
  args.norm.partials = Workspace::at<double>(base, layout.partials);
  args.norm.counter = Workspace::at<uint32_t>(base, layout.counter);
  args.norm.result = Workspace::at<ClipResult>(base, layout.result);
  args.tensors = Workspace::at<AdamWTensor>(base, layout.tensors);
  args.hypers = Workspace::at<AdamWHyper>(base, layout.hypers);
  args.corrections = Workspace::at<AdamWCorrection>(base, layout.corrections);
  args.update_counter = Workspace::at<uint32_t>(base, layout.update_counter);
  args.update_partials = Workspace::at<UpdateStats>(base, layout.update_partials);

  void* stream = current_stream(device_);
  const DeviceGuard guard(device_);
  // What is captured gets there at a replay, and other steps in between: each uploads its own.
  const bool is_capturing = cuda::is_capturing(stream);
  is_captured_ |= is_capturing;
  if (uploaded_to_ != base) {
    check_cuda(cuda::upload(Workspace::at<char>(base, layout.tensors), tensors_.data(),
                            tensors_.size() * sizeof(AdamWTensor), stream));
    check_cuda(cuda::upload(Workspace::at<char>(base, layout.chunks), chunks_.data(),
                            chunks_.size() * sizeof(Chunk), stream));
    uploaded_to_ = is_capturing ? 0 : base;
    uploaded_.clear();
  }
  std::vector<char> current(layout.uploaded);
  std::memcpy(current.data(), grads_.data(), grads_.size() * sizeof(GradTensor));
  std::memcpy(current.data() + (layout.hypers - layout.grads), hypers_.data(),
              hypers_.size() * sizeof(AdamWHyper));
  if (current != uploaded_ || is_captured_) {
    check_cuda(cuda::upload(Workspace::at<char>(base, layout.grads), current.data(), current.size(),
                            stream));
    uploaded_ = std::move(current);
  }
  check_cuda(cuda::launch_adamw_prepare(args, stream));
  check_cuda(cuda::launch_adamw_update(args, stream));
#else
  static_cast<void>(args);
  static_cast<void>(base);
  throw std::runtime_error("fastremedy was built without CUDA kernels");
#endif
}

}  // namespace fastremedy::host
