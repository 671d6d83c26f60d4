// Focal loss of every class by itself.
//
// A thread takes vectors of neighbours wherever rows begin and end.
#pragma once

#include "focal_loss_elements.cuh"

namespace fastremedy::cuda {

template <class T>
struct SigmoidPlan {
  Gamma<T> gamma;
  FocalWeights<T> weights;  // of classes that have no values of their own
  T smoothing;
  T ignored;  // probability
  Divisor inner, classes;
  bool has_class_values;
  bool is_aligned;
};

struct Place {
  int64_t row, channel;
};

// Where the elements first + k lie.
template <class T>
class Places {
 public:
  FASTREMEDY_DEVICE Places(const SigmoidPlan<T>& plan, int64_t first) : plan_(plan), first_(first) {
    const int64_t inner = plan.inner.value();
    const int64_t column = first - plan.inner.quotient(first) * inner;
    place_ = find(first);
    is_row_ = inner == 1;
    const int64_t left = is_row_ ? plan.classes.value() - place_.channel : inner - column;
    num_near_ = left < kVecSize<T> ? static_cast<int>(left) : kVecSize<T>;
  }

  FASTREMEDY_DEVICE Place operator[](int k) const {
    if (k >= num_near_) return find(first_ + k);
    return {place_.row + (is_row_ ? 0 : k), place_.channel + (is_row_ ? k : 0)};
  }

 private:
  FASTREMEDY_DEVICE Place find(int64_t i) const {
    const int64_t inner = plan_.inner.value(), classes = plan_.classes.value();
    const int64_t line = plan_.inner.quotient(i), outer = plan_.classes.quotient(line);
    return {outer * inner + (i - line * inner), line - outer * classes};
  }

  const SigmoidPlan<T>& plan_;
  const int64_t first_;
  Place place_;
  bool is_row_;
  int num_near_;  // elements in the row or the class of the first
};

template <class T>
FASTREMEDY_DEVICE FocalWeights<T> weights_of(const FocalLossArgs& args, const SigmoidPlan<T>& plan,
                                             int64_t channel) {
  FocalWeights<T> weights = plan.weights;
  if (args.alphas.data) {
    with_value(args.alphas, channel, [&](auto alpha) {
      weights.positive = static_cast<T>(alpha_of_positives(alpha));
      weights.negative = static_cast<T>(alpha_of_negatives(alpha));
    });
  }
  const T weight = get<T>(args.weight, channel, 1);
  weights.positive *= weight;
  weights.negative *= weight;
  weights.pos_weight = get<T>(args.pos_weight, channel, 1);
  return weights;
}

// The targets of one vector.
template <class T>
struct Targets {
  T values[kVecSize<T>] = {};
  uint32_t counted = 0;  // bit k: element k counts
  bool are_hard = true;
};

template <class T>
FASTREMEDY_DEVICE Targets<T> targets_of_labels(const FocalLossArgs& args,
                                               const SigmoidPlan<T>& plan, const Span& span,
                                               const Places<T>& places) {
  Targets<T> targets;
  targets.are_hard = plan.smoothing == T(0);
  int64_t row = -1, label = kIgnored;
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k) {
    if (!span.has(k)) continue;
    const Place place = places[k];
    if (place.row != row) {
      row = place.row;
      label = load_label(args, row);
    }
    targets.values[k] = place.channel == label ? T(1) : T(0);
    targets.counted |= static_cast<uint32_t>(label != kIgnored) << k;
  }
  return targets;
}

template <class T, Reuse kReuse>
FASTREMEDY_DEVICE Targets<T> targets_of_probabilities(const FocalLossArgs& args,
                                                      const SigmoidPlan<T>& plan,
                                                      const Span& span) {
  Targets<T> targets;
  targets.are_hard = plan.smoothing == T(0);
  load_span<kReuse>(args.probabilities, args.probabilities_dtype, span, targets.values);
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k) {
    const bool counts = span.has(k) && targets.values[k] != plan.ignored;
    targets.counted |= static_cast<uint32_t>(counts) << k;
    targets.are_hard &= !counts || is_hard(targets.values[k]);
  }
  return targets;
}

template <class T>
FASTREMEDY_DEVICE void count_sigmoid(const FocalLossArgs& args, const Span& span,
                                     const Places<T>& places, const Targets<T>& targets,
                                     const T (&x)[kVecSize<T>]) {
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k) {
    if (!span.has(k)) continue;
    const int64_t channel = places[k].channel;
    if (targets.counted >> k & 1) {
      if (targets.values[k] > T(0.5)) count_label(args, channel, probability_of_logit(-x[k]));
    } else if (args.labels == nullptr || channel == 0) {
      count_ignored(args);
    }
  }
}

