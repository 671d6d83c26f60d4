// One call of the statistics: its tensors, and what is expected of their rows.
#pragma once

#include <map>

#include "check.h"

namespace fastremedy::check {

// What the elements are.
enum class Filling {
  kNormal,
  kPositivePart,  // zeros and positive values
  kFarFromZero,   // mean / std = 1000
  kSorted,        // the same
  kZerosFirst,    // the same after zeros
  kConstant,
  kTiny,  // fourth powers underflow in float
  kHuge,  // fourth powers overflow in float
  kSparse,
  kOutliers,
  kNonFinite,  // among normal ones
  kAllNaN,
  kCount
};

struct StatsCase {
  int64_t outer, channels, inner;
  DType dtype;
  Filling filling;
  bool is_misaligned;
};

class StatsProblem {
 public:
  StatsProblem(const std::vector<StatsCase>& cases, bool has_histogram, unsigned seed)
      : cases_(cases), random_(seed) {
    int32_t num_rows = 0;
    for (const StatsCase& c : cases_) {
      StatsTensor tensor{nullptr, c.outer, c.channels, c.inner, num_rows, c.dtype};
      const int size = element_size(c.dtype);
      void* const data = memory_.allocate(tensor.numel() * size, c.is_misaligned ? size : 0);
      fill(data, c);
      tensor.data = data;
      tensors_.push_back(tensor);
      num_rows += static_cast<int32_t>(c.channels) + 1;  // a row that nothing may write
    }
    Moments none;
    moments_ = memory_.upload(std::vector<Moments>(num_rows, none));
    counts_ = memory_.upload(std::vector<int64_t>(num_rows * kNumCounts));
    if (has_histogram) histogram_ = memory_.upload(std::vector<int64_t>(num_rows * kNumBuckets));
    const auto size =
        cuda::activation_stats_scratch_size(tensors_.data(), static_cast<int>(tensors_.size()));
    scratch_.counters = memory_.upload(std::vector<uint32_t>(size.num_counters));
    scratch_.partials = memory_.allocate(size.partial_bytes);
    num_counters_ = size.num_counters;
    num_rows_ = num_rows;
  }

  void run(const int32_t* armed = nullptr) {
    const ActivationStatsArgs args{tensors_.data(), static_cast<int32_t>(tensors_.size()),
                                   armed,           reinterpret_cast<double*>(moments_),
                                   counts_,         histogram_};
    expect(cuda::launch_activation_stats(args, scratch_, nullptr) == 0, "activation_stats");
    expect(memory_.is_intact(), "activation_stats: memory around the buffers");
    for (size_t i = 0; i < num_counters_; ++i) {
      expect(scratch_.counters[i] == 0, "activation_stats: a counter");
    }
  }

  // After `times` calls.
  void expect_rows(int times) const {
    for (size_t t = 0; t < tensors_.size(); ++t) {
      for (int64_t c = 0; c < tensors_[t].channels; ++c) expect_row(t, c, times);
      const int64_t unused = tensors_[t].first_row + tensors_[t].channels;
      expect(moments_[unused].count == 0 && counts_[unused * kNumCounts] == 0,
             name(t, "a row of no tensor"));
    }
  }

  bool equals(const StatsProblem& other) const {
    return std::memcmp(moments_, other.moments_, num_rows_ * sizeof(Moments)) == 0 &&
           std::memcmp(counts_, other.counts_, num_rows_ * kNumCounts * sizeof(int64_t)) == 0;
  }

 private:
  using Wide = long double;

  std::string name(size_t t, const std::string& what) const {
    const StatsCase& c = cases_[t];
    const auto number = [](auto n) { return std::to_string(n); };
    return "activation_stats " + number(c.outer) + "x" + number(c.channels) + "x" +
           number(c.inner) + " " + name_of(c.dtype) + " filling " +
           number(static_cast<int>(c.filling)) + (c.is_misaligned ? " misaligned" : "") +
           (histogram_ ? " histogram" : "") + " of " + number(cases_.size()) + ": " + what;
  }

