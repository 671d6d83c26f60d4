// AdamW (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101) and Adam (Kingma & Ba, 2015):
//
//   g  = gradient * grad_factor                   clipping, loss scale and maximize in one factor
//   g += l2 * p                                   Adam only: weight decay as part of the loss
//   m += (1 - beta1) * (g - m)
//   v += (1 - beta2) * (g * g - v)
//   p -= lr * weight_decay * p + step_size * m / (sqrt(v) * inv_sqrt_bias_correction2 + eps)
//
// State is stored in any floating type and updated in T (float, or double for float64 parameters).
// NaN and infinity propagate. Written as differences, m and v have exact fixed points and p is
// rounded once: `p * (1 - lr * weight_decay)` would round the decay itself to a multiple of 2^-24.
#pragma once

#include <cmath>

#include "noise.h"
#include "types.h"

namespace fastremedy {

// What one parameter group asks for. `lr_tensor`, where set, is read by the device.
struct AdamWHyper {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  const float* lr_tensor;
  int32_t maximize;
  int32_t amsgrad;
  int32_t decoupled_weight_decay;
  int32_t padding;
};

// How a parameter narrower than float keeps what rounding takes from it.
enum class Rounding : int32_t { kNearest = 0, kStochastic = 1, kKahan = 2, kMaster = 3 };

// One parameter: what stays the same from step to step. Elements are in memory order: parameter,
// state and gradient share one dense layout.
struct AdamWTensor {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* residual;        // Kahan compensation or float32 master, null without
  float* step;
  int64_t numel;
  DType param_dtype;  // gradients have it too
  DType state_dtype;  // of the three moments
  int32_t group;
  uint32_t noise_stream;
};

// What a step did to one parameter: sums over its elements. The value of an element is what the
// next step would read, with Kahan's compensation or the master where there is one.
struct UpdateStats {
  double grad_sq;    // of the gradient as it is in memory, before any factor
  double weight_sq;  // of the values before the step
  double update_sq;  // of their changes
  double moved;      // number of values that changed
  double stuck;      // number of values that did not, though their gradient is not 0
};
inline constexpr int kNumUpdateStats = 5;
static_assert(sizeof(UpdateStats) == kNumUpdateStats * sizeof(double), "rows of float64");

FASTREMEDY_HD void add_element(UpdateStats& sums, double grad, double before, double after) {
  const double change = after - before;
  const bool has_moved = !(after == before);  // NaN counts as moved
  sums.grad_sq += grad * grad;
  sums.weight_sq += before * before;
  sums.update_sq += change * change;
  sums.moved += has_moved ? 1.0 : 0.0;
  sums.stuck += !has_moved && grad != 0.0 ? 1.0 : 0.0;
}

FASTREMEDY_HD void add_sums(UpdateStats& sums, const UpdateStats& others) {
  sums.grad_sq += others.grad_sq;
  sums.weight_sq += others.weight_sq;
  sums.update_sq += others.update_sq;
  sums.moved += others.moved;
  sums.stuck += others.stuck;
}

// What depends on the step: computed once per parameter, in double.
struct AdamWCorrection {
  double step_size;
  double inv_sqrt_bias_correction2;
  double lr;
};

FASTREMEDY_HD AdamWCorrection adamw_correction(const AdamWHyper& hyper, double step) {
  const double lr = hyper.lr_tensor ? static_cast<double>(*hyper.lr_tensor) : hyper.lr;
  const double bias_correction1 = 1.0 - ::pow(hyper.beta1, step);
  const double bias_correction2 = 1.0 - ::pow(hyper.beta2, step);
  return {lr / bias_correction1, 1.0 / ::sqrt(bias_correction2), lr};
}

template <class T>
struct AdamWCoefficients {
  T grad_factor;
  T l2;
  T decay;
  T one_minus_beta1;
  T one_minus_beta2;
  T step_size;
  T inv_sqrt_bias_correction2;
  T eps;
};

template <class T>
FASTREMEDY_HD AdamWCoefficients<T> adamw_coefficients(const AdamWHyper& hyper,
                                                      const AdamWCorrection& correction,
                                                      double grad_factor) {
  const bool decoupled = hyper.decoupled_weight_decay != 0;
  AdamWCoefficients<T> c;
  c.grad_factor = static_cast<T>(hyper.maximize ? -grad_factor : grad_factor);
  c.l2 = static_cast<T>(decoupled ? 0.0 : hyper.weight_decay);
  c.decay = static_cast<T>(decoupled ? correction.lr * hyper.weight_decay : 0.0);
  c.one_minus_beta1 = static_cast<T>(1.0 - hyper.beta1);
  c.one_minus_beta2 = static_cast<T>(1.0 - hyper.beta2);
  c.step_size = static_cast<T>(correction.step_size);
  c.inv_sqrt_bias_correction2 = static_cast<T>(correction.inv_sqrt_bias_correction2);
  c.eps = static_cast<T>(hyper.eps);
  return c;
}

// start + weight * (end - start), from the nearer end: weight 1 gives `end` exactly.
template <class T>
FASTREMEDY_HD T lerp(T start, T end, T weight) {
  const bool near_start = weight < T(0.5);
  const T base = near_start ? start : end;
  const T rest = near_start ? weight : weight - T(1);
  return base + rest * (end - start);
}

template <bool kAmsgrad, class T>
FASTREMEDY_HD void adamw_update(const AdamWCoefficients<T>& c, T grad, T& param, T& exp_avg,
                                T& exp_avg_sq, T& max_exp_avg_sq) {
  grad = grad * c.grad_factor;
  grad = c.l2 == T(0) ? grad : grad + c.l2 * param;
  exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);
  const T grad_sq = grad * grad;
  // An infinite second moment stays infinite (infinity - infinity would make it NaN).
  const bool is_infinite = exp_avg_sq - exp_avg_sq != T(0) && exp_avg_sq == exp_avg_sq;
  exp_avg_sq = is_infinite ? exp_avg_sq + grad_sq : lerp(exp_avg_sq, grad_sq, c.one_minus_beta2);
  T second_moment = exp_avg_sq;
  if (kAmsgrad) {
    const bool grows = exp_avg_sq > max_exp_avg_sq || exp_avg_sq != exp_avg_sq;
    max_exp_avg_sq = grows ? exp_avg_sq : max_exp_avg_sq;
    second_moment = max_exp_avg_sq;
  }
  using std::sqrt;
  const T denom = sqrt(second_moment) * c.inv_sqrt_bias_correction2 + c.eps;
  // An infinite parameter stays infinite, too.
  const T decay = param - param == T(0) ? c.decay * param : T(0);
  param -= decay + c.step_size * (exp_avg / denom);
}

}  // namespace fastremedy
