// Focal loss of classes that exclude each other.
//
// The threads of a row are a part of a warp, a warp or, where there are many classes, a block. If
// the classes of a row do not lie side by side, neighbouring threads take neighbouring rows.
#pragma once

#include "focal_loss_elements.cuh"

namespace fastremedy::cuda {

template <class T>
struct SoftmaxPlan {
  Gamma<T> gamma;
  T alpha;
  T smoothing;
  T share;  // of a class in a smoothed label
  Divisor inner;
  int32_t threads_per_row;
  bool has_vectors;  // all rows are aligned
};

struct Row {
  int64_t index;
  int64_t first;  // the element of class 0
  int thread;
  bool exists;
};

template <class T, class Use>
FASTREMEDY_DEVICE void for_each_row(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                                    Use use) {
  const int64_t num_rows = args.shape.num_rows(), inner = args.shape.inner;
  const int rows_per_block = kFocalBlockSize / plan.threads_per_row;
  const int row_in_block = static_cast<int>(threadIdx.x) / plan.threads_per_row;
  const int64_t step = int64_t{gridDim.x} * rows_per_block;
  for (int64_t r = int64_t{blockIdx.x} * rows_per_block; r < num_rows; r += step) {
    const int64_t row = r + row_in_block;
    const int64_t outer = plan.inner.quotient(row);
    use(Row{row, outer * args.shape.classes * inner + (row - outer * inner),
            static_cast<int>(threadIdx.x) % plan.threads_per_row, row < num_rows});
  }
}

// use(span, class of its first element) for the classes of the thread; the next elements of the
// span are those of class + k * class_step(plan).
template <class T>
FASTREMEDY_DEVICE int class_step(const SoftmaxPlan<T>& plan) {
  return plan.has_vectors ? 1 : plan.threads_per_row;
}
template <class T, class Use>
FASTREMEDY_DEVICE void for_each_span(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                                     const Row& row, Use use) {
  constexpr int kWidth = kVecSize<T>;
  const int64_t classes = args.shape.classes, inner = args.shape.inner;
  const int step = class_step(plan);
  const int64_t begin = plan.has_vectors ? row.thread * kWidth : row.thread;
  for (int64_t c = begin; c < classes; c += plan.threads_per_row * kWidth) {
    const int left = saturate(classes - c);
    int count = 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) count += k * step < left;
    use(Span{row.first + c * inner, step * inner, count, plan.has_vectors}, c);
  }
}

template <class T>
FASTREMEDY_DEVICE SoftmaxState<T> empty_state() {
  return {-static_cast<T>(HUGE_VAL), T(0)};
}

template <class T>
FASTREMEDY_DEVICE SoftmaxState<T> state_of(const T (&x)[kVecSize<T>]) {
  T max = x[0];
  int place = 0;
#pragma unroll
  for (int k = 1; k < kVecSize<T>; ++k) {
    if (x[k] > max) {
      max = x[k];
      place = k;
    }
  }
  const T shift = max == -static_cast<T>(HUGE_VAL) ? T(0) : max;
  T rest = 0;
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k) {
    const T e = exp_of_negative(shift - x[k]);
    rest += k == place && max == max ? T(0) : e;
  }
  return {max, rest};
}

// The state of the thread's classes. Parts of 64 vectors keep rounding errors small.
template <class T>
FASTREMEDY_DEVICE SoftmaxState<T> read_state(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                                             const Row& row) {
  constexpr int kMostVectors = 64;
  SoftmaxState<T> state = empty_state<T>(), part = empty_state<T>();
  int num_vectors = 0;
  for_each_span(args, plan, row, [&](const Span& span, int64_t) {
    T x[kVecSize<T>];
    load_span<Reuse::kByNextKernel>(args.input, args.shape.dtype, span, x,
                                    -static_cast<T>(HUGE_VAL));
    part = merge(part, state_of(x));
    if (++num_vectors < kMostVectors) return;
    state = merge(state, part);
    part = empty_state<T>();
    num_vectors = 0;
  });
  return merge(state, part);
}