  void fill(void* data, const StatsCase& c) {
    const int64_t numel = c.outer * c.channels * c.inner;
    std::normal_distribution<double> normal;
    std::vector<double> values(numel);
    const bool is_wide = c.dtype == DType::kFloat64 || c.dtype == DType::kFloat32;
    const bool is_half = c.dtype == DType::kFloat16;
    const double far = is_wide ? 1000 : 50;
    for (int64_t i = 0; i < numel; ++i) {
      const double x = normal(random_);
      constexpr double kOdd[] = {HUGE_VAL, -HUGE_VAL, NAN, 0.0, -0.0, 6e4, -6e4};
      switch (c.filling) {
        case Filling::kPositivePart:
          values[i] = x > 0 ? x : 0;
          break;
        case Filling::kFarFromZero:
        case Filling::kSorted:
          values[i] = x + far;
          break;
        case Filling::kZerosFirst:
          values[i] = i < 20 ? 0 : x + far;
          break;
        case Filling::kConstant:
          values[i] = -1.25;
          break;
        case Filling::kTiny:
          values[i] = x * (is_half ? 1e-5 : 1e-14);
          break;
        case Filling::kHuge:
          values[i] = x * (is_half ? 1e4 : 3e37);
          break;
        case Filling::kSparse:
          values[i] = i % 37 == 5 ? x * (is_half ? 1e-3 : 1e-11) : 0;
          break;
        case Filling::kOutliers:
          values[i] = i % 67 == 1 ? x * 1e4 : x;
          break;
        case Filling::kNonFinite:
          values[i] = random_() % 29 == 0 ? kOdd[random_() % 7] : x;
          break;
        case Filling::kAllNaN:
          values[i] = NAN;
          break;
        default:
          values[i] = x;
      }
    }
    if (c.filling == Filling::kSorted) std::sort(values.begin(), values.end());
    for (int64_t i = 0; i < numel; ++i) set(data, c.dtype, i, values[i]);
  }

  void expect_row(size_t t, int64_t channel, int times) const {
    const StatsTensor& tensor = tensors_[t];
    const int64_t row = tensor.first_row + channel;
    std::vector<Wide> values;
    std::map<uint32_t, int64_t> buckets;
    int64_t counts[kNumCounts] = {};
    for (int64_t i = 0; i < tensor.outer * tensor.inner; ++i) {
      const int64_t sample = i / tensor.inner * tensor.channels + channel;
      const double x = get(tensor.data, tensor.dtype, sample * tensor.inner + i % tensor.inner);
      const uint32_t bucket = bucket_of(static_cast<float>(x));
      if (is_finite_bucket(bucket)) buckets[bucket] += times;
      const int kind = x != x                      ? 2
                       : x == HUGE_VAL             ? 3
                       : x == -HUGE_VAL            ? 4
                       : std::signbit(x) && x != 0 ? 1
                       : x == 0                    ? 0
                                                   : -1;
      if (kind >= 0) counts[kind] += times;
      if (kind < 2 && times > 0) values.push_back(x);
    }
    for (int k = 0; k < kNumCounts; ++k) {
      expect(counts_[row * kNumCounts + k] == counts[k], name(t, "count " + std::to_string(k)));
    }
    for (int b = 0; histogram_ && b < kNumBuckets; ++b) {
      const auto found = buckets.find(b);
      const int64_t expected = found == buckets.end() ? 0 : found->second;
      if (histogram_[row * kNumBuckets + b] == expected) continue;  // text for each takes a second
      expect(false, name(t, "bucket " + std::to_string(b)));
    }
    expect_moments(t, moments_[row], values, times);
  }

  void expect_moments(size_t t, const Moments& m, const std::vector<Wide>& values,
                      int times) const {
    const auto n = static_cast<Wide>(values.size());
    Wide mean = 0, l1 = 0, min = HUGE_VALL, max = -HUGE_VALL, m2 = 0, m3 = 0, m4 = 0, size3 = 0;
    for (const Wide x : values) {
      mean += x;
      l1 += std::fabs(x) * times;
      min = std::min(min, x);
      max = std::max(max, x);
    }
    if (n > 0) mean /= n;
    for (const Wide x : values) {
      const Wide d = x - mean;
      m2 += d * d * times;
      m3 += d * d * d * times;
      m4 += d * d * d * d * times;
      size3 += std::fabs(d * d * d) * times;
    }
    const auto within = [&](const char* what, double actual, Wide expected, Wide scale) {
      // Below, units of double's smallest numbers count.
      const bool holds = std::fabs(actual - expected) <= 1e-6L * scale + 1e-300L;
      char numbers[100];
      std::snprintf(numbers, sizeof(numbers), " %.12g instead of %.12Lg", actual, expected);
      expect(holds, name(t, what + std::string(numbers)));
    };
    within("count", m.count, n * times, 0);
    within("mean", m.mean, mean, n > 0 ? std::sqrt(m2 / n / times) + std::fabs(mean) * 1e-9L : 0);
    within("m2", m.m2, m2, m2);
    within("m3", m.m3, m3, size3);
    within("m4", m.m4, m4, m4);
    within("l1", m.l1, l1, l1);
    expect(m.min == min && m.max == max, name(t, "extremes"));
  }

  const std::vector<StatsCase> cases_;
  std::mt19937 random_;
  Memory memory_;
  std::vector<StatsTensor> tensors_;
  Moments* moments_ = nullptr;
  int64_t* counts_ = nullptr;
  int64_t* histogram_ = nullptr;
  cuda::ActivationStatsScratch scratch_{};
  size_t num_counters_ = 0;
  int64_t num_rows_ = 0;
};

}  // namespace fastremedy::check
