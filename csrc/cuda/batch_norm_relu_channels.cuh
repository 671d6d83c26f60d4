// Values of channels in memory, and the activation.
#pragma once

#include <type_traits>

#include "../core/arguments.h"
#include "runtime.cuh"

namespace fastremedy::cuda {

FASTREMEDY_DEVICE double get(const ChannelValues& values, int64_t channel, double otherwise) {
  if (values.data == nullptr) return otherwise;
  switch (values.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(values.data)[channel];
    case DType::kFloat64:
      return static_cast<const double*>(values.data)[channel];
    case DType::kFloat16:
      return float16_to_float(static_cast<const uint16_t*>(values.data)[channel]);
    case DType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(values.data)[channel]);
  }
  return otherwise;
}

FASTREMEDY_DEVICE void set(const ChannelValues& values, int64_t channel, double value) {
  const auto narrow = static_cast<float>(value);
  switch (values.dtype) {
    case DType::kFloat32:
      static_cast<float*>(values.data)[channel] = narrow;
      break;
    case DType::kFloat64:
      static_cast<double*>(values.data)[channel] = value;
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(values.data)[channel] = float_to_float16(narrow);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(values.data)[channel] = float_to_bfloat16(narrow);
      break;
  }
}

template <class T>
FASTREMEDY_DEVICE ChannelStatistics<T> load_statistics(const void* saved, int64_t channels,
                                                       int64_t channel) {
  const T* const s = static_cast<const T*>(saved) + channel;
  return {s[0], s[channels], s[2 * channels], s[3 * channels]};
}

template <class T>
FASTREMEDY_DEVICE void store_statistics(void* saved, int64_t channels, int64_t channel,
                                        const ChannelStatistics<T>& statistics) {
  T* const s = static_cast<T*>(saved) + channel;
  s[0] = statistics.mean;
  s[channels] = statistics.mean_low;
  s[2 * channels] = statistics.invstd;
  s[3 * channels] = statistics.variance;
}

template <class T>
FASTREMEDY_DEVICE Normalizer<T> load_normalizer(const ChannelStatistics<T>& statistics,
                                                const ChannelValues& weight,
                                                const ChannelValues& bias, int64_t channel) {
  return normalizer(statistics, static_cast<T>(get(weight, channel, 1)),
                    static_cast<T>(get(bias, channel, 0)));
}

// use(activation) with a constant of the compiler: one decision for all elements of a lane. Some
// activations only need the sign of z.
template <bool kHasZ, class Use>
FASTREMEDY_DEVICE void with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::kIdentity:
      return use(std::integral_constant<Activation, Activation::kIdentity>());
    case Activation::kReLU:
      return use(std::integral_constant<Activation, Activation::kReLU>());
    case Activation::kLeakyReLU:
      return use(std::integral_constant<Activation, Activation::kLeakyReLU>());
    case Activation::kELU:
      if constexpr (kHasZ) use(std::integral_constant<Activation, Activation::kELU>());
      return;
    case Activation::kSiLU:
      if constexpr (kHasZ) use(std::integral_constant<Activation, Activation::kSiLU>());
      return;
  }
}

}  // namespace fastremedy::cuda
