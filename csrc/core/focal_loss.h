// Focal loss (Lin et al., 2017): FL = alpha_t (1 - p_t)^gamma CE, where CE = -log(p_t).
//
// Derivatives are taken in the logit and in closed form, where no gamma >= 0 is singular. With
// q = 1 - p_t, computed as itself and not as a difference:
//   one logit:  u is the logit of the wrong answer, q = sigmoid(u);
//               dFL/du = alpha_t q^gamma (gamma p_t CE + q).
//   classes:    q is the sum of the other probabilities;
//               dFL/dx_j = alpha_t q^gamma (1 + gamma p_t CE / q) (p_j - [j = t]), and p_t - 1 =
//               -q.
#pragma once

#include "exponential.h"

namespace fastremedy {

enum class FocalForm : int32_t { kSigmoid = 0, kSoftmax = 1 };
enum class Reduction : int32_t { kNone = 0, kMean = 1, kSum = 2 };

// p_t is summed up in units of 2^-32: integers give the same sum in every order.
inline constexpr double kProbabilityUnit = 0x1p-32;

template <class T>
FASTREMEDY_HD int64_t in_probability_units(T p) {
  // NaN counts as 0.
  return p >= T(0) ? static_cast<int64_t>(static_cast<double>(p) / kProbabilityUnit + 0.5) : 0;
}

// gamma as a template argument where that saves an exponential.
enum class GammaKind { kZero, kOne, kTwo, kAny };

inline GammaKind gamma_kind(double gamma) {
  return gamma == 0   ? GammaKind::kZero
         : gamma == 1 ? GammaKind::kOne
         : gamma == 2 ? GammaKind::kTwo
                      : GammaKind::kAny;
}

// In two parts: rounded to float, gamma would put an error of 3e-6 into exp(-87).
template <class T>
struct Gamma {
  T value, low;

