// The sums of a unit: pilots, what a thread adds, and the sums of all threads.
#pragma once

#include "activation_stats_parts.cuh"

namespace fastremedy::cuda {

// What threads of a block exchange, one after the other.
struct StatsShared {
  static constexpr int kMostValues = 10;
  union {
    double samples[kNumSamples * kMostStatsColumns];
    uint32_t buckets[kNumBuckets];
    double values[kMostValues][kStatsBlockSize / 2];
  };
  double least[kMostStatsColumns], most[kMostStatsColumns];  // of the inner samples
  double pilots[kMostStatsColumns];
  float scales[kMostStatsColumns];
  uint32_t votes[kNumSamples];
  uint32_t non_finite[3][kMostStatsColumns];
};

FASTREMEDY_DEVICE StatsShared& stats_shared() {
  FASTREMEDY_SHARED(StatsShared, shared);
  return shared;
}

// The power of 2 that brings distances near 1: their fourth powers overflow beyond 2^31 times as
// much, and the smallest ones that count do not underflow.
FASTREMEDY_DEVICE float scale_for(float distance) {
  if (distance == 0) return 1;
  const uint32_t exponent = bit_cast<uint32_t>(distance) >> 23;
  const uint32_t bounded = exponent < 15 ? 15 : exponent > 239 ? 239 : exponent;
  return bit_cast<float>((254 - bounded) << 23);
}

// The pilot of a column is the mean of its samples; the outermost eighths may be outliers and count
// as those beside them. A median of two values would be one of them, far enough from their mean to
// change the fourth moment by 3e-6. Samples vote for a bucket, too.
template <class T, class Part>
FASTREMEDY_DEVICE void choose_pilots(const Part& part, int columns, StatsShared& shared) {
  if (threadIdx.x < kMostStatsColumns) {
    for (auto& counts : shared.non_finite) counts[threadIdx.x] = 0;
  }
  T* const samples = reinterpret_cast<T*>(shared.samples);
  for (int i = threadIdx.x; i < kNumSamples * columns; i += kStatsBlockSize) {
    samples[i] = part.sample(i / columns, i % columns);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kNumSamples * columns; i += kStatsBlockSize) {
    const int mine = i / columns, c = i % columns;
    const T x = samples[i];
    const uint32_t bucket = bucket_of(x);
    int rank = 0, num_finite = 0, num_alike = 0;
    T distance = 0;
    for (int k = 0; k < kNumSamples; ++k) {
      const T other = samples[k * columns + c];
      num_alike += bucket_of(other) == bucket;
      if (!is_finite(other)) continue;
      ++num_finite;
      rank += other < x || (other == x && k < mine);
      distance = ::fmax(distance, ::fabs(other - x));
    }
    if (num_finite == 0 && mine == 0) {
      shared.least[c] = shared.most[c] = 0;
      shared.scales[c] = 1;
    }
    if (num_finite > 0 && is_finite(x)) {
      if (rank == num_finite / 8) shared.least[c] = static_cast<double>(x);
      if (rank == num_finite - 1 - num_finite / 8) shared.most[c] = static_cast<double>(x);
      if (rank == num_finite / 2) shared.scales[c] = scale_for(static_cast<float>(distance));
    }
    if (columns == 1) shared.votes[mine] = static_cast<uint32_t>(num_alike) * kNumBuckets + bucket;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < columns) {
    const double least = shared.least[threadIdx.x], most = shared.most[threadIdx.x];
    double sum = 0, count = 0;
#pragma unroll 1
    for (int k = 0; k < kNumSamples; ++k) {
      const T x = samples[k * columns + threadIdx.x];
      if (!is_finite(x)) continue;
      sum += ::fmin(::fmax(static_cast<double>(x), least), most);
      count += 1;
    }
    // Rounding must not move the mean of equal values.
    const double mean = count > 0 ? ::fmin(::fmax(sum / count, least), most) : 0;
    shared.pilots[threadIdx.x] = static_cast<double>(static_cast<T>(mean));
  }
  __syncthreads();
}

template <class T>
struct Pilot {
  T value, scale;

  FASTREMEDY_DEVICE Pilot(const StatsShared& shared, int column)
      : value(static_cast<T>(shared.pilots[column])), scale(shared.scales[column]) {}
};

// What a thread adds in T, 64 elements at most: each is assumed to be finite.
template <class T>
struct Stretch {
  PowerSums<T> sums;  // s1 to s4 of (x - pilot) * scale
  T min = static_cast<T>(HUGE_VAL), max = static_cast<T>(-HUGE_VAL);
  uint32_t count = 0, num_zero = 0, num_negative = 0;

  FASTREMEDY_DEVICE void add(T x, const Pilot<T>& pilot) {
    const T d = ::fma(x, pilot.scale, -pilot.value * pilot.scale), d2 = d * d;
    sums.s1 += d;
    sums.s2 += d2;
    sums.s3 += d2 * d;
    sums.s4 += d2 * d2;
    sums.l1 += ::fabs(x);
    min = ::fmin(min, x);
    max = ::fmax(max, x);
    ++count;
    num_zero += x == 0;
    num_negative += x < 0;
  }