// Of all threads of a row, the same bits in each of them.
template <bool kWholeBlock, class T>
FASTREMEDY_DEVICE SoftmaxState<T> merge_threads(SoftmaxState<T> state, int threads_per_row) {
  const int lane = threadIdx.x % kWarpSize;
  const auto merge_lanes = [&](int num_lanes) {
    for (int lane_mask = num_lanes / 2; lane_mask > 0; lane_mask /= 2) {
      const SoftmaxState<T> other{__shfl_xor_sync(kAllLanes, state.max, lane_mask),
                                  __shfl_xor_sync(kAllLanes, state.rest, lane_mask)};
      state = lane & lane_mask ? merge(other, state) : merge(state, other);
    }
  };
  if constexpr (kWholeBlock) {
    constexpr int kNumWarps = kFocalBlockSize / kWarpSize;
    using WarpStates = SoftmaxState<T>[kNumWarps];
    FASTREMEDY_SHARED(WarpStates, warp_states);
    merge_lanes(kWarpSize);
    if (lane == 0) warp_states[threadIdx.x / kWarpSize] = state;
    __syncthreads();
    state = warp_states[lane % kNumWarps];
    __syncthreads();  // the next row writes warp_states again
    merge_lanes(kNumWarps);
  } else {
    merge_lanes(threads_per_row);
  }
  return state;
}

template <bool kWholeBlock, class T, class Combine>
FASTREMEDY_DEVICE T reduce_threads(T value, double identity, Combine combine, int threads_per_row) {
  if constexpr (kWholeBlock) {
    return static_cast<T>(
        block_reduce<kFocalBlockSize>(static_cast<double>(value), identity, combine));
  } else {
    for (int lane_mask = threads_per_row / 2; lane_mask > 0; lane_mask /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, lane_mask));
    }
    return value;
  }
}

template <class T>
FASTREMEDY_DEVICE T weight_of(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                              int64_t channel) {
  return get<T>(args.alphas, channel, plan.alpha) * get<T>(args.weight, channel, 1);
}

FASTREMEDY_DEVICE int64_t label_of(const FocalLossArgs& args, const Row& row) {
  if (!row.exists) return kIgnored;
  return args.labels ? load_label(args, row.index) : kNoClass;
}

// What the classes of a row have in common.
template <GammaKind kKind, class T>
class SoftRow {
 public:
  FASTREMEDY_DEVICE SoftRow(const SoftmaxState<T>& state, const Gamma<T>& gamma)
      : state_(state), gamma_(gamma), log1p_rest_(static_cast<T>(::log1p(state.rest))) {
    if constexpr (kKind == GammaKind::kAny) {
      power_of_max_ = power_of_label(state.rest / (T(1) + state.rest), gamma);
    }
  }

  FASTREMEDY_DEVICE ClassTerms<T> terms(T x) const { return class_terms(x, state_, log1p_rest_); }

  FASTREMEDY_DEVICE LossAndSlope<T> focal(T x, const ClassTerms<T>& terms, T weight) const {
    const bool needs_pow = kKind == GammaKind::kAny && x == state_.max;
    const T factor = needs_pow ? power_of_max_ : power_of_class<kKind>(terms, gamma_);
    return focal_of_class(terms, weight * factor, gamma_.value);
  }

 private:
  const SoftmaxState<T> state_;
  const Gamma<T>& gamma_;
  const T log1p_rest_;
  T power_of_max_ = 0;
};

// use(span, class of its first element, logits, smoothed targets) for the thread's classes.
template <Reuse kReuse, class T, class Use>
FASTREMEDY_DEVICE void for_each_soft_span(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                                          const Row& row, int64_t label, Use use) {
  for_each_span(args, plan, row, [&](const Span& span, int64_t first_class) {
    T x[kVecSize<T>], targets[kVecSize<T>] = {};
    load_span<kReuse>(args.input, args.shape.dtype, span, x);
    if (args.labels == nullptr) {
      load_span<kReuse>(args.probabilities, args.probabilities_dtype, span, targets);
    }
    const int label_place = saturate(label - first_class);
#pragma unroll
    for (int k = 0; k < kVecSize<T>; ++k) {
      if (k * class_step(plan) == label_place) targets[k] = 1;
      targets[k] = smooth(targets[k], plan.smoothing, plan.share);
    }
    use(span, first_class, x, targets);
  });
}

