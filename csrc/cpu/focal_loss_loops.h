// Loops of the focal loss over blocks in L1, without memory movement.
#pragma once

#include <type_traits>

#include "../core/arguments.h"
#include "simd.h"

namespace fastremedy::cpu {

// Weights of the elements of a block, one array for each member of FocalWeights.
template <class T>
struct ElementWeights {
  const T *positive, *negative, *pos_weight;

  FocalWeights<T> operator[](int64_t i) const { return {positive[i], negative[i], pos_weight[i]}; }
};

// The same for all elements.
template <class T>
struct UniformWeights {
  FocalWeights<T> weights;

  FocalWeights<T> operator[](int64_t) const { return weights; }
};

template <class T>
FASTREMEDY_CLONES void exp_of_logits(const T* __restrict x, int64_t n, T* __restrict e) {
  for (int64_t i = 0; i < n; ++i) e[i] = exp_of_logit(x[i]);
}

template <GammaKind kKind, class T, class Weights>
FASTREMEDY_CLONES void focal_of_hard_targets(const T* __restrict x, const T* __restrict e,
                                             const T* __restrict targets, int64_t n,
                                             Weights weights, Gamma<T> gamma, T scale,
                                             T* __restrict losses, T* __restrict grads) {
  for (int64_t i = 0; i < n; ++i) {
    const auto of_x = focal_of_hard_target<kKind>(x[i], e[i], targets[i], weights[i], gamma);
    losses[i] = of_x.loss;
    grads[i] = of_x.slope * scale;
  }
}

template <GammaKind kKind, class T, class Weights>
FASTREMEDY_CLONES void focal_of_soft_targets(const T* __restrict x, const T* __restrict e,
                                             const T* __restrict targets, int64_t n, T smoothing,
                                             Weights weights, Gamma<T> gamma, T scale,
                                             T* __restrict losses, T* __restrict grads) {
  for (int64_t i = 0; i < n; ++i) {
    const auto of_x =
        focal_of_soft_target<kKind>(x[i], e[i], targets[i], smoothing, weights[i], gamma);
    losses[i] = of_x.loss;
    grads[i] = of_x.slope * scale;
  }
}

// Whether all targets are 0 or 1: there t - t * t has no bit.
template <class T>
FASTREMEDY_CLONES bool are_hard(const T* __restrict targets, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= bit_cast<Bits>(targets[i] - targets[i] * targets[i]);
  return bits == 0;
}

template <class T>
FASTREMEDY_CLONES int64_t count_equal(const T* __restrict values, int64_t n, T wanted) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += values[i] == wanted;
  return count;
}

template <class T>
FASTREMEDY_CLONES void multiply(T* __restrict values, const T* __restrict factors, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] *= factors[i];
}

// Four vectors of lanes, so that additions need not wait for each other; at most 16 follow.
template <class T>
FASTREMEDY_CLONES T sum_block(const T* __restrict values, int64_t n) {
  Lanes<T> sums[4];
  int64_t i = 0;
  for (; i + 4 * kNumLanes<T> <= n; i += 4 * kNumLanes<T>) {
    for (int64_t k = 0; k < 4; ++k) sums[k].add(Lanes<T>::load(values + i + k * kNumLanes<T>));
  }
  for (; i + kNumLanes<T> <= n; i += kNumLanes<T>) sums[0].add(Lanes<T>::load(values + i));
  T rest = 0;
  for (; i < n; ++i) rest += values[i];
  sums[0].add(sums[1]);
  sums[2].add(sums[3]);
  sums[0].add(sums[2]);
  return sum_of(sums[0]) + rest;
}

}  // namespace fastremedy::cpu
