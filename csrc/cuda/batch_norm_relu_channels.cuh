// Statistics of channels in memory, and the activation.
#pragma once

#include <type_traits>

#include "channel_values.cuh"

namespace fastremedy::cuda {

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
  return normalizer(statistics, get<T>(weight, channel, 1), get<T>(bias, channel, 0));
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
