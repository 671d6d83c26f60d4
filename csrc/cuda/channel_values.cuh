// Values of channels in memory, of every dtype.
#pragma once

#include "../core/arguments.h"
#include "runtime.cuh"

namespace fastremedy::cuda {

// use(value) with a float, or a double where memory has one: double is slow on many devices.
template <class Use>
FASTREMEDY_DEVICE void with_value(const ChannelValues& values, int64_t channel, Use use) {
  switch (values.dtype) {
    case DType::kFloat32:
      return use(static_cast<const float*>(values.data)[channel]);
    case DType::kFloat64:
      return use(static_cast<const double*>(values.data)[channel]);
    case DType::kFloat16:
      return use(float16_to_float(static_cast<const uint16_t*>(values.data)[channel]));
    case DType::kBFloat16:
      return use(bfloat16_to_float(static_cast<const uint16_t*>(values.data)[channel]));
  }
}

template <class T>
FASTREMEDY_DEVICE T get(const ChannelValues& values, int64_t channel, T otherwise) {
  if (values.data == nullptr) return otherwise;
  with_value(values, channel, [&](auto value) { otherwise = static_cast<T>(value); });
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

}  // namespace fastremedy::cuda
