// Quotients of integers.
#pragma once

#include "../core/types.h"

namespace fastremedy::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides by multiplication (Granlund & Montgomery, 1994): a division takes 20 instructions more,
// and there is one for each vector.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t value) : value_(value) {
    while (shift_ < 31 && uint64_t{1} << shift_ < static_cast<uint64_t>(value)) ++shift_;
    multiplier_ =
        static_cast<uint32_t>(((uint64_t{1} << shift_) - value) * (uint64_t{1} << 32) / value + 1);
  }

  FASTREMEDY_HD int64_t value() const { return value_; }
  FASTREMEDY_HD int64_t quotient(int64_t n) const {
    if ((n | value_) >> 31) return n / value_;
    const auto narrow = static_cast<uint32_t>(n);
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(narrow) * multiplier_ >> 32);
    return (high + narrow) >> shift_;
  }

 private:
  int64_t value_ = 1;
  uint32_t multiplier_ = 0;
  int32_t shift_ = 0;
};

}  // namespace fastremedy::cuda
