// Batch normalisation (Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167) with what follows
// it in most networks:
//
//   z = (x - mean) * invstd * weight + bias + residual        y = activation(z)
//   g = dy * activation'(z)                                   dresidual = g
//   dx = weight * invstd * (g - mean(g) - (x - mean) * invstd^2 * mean(g * (x - mean)))
//
// T is what elements are computed in: float, or double for float64. Forward and backward find z by
// the one function `normalize`, so the sign of z is the same in both, to the bit.
//
// Statistics are sums about a pilot, a value close to the mean: sum(x - pilot) and
// sum((x - pilot)^2). Partial sums merge by addition, there is no division on the way, and nothing
// cancels however far the mean is from zero. The mean is kept in two parts, mean + mean_low: one
// float alone is off by 6e-4 standard deviations where the mean is 1e4 of them.
#pragma once

#include <cmath>

#include "exponential.h"
#include "types.h"

namespace fastremedy {

enum class Activation : int32_t { kIdentity = 0, kReLU = 1, kLeakyReLU = 2, kELU = 3, kSiLU = 4 };

// The pilot is the mean of a channel's first elements: a single one may lie far out.
inline constexpr int kPilotElements = 16;

// --- per channel ---

// About an infinite pilot all sums would be NaN, and hide what the mean is.
template <class T>
FASTREMEDY_HD T usable_pilot(T mean) {
  return mean - mean == T(0) ? mean : T(0);
}

// z = (x - mean) * scale + shift, before a residual is added.
template <class T>
struct Normalizer {
  T mean;
  T scale;
  T shift;
};

// dx = g * g_scale + (x - mean) * x_scale + shift.
template <class T>
struct InputGrad {
  T mean;
  T g_scale;
  T x_scale;
  T shift;
};

template <class T>
struct ChannelStatistics {
  T mean;
  T mean_low;  // what rounding took from the mean
  T invstd;
  T variance;  // biased
};

// count >= 1; the sums are about the pilot.
template <class T>
FASTREMEDY_HD ChannelStatistics<T> channel_statistics(double count, double pilot, double sum,
                                                      double sum_of_squares, double eps) {
  const double inv_count = 1 / count;  // the same for all channels: out of a loop over them
  const double offset = sum * inv_count;
  const double mean = pilot + offset;
  double variance = sum_of_squares * inv_count - offset * offset;
  variance = variance < 0 ? 0 : variance;  // NaN stays
  ChannelStatistics<T> s;
  s.mean = static_cast<T>(mean);
  // Of an infinite or NaN mean nothing is left over: it has to reach the output as it is.
  s.mean_low =
      mean - mean == 0 ? static_cast<T>((pilot - static_cast<double>(s.mean)) + offset) : T(0);
  s.invstd = static_cast<T>(1 / ::sqrt(variance + eps));
  s.variance = static_cast<T>(variance);
  return s;
}

template <class T>
FASTREMEDY_HD Normalizer<T> normalizer(const ChannelStatistics<T>& s, T weight, T bias) {
  const T scale = s.invstd * weight;
  return {s.mean, scale, bias - s.mean_low * scale};
}

// sum_g = sum(g), sum_gx = sum(g * (x - mean)) with the rounded mean.
template <class T>
FASTREMEDY_HD double centered_sum(const ChannelStatistics<T>& s, double sum_g, double sum_gx) {
  return sum_gx - static_cast<double>(s.mean_low) * sum_g;
}

// sum_gx is centered. In evaluation the statistics are constants, and only g_scale is used.
template <class T>
FASTREMEDY_HD InputGrad<T> input_grad(const ChannelStatistics<T>& s, T weight, double count,
                                      double sum_g, double sum_gx) {
  const double inv_count = 1 / count, invstd = s.invstd;
  const double g_scale = invstd * static_cast<double>(weight);
  const double x_scale = -g_scale * invstd * invstd * (sum_gx * inv_count);
  const double shift = -g_scale * (sum_g * inv_count) - x_scale * static_cast<double>(s.mean_low);
  return {s.mean, static_cast<T>(g_scale), static_cast<T>(x_scale), static_cast<T>(shift)};
}

// The unbiased variance of one element is not a number, as in torch.
FASTREMEDY_HD double unbiased(double variance, double count) {
  return variance * (count / (count - 1));
}

FASTREMEDY_HD double moving_average(double running, double value, double momentum) {
  return (1 - momentum) * running + momentum * value;
}

// --- per element ---

template <class T>
FASTREMEDY_HD T normalize(T x, T mean, T scale, T shift) {
#ifdef __CUDA_ARCH__
  return ::fma(x - mean, scale, shift);  // not left to the compiler, kernel by kernel
#else
  // One rounding where the machine can: compilers fuse this into a multiply-add.
  return (x - mean) * scale + shift;
#endif
}

// Half of the smallest positive number of the dtype: what is not above rounds to zero or below, and
// torch decides on the rounded value.
template <class T>
FASTREMEDY_HD T zero_threshold(DType dtype) {
  return dtype == DType::kFloat16 ? T(0x1p-25) : dtype == DType::kBFloat16 ? T(0x1p-134) : T(0);
}

// True for NaN, which ReLU passes in both directions.
template <class T>
FASTREMEDY_HD bool is_positive(T z, T threshold) {
  return !(z <= threshold);
}

// Whether the gradient stays as it is. At NaN leaky ReLU scales it, as torch does.
template <Activation kActivation, class T>
FASTREMEDY_HD bool keeps_grad(T z, T threshold) {
  return kActivation == Activation::kLeakyReLU ? z > threshold : is_positive(z, threshold);
}

template <Activation kActivation, class T>
FASTREMEDY_HD T activate(T z, T threshold, T negative_slope) {
  switch (kActivation) {
    case Activation::kIdentity:
      return z;
    case Activation::kReLU:
      return is_positive(z, threshold) ? z : T(0);
    case Activation::kLeakyReLU:
      return is_positive(z, threshold) ? z : z * negative_slope;
    case Activation::kELU:
      return z > T(0) ? z : expm1_of(z);
    case Activation::kSiLU:
      return z * sigmoid(z);
  }
  return z;
}

// What a gradient is multiplied by.
template <Activation kActivation, class T>
FASTREMEDY_HD T activation_slope(T z, T threshold, T negative_slope) {
  switch (kActivation) {
    case Activation::kIdentity:
      return T(1);
    case Activation::kReLU:
      return keeps_grad<kActivation>(z, threshold) ? T(1) : T(0);
    case Activation::kLeakyReLU:
      return keeps_grad<kActivation>(z, threshold) ? T(1) : negative_slope;
    case Activation::kELU:
      return z > T(0) ? T(1) : exp_of(z);
    case Activation::kSiLU: {
      const T s = sigmoid(z);
      return s * (T(1) + z * (T(1) - s));
    }
  }
  return T(1);
}

// value, or 0. Not as a choice of two values: of that GCC makes a branch, which no loop is
// vectorised with.
FASTREMEDY_HD float keep_if(bool condition, float value) {
  return bit_cast<float>(bit_cast<uint32_t>(value) & (0u - static_cast<uint32_t>(condition)));
}
FASTREMEDY_HD double keep_if(bool condition, double value) {
  return bit_cast<double>(bit_cast<uint64_t>(value) & (0ull - static_cast<uint64_t>(condition)));
}

// ReLU drops a gradient, also an infinite one: 0 * inf would be NaN.
template <Activation kActivation, class T>
FASTREMEDY_HD T activation_grad(T z, T grad, T threshold, T negative_slope) {
  if (kActivation == Activation::kReLU) return keep_if(keeps_grad<kActivation>(z, threshold), grad);
  return grad * activation_slope<kActivation>(z, threshold, negative_slope);
}

// dx, see InputGrad. Where the statistics are constants a NaN of x must not reach its gradient.
template <class T>
FASTREMEDY_HD T input_grad_of(bool batch_statistics, T g, T centered, T g_scale, T x_scale,
                              T shift) {
  return batch_statistics ? g * g_scale + (centered * x_scale + shift) : g * g_scale;
}

}  // namespace fastremedy
