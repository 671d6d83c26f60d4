// What a check of AdamW needs beside the kernels: stored elements in plain arithmetic, and what a
// step did.
#pragma once

#include "../core/adamw.h"
#include "check.h"

namespace fastremedy::check {

struct DTypes {
  DType param, state;
};

inline constexpr DTypes kDTypes[] = {
    {DType::kFloat32, DType::kFloat32},   {DType::kFloat32, DType::kBFloat16},
    {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32},
    {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
    {DType::kFloat64, DType::kFloat64},   {DType::kFloat64, DType::kBFloat16}};

inline bool is_narrow(DType dtype) { return element_size(dtype) == 2; }

inline double stored_as(DType dtype, double value) {
  return round_to(dtype, is_narrow(dtype) ? static_cast<float>(value) : value);
}

// Up with the probability of the cut part: 16 bits of noise, 13 for float16.
inline double round_stochastic(DType dtype, double value, uint32_t noise) {
  const bool is_float16 = dtype == DType::kFloat16;
  const double unit = spacing(dtype, value);
  const double fraction = is_float16 ? (noise & 0x1fff) / 8192.0 : (noise & 0xffff) / 65536.0;
  double units = std::fabs(value) / unit + fraction;
  if (is_float16 && std::fabs(value) < std::ldexp(1.0, -14)) units = static_cast<float>(units);
  return std::copysign(std::floor(units) * unit, value);
}

// One tensor's arrays as they were before a step.
struct Before {
  std::vector<double> params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residuals;
  double step;
};

// The value that a stored parameter stands for.
inline double value_of(const Before& state, DType dtype, Rounding rounding, size_t i) {
  const double param = state.params[i];
  if (state.residuals.empty()) return param;
  const double residual = state.residuals[i];
  if (rounding == Rounding::kKahan) return static_cast<float>(param + residual);
  return round_to(dtype, residual) == param ? residual : param;
}

// What a step did to one tensor, by its definition.
class ExpectedUpdate {
 public:
  void add(long double grad, long double before, long double after) {
    const bool has_moved = !(before == after);
    grad_sq_ += grad * grad;
    weight_sq_ += before * before;
    update_sq_ += (after - before) * (after - before);
    moved_ += has_moved;
    stuck_ += !has_moved && grad != 0;
  }

  // A partial adds up 65536 squares at most, in any order.
  bool matches(const UpdateStats& actual) const {
    constexpr double kTolerance = 1e-11;
    return is_close(actual.grad_sq, grad_sq_, kTolerance) &&
           is_close(actual.weight_sq, weight_sq_, kTolerance) &&
           is_close(actual.update_sq, update_sq_, kTolerance) && actual.moved == moved_ &&
           actual.stuck == stuck_;
  }

 private:
  long double grad_sq_ = 0, weight_sq_ = 0, update_sq_ = 0;
  int64_t moved_ = 0, stuck_ = 0;
};

}  // namespace fastremedy::check
