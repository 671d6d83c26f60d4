// One call of batch normalisation: its case, its tensors, and what the formula makes of an element.
#pragma once

#include "../core/batch_norm_relu.h"
#include "check.h"

namespace fastremedy::check {

using Wide = long double;

struct Case {
  BatchNormShape shape;
  Activation activation;
  bool training, in_phases, cumulative;
  bool has_residual, has_mask, has_dead, has_affine, has_running;
  bool is_misaligned, has_nan;
  bool wants_grad_input, wants_grad_residual;
  DType param_dtype;
  double mean;
};

// In a group of two ranks with the same elements every sum is twice that of one.
inline constexpr double kRanks = 2;

inline Wide activate_exactly(Activation activation, Wide z, Wide slope) {
  if (z != z) return z;
  switch (activation) {
    case Activation::kIdentity:
      return z;
    case Activation::kReLU:
      return z > 0 ? z : 0;
    case Activation::kLeakyReLU:
      return z > 0 ? z : z * slope;
    case Activation::kELU:
      return z > 0 ? z : std::expm1(z);
    case Activation::kSiLU:
      return z / (1 + std::exp(-z));
  }
  return z;
}

inline Wide slope_exactly(Activation activation, Wide z, Wide slope) {
  const Wide s = 1 / (1 + std::exp(-z));
  switch (activation) {
    case Activation::kIdentity:
      return 1;
    case Activation::kReLU:
      return z > 0;
    case Activation::kLeakyReLU:
      return z > 0 ? 1 : slope;
    case Activation::kELU:
      return z > 0 ? 1 : std::exp(z);
    case Activation::kSiLU:
      return s * (1 + z * (1 - s));
  }
  return 1;
}

template <class T, class Use>
auto with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::kReLU:
      return use(std::integral_constant<Activation, Activation::kReLU>());
    case Activation::kLeakyReLU:
      return use(std::integral_constant<Activation, Activation::kLeakyReLU>());
    case Activation::kELU:
      return use(std::integral_constant<Activation, Activation::kELU>());
    case Activation::kSiLU:
      return use(std::integral_constant<Activation, Activation::kSiLU>());
    default:
      return use(std::integral_constant<Activation, Activation::kIdentity>());
  }
}

inline bool is_near(Wide actual, Wide expected, Wide tolerance) {
  return expected != expected ? actual != actual : std::fabs(actual - expected) <= tolerance;
}

inline bool same(double a, double b) { return a == b || (a != a && b != b); }

template <class T>
class BatchNormCall {
 public:
  BatchNormCall(const Case& c, unsigned seed) : c_(c), random_(seed) {
    const int64_t channels = shape().channels;
    numel_ = shape().count() * channels;
    input_ = elements(c_.mean, 1);
    if (c_.has_nan && numel_ > 0) {
      set(input_, shape().dtype, numel_ / 2, std::numeric_limits<double>::quiet_NaN());
    }
    if (c_.has_residual) residual_ = elements(0, 1);
    output_ = elements(0, 0);
    grad_output_ = elements(0.1, 1);
    grad_input_ = elements(0, 0);
    grad_residual_ = elements(0, 0);
    mask_bytes_ = shape().num_rows() * shape().mask_row_size();
    mask_ = c_.has_mask ? memory_.upload(std::vector<uint8_t>(mask_bytes_, 0xee)) : nullptr;
    dead_ = c_.has_dead ? memory_.upload(std::vector<int64_t>(channels)) : nullptr;
    num_batches_tracked_ = memory_.upload(std::vector<int64_t>{4});
    saved_ = memory_.upload(std::vector<T>(4 * channels, T(-7)));
    sums_ = memory_.upload(std::vector<double>(2 * channels + 1, -7));
    if (c_.has_affine) {
      weight_ = values(1, 0.5);
      bias_ = values(0, 0.5);
      grad_weight_ = values(0, 0);
      grad_bias_ = values(0, 0);
    }
    if (c_.has_running || !c_.training) {
      running_mean_ = values(c_.mean, 0.5);
      running_var_ = values(2, 0.2);
    }
    const cuda::BatchNormScratchSize size = cuda::batch_norm_scratch_size(shape());
    scratch_.counters = memory_.upload(std::vector<uint32_t>(size.num_counters));
    scratch_.partials = memory_.allocate(size.partial_bytes);
    num_counters_ = size.num_counters;
  }