// The class of the largest probability, the first of several.
template <bool kWholeBlock, class T>
FASTREMEDY_DEVICE int64_t most_probable(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                                        const Row& row) {
  const double none = static_cast<double>(args.shape.classes);
  T largest = -1;
  double place = none;
  if (row.exists) {
    for_each_span(args, plan, row, [&](const Span& span, int64_t first_class) {
      T targets[kVecSize<T>];
      load_span<Reuse::kByNextKernel>(args.probabilities, args.probabilities_dtype, span, targets);
#pragma unroll
      for (int k = 0; k < kVecSize<T>; ++k) {
        if (!span.has(k) || !(targets[k] > largest)) continue;
        largest = targets[k];
        place = static_cast<double>(first_class + k * class_step(plan));
      }
    });
  }
  const auto max = [](auto a, auto b) { return a > b ? a : b; };
  const auto min = [](auto a, auto b) { return a < b ? a : b; };
  const T of_all = reduce_threads<kWholeBlock>(largest, -1, max, plan.threads_per_row);
  place = reduce_threads<kWholeBlock>(largest == of_all ? place : none, none, min,
                                      plan.threads_per_row);
  return place < none ? static_cast<int64_t>(place) : kNoClass;
}

// What the first thread of a row writes.
template <class T>
struct RowResult {
  T loss = 0;
  T saved[3] = {};
};

template <class T>
FASTREMEDY_DEVICE RowResult<T> hard_row(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                                        const ClassTerms<T>& terms, const SoftmaxState<T>& state,
                                        int64_t label) {
  const T factor = weight_of(args, plan, label) * power_of_label(terms.q, plan.gamma);
  const LossAndSlope<T> result = focal_of_class(terms, factor, plan.gamma.value);
  return {result.loss, {state.max, result.slope / (T(1) + state.rest), -result.slope * terms.q}};
}

template <GammaKind kKind, bool kWholeBlock, class T>
FASTREMEDY_DEVICE RowResult<T> soft_row(const FocalLossArgs& args, const SoftmaxPlan<T>& plan,
                                        const Row& row, const SoftmaxState<T>& state,
                                        int64_t label) {
  RunningSum<T> losses, slopes;
  if (label != kIgnored) {
    const SoftRow<kKind, T> of_row(state, plan.gamma);
    for_each_soft_span<Reuse::kByNextKernel>(
        args, plan, row, label,
        [&](const Span& span, int64_t first_class, const auto& x, const auto& targets) {
          T loss = 0, slope = 0;
#pragma unroll
          for (int k = 0; k < kVecSize<T>; ++k) {
            if (!span.has(k) || targets[k] == T(0)) continue;
            const T weight = weight_of(args, plan, first_class + k * class_step(plan));
            const auto result = of_row.focal(x[k], of_row.terms(x[k]), weight * targets[k]);
            loss += result.loss;
            slope += result.slope;
          }
          losses.add(loss);
          slopes.add(slope);
        });
  }
  const auto sum = [&](const RunningSum<T>& of_thread) {
    const T total = static_cast<T>(of_thread.total());
    return reduce_threads<kWholeBlock>(total, 0, Add(), plan.threads_per_row);
  };
  const T loss = sum(losses);
  return {loss, {state.max, state.rest, sum(slopes)}};
}

