// What both forms of the focal loss share: elements and labels in memory, sums and statistics.
#pragma once

#include "block.cuh"
#include "channel_values.cuh"
#include "division.cuh"
#include "launch.h"
#include "vectors.cuh"

namespace fastremedy::cuda {

// Blocks at once on an H100; the shape alone decides how many there are, so sums are bitwise the
// same on every device.
#ifdef FASTREMEDY_EMULATION
inline constexpr int kFocalBlockSize = 64;
inline constexpr int64_t kMostFocalBlocks = 7;
#else
inline constexpr int kFocalBlockSize = 256;
inline constexpr int64_t kMostFocalBlocks = 1024;
#endif
inline constexpr int kFocalBlocks = 2;  // of a multiprocessor at least: up to 128 registers

// The elements first + k * step below end, k from 0 to kVecSize - 1.
struct Span {
  int64_t first, step, end;
  bool is_vector;  // aligned neighbours, all below end

  FASTREMEDY_DEVICE bool has(int k) const { return is_vector || first + k * step < end; }
};

template <class T, Reuse kReuse = Reuse::kNever>
FASTREMEDY_DEVICE T load_one(const void* data, DType dtype, int64_t i) {
  T value[1];
  unpack(load<T, 1, kReuse>(element_at(data, dtype, i), dtype, 0), dtype, value);
  return value[0];
}

// Elements that the span does not have keep their values.
template <Reuse kReuse, class T>
FASTREMEDY_DEVICE void load_span(const void* data, DType dtype, const Span& span,
                                 T (&values)[kVecSize<T>]) {
  if (span.is_vector) {
    const char* const first = element_at(data, dtype, span.first);
    return unpack(load<T, kVecSize<T>, kReuse>(first, dtype, 0), dtype, values);
  }
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k) {
    if (span.has(k)) values[k] = load_one<T, kReuse>(data, dtype, span.first + k * span.step);
  }
}

template <class T>
FASTREMEDY_DEVICE void store_span(void* data, DType dtype, const Span& span,
                                  const T (&values)[kVecSize<T>]) {
  if (span.is_vector) {
    return store(element_at(data, dtype, span.first), dtype, 0, pack(values, dtype));
  }
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k) {
    const T value[1] = {values[k]};
    if (span.has(k)) {
      store(element_at(data, dtype, span.first + k * span.step), dtype, 0, pack(value, dtype));
    }
  }
}

// The class of a row, or one of these.
inline constexpr int64_t kNoClass = -1;
inline constexpr int64_t kIgnored = -2;

FASTREMEDY_DEVICE int64_t load_label(const FocalLossArgs& args, int64_t row) {
  const int64_t label = args.labels[row];
  if (label == args.ignore_index) return kIgnored;
  const bool has_background = args.form == FocalForm::kSigmoid && args.background != kNoBackground;
  if (has_background && label == args.background) return kNoClass;
  const bool label_is_a_class = label >= 0 && label < args.shape.classes;
  FASTREMEDY_DEVICE_ASSERT(label_is_a_class);
  return label_is_a_class ? label : kIgnored;
}

// Adds in T, and moves on to double before rounding can be seen.
template <class T>
class RunningSum {
  static constexpr int kMostTerms = 64;

 public:
  FASTREMEDY_DEVICE void add(T term) {
    terms_ += term;
    if (++num_terms_ < kMostTerms) return;
    total_ = total();
    terms_ = 0;
    num_terms_ = 0;
  }
  FASTREMEDY_DEVICE double total() const { return total_ + static_cast<double>(terms_); }

 private:
  double total_ = 0;
  T terms_ = 0;
  int num_terms_ = 0;
};

struct Add {
  template <class T>
  FASTREMEDY_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// The loss from the sum of every thread, and the normalizer from what counted there. Each block
// leaves its sums at a fixed place; the last one adds them in a fixed order.
FASTREMEDY_DEVICE void finish_loss(const FocalLossArgs& args, const FocalLossScratch& scratch,
                                   double sum, double count) {
  const bool is_mean = args.reduction == Reduction::kMean;
  double* const sums = scratch.partials;
  double* const counts = scratch.partials + gridDim.x;
  const auto reduce = [&] {
    sum = block_reduce<kFocalBlockSize>(sum, 0, Add());
    if (is_mean) count = block_reduce<kFocalBlockSize>(count, 0, Add());
  };
  reduce();
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    if (is_mean) counts[blockIdx.x] = count;
  }
  if (!is_last_block(scratch.counter, gridDim.x)) return;
  sum = count = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kFocalBlockSize) {
    sum += sums[b];
    if (is_mean) count += counts[b];
  }
  reduce();
  if (threadIdx.x > 0) return;
  if (is_mean) *args.normalizer = count;
  set({args.loss, args.loss_dtype, 0}, 0, is_mean ? sum / count : sum);
}

// What gradients are multiplied by, where the loss is a scalar.
template <class T>
FASTREMEDY_DEVICE T grad_of_scalar(const FocalLossArgs& args) {
  const T grad = load_one<T>(args.grad_output, args.grad_output_dtype, 0);
  return args.reduction == Reduction::kMean ? grad / static_cast<T>(*args.normalizer) : grad;
}

FASTREMEDY_DEVICE void add_to(int64_t* sum, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}

template <class T>
FASTREMEDY_DEVICE void count_label(const FocalLossArgs& args, int64_t label, T probability) {
  add_to(args.stats + label, 1);
  add_to(args.stats + args.shape.classes + label, in_probability_units(probability));
}

FASTREMEDY_DEVICE void count_ignored(const FocalLossArgs& args) {
  add_to(args.stats + 2 * args.shape.classes, 1);
}

}  // namespace fastremedy::cuda