enum class Direction { kForward, kBackward };

// use(span, losses or slopes, targets), where elements that do not count are 0.
template <Direction kDirection, GammaKind kKind, bool kHasLabels, class T, class Use>
FASTREMEDY_DEVICE void for_each_vector(const FocalLossArgs& args, const SigmoidPlan<T>& plan,
                                       Use use) {
  constexpr int kWidth = kVecSize<T>;
  constexpr bool kIsForward = kDirection == Direction::kForward;
  constexpr Reuse kReuse = kIsForward ? Reuse::kByNextKernel : Reuse::kNever;
  const int64_t numel = args.shape.numel();
  const int64_t step = int64_t{gridDim.x} * kFocalBlockSize * kWidth;
  const int64_t begin = (int64_t{blockIdx.x} * kFocalBlockSize + threadIdx.x) * kWidth;
  for (int64_t first = begin; first < numel; first += step) {
    const Span span{first, 1, numel, plan.is_aligned && first + kWidth <= numel};
    T x[kWidth] = {};
    load_span<kReuse>(args.input, args.shape.dtype, span, x);
    const Places<T> places(plan, first);
    Targets<T> targets;
    if constexpr (kHasLabels) {
      targets = targets_of_labels(args, plan, span, places);
    } else {
      targets = targets_of_probabilities<T, kReuse>(args, plan, span);
    }
    if (kIsForward && args.stats) count_sigmoid(args, span, places, targets, x);

    T results[kWidth];
    const auto evaluate = [&](auto formula) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const bool counts = targets.counted >> k & 1;
        const FocalWeights<T> weights = counts && plan.has_class_values
                                            ? weights_of(args, plan, places[k].channel)
                                            : plan.weights;
        const LossAndSlope<T> result = formula(x[k], targets.values[k], weights);
        results[k] = counts ? (kIsForward ? result.loss : result.slope) : T(0);
      }
    };
    if (targets.are_hard) {
      evaluate([&](T logit, T target, const FocalWeights<T>& weights) {
        return focal_of_hard_target<kKind>(logit, target, weights, plan.gamma);
      });
    } else {
      evaluate([&](T logit, T target, const FocalWeights<T>& weights) {
        const T smoothed = smooth(target, plan.smoothing, T(0.5));
        return focal_of_soft_target<kKind>(logit, smoothed, weights, plan.gamma);
      });
    }
    use(span, results, targets.counted);
  }
}

template <GammaKind kKind, bool kHasLabels, class T>
__global__ void __launch_bounds__(kFocalBlockSize, kFocalBlocks)
    sigmoid_forward_kernel(const __grid_constant__ FocalLossArgs args,
                           const __grid_constant__ SigmoidPlan<T> plan, FocalLossScratch scratch) {
  RunningSum<T> sum;
  int64_t num_counted = 0;
  for_each_vector<Direction::kForward, kKind, kHasLabels>(
      args, plan, [&](const Span& span, const T(&losses)[kVecSize<T>], uint32_t counted) {
        if (args.reduction == Reduction::kNone) {
          return store_span(args.loss, args.loss_dtype, span, losses);
        }
        T total = 0;
#pragma unroll
        for (int k = 0; k < kVecSize<T>; ++k) {
          total += losses[k];
          num_counted += counted >> k & 1;
        }
        sum.add(total);
      });
  if (args.reduction == Reduction::kNone) return;
  finish_loss(args, scratch, sum.total(), static_cast<double>(num_counted));
}

template <GammaKind kKind, bool kHasLabels, class T>
__global__ void __launch_bounds__(kFocalBlockSize, kFocalBlocks)
    sigmoid_backward_kernel(const __grid_constant__ FocalLossArgs args,
                            const __grid_constant__ SigmoidPlan<T> plan) {
  const bool is_scalar = args.reduction != Reduction::kNone;
  const T scale = is_scalar ? grad_of_scalar<T>(args) : T(1);
  for_each_vector<Direction::kBackward, kKind, kHasLabels>(
      args, plan, [&](const Span& span, T(&slopes)[kVecSize<T>], uint32_t counted) {
        T grads[kVecSize<T>] = {};
        if (!is_scalar) {
          load_span<Reuse::kNever>(args.grad_output, args.grad_output_dtype, span, grads);
        }
#pragma unroll
        for (int k = 0; k < kVecSize<T>; ++k) {
          const T grad = is_scalar ? scale : grads[k];
          slopes[k] = counted >> k & 1 ? slopes[k] * grad : T(0);
        }
        store_span(args.grad_input, args.shape.dtype, span, slopes);
      });
}

}  // namespace fastremedy::cuda
