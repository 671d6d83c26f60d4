// What a backend gets for one call: plain pointers into memory of its device.
#pragma once

#include "activation_stats.h"
#include "adamw.h"
#include "batch_norm_relu.h"
#include "clip_grad_norm.h"
#include "focal_loss.h"
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
  // Null, or [number of grads], 0 on entry: the norm of each gradient that has elements. With kNone
  // null.
  double* tensor_norms;
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
  // Null, or [num_tensors]: written for every tensor that has a gradient, unless the step is
  // skipped.
  UpdateStats* update_stats;
  UpdateStats* update_partials;  // [num_chunks] if update_stats is not null
  uint32_t* update_counter;      // 0 before and after every launch; unused on the CPU
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
  FASTREMEDY_HD int64_t bytes() const { return batch * channels * spatial * element_size(dtype); }
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
  uint8_t* mask;  // null, or [num_rows, mask_row_size]: bit i % 8 of byte i / 8 is keeps_grad(z),
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

// Elements [outer, classes, inner] without gaps; a row are the classes of one place.
struct FocalLossShape {
  int64_t outer;
  int64_t classes;
  int64_t inner;
  DType dtype;  // of input and grad_input

  FASTREMEDY_HD int64_t num_rows() const { return outer * inner; }
  FASTREMEDY_HD int64_t numel() const { return outer * classes * inner; }
  FASTREMEDY_HD int64_t bytes() const { return numel() * element_size(dtype); }
};

// What both directions get. T is double if shape.dtype is, float otherwise. There is at least one
// element.
struct FocalLossArgs {
  FocalLossShape shape;
  FocalForm form;
  Reduction reduction;
  const void* input;
  // The target: labels [outer, inner] or, if those are null, probabilities [outer, classes, inner].
  const int64_t* labels;
  const void* probabilities;
  DType probabilities_dtype;
  double gamma;
  // kSigmoid: share of the positives, below 0 none. kSoftmax: a factor of the loss.
  double alpha;
  ChannelValues alphas;      // instead of alpha, one of each class
  ChannelValues weight;      // null: 1
  ChannelValues pos_weight;  // null: 1; kSigmoid only
  double label_smoothing;
  // Rows with this label do not count; nor do elements with this probability in kSigmoid.
  int64_t ignore_index;
  int64_t background;  // kSigmoid: label of rows without a positive class; ignore_index for none
  // kNone: [outer, classes, inner] in kSigmoid and [outer, inner] in kSoftmax. Otherwise a scalar.
  void* loss;
  DType loss_dtype;
  // kSoftmax: T[3, rows], what backward needs; null if there will be no backward.
  // With labels but without smoothing: the largest logit, the factor of exp(x - largest) in the
  // gradient, and the gradient of the label. Otherwise: SoftmaxState, and the sum over the classes
  // of what multiplies [j = t] in the gradient.
  void* saved;
  // kMean: what the sum was divided by, a scalar: the number of elements (kSigmoid) or rows
  // (kSoftmax with probabilities) that count, or the sum of their labels' weights.
  double* normalizer;
  // Null, or [2 * classes + 1], 0 on entry: rows of every label (elements with a probability above
  // 1/2), their p_t in units of 2^-32, and rows (elements) that are ignored. With probabilities
  // kSoftmax takes the class of the largest for the label.
  int64_t* stats;
  // Backward: as the loss.
  const void* grad_output;
  DType grad_output_dtype;
  void* grad_input;  // [outer, classes, inner]; kernels for CPUs also write it with the loss
};

// A tensor whose elements [outer, channels, inner] lie without gaps. Channel c belongs to row
// first_row + c of the statistics; for a tensor as a whole channels is 1.
struct StatsTensor {
  const void* data;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int32_t first_row;
  DType dtype;

  FASTREMEDY_HD int64_t numel() const { return outer * channels * inner; }
};

// What the tensors hold is merged into what the rows hold already. No two tensors of a call share
// rows. Tensors may be empty.
struct ActivationStatsArgs {
  const StatsTensor* tensors;  // memory of the host
  int32_t num_tensors;
  const int32_t* armed;  // null, or a flag in memory of the device: nothing happens while it is 0
  double* moments;       // [rows, kNumMoments]: Moments
  int64_t* counts;       // [rows, kNumCounts]
  int64_t* histogram;    // null, or [rows, kNumBuckets]
};

}  // namespace fastremedy
