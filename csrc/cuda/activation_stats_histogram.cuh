// Counting buckets.
//
// Neighbours that fall into one bucket wait for each other. Values of a continuous distribution do
// so rarely: of a normal one the fullest bucket has a share of 3 %, and 32 lanes meet in banks of
// shared memory 3 to 4 deep anyway. What is left are repeated values, such as the zeros behind a
// ReLU: the bucket that most samples are in is counted in a register of each thread.
#pragma once

#include "activation_stats_sums.cuh"

namespace fastremedy::cuda {

FASTREMEDY_DEVICE void add_count(int64_t* count, uint32_t n) {
  if (n > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(count), static_cast<unsigned long long>(n));
  }
}

struct NoBuckets {
  FASTREMEDY_DEVICE NoBuckets(StatsShared&, int64_t*) {}
  template <class T>
  FASTREMEDY_DEVICE void add(T) {}
  FASTREMEDY_DEVICE void finish() {}
};

// All threads visit the same row.
class RowBuckets {
 public:
  FASTREMEDY_DEVICE RowBuckets(StatsShared& shared, int64_t* histogram)
      : counts_(shared.buckets), histogram_(histogram) {
    uint32_t most = 0;
#pragma unroll 1  // all at once they do not fit into the registers of sm_100
    for (const uint32_t vote : shared.votes) most = vote > most ? vote : most;
    frequent_ = most % kNumBuckets;
    for (int i = threadIdx.x; i < kNumBuckets; i += kStatsBlockSize) counts_[i] = 0;
    __syncthreads();
  }

  template <class T>
  FASTREMEDY_DEVICE void add(T x) {
    const uint32_t bucket = bucket_of(x);
    if (bucket == frequent_) {
      ++num_frequent_;
    } else {
      atomicAdd(&counts_[bucket], 1u);
    }
  }

  FASTREMEDY_DEVICE void finish() {
    if (num_frequent_ > 0) atomicAdd(&counts_[frequent_], num_frequent_);
    __syncthreads();
    for (int i = threadIdx.x; i < kNumBuckets; i += kStatsBlockSize) {
      if (is_finite_bucket(i)) add_count(histogram_ + i, counts_[i]);
    }
    __syncthreads();  // the memory is used again
  }

 private:
  uint32_t* const counts_;
  int64_t* const histogram_;
  uint32_t frequent_, num_frequent_ = 0;
};

// Every thread visits a row of its own: there is no room for all of them in shared memory.
class ColumnBuckets {
 public:
  FASTREMEDY_DEVICE ColumnBuckets(StatsShared&, int64_t* histogram) : histogram_(histogram) {}

  template <class T>
  FASTREMEDY_DEVICE void add(T x) {
    const uint32_t bucket = bucket_of(x);
    if (bucket != repeated_) {
      finish();
      repeated_ = bucket;
      num_repeated_ = 0;
    }
    ++num_repeated_;
  }

  FASTREMEDY_DEVICE void finish() {
    if (is_finite_bucket(repeated_)) add_count(histogram_ + repeated_, num_repeated_);
  }

 private:
  int64_t* const histogram_;
  uint32_t repeated_ = 0, num_repeated_ = 0;
};

}  // namespace fastremedy::cuda
