// What is done once for each channel, vectorised over channels: 2048 of them, one after the other,
// would take as long as the elements of a 7 x 7 map.
#pragma once

#include <algorithm>

#include "../core/arguments.h"
#include "blocks.h"
#include "simd.h"

namespace fastremedy::cpu {

// Channels are done in runs of this many: what a run needs stays in L1.
inline constexpr int64_t kChannelRun = 256;

// Values of channels [begin, begin + n) as float or double; `without` where there are none.
template <class T>
void load_channels(const ChannelValues& values, int64_t begin, int64_t n, T without, T* out) {
  if (values.data == nullptr) {
    std::fill_n(out, n, without);
  } else if (values.dtype == DType::kFloat32) {
    std::copy_n(static_cast<const float*>(values.data) + begin, n, out);
  } else if (values.dtype == DType::kFloat64) {
    std::copy_n(static_cast<const double*>(values.data) + begin, n, out);
  } else {
    const auto* bits = static_cast<const uint16_t*>(values.data) + begin;
    const bool is_bfloat16 = values.dtype == DType::kBFloat16;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = is_bfloat16 ? bfloat16_to_float(bits[i]) : float16_to_float(bits[i]);
    }
  }
}

inline void store_channels(const ChannelValues& values, int64_t begin, int64_t n,
                           const double* in) {
  if (values.data == nullptr) return;
  if (values.dtype == DType::kFloat32) {
    std::copy_n(in, n, static_cast<float*>(values.data) + begin);
  } else if (values.dtype == DType::kFloat64) {
    std::copy_n(in, n, static_cast<double*>(values.data) + begin);
  } else {
    auto* bits = static_cast<uint16_t*>(values.data) + begin;
    const bool is_bfloat16 = values.dtype == DType::kBFloat16;
    for (int64_t i = 0; i < n; ++i) {
      const auto value = static_cast<float>(in[i]);
      bits[i] = is_bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
    }
  }
}

// The rows of `saved`, from some channel on.
template <class T>
struct StatisticsRows {
  StatisticsRows(const void* saved, int64_t channels, int64_t begin)
      : mean(static_cast<T*>(const_cast<void*>(saved)) + begin),
        mean_low(mean + channels),
        invstd(mean_low + channels),
        variance(invstd + channels) {}

  ChannelStatistics<T> get(int64_t i) const {
    return {mean[i], mean_low[i], invstd[i], variance[i]};
  }

  T* mean;
  T* mean_low;
  T* invstd;
  T* variance;
};

// Addresses of rows are taken out of their struct: each store could change those that are in it,
// and the loops would go element by element.

template <class T>
FASTREMEDY_CLONES void find_statistics(double count, const double* pilot, const double* sum,
                                       const double* sum_of_squares, double eps, int64_t n,
                                       StatisticsRows<T> out) {
  T *const mean = out.mean, *const mean_low = out.mean_low;
  T *const invstd = out.invstd, *const variance = out.variance;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const ChannelStatistics<T> s =
        channel_statistics<T>(count, pilot[i], sum[i], sum_of_squares[i], eps);
    mean[i] = s.mean;
    mean_low[i] = s.mean_low;
    invstd[i] = s.invstd;
    variance[i] = s.variance;
  }
}

template <class T>
FASTREMEDY_CLONES void find_normalizers(StatisticsRows<T> s, const T* weight, const T* bias,
                                        int64_t n, T* mean, T* scale, T* shift) {
  const T *const s_mean = s.mean, *const s_mean_low = s.mean_low, *const s_invstd = s.invstd;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const ChannelStatistics<T> of_channel{s_mean[i], s_mean_low[i], s_invstd[i], T(0)};
    const Normalizer<T> c = normalizer(of_channel, weight[i], bias[i]);
    mean[i] = c.mean;
    scale[i] = c.scale;
    shift[i] = c.shift;
  }
}

template <class T>
FASTREMEDY_CLONES void find_input_grads(StatisticsRows<T> s, const T* weight, double count,
                                        const double* sum_g, const double* sum_gx, int64_t n,
                                        T* g_scale, T* x_scale, T* shift) {
  const T *const s_mean = s.mean, *const s_mean_low = s.mean_low, *const s_invstd = s.invstd;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const ChannelStatistics<T> of_channel{s_mean[i], s_mean_low[i], s_invstd[i], T(0)};
    const InputGrad<T> d = input_grad(of_channel, weight[i], count, sum_g[i], sum_gx[i]);
    g_scale[i] = d.g_scale;
    x_scale[i] = d.x_scale;
    shift[i] = d.shift;
  }
}

}  // namespace fastremedy::cpu
