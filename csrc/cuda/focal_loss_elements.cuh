// What both forms of the focal loss share: elements and labels in memory, sums and statistics.
#pragma once

#include "block.cuh"
#include "channel_values.cuh"
#include "division.cuh"
#include "launch.h"
#include "vectors.cuh"

namespace fastremedy::cuda {

// 12 blocks for each of the 132 multiprocessors of an H100: whole rounds where 3 or 4 run at once.
// The shape alone decides how many there are, so sums are bitwise the same on every device.
#ifdef FASTREMEDY_EMULATION
inline constexpr int kFocalBlockSize = 64;
inline constexpr int64_t kMostFocalBlocks = 7;
#else
inline constexpr int kFocalBlockSize = 256;
inline constexpr int64_t kMostFocalBlocks = 1584;
#endif
// Of a multiprocessor at least: 3 leave up to 80 registers, which are enough where float is
// computed, except on sm_75.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
inline constexpr int kFocalBlocks = 2;
#else
template <class T>
inline constexpr int kFocalBlocks = sizeof(T) == sizeof(float) ? 3 : 2;
#endif

// The elements first + k * step, k from 0 to count - 1.
struct Span {
  int64_t first, step;
  int count;       // kVecSize at most
  bool is_vector;  // kVecSize aligned neighbours

  FASTREMEDY_DEVICE bool has(int k) const { return k < count; }
};

// A number that is compared with small ones alone.
FASTREMEDY_DEVICE int saturate(int64_t n) {
  constexpr int64_t kLargest = 1 << 20;
  return static_cast<int>(n < -1 ? -1 : n > kLargest ? kLargest : n);
}

template <class T, Reuse kReuse = Reuse::kNever>
FASTREMEDY_DEVICE T load_one(const void* data, DType dtype, int64_t i) {
  T value[1];
  unpack(load<T, 1, kReuse>(element_at(data, dtype, i), dtype, 0), dtype, value);
  return value[0];
}

// Element k of a vector, as load and store take it alone.
template <class T>
FASTREMEDY_DEVICE void put(Stored<T, kVecSize<T>>& vector, int k, DType dtype,
                           const Stored<T, 1>& element) {
  const int size = element_size(dtype);
  if (size == 2) vector.set_half(k, element.half(0));
  if (size == 4) vector.words[k] = element.words[0];
  if constexpr (sizeof(T) == 8) {
    if (size == 8) memcpy(vector.words + 2 * k, element.words, sizeof(T));
  }
}
template <class T>
FASTREMEDY_DEVICE Stored<T, 1> take(const Stored<T, kVecSize<T>>& vector, int k, DType dtype) {
  const int size = element_size(dtype);
  Stored<T, 1> element;
  if (size == 2) element.words[0] = vector.half(k);
  if (size == 4) element.words[0] = vector.words[k];
  if constexpr (sizeof(T) == 8) {
    if (size == 8) memcpy(element.words, vector.words + 2 * k, sizeof(T));
  }
  return element;
}

template <Reuse kReuse, class T>
FASTREMEDY_DEVICE void load_span(const void* data, DType dtype, const Span& span,
                                 T (&values)[kVecSize<T>], T otherwise = 0) {
  constexpr int kWidth = kVecSize<T>;
  const char* const first = element_at(data, dtype, span.first);
  if (span.is_vector) return unpack(load<T, kWidth, kReuse>(first, dtype, 0), dtype, values);
  const int64_t step = span.step * element_size(dtype);
  Stored<T, kWidth> stored;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (span.has(k)) put(stored, k, dtype, load<T, 1, kReuse>(first + k * step, dtype, 0));
  }
  unpack(stored, dtype, values);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) values[k] = span.has(k) ? values[k] : otherwise;
}

template <class T>
FASTREMEDY_DEVICE void store_span(void* data, DType dtype, const Span& span,
                                  const T (&values)[kVecSize<T>]) {
  const Stored<T, kVecSize<T>> stored = pack(values, dtype);
  char* const first = element_at(data, dtype, span.first);
  if (span.is_vector) return store(first, dtype, 0, stored);
  const int64_t step = span.step * element_size(dtype);
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k) {
    if (span.has(k)) store(first + k * step, dtype, 0, take(stored, k, dtype));
  }
}

// The class of a row, or one of these.
inline constexpr int64_t kNoClass = -1;
inline constexpr int64_t kIgnored = -2;

FASTREMEDY_DEVICE int64_t load_label(const FocalLossArgs& args, int64_t row) {
  const int64_t label = args.labels[row];
  if (label == args.ignore_index) return kIgnored;
  if (args.form == FocalForm::kSigmoid && label == args.background) return kNoClass;
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
