// Loops of the statistics over elements in L1, without memory movement.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "../core/activation_stats.h"
#include "simd.h"

namespace fastremedy::cpu {

// Powers are those of (x - pilot) * scale.
template <class T>
struct Pilot {
  T value = 0;
  T scale = 1;  // a power of 2, so that it changes no digit
};

// Sums of up to 1024 elements, in T.
template <class T>
struct StretchSums {
  int64_t count = 0;  // of the elements, the first of a stretch: whole vectors
  PowerSums<T> powers;
  T min = static_cast<T>(HUGE_VAL), max = -static_cast<T>(HUGE_VAL);
  int64_t num_zero = 0, num_negative = 0;

  // Whether a value is not finite, or so far from the size of the scale that digits of its fourth
  // power are lost: 1024 terms at the edge of what T holds are 1e-8 of the limit.
  bool has_lost(const Pilot<T>& pilot) const {
    constexpr T kLimit = static_cast<T>(sizeof(T) == sizeof(float) ? 1e-27 : 1e-296);
    const bool is_spread = min != pilot.value || max != pilot.value;
    return !is_finite(powers.s4 + powers.l1) || (is_spread && powers.s4 < kLimit);
  }
};

// Four tables of buckets take turns, so that an element need not wait for the count of the one
// before. Each begins elsewhere within a page: a CPU takes addresses with the same last 12 bits for
// the same until it knows better (eight tables took 67 ms without that, and 16 with it).
inline constexpr int64_t kNumTables = 4;
inline constexpr int64_t kTableSize = kNumBuckets + 256;

// Adds the tables to a histogram, to which other threads may add, and empties them. Most buckets
// are those of numbers that do not occur: vectors of them are passed over.
inline void move_tables(uint32_t* tables, int64_t* histogram) {
  constexpr int64_t kStep = 16;
  for (int64_t begin = 0; begin < kNumBuckets; begin += kStep) {
    uint32_t any[kStep] = {};
    for (int64_t t = 0; t < kNumTables; ++t) {
      for (int64_t k = 0; k < kStep; ++k) any[k] |= tables[t * kTableSize + begin + k];
    }
    uint32_t all = 0;
    for (int64_t k = 0; k < kStep; ++k) all |= any[k];
    if (all == 0) continue;
    for (int64_t b = begin; b < begin + kStep; ++b) {
      int64_t count = 0;
      for (int64_t t = 0; t < kNumTables; ++t) {
        count += std::exchange(tables[t * kTableSize + b], 0);
      }
      if (count > 0 && is_finite_bucket(static_cast<uint32_t>(b))) {
        __atomic_fetch_add(histogram + b, count, __ATOMIC_RELAXED);
      }
    }
  }
}

// What holds is -1. AVX-512 adds under a mask, as which it compares; AVX2 would add and choose.
template <int kVectorBytes, class Mask>
inline __attribute__((always_inline)) void count_if(const Mask& holds, Mask* count) {
  if constexpr (kVectorBytes == 64) {
    *count = holds ? *count + 1 : *count;
  } else {
    *count -= holds;
  }
}

// Buckets are counted in the same loop if there are tables: they keep other parts of the CPU busy.
template <int kVectorBytes, bool kHasTables, class T>
inline __attribute__((always_inline)) StretchSums<T> sum_vectors(const T* __restrict values,
                                                                 int64_t n, Pilot<T> pilot,
                                                                 uint32_t* __restrict tables) {
  using Vector = typename VectorOf<T, kVectorBytes>::Type;
  using Mask = decltype(Vector{} < Vector{});
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr int64_t kWidth = sizeof(Vector) / sizeof(T);
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  // A difference in one operation, rounded as x - pilot is: the scale changes no digit.
  const T shift = pilot.value * pilot.scale;
  StretchSums<T> sums;
  Vector s1 = {}, s2 = {}, s3 = {}, s4 = {}, l1 = {};
  Vector min = Vector{} + sums.min, max = Vector{} + sums.max;
  Mask num_zero = {}, num_negative = {};
  int64_t i = 0;
  while (i + kWidth <= n) {
    // Equal values round the same way every time: 8 or 16 in a row, then as many again.
    Vector t1 = {}, t2 = {}, t3 = {}, t4 = {}, t5 = {};
    const int64_t end = std::min<int64_t>(n - kWidth + 1, i + 128);
    for (; i < end; i += kWidth) {
      if constexpr (kHasTables) {
        for (int64_t k = 0; k < kWidth; ++k) {
          uint32_t* const table = tables + k % kNumTables * kTableSize;
          ++table[bucket_of(values[i + k])];
        }
      }
      Vector x;
      std::memcpy(&x, values + i, sizeof(x));
      const Vector d = x * pilot.scale - shift, d2 = d * d;
      t1 += d;
      t2 += d2;
      t3 += d2 * d;
      t4 += d2 * d2;
      Mask bits;
      std::memcpy(&bits, &x, sizeof(bits));
      bits &= kMagnitude;
      Vector magnitude;
      std::memcpy(&magnitude, &bits, sizeof(bits));
      t5 += magnitude;
      count_if<kVectorBytes>(x < T(0), &num_negative);
      count_if<kVectorBytes>(x == T(0), &num_zero);
      min = x < min ? x : min;
      max = x > max ? x : max;
    }
    s1 += t1;
    s2 += t2;
    s3 += t3;
    s4 += t4;
    l1 += t5;
  }
  // Pairwise: one after the other, equal sums would round the same way every time here, too.
  const auto sum = [&](auto vector) {
    for (int64_t half = kWidth / 2; half > 0; half /= 2) {
      for (int64_t k = 0; k < half; ++k) vector[k] += vector[k + half];
    }
    return vector[0];
  };
  sums.count = i;
  sums.num_zero = sum(num_zero);
  sums.num_negative = sum(num_negative);
  for (int64_t k = 0; k < kWidth; ++k) {
    sums.min = std::min(sums.min, min[k]);
    sums.max = std::max(sums.max, max[k]);
  }
  sums.powers = {sum(s1), sum(s2), sum(s3), sum(s4), sum(l1)};
  return sums;
}

template <bool kHasTables, class T>
FASTREMEDY_CLONES StretchSums<T> sum_stretch(const T* values, int64_t n, Pilot<T> pilot,
                                             uint32_t* tables) {
  return sum_vectors<32, kHasTables>(values, n, pilot, tables);
}

// Without tables the loop is bound by the number of instructions. Values in cache take 5.6 us
// instead of 9.3 for 64 K with vectors twice as wide, which only machines with_avx512() have.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  return has;
}

template <class T>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) StretchSums<T> sum_stretch_avx512(
    const T* values, int64_t n, Pilot<T> pilot) {
  return sum_vectors<64, false, T>(values, n, pilot, nullptr);
}
#else
inline bool has_avx512() { return false; }

template <class T>
StretchSums<T> sum_stretch_avx512(const T* values, int64_t n, Pilot<T> pilot) {
  return sum_stretch<false>(values, n, pilot, nullptr);
}
#endif

}  // namespace fastremedy::cpu
