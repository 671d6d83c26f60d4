// One source, three instruction sets: the loader picks AVX-512, AVX2 or baseline x86-64 once.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTREMEDY_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// Without AVX-512, for loops that choose among what they load: GCC loads under a mask there, which
// has to wait for the mask. Of two streams from memory 2.2 elements a nanosecond come, 4.2 this
// way.
#define FASTREMEDY_CLONES_WITHOUT_MASKS __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FASTREMEDY_CLONES
#define FASTREMEDY_CLONES_WITHOUT_MASKS
#endif

namespace fastremedy::cpu {

// A register of AVX2. One of 64 bytes is taken apart into single elements where the machine has
// none.
template <class T, int kBytes = 32>
struct VectorOf;
template <int kBytes>
struct VectorOf<float, kBytes> {
  typedef float Type __attribute__((vector_size(kBytes)));
};
template <int kBytes>
struct VectorOf<double, kBytes> {
  typedef double Type __attribute__((vector_size(kBytes)));
};

// 64 bytes of T, which add up lane by lane.

template <class T>
struct Lanes {
  typename VectorOf<T>::Type low = {}, high = {};

  inline __attribute__((always_inline)) static Lanes load(const T* values) {
    Lanes lanes;
    std::memcpy(&lanes.low, values, sizeof(lanes.low));
    std::memcpy(&lanes.high, values + sizeof(lanes.low) / sizeof(T), sizeof(lanes.high));
    return lanes;
  }
  inline __attribute__((always_inline)) void add(const Lanes& other) {
    low += other.low;
    high += other.high;
  }
  inline __attribute__((always_inline)) void raise_to(const Lanes& other) {
    low = low > other.low ? low : other.low;
    high = high > other.high ? high : other.high;
  }
  inline __attribute__((always_inline)) void add_squares(const Lanes& other) {
    low += other.low * other.low;
    high += other.high * other.high;
  }
};

template <class T>
inline constexpr int64_t kNumLanes = sizeof(Lanes<T>) / sizeof(T);

// Arrays that begin with a cache line: a vector access that crosses lines takes twice as long.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kLine); }
  friend bool operator==(LineAllocator, LineAllocator) { return true; }
  friend bool operator!=(LineAllocator, LineAllocator) { return false; }
};
template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

// Pairwise, in registers. A reduction of `omp simd` adds one lane after the other, which takes as
// long as the rest of a row of 49 elements.
template <int64_t kSize, class T>
inline __attribute__((always_inline)) T sum_of(const T* values) {
  if constexpr (kSize == 1) {
    return values[0];
  } else {
    T sums[kSize / 2];
    for (int64_t i = 0; i < kSize / 2; ++i) sums[i] = values[i] + values[i + kSize / 2];
    return sum_of<kSize / 2>(sums);
  }
}

template <class T>
inline __attribute__((always_inline)) T sum_of(const Lanes<T>& lanes) {
  const auto sums = lanes.low + lanes.high;
  typename VectorOf<T, 16>::Type halves[2];
  std::memcpy(halves, &sums, sizeof(sums));
  halves[0] += halves[1];
  T values[16 / sizeof(T)];
  std::memcpy(values, halves, sizeof(values));
  return sum_of<16 / sizeof(T)>(values);
}

}  // namespace fastremedy::cpu
