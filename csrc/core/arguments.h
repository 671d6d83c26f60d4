// What a backend gets for one call: plain pointers into memory of its device.
#pragma once

#include "adamw.h"
#include "clip_grad_norm.h"
#include "multi_tensor.h"

namespace fastremedy {

struct GradNormArgs {
  const GradTensor* grads;
  const Chunk* chunks;
  int32_t num_chunks;
  NormKind kind;  // kNone: no gradient is read, total_norm is not written
  ClipOptions options;
  double* partials;   // [num_chunks]
  uint32_t* counter;  // 0 before and after every launch; unused on the CPU
  ClipResult* result;
  void* total_norm;  // float32 or float64 scalar, may be null
  DType total_norm_dtype;
};

struct AdamWArgs {
  GradNormArgs norm;  // norm.grads is parallel to tensors
  const AdamWTensor* tensors;
  const AdamWHyper* hypers;      // indexed by AdamWTensor::group
  AdamWCorrection* corrections;  // [num_tensors]
  int64_t* num_skipped;
  int32_t num_tensors;
  Rounding rounding;
  uint64_t seed;
};

}  // namespace fastremedy
