// One source, three instruction sets: the loader picks AVX-512, AVX2 or baseline x86-64 once.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTREMEDY_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTREMEDY_CLONES
#endif

namespace fastremedy::cpu {

// 64 bytes of T, which add up lane by lane: one register of AVX-512, two of AVX2.
template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Type __attribute__((vector_size(64)));
};
template <>
struct LanesOf<double> {
  typedef double Type __attribute__((vector_size(64)));
};
template <class T>
using Lanes = typename LanesOf<T>::Type;

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
  T values[kNumLanes<T>];
  std::memcpy(values, &lanes, sizeof(values));
  return sum_of<kNumLanes<T>>(values);
}

}  // namespace fastremedy::cpu