  Gamma() = default;
  FASTREMEDY_HD explicit Gamma(double gamma)
      : value(static_cast<T>(gamma)), low(static_cast<T>(gamma - static_cast<double>(value))) {}
};

// q^gamma, where -log(q) = whole + part, whole without an error and |part| <= 1.
template <GammaKind kKind, class T>
FASTREMEDY_HD T power(T q, T whole, T part, const Gamma<T>& gamma) {
  switch (kKind) {
    case GammaKind::kZero:
      return T(1);
    case GammaKind::kOne:
      return q;
    case GammaKind::kTwo:
      return q * q;
    case GammaKind::kAny:
      break;
  }
  // -gamma log(q) = sum + low, both products exact enough for an exponential of 1e-38.
  const T a = gamma.value * whole, b = gamma.value * part;
  const T sum = a + b;
  const T rest = sum - a;
  T low = ::fma(gamma.value, whole, -a) + ::fma(gamma.value, part, -b) + gamma.low * whole;
  low += (a - (sum - rest)) + (b - rest);
  // Large products have a large `low`, and an exponential of 0.
  return exp_of_negative(sum, sum > T(100) ? T(0) : -low);
}

// A loss and its derivative in the logit.
template <class T>
struct LossAndSlope {
  T loss, slope;
};

// What all of a logit x comes from: e = exp(-|x|). An argument of the formulas: computed in a loop
// of its own, it halves the chain of operations that has to fit into a processor at once.
template <class T>
FASTREMEDY_HD T exp_of_logit(T x) {
  return exp_of_negative(std::fabs(x));
}

// sigmoid(|x|) = r, sigmoid(-|x|) = e r, softplus(-|x|) = l.
template <class T>
struct LogitTerms {
  T e, r, l;
};

template <class T>
FASTREMEDY_HD LogitTerms<T> logit_terms(T e) {
  return {e, reciprocal(T(1) + e), log1p_of(e)};
}

// Of a logit u that should be low: the input where the target is 0, minus the input where it is 1.
template <GammaKind kKind, class T>
FASTREMEDY_HD LossAndSlope<T> focal_of_logit(T u, T e, T weight, const Gamma<T>& gamma) {
  const LogitTerms<T> terms = logit_terms(e);
  const T small = terms.e * terms.r;
  const bool is_wrong = u > T(0);
  const T q = is_wrong ? terms.r : small;
  const T p = is_wrong ? small : terms.r;
  const T ce = (is_wrong ? u : T(0)) + terms.l;
  const T factor = weight * power<kKind>(q, is_wrong ? T(0) : -u, terms.l, gamma);
  // Without gamma there is no p * ce, which is 0 * inf for an infinite logit.
  return {factor * ce, factor * (kKind == GammaKind::kZero ? q : gamma.value * p * ce + q)};
}

// p_t of a logit and its target.
template <class T>
FASTREMEDY_HD T probability_of_target(T x, T target) {
  const T p = sigmoid(x);
  return target * p + (T(1) - target) * (T(1) - p);
}

// Weights of a class. A hard target takes its positive or its negative side, a soft one a mix.
template <class T>
struct FocalWeights {
  T positive;    // alpha * weight
  T negative;    // (1 - alpha) * weight
  T pos_weight;  // of the cross entropy of positives
};

template <class V>
FASTREMEDY_HD V alpha_of_positives(V alpha) {
  return alpha < 0 ? V(1) : alpha;
}
template <class V>
FASTREMEDY_HD V alpha_of_negatives(V alpha) {
  return alpha < 0 ? V(1) : V(1) - alpha;
}

template <class T>
FASTREMEDY_HD FocalWeights<T> focal_weights(double alpha, double weight, double pos_weight) {
  return {static_cast<T>(alpha_of_positives(alpha) * weight),
          static_cast<T>(alpha_of_negatives(alpha) * weight), static_cast<T>(pos_weight)};
}

// Target 0 or 1: without the divisions and the logarithm that targets between need.
template <GammaKind kKind, class T>
FASTREMEDY_HD LossAndSlope<T> focal_of_hard_target(T x, T e, T target,
                                                   const FocalWeights<T>& weights,
                                                   const Gamma<T>& gamma) {
  const bool is_positive = target > T(0.5);
  const T weight = is_positive ? weights.positive * weights.pos_weight : weights.negative;
  const LossAndSlope<T> of_u = focal_of_logit<kKind>(is_positive ? -x : x, e, weight, gamma);
  return {of_u.loss, is_positive ? -of_u.slope : of_u.slope};
}

template <class T>
FASTREMEDY_HD T smooth(T target, T smoothing, T share) {
  return target * (T(1) - smoothing) + smoothing * share;  // share: of one class if all are alike
}

// Any target in [0, 1], once it is smoothed: p_t = t p + (1 - t) (1 - p).
template <GammaKind kKind, class T>
FASTREMEDY_HD LossAndSlope<T> focal_of_soft_target(T x, T e, T stored_target, T smoothing,
                                                   const FocalWeights<T>& weights,
                                                   const Gamma<T>& gamma) {
  // Each by itself: the difference of a smoothed target from 1 has lost digits.
  const T target = smooth(stored_target, smoothing, T(0.5));
  const T not_target = smooth(T(1) - stored_target, smoothing, T(0.5));
  const LogitTerms<T> terms = logit_terms(e);
  const T small = terms.e * terms.r;
  const bool is_high = x > T(0);
  const T p = is_high ? terms.r : small;
  const T not_p = is_high ? small : terms.r;
  // 1 - p_t = r w, with w from the share of the target on the side of the logit and the rest.
  const T with_logit = is_high ? target : not_target;
  const T against = is_high ? not_target : target;
  const bool is_right = against == T(0);
  const T w = is_right ? terms.e : against + with_logit * terms.e;
  const T q = terms.r * w;
  const LogParts<T> log_w = log_parts(w);
  const T whole = is_right ? std::fabs(x) : -log_w.high;
  const T part = is_right ? terms.l : terms.l - log_w.low;
  const T ce = weights.pos_weight * target * (terms.l + (is_high ? T(0) : -x)) +
               not_target * (terms.l + (is_high ? x : T(0)));
  const T ce_slope = not_target * p - weights.pos_weight * target * not_p;
  const T log_q_slope = (not_target - target) * terms.r * (is_right ? T(1) : terms.e / w);
  const T alpha_t = weights.positive * target + weights.negative * not_target;
  const T factor = alpha_t * power<kKind>(q, whole, part, gamma);
  return {factor * ce, factor * (gamma.value * log_q_slope * ce + ce_slope)};
}

template <class T>
FASTREMEDY_HD bool is_hard(T target) {
  return target == T(0) || target == T(1);
}

// Softmax of a row as its largest logit and the exponentials of the others: probabilities are
// exp(x - max) / (1 + rest). Near p = 1, 1 - p would have no digits left; rest / (1 + rest) has
// all.
template <class T>
struct SoftmaxState {
  T max, rest;
};

// The states of two parts of a row, or of one part (rest 0) and another; -inf is the empty part.
template <class T>
FASTREMEDY_HD SoftmaxState<T> merge(const SoftmaxState<T>& a, const SoftmaxState<T>& b) {
  const bool a_is_higher = !(a.max < b.max);
  const T high = a_is_higher ? a.max : b.max, low = a_is_higher ? b.max : a.max;
  const T high_rest = a_is_higher ? a.rest : b.rest, low_rest = a_is_higher ? b.rest : a.rest;
  // An empty part has no rest, unless NaN came before.
  if (low == -HUGE_VAL) return {high, high_rest + low_rest};
  return {high, high_rest + (low_rest + T(1)) * exp_of_negative(high - low)};
}

// One class of a softmax.
template <class T>
struct ClassTerms {
  T p, q, ce;  // q = 1 - p, ce = -log(p)
};

template <class T>
FASTREMEDY_HD ClassTerms<T> class_terms(T x, const SoftmaxState<T>& state, T log1p_rest) {
  const T total = T(1) + state.rest;
  const T p = exp_of_negative(state.max - x) / total;
  // Only the largest can have p above 1/2.
  return {p, x == state.max ? state.rest / total : T(1) - p, (state.max - x) + log1p_rest};
}

// The loss of a class with weight 1, and what its gradient p_j - [j = t] is multiplied by.
template <class T>
FASTREMEDY_HD LossAndSlope<T> focal_of_class(const ClassTerms<T>& t, T factor, T gamma) {
  const T ce_by_q = t.q > T(0) ? t.ce / t.q : T(1);                   // -log(1 - q) / q -> 1
  const T times = t.p == T(0) ? T(1) : T(1) + gamma * t.p * ce_by_q;  // a logit of -inf
  return {factor * t.ce, factor * times};
}

// (1 - p)^gamma of one class of many: accurate for p <= 1/2, where log(q) is small.
template <GammaKind kKind, class T>
FASTREMEDY_HD T power_of_class(const ClassTerms<T>& t, const Gamma<T>& gamma) {
  const LogParts<T> log_q = log_parts(t.q);
  return power<kKind>(t.q, -log_q.high, -log_q.low, gamma);
}

// The same once a row, for every p: by the library's pow.
template <class T>
FASTREMEDY_HD T power_of_label(T q, const Gamma<T>& gamma) {
  if (gamma.value == T(0) || gamma.value == T(1) || gamma.value == T(2)) {
    return gamma.value == T(0) ? T(1) : gamma.value == T(1) ? q : q * q;
  }
  const T power = ::pow(q, gamma.value);
  return q > T(0) ? power * (T(1) + gamma.low * log_of(q)) : power;
}

}  // namespace fastremedy
