// The gradients of one call, read once: norm and clipping without a Python loop.
#pragma once

#include "../core/arguments.h"
#include "device.h"

namespace fastremedy::host {

class GradList {
 public:
  // Reads `tensors`, or their .grad where `from_grad` is set; None counts as no gradient.
  GradList(const py::list& tensors, bool from_grad);

  // Whether kernels can take all of them as they are: one device, dense, float dtypes.
  bool is_uniform() const { return is_uniform_; }
  // Whether some memory comes twice: threads would scale it at the same time.
  bool has_duplicates() const;
  bool has_float64() const { return has_float64_; }
  size_t size() const { return grads_.size(); }
  py::list tensors() const;
  size_t workspace_bytes();

  // Writes the norm to total_norm, a float64 scalar if has_float64(), float32 otherwise. With a
  // finite max_norm also scales the gradients; returns whether they may have changed.
  // `tensor_norms`: float64 [size()] on the device for the norm of each, 0 if not wanted.
  bool clip(double max_norm, double norm_type, uintptr_t total_norm, uintptr_t tensor_norms,
            uintptr_t workspace);

 private:
  void add(py::object tensor);
  void make_chunks(int64_t chunk_size);
  bool clip_on_cpu(GradNormArgs args);
  bool clip_on_cuda(GradNormArgs args, uintptr_t workspace);

  std::vector<py::object> owners_;  // keep the memory alive
  std::vector<GradTensor> grads_;
  std::vector<Chunk> chunks_;
  DLDevice device_{};
  bool is_uniform_ = true;
  bool has_float64_ = false;
};

void bind_clip_grad_norm(py::module_& module);

}  // namespace fastremedy::host
