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

// Where an element lies.
template <class T>
class Place {
 public:
  FASTREMEDY_DEVICE Place(const SigmoidPlan<T>& plan, int64_t i)
      : inner_(plan.inner.value()), classes_(plan.classes.value()) {
    const int64_t line = plan.inner.quotient(i), outer = plan.classes.quotient(line);
    column_ = i - line * inner_;
    channel_ = line - outer * classes_;
    row_ = outer * inner_ + column_;
  }

  FASTREMEDY_DEVICE int64_t row() const { return row_; }
  FASTREMEDY_DEVICE int64_t channel() const { return channel_; }

  FASTREMEDY_DEVICE void advance() {
    ++row_;
    if (++column_ < inner_) return;
    column_ = 0;
    row_ -= inner_;
    if (++channel_ < classes_) return;
    channel_ = 0;
    row_ += inner_;
  }

 private:
  const int64_t inner_, classes_;
  int64_t row_, channel_, column_;
};

template <class T>
FASTREMEDY_DEVICE FocalWeights<T> weights_of(const FocalLossArgs& args, const SigmoidPlan<T>& plan,
                                             int64_t channel) {
  FocalWeights<T> weights = plan.weights;
  if (args.alphas.data) {
    with_value(args.alphas, channel, [&](auto value) {
      const auto alpha = value + T(0);  // the wider type: 1 - alpha may cancel
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
                                               Place<T> place) {
  constexpr int kWidth = kVecSize<T>;
  Targets<T> targets;
  targets.are_hard = plan.smoothing == T(0);
  if (args.shape.inner == 1 && args.shape.classes >= kWidth) {
    // Elements of this row and at most the next one.
    const int left = saturate(args.shape.classes - place.channel());
    const int size = left < span.count ? left : span.count;
    const int64_t label = load_label(args, place.row());
    const int64_t next = size < span.count ? load_label(args, place.row() + 1) : kIgnored;
    const uint32_t row_bits = (1u << size) - 1;
    const uint32_t next_bits = (1u << span.count) - 1 - row_bits;
    targets.counted = (label != kIgnored ? row_bits : 0) | (next != kIgnored ? next_bits : 0);
    const int label_place = label >= 0 ? saturate(label - place.channel()) : -1;
    const int next_place = next >= 0 ? saturate(left + next) : -1;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      targets.values[k] = k == label_place || k == next_place ? T(1) : T(0);
    }
    return targets;
  }
  int64_t row = -1, label = kIgnored;
#pragma unroll
  for (int k = 0; k < kWidth; ++k, place.advance()) {
    if (!span.has(k)) continue;
    if (place.row() != row) label = load_label(args, row = place.row());
    targets.values[k] = place.channel() == label ? T(1) : T(0);
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
FASTREMEDY_DEVICE void count_targets(const FocalLossArgs& args, const Span& span, Place<T> place,
                                     const Targets<T>& targets, const T (&x)[kVecSize<T>]) {
#pragma unroll
  for (int k = 0; k < kVecSize<T>; ++k, place.advance()) {
    if (!span.has(k)) continue;
    if (targets.counted >> k & 1) {
      if (targets.values[k] > T(0.5)) {
        count_label(args, place.channel(), probability_of_target(x[k], targets.values[k]));
      }
    } else if (args.labels == nullptr || place.channel() == 0) {
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
    const int count = numel - first < kWidth ? static_cast<int>(numel - first) : kWidth;
    const Span span{first, 1, count, plan.is_aligned && count == kWidth};
    T x[kWidth];
    load_span<kReuse>(args.input, args.shape.dtype, span, x);
    const Place<T> place(plan, first);
    Targets<T> targets;
    if constexpr (kHasLabels) {
      targets = targets_of_labels(args, plan, span, place);
    } else {
      targets = targets_of_probabilities<T, kReuse>(args, plan, span);
    }
    if (kIsForward && args.stats) count_targets(args, span, place, targets, x);

    T results[kWidth];
    const auto hard = [&](T logit, T target, const FocalWeights<T>& weights) {
      return focal_of_hard_target<kKind>(logit, exp_of_logit(logit), target, weights, plan.gamma);
    };
    const auto soft = [&](T logit, T target, const FocalWeights<T>& weights) {
      return focal_of_soft_target<kKind>(logit, exp_of_logit(logit), target, plan.smoothing,
                                         weights, plan.gamma);
    };
    const auto evaluate = [&](auto formula) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const LossAndSlope<T> result = formula(x[k], targets.values[k]);
        results[k] = targets.counted >> k & 1 ? (kIsForward ? result.loss : result.slope) : T(0);
      }
    };
    if (plan.has_class_values) {
      Place<T> of_element = place;
      evaluate([&](T logit, T target) {
        const FocalWeights<T> weights = weights_of(args, plan, of_element.channel());
        of_element.advance();
        return targets.are_hard ? hard(logit, target, weights) : soft(logit, target, weights);
      });
    } else if (targets.are_hard) {
      evaluate([&](T logit, T target) { return hard(logit, target, plan.weights); });
    } else {
      evaluate([&](T logit, T target) { return soft(logit, target, plan.weights); });
    }
    use(span, results, targets.counted);
  }
}

template <GammaKind kKind, bool kHasLabels, class T>
__global__ void __launch_bounds__(kFocalBlockSize, kFocalBlocks<T>)
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
__global__ void __launch_bounds__(kFocalBlockSize, kFocalBlocks<T>)
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