  // Values that are not finite and an overflow show in the sums; an underflow shows in s4, unless
  // all values are the pilot.
  FASTREMEDY_DEVICE bool is_exact(const Pilot<T>& pilot) const {
    if (!is_finite(sums.s4 + sums.l1)) return false;
    return sizeof(T) == sizeof(double) || sums.s4 >= T(0x1p-96f) ||
           (min >= pilot.value && max <= pilot.value);
  }
};

// What a thread finds in a stretch that is not finite. It goes on to shared memory, and so needs no
// register elsewhere.
struct NonFinite {
  static constexpr int kFirst = static_cast<int>(Count::kNaN), kNumKinds = 3;
  static_assert(kFirst + 1 == static_cast<int>(Count::kPositiveInf) &&
                kFirst + 2 == static_cast<int>(Count::kNegativeInf));
  uint32_t counts[kNumKinds] = {};

  template <class T>
  FASTREMEDY_DEVICE void add(T x) {
    counts[0] += x != x;
    counts[1] += x > 0;
    counts[2] += x < 0;
  }
  FASTREMEDY_DEVICE void add_to(StatsShared& shared, int column) const {
#pragma unroll
    for (int k = 0; k < kNumKinds; ++k) {
      if (counts[k] > 0) atomicAdd(&shared.non_finite[k][column], counts[k]);
    }
  }
};

// The sums of a thread, then of a column.
template <class T>
struct StatsTotals {
  static constexpr int kMin = 8, kMax = 9, kNumValues = 10;

  PowerSums<double> sums;
  T min = static_cast<T>(HUGE_VAL), max = static_cast<T>(-HUGE_VAL);
  uint32_t count = 0, num_zero = 0, num_negative = 0;

  FASTREMEDY_DEVICE void add(const Stretch<T>& stretch) {
    sums.s1 += static_cast<double>(stretch.sums.s1);
    sums.s2 += static_cast<double>(stretch.sums.s2);
    sums.s3 += static_cast<double>(stretch.sums.s3);
    sums.s4 += static_cast<double>(stretch.sums.s4);
    sums.l1 += static_cast<double>(stretch.sums.l1);
    min = ::fmin(min, stretch.min);
    max = ::fmax(max, stretch.max);
    count += stretch.count;
    num_zero += stretch.num_zero;
    num_negative += stretch.num_negative;
  }

  // One finite value, in double.
  FASTREMEDY_DEVICE void add(T x, const Pilot<T>& pilot) {
    const double wide = static_cast<double>(x), scale = static_cast<double>(pilot.scale);
    const double d = (wide - static_cast<double>(pilot.value)) * scale, d2 = d * d;
    sums.s1 += d;
    sums.s2 += d2;
    sums.s3 += d2 * d;
    sums.s4 += d2 * d2;
    sums.l1 += ::fabs(wide);
    min = ::fmin(min, x);
    max = ::fmax(max, x);
    ++count;
    num_zero += x == 0;
    num_negative += x < 0;
  }

  FASTREMEDY_DEVICE void get(double (&values)[kNumValues]) const {
    values[0] = sums.s1;
    values[1] = sums.s2;
    values[2] = sums.s3;
    values[3] = sums.s4;
    values[4] = sums.l1;
    values[5] = static_cast<double>(count);
    values[6] = static_cast<double>(num_zero);
    values[7] = static_cast<double>(num_negative);
    values[kMin] = static_cast<double>(min);
    values[kMax] = static_cast<double>(max);
  }

  static FASTREMEDY_DEVICE void combine(double (&values)[kNumValues],
                                        const double (&others)[kNumValues]) {
#pragma unroll
    for (int k = 0; k < kMin; ++k) values[k] += others[k];
    values[kMin] = ::fmin(values[kMin], others[kMin]);
    values[kMax] = ::fmax(values[kMax], others[kMax]);
  }

  static FASTREMEDY_DEVICE Moments moments(const double (&values)[kNumValues],
                                           const Pilot<T>& pilot) {
    const double unit = 1 / static_cast<double>(pilot.scale), unit2 = unit * unit;
    PowerSums<double> sums;
    sums.s1 = values[0] * unit;
    sums.s2 = values[1] * unit2;
    sums.s3 = values[2] * unit2 * unit;
    sums.s4 = values[3] * unit2 * unit2;
    sums.l1 = values[4];
    return central_moments(values[5], static_cast<double>(pilot.value), sums, values[kMin],
                           values[kMax]);
  }
};

// The values of all threads of a column end up in its first thread, combined in a fixed order.
template <int kSize, class Combine>
FASTREMEDY_DEVICE void reduce_columns(double (&values)[kSize], int columns, StatsShared& shared,
                                      Combine combine) {
  static_assert(kSize <= StatsShared::kMostValues);
  const int thread = threadIdx.x;
#pragma unroll 1
  for (int half = kStatsBlockSize / 2; half >= columns; half /= 2) {
    if (thread >= half && thread < 2 * half) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) shared.values[k][thread - half] = values[k];
    }
    __syncthreads();
    if (thread < half) {
      double others[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) others[k] = shared.values[k][thread];
      combine(values, others);
    }
    __syncthreads();
  }
}

}  // namespace fastremedy::cuda
