// Memory that is about to be written for the first time.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastremedy::cpu {

// Asks for pages of 2 MB under a large result. It is new from the operating system more often than
// not, and 32 000 page faults for 131 MB take 27 ms where 830 take 9.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr intptr_t kHugePage = 2 << 20;
  const intptr_t begin = (reinterpret_cast<intptr_t>(data) + kHugePage - 1) & -kHugePage;
  const intptr_t end = (reinterpret_cast<intptr_t>(data) + bytes) & -kHugePage;
  // It is a wish: where it is not granted nothing else changes.
  if (data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace fastremedy::cpu
