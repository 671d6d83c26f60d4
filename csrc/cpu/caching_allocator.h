// Memory of large results, kept from one training step to the next.
#pragma once

#include <cstddef>

namespace fastremedy::cpu {

// From here on a result has a block of its own: one huge page.
inline constexpr size_t kHugePage = size_t{2} << 20;

struct MemoryBlock {
  void* data;  // begins with a huge page; null where the operating system has no memory left
  size_t bytes;
};

// At least `bytes` bytes of any content.
MemoryBlock allocate_block(size_t bytes);
void release_block(MemoryBlock block);

// Released blocks that the operating system did not get back.
size_t cached_bytes();
void empty_cache();

}  // namespace fastremedy::cpu
