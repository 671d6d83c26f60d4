// What a backend gets for one call: plain pointers into memory of its device.
#pragma once

#include "adamw.h"
#include "batch_norm_relu.h"
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

// One value for each channel. Null data: there is none.
struct ChannelValues {
  void* data;
  DType dtype;
  int32_t padding;
};

// Elements lie in rows without gaps. Contiguous: batch * channels rows of `spatial` elements of one
// channel. Channels last: batch * spatial rows of one element of every channel.
struct BatchNormShape {
  int64_t batch;
  int64_t channels;
  int64_t spatial;
  int32_t channels_last;
  DType dtype;  // of input, residual, output and their gradients

  FASTREMEDY_HD int64_t count() const { return batch * spatial; }  // elements of a channel
  FASTREMEDY_HD int64_t num_rows() const { return batch * (channels_last ? spatial : channels); }
  FASTREMEDY_HD int64_t row_size() const { return channels_last ? channels : spatial; }
  FASTREMEDY_HD int64_t mask_row_size() const { return (row_size() + 7) / 8; }  // bytes
};

// Where a call begins and ends. Ranks of a group sum up between kReduce and kFinish.
enum class BatchNormPhase : int32_t {
  kReduce = 0,  // read the elements, write `sums`
  kFinish = 1,  // read `sums`, write the results
  kBoth = 2,    // `sums` is not used
};

// T is double if shape.dtype is, float otherwise. There is at least one channel; there may be no
// element in kReduce and kFinish: other ranks may have some, and if none has, running statistics
// stay.
struct BatchNormForwardArgs {
  BatchNormShape shape;
  BatchNormPhase phase;
  Activation activation;
  int32_t training;    // statistics of the batch; otherwise running_mean and running_var
  int32_t cumulative;  // running statistics are plain averages over all batches
  double momentum;
  double eps;
  double negative_slope;
  const void* input;
  const void* residual;  // null: none
  void* output;
  uint8_t* mask;  // null, or [num_rows, mask_row_size]: bit i % 8 of byte i / 8 is is_positive(z),
                  // the rest 0
  int64_t* dead;  // null, or [channels]: 0 on entry, number of elements that are not positive
  void* saved;    // T[4, channels]: the members of ChannelStatistics, written
  ChannelValues weight, bias;
  ChannelValues running_mean, running_var;  // updated if training
  int64_t* num_batches_tracked;             // null, or incremented if training
  // double[2 * channels + 1]: sum(x), sum(x * x) of every channel, then the number of elements.
  double* sums;
};

struct BatchNormBackwardArgs {
  BatchNormShape shape;
  BatchNormPhase phase;
  Activation activation;
  int32_t training;
  double negative_slope;
  const void* grad_output;
  const void* input;
  const void* residual;  // null, or needed for z: no mask was written
  const uint8_t* mask;   // null: the sign of z is recomputed
  const void* saved;
  ChannelValues weight, bias;
  void* grad_input;                      // null: not wanted
  void* grad_residual;                   // null: not wanted
  ChannelValues grad_weight, grad_bias;  // null data: not wanted; not written in kFinish
  // double[2 * channels + 1]: sum(g), centered sum(g * x), then the number of elements.
  double* sums;
};

}  // namespace fastremedy
