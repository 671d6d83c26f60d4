// Stores that go past the cache. What is written leaves alone what will be read again, and no line
// is fetched only to be overwritten. In parts of 16 bytes, sigmoid focal loss of 100000 x 80 labels
// takes 2.1 ms instead of 1.8 in lines, and BatchNorm of (32, 64, 56, 56) with a residual 9.8 ms
// instead of 9.4 in halves of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTREMEDY_STREAMS
#include <immintrin.h>
#endif

namespace fastremedy::cpu {

#ifdef FASTREMEDY_STREAMS
inline constexpr int64_t kLineBytes = 64;

// The first byte of `to` begins a line.
inline void stream_lines(char* to, const char* from, int64_t num_lines) {
  for (int64_t i = 0; i < 4 * num_lines; ++i) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part);
  }
}

__attribute__((target("avx2"))) inline void stream_lines_by_halves(char* to, const char* from,
                                                                   int64_t num_lines) {
  for (int64_t i = 0; i < 2 * num_lines; ++i) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, half);
  }
}

__attribute__((target("avx512f"))) inline void stream_lines_at_once(char* to, const char* from,
                                                                    int64_t num_lines) {
  for (int64_t i = 0; i < num_lines; ++i) {
    const __m512i line = _mm512_loadu_si512(from + kLineBytes * i);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + kLineBytes * i), line);
  }
}
#endif

inline void stream_bytes(char* to, const char* from, int64_t n) {
#ifdef FASTREMEDY_STREAMS
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLineBytes - 1);
  const int64_t begin = head < n ? head : n;
  const int64_t num_lines = (n - begin) / kLineBytes, end = begin + num_lines * kLineBytes;
  static const auto stream = __builtin_cpu_supports("avx512f") ? &stream_lines_at_once
                             : __builtin_cpu_supports("avx2")  ? &stream_lines_by_halves
                                                               : &stream_lines;
  std::memcpy(to, from, begin);
  stream(to + begin, from + begin, num_lines);
  std::memcpy(to + end, from + end, n - end);
#else
  std::memcpy(to, from, n);
#endif
}

// To be called by the thread that streamed, before others read.
inline void finish_streams() {
#ifdef FASTREMEDY_STREAMS
  _mm_sfence();
#endif
}

}  // namespace fastremedy::cpu