 protected:
  static constexpr Wide kTolerance = sizeof(T) == 4 ? 1e-6 : 1e-12;
  static constexpr double kEps = 1e-5, kSlope = 0.01, kMomentum = 0.3;

  const BatchNormShape& shape() const { return c_.shape; }

  std::string name(const std::string& what, int64_t i = -1) const {
    const auto number = [](int64_t n) { return std::to_string(n); };
    return "batch_norm_relu " + number(shape().batch) + "x" + number(shape().channels) + "x" +
           number(shape().spatial) + (shape().channels_last ? " channels last " : " contiguous ") +
           name_of(shape().dtype) + " activation " + number(static_cast<int>(c_.activation)) +
           (c_.training ? "" : " eval") + (c_.in_phases ? " in phases" : "") +
           (c_.has_residual ? " residual" : "") + (c_.has_mask ? " mask" : "") +
           (c_.is_misaligned ? " misaligned" : "") + (c_.has_nan ? " nan: " : ": ") + what +
           (i < 0 ? "" : " at " + number(i));
  }

  void* elements(double mean, double std) {
    const int size = element_size(shape().dtype);
    void* const data = memory_.allocate(numel_ * size, c_.is_misaligned ? size : 0);
    std::normal_distribution<double> normal(mean, std);
    for (int64_t i = 0; i < numel_; ++i) {
      set(data, shape().dtype, i, std == 0 ? -7 : normal(random_));
    }
    return data;
  }

  ChannelValues values(double mean, double spread) {
    void* const data = memory_.allocate(shape().channels * element_size(c_.param_dtype));
    std::uniform_real_distribution<double> uniform(mean - spread, mean + spread);
    for (int64_t c = 0; c < shape().channels; ++c) {
      set(data, c_.param_dtype, c, spread == 0 ? -7 : uniform(random_));
    }
    return {data, c_.param_dtype, 0};
  }
  static double get(const ChannelValues& v, int64_t c, double otherwise) {
    return v.data ? check::get(v.data, v.dtype, c) : otherwise;
  }
  std::vector<double> copy(const ChannelValues& v) const {
    std::vector<double> result;
    for (int64_t c = 0; v.data && c < shape().channels; ++c) result.push_back(get(v, c, 0));
    return result;
  }

  double at(const void* data, int64_t i) const { return check::get(data, shape().dtype, i); }
  int64_t channel_of(int64_t i) const {
    return shape().channels_last ? i % shape().channels : i / shape().spatial % shape().channels;
  }
  bool mask_bit(int64_t i) const {
    const int64_t column = i % shape().row_size();
    const int64_t row = i / shape().row_size();
    return mask_[row * shape().mask_row_size() + column / 8] >> (column % 8) & 1;
  }
  ChannelStatistics<T> saved(int64_t c) const {
    const int64_t n = shape().channels;
    return {saved_[c], saved_[n + c], saved_[2 * n + c], saved_[3 * n + c]};
  }
  T z_of(int64_t i) const {
    const int64_t c = channel_of(i);
    const auto n =
        normalizer(saved(c), static_cast<T>(get(weight_, c, 1)), static_cast<T>(get(bias_, c, 0)));
    const T z = normalize(static_cast<T>(at(input_, i)), n.mean, n.scale, n.shift);
    return residual_ ? z + static_cast<T>(at(residual_, i)) : z;
  }
  double stored(T value) const {
    double bits = 0;
    check::set(&bits, shape().dtype, 0, value);
    return check::get(&bits, shape().dtype, 0);
  }

  const Case c_;
  std::mt19937 random_;
  Memory memory_;
  int64_t numel_, mask_bytes_;
  size_t num_counters_;
  void *input_, *residual_ = nullptr, *output_, *grad_output_, *grad_input_, *grad_residual_;
  uint8_t* mask_;
  int64_t *dead_, *num_batches_tracked_;
  T* saved_;
  double* sums_;
  ChannelValues weight_{}, bias_{}, grad_weight_{}, grad_bias_{}, running_mean_{}, running_var_{};
  cuda::BatchNormScratch scratch_;
};

}  // namespace fastremedy::check
