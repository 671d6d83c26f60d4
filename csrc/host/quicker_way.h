// Which of two ways to do the same takes less time here and now.
#pragma once

#include <algorithm>
#include <chrono>

namespace fastremedy::host {

class Clock {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Both ways are tried, the first one first, and again after a while.
class QuickerWay {
 public:
  bool is_second() const { return is_second_; }

  // Says how long the way of is_second() took.
  void note(double seconds) {
    const int turn = num_noted_;
    num_noted_ = (num_noted_ + 1) % kPeriod;
    if (turn < 2 * kTrials) {
      // At first the data is still where the other way has left it.
      const bool is_used_to = turn % kTrials > kTrials / 2;
      double& best = best_[is_second_];
      best = is_used_to ? std::min(best, seconds) : seconds;
    }
    if (turn == kTrials - 1) is_second_ = true;
    if (turn == 2 * kTrials - 1) is_second_ = best_[1] < best_[0];
    if (turn == kPeriod - 1) is_second_ = false;
  }

 private:
  static constexpr int kTrials = 8;
  static constexpr int kPeriod = 1024;  // eight times of which the way is the slower one
  bool is_second_ = false;
  int num_noted_ = 0;
  double best_[2] = {};
};

}  // namespace fastremedy::host
