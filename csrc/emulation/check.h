// What the checks share: guarded memory, element types in plain arithmetic, and numbers that carry
// a bound of their rounding error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../core/arguments.h"
#include "../core/param_storage.h"
#include "../cuda/launch.h"
#include "cuda_on_cpu.h"

namespace fastremedy::check {

void check_clip_grad_norm();
void check_adamw();
void check_batch_norm_relu();
void check_focal_loss();
void check_activation_stats();

inline int num_failures = 0;

// The first failures are printed; the driver's exit status tells whether there were any.
inline void expect(bool holds, const std::string& what) {
  if (!holds && ++num_failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// Memory between guard bytes, which nothing may read (AddressSanitizer sees it) or write.
class Memory {
 public:
  Memory() = default;
  ~Memory() {
    for (Region& region : regions_) region.set_poisoned(false);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // The address is `shift_bytes` after a multiple of 64.
  void* allocate(size_t bytes, size_t shift_bytes = 0) {
    Region& region = regions_.emplace_back();
    region.bytes.assign(bytes + shift_bytes + 3 * kGuardBytes, kGuardByte);
    const size_t offset = reinterpret_cast<uintptr_t>(region.bytes.data()) % kGuardBytes;
    region.begin = 2 * kGuardBytes - offset + shift_bytes;
    region.end = region.begin + bytes;
    region.set_poisoned(true);
    return region.bytes.data() + region.begin;
  }
  template <class T>
  T* upload(const std::vector<T>& values) {
    void* const address = allocate(values.size() * sizeof(T));
    const int code = cuda::upload(address, values.data(), values.size() * sizeof(T), nullptr);
    expect(code == 0, "upload");
    return static_cast<T*>(address);
  }

  bool is_intact() {
    bool result = true;
    for (Region& region : regions_) {
      region.set_poisoned(false);
      const auto is_guard = [](char byte) { return byte == kGuardByte; };
      const auto begin = region.bytes.begin();
      result &= std::all_of(begin, begin + region.begin, is_guard) &&
                std::all_of(begin + region.end, region.bytes.end(), is_guard);
      region.set_poisoned(true);
    }
    return result;
  }

 private:
  static constexpr size_t kGuardBytes = 64;
  static constexpr char kGuardByte = 0x5a;

  struct Region {
    void set_poisoned(bool is_poisoned) {
      const auto set = [&](size_t first, size_t last) {
        if (is_poisoned) {
          ASAN_POISON_MEMORY_REGION(bytes.data() + first, last - first);
        } else {
          ASAN_UNPOISON_MEMORY_REGION(bytes.data() + first, last - first);
        }
      };
      set(0, begin);
      set(end, bytes.size());
    }
    std::vector<char> bytes;
    size_t begin, end;
  };
  std::deque<Region> regions_;
};

inline double get(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kFloat64:
      return static_cast<const double*>(data)[i];
    case DType::kFloat16:
      return float16_to_float(static_cast<const uint16_t*>(data)[i]);
    case DType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
  return 0;
}

inline void set(void* data, DType dtype, int64_t i, double value) {
  const auto narrow = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[i] = narrow;
      break;
    case DType::kFloat64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[i] = float_to_float16(narrow);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[i] = float_to_bfloat16(narrow);
      break;
  }
}

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16"};
  return kNames[static_cast<int>(dtype)];
}

// The distance of neighbouring values of the dtype around x.
inline double spacing(DType dtype, double x) {
  struct Format {
    int fraction_bits, min_exponent;
  };
  constexpr Format kFormats[] = {{23, -126}, {52, -1022}, {10, -14}, {7, -126}};
  const Format format = kFormats[static_cast<int>(dtype)];
  const int exponent = x == 0 ? format.min_exponent : std::max(std::ilogb(x), format.min_exponent);
  return std::ldexp(1.0, exponent - format.fraction_bits);
}

// To nearest, ties to even, for values that do not overflow.
inline double round_to(DType dtype, double x) {
  const double unit = spacing(dtype, x);
  return std::nearbyint(x / unit) * unit;
}

// A result in exact arithmetic with a bound of what rounding every operation of it to T can change.
template <class T>
struct Bounded {
  static constexpr long double kUnit = std::numeric_limits<T>::epsilon() / 2;

  static Bounded exact(long double value) { return {value, 0}; }
  static Bounded rounded(long double value, long double error = 0) {
    return {value,
            error + kUnit * (std::fabs(value) + error) + std::numeric_limits<T>::denorm_min()};
  }

  friend Bounded operator+(Bounded a, Bounded b) {
    return rounded(a.value + b.value, a.error + b.error);
  }
  friend Bounded operator-(Bounded a, Bounded b) {
    return rounded(a.value - b.value, a.error + b.error);
  }
  friend Bounded operator*(Bounded a, Bounded b) {
    return rounded(a.value * b.value,
                   std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
  }
  friend Bounded operator/(Bounded a, Bounded b) {
    const long double quotient = a.value / b.value;
    return rounded(quotient,
                   (a.error + std::fabs(quotient) * b.error) / (std::fabs(b.value) - b.error));
  }
  friend Bounded sqrt(Bounded a) {
    const long double root = std::sqrt(a.value);
    return rounded(root, a.error == 0 ? 0 : a.error / std::max(root, std::sqrt(a.error)));
  }

  long double value;
  long double error;
};

inline std::vector<Chunk> make_chunks(const std::vector<GradTensor>& grads) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < grads.size(); ++t) {
    for (int64_t c = 0; c < num_chunks(grads[t].numel, cuda::kChunkSize); ++c) {
      chunks.push_back({static_cast<int32_t>(t), static_cast<int32_t>(c)});
    }
  }
  return chunks;
}

// The norm by its definition. NaN if any element is.
inline long double norm_of(const std::vector<GradTensor>& grads, double p) {
  const bool is_min = p == -HUGE_VAL, is_max = p == HUGE_VAL;
  bool has_elements = false, has_nan = false;
  long double total = is_min ? HUGE_VALL : 0;
  for (const GradTensor& grad : grads) {
    if (grad.data == nullptr) continue;
    for (int64_t i = 0; i < grad.numel; ++i) {
      const long double x = std::fabs(get(grad.data, grad.dtype, i));
      has_elements = true;
      has_nan |= x != x;
      if (is_min) {
        total = std::min(total, x);
      } else if (is_max) {
        total = std::max(total, x);
      } else {
        total += p == 0 ? x != 0 : p == 1 ? x : p == 2 ? x * x : std::pow(x, (long double){p});
      }
    }
  }
  if (!has_elements) return 0;
  if (has_nan && p != 0) return std::numeric_limits<long double>::quiet_NaN();
  return is_min || is_max || p == 0 || p == 1 ? total : std::pow(total, 1 / (long double){p});
}

// A sum of n terms of one sign is off by n roundings at most, and its p-th root by a p-th of that.
// A thread of the emulation takes a 64th of a chunk, in float for L1 and L2; the few terms more are
// the rounding of a power and the additions over threads and chunks, in double.
inline double norm_tolerance(double p) {
  if (p == 0 || std::isinf(p)) return 0;
  const double num_roundings = cuda::kChunkSize / 64.0 + 16;
  return num_roundings * std::ldexp(1.0, p == 1 || p == 2 ? -24 : -53) / std::fabs(p);
}

inline bool is_close(double actual, long double expected, double tolerance) {
  if (expected != expected) return actual != actual;
  if (std::isinf(expected)) return actual == expected;
  return std::fabs(actual - expected) <= tolerance * std::fabs(expected);
}

}  // namespace fastremedy::check
