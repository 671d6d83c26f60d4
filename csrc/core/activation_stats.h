// Statistics of a tensor in one pass: moments, extremes, counts and a histogram.
//
// Sums of powers of x - pilot, with a pilot near the mean, become central moments in double, and
// those merge in any order (Pebay, 2008): over threads, blocks, steps, ranks and runs. Values that
// are not finite are counted and take no part in the rest. Buckets of the histogram are the sign,
// the exponent and three bits of the mantissa of x as a float: their edges are fixed, so that they
// add up, and a quantile is at most sqrt(1 + 1/8) - 1 = 6.1 % off.
#pragma once

#include <cmath>

#include "types.h"

namespace fastremedy {

// sum((x - pilot)^k) for k = 1 to 4, and sum(|x|). In float the differences have to be of a size
// whose fourth power is there: above 4e9 it overflows, below 3e-10 (vanishing gradients) it is 0.
template <class T>
struct PowerSums {
  T s1 = 0, s2 = 0, s3 = 0, s4 = 0, l1 = 0;

  FASTREMEDY_HD void add(T x, T d) {
    const T d2 = d * d;
    s1 += d;
    s2 += d2;
    s3 += d2 * d;
    s4 += d2 * d2;
    l1 += std::fabs(x);
  }
};

// Of the finite values: their number, sum((x - mean)^k) for k = 2 to 4, sum(|x|) and extremes,
// which are infinities with the other sign if there is no value. The order is that of a row of
// ActivationStatsArgs::moments.
struct Moments {
  double count = 0, mean = 0, m2 = 0, m3 = 0, m4 = 0, l1 = 0;
  double min = HUGE_VAL, max = -HUGE_VAL;
};
inline constexpr int kNumMoments = 8;
static_assert(sizeof(Moments) == kNumMoments * sizeof(double), "rows are stored as structs");

// Exact to the precision of the sums if the pilot is within a few standard deviations.
FASTREMEDY_HD Moments central_moments(double count, double pilot, const PowerSums<double>& sums,
                                      double min, double max) {
  Moments m;
  if (count == 0) return m;
  const double d = sums.s1 / count;
  m.count = count;
  m.mean = pilot + d;
  m.m2 = sums.s2 - count * d * d;
  m.m3 = sums.s3 - 3 * d * sums.s2 + 2 * count * d * d * d;
  m.m4 = sums.s4 - 4 * d * sums.s3 + 6 * d * d * sums.s2 - 3 * count * d * d * d * d;
  m.m2 = m.m2 > 0 ? m.m2 : 0;  // rounding
  m.m4 = m.m4 > 0 ? m.m4 : 0;
  m.l1 = sums.l1;
  m.min = min;
  m.max = max;
  return m;
}

FASTREMEDY_HD Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  Moments m;
  m.count = a.count + b.count;
  const double d = b.mean - a.mean, share_a = a.count / m.count, share_b = b.count / m.count;
  m.mean = a.mean + d * share_b;
  const double between = d * d * share_a * b.count;  // d^2 n_a n_b / n
  m.m2 = a.m2 + b.m2 + between;
  m.m3 =
      a.m3 + b.m3 + between * d * (share_a - share_b) + 3 * d * (share_a * b.m2 - share_b * a.m2);
  m.m4 = a.m4 + b.m4 +
         between * d * d * (share_a * share_a - share_a * share_b + share_b * share_b) +
         6 * d * d * (share_a * share_a * b.m2 + share_b * share_b * a.m2) +
         4 * d * (share_a * b.m3 - share_b * a.m3);
  m.l1 = a.l1 + b.l1;
  m.min = a.min < b.min ? a.min : b.min;
  m.max = a.max > b.max ? a.max : b.max;
  return m;
}

// The columns of ActivationStatsArgs::counts.
enum class Count : int32_t {
  kZero = 0,
  kNegative = 1,
  kNaN = 2,
  kPositiveInf = 3,
  kNegativeInf = 4
};
inline constexpr int kNumCounts = 5;

inline constexpr int kNumBuckets = 4096;

// Positive values have their order, negative ones the reverse. NaN, infinities and what is one as a
// float share the exponent 255, whose buckets stay empty.
FASTREMEDY_HD uint32_t bucket_of(float x) { return bit_cast<uint32_t>(x) >> 20; }
FASTREMEDY_HD uint32_t bucket_of(double x) { return bucket_of(static_cast<float>(x)); }

FASTREMEDY_HD bool is_finite_bucket(uint32_t bucket) {
  return bucket % (kNumBuckets / 2) < (255u << 3);
}

template <class T>
FASTREMEDY_HD bool is_finite(T x) {
  return x - x == T(0);
}

}  // namespace fastremedy
