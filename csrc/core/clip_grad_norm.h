// The p-norm of all gradients as one vector, and what follows from it:
//
//   total_norm = (sum |g|^p)^(1/p)                inf: max |g|, -inf: min |g|, 0: number of g != 0
//   clip_coef  = min(1, max_norm / (total_norm + 1e-6))
//
// Each chunk of a tensor gives one partial in double at a fixed place; adding them in that order
// makes the norm bitwise the same for any number of threads or blocks. The sums of two partials can
// not overflow: float32 gradients of 1e20 square to 1e40.
#pragma once

#include <cmath>

#include "types.h"

namespace fastremedy {

enum class NormKind : int32_t { kNone = 0, kL1 = 1, kL2 = 2, kMax = 3, kGeneral = 4 };

inline NormKind norm_kind(double norm_type) {
  if (norm_type == 1.0) return NormKind::kL1;
  if (norm_type == 2.0) return NormKind::kL2;
  return norm_type == HUGE_VAL ? NormKind::kMax : NormKind::kGeneral;
}

// What clipping, loss scale and checks make of the gradients: written once per call.
struct ClipResult {
  double total_norm;   // of the unscaled gradients
  double grad_factor;  // clip_coef / grad_scale
  int32_t skip;        // 1: leave everything as it is
  int32_t is_clipped;  // 1: clip_coef < 1 or NaN
};

struct ClipOptions {
  double max_norm;  // infinity: no clipping
  double norm_type;
  int32_t skip_nonfinite;
  DType grad_scale_dtype;  // float32 or float64
  const void* grad_scale;  // null: 1
  const float* found_inf;  // null: 0; any non-zero value skips
};

// NaN of either side wins, as torch.linalg.vector_norm has it.
FASTREMEDY_HD double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }
FASTREMEDY_HD double min_or_nan(double a, double b) { return a < b || a != a ? a : b; }

// The contribution of one element to a partial of NormKind::kGeneral.
FASTREMEDY_HD double norm_term(double magnitude, double norm_type) {
  if (norm_type == 0.0) return magnitude != 0.0 ? 1.0 : 0.0;
  if (norm_type == -HUGE_VAL) return magnitude;
  return ::pow(magnitude, norm_type);
}

FASTREMEDY_HD double norm_identity(NormKind kind, double norm_type) {
  return kind == NormKind::kGeneral && norm_type == -HUGE_VAL ? HUGE_VAL : 0.0;
}

FASTREMEDY_HD double norm_combine(NormKind kind, double norm_type, double a, double b) {
  if (kind == NormKind::kMax) return max_or_nan(a, b);
  if (kind == NormKind::kGeneral && norm_type == -HUGE_VAL) return min_or_nan(a, b);
  return a + b;
}

FASTREMEDY_HD double norm_finish(NormKind kind, double norm_type, double total) {
  if (kind == NormKind::kL2) return ::sqrt(total);
  if (kind != NormKind::kGeneral || norm_type == 0.0 || norm_type == -HUGE_VAL) return total;
  return ::pow(total, 1.0 / norm_type);
}

FASTREMEDY_HD bool is_finite(double value) { return value - value == 0.0; }

FASTREMEDY_HD double grad_scale_of(const ClipOptions& options) {
  if (options.grad_scale == nullptr) return 1.0;
  return options.grad_scale_dtype == DType::kFloat64
             ? *static_cast<const double*>(options.grad_scale)
             : static_cast<double>(*static_cast<const float*>(options.grad_scale));
}

// scaled_norm: of the gradients as they stand, still multiplied by the loss scale.
FASTREMEDY_HD ClipResult clip_result(const ClipOptions& options, double scaled_norm) {
  const double inv_scale = 1.0 / grad_scale_of(options);
  ClipResult result;
  result.total_norm = scaled_norm * inv_scale;
  const double coef = options.max_norm / (result.total_norm + 1e-6);
  result.is_clipped = options.max_norm != HUGE_VAL && !(coef >= 1.0);
  result.grad_factor = result.is_clipped ? coef * inv_scale : inv_scale;
  const bool found_inf = options.found_inf && !(*options.found_inf == 0.0f);
  result.skip = found_inf || (options.skip_nonfinite && !is_finite(result.total_norm));
  return result;
}

}  // namespace fastremedy