template <GammaKind kKind, bool kIsSoft, bool kWholeBlock, class T>
__global__ void __launch_bounds__(kFocalBlockSize, kFocalBlocks<T>)
    softmax_forward_kernel(const __grid_constant__ FocalLossArgs args,
                           const __grid_constant__ SoftmaxPlan<T> plan, FocalLossScratch scratch) {
  const int64_t num_rows = args.shape.num_rows();
  RunningSum<T> losses, weights;
  for_each_row(args, plan, [&](const Row& row) {
    const int64_t label = label_of(args, row);
    const bool counts = label != kIgnored;
    SoftmaxState<T> state = counts ? read_state(args, plan, row) : empty_state<T>();
    state = merge_threads<kWholeBlock>(state, plan.threads_per_row);
    RowResult<T> result;
    if constexpr (kIsSoft) {
      result = soft_row<kKind, kWholeBlock>(args, plan, row, state, label);
    }
    int64_t counted_class = label;
    if (args.stats && args.labels == nullptr) {
      counted_class = most_probable<kWholeBlock>(args, plan, row);
    }
    if (row.thread > 0 || !row.exists) return;
    if (counts && counted_class >= 0) {
      const T x = load_one<T, Reuse::kByNextKernel>(args.input, args.shape.dtype,
                                                    row.first + counted_class * args.shape.inner);
      const ClassTerms<T> terms = class_terms(x, state, static_cast<T>(::log1p(state.rest)));
      if constexpr (!kIsSoft) result = hard_row(args, plan, terms, state, label);
      if (args.stats) count_label(args, counted_class, terms.p);
    }
    if (!counts) {
      result = RowResult<T>();
      if (args.stats) count_ignored(args);
    }
    for (int i = 0; args.saved && i < 3; ++i) {
      static_cast<T*>(args.saved)[i * num_rows + row.index] = result.saved[i];
    }
    if (args.reduction == Reduction::kNone) {
      return set({args.loss, args.loss_dtype, 0}, row.index, static_cast<double>(result.loss));
    }
    losses.add(result.loss);
    if (counts) weights.add(args.labels ? get<T>(args.weight, label, 1) : T(1));
  });
  if (args.reduction == Reduction::kNone) return;
  finish_loss(args, scratch, losses.total(), weights.total());
}

template <GammaKind kKind, bool kIsSoft, class T>
__global__ void __launch_bounds__(kFocalBlockSize, kFocalBlocks<T>)
    softmax_backward_kernel(const __grid_constant__ FocalLossArgs args,
                            const __grid_constant__ SoftmaxPlan<T> plan) {
  constexpr int kWidth = kVecSize<T>;
  const int64_t num_rows = args.shape.num_rows();
  const bool is_scalar = args.reduction != Reduction::kNone;
  const T grad_of_loss = is_scalar ? grad_of_scalar<T>(args) : T(1);
  const DType dtype = args.shape.dtype;
  for_each_row(args, plan, [&](const Row& row) {
    if (!row.exists) return;
    const int64_t label = label_of(args, row);
    if (label == kIgnored) {
      return for_each_span(args, plan, row, [&](const Span& span, int64_t) {
        const T zeros[kWidth] = {};
        store_span(args.grad_input, dtype, span, zeros);
      });
    }
    const T* const saved = static_cast<const T*>(args.saved) + row.index;
    const T max = saved[0], second = saved[num_rows], third = saved[2 * num_rows];
    const T grad =
        is_scalar ? grad_of_loss : load_one<T>(args.grad_output, args.grad_output_dtype, row.index);
    if constexpr (kIsSoft) {
      const SoftRow<kKind, T> of_row(SoftmaxState<T>{max, second}, plan.gamma);
      for_each_soft_span<Reuse::kNever>(
          args, plan, row, label,
          [&](const Span& span, int64_t first_class, auto& x, const auto& targets) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
              const ClassTerms<T> terms = of_row.terms(x[k]);
              T slope = 0;
              if (span.has(k) && targets[k] != T(0)) {
                const T weight = weight_of(args, plan, first_class + k * class_step(plan));
                slope = of_row.focal(x[k], terms, weight * targets[k]).slope;
              }
              x[k] = grad * (terms.p * (third - slope) - terms.q * slope);
            }
            store_span(args.grad_input, dtype, span, x);
          });
    } else {
      const T factor = grad * second, grad_of_label = grad * third;
      for_each_span(args, plan, row, [&](const Span& span, int64_t first_class) {
        T x[kWidth];
        load_span<Reuse::kNever>(args.input, dtype, span, x);
        const int label_place = saturate(label - first_class);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const bool is_label = k * class_step(plan) == label_place;
          x[k] = is_label ? grad_of_label : exp_of_negative(max - x[k]) * factor;
        }
        store_span(args.grad_input, dtype, span, x);
      });
    }
  });
}

}  // namespace fastremedy::cuda
