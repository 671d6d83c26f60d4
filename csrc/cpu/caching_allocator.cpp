// New memory is cleared page by page as it is first written: for 131 MB that takes 56 ms in pages
// of 4 KB and 9 ms or more in pages of 2 MB, where a kernel that fills them takes 7. A training
// step asks for the sizes of the step before, so released blocks wait here for the next one.
//
// A size that no block fits pays with the blocks that have waited longest, so blocks in use and
// waiting together never exceed what was once in use at the same time. And all but the last that
// were released are the operating system's to take when memory gets short (MADV_FREE).
#include "caching_allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

namespace fastremedy::cpu {
namespace {

// Whole pages, so that no two blocks share one.
constexpr size_t kPage = size_t{64} << 10;
// So much waits as it is. To write pages that could have been taken costs 20 us for each of 2 MB.
constexpr size_t kHeldBytes = size_t{1} << 30;

MemoryBlock map_block(size_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  void* const mapping =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return {nullptr, 0};
  const size_t before = -reinterpret_cast<uintptr_t>(mapping) % kHugePage;
  char* const data = static_cast<char*>(mapping) + before;
  if (before > 0) munmap(mapping, before);
  munmap(data + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // a wish: where it is not granted nothing else changes
#endif
  return {data, bytes};
}

void unmap_block(MemoryBlock block) { munmap(block.data, block.bytes); }

// Waiting blocks, the one released last at the end.
class Cache {
 public:
  // A null block if none fits; then it has made room for a new one.
  MemoryBlock take(size_t bytes) {
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 4;
      // Of equal ones the last released, which a processor's cache may still have.
      if (fits && (best == blocks_.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best == blocks_.end()) {
      give_back(bytes);
      return {nullptr, 0};
    }
    const MemoryBlock taken = *best;
    blocks_.erase(best);
    return taken;
  }

  void keep(MemoryBlock block) {
    blocks_.push_back({block, false});
    size_t held = 0;
    for (auto b = blocks_.rbegin(); b != blocks_.rend() && !b->can_be_taken; ++b) {
      held += b->bytes;
      if (held > kHeldBytes) offer(*b);
    }
  }

  // Gives the oldest blocks to the operating system, `bytes` or all there are.
  void give_back(size_t bytes) {
    size_t given = 0;
    auto block = blocks_.begin();
    for (; block != blocks_.end() && given < bytes; ++block) {
      given += block->bytes;
      unmap_block(*block);
    }
    blocks_.erase(blocks_.begin(), block);
  }

  size_t bytes() const {
    size_t total = 0;
    for (const MemoryBlock& block : blocks_) total += block.bytes;
    return total;
  }

  // Locked for the blink of a look-up. Who does not get it does without the cache: after a fork its
  // holder may not exist.
  std::mutex mutex;

 private:
  struct Waiting : MemoryBlock {
    bool can_be_taken;  // by the operating system
  };

  static void offer(Waiting& block) {
#ifdef MADV_FREE
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    block.can_be_taken = true;
  }

  std::vector<Waiting> blocks_;
};

// Never destroyed: tensors may be released after everything static.
Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

}  // namespace

MemoryBlock allocate_block(size_t bytes) {
  const std::unique_lock lock(cache().mutex, std::try_to_lock);
  if (lock.owns_lock()) {
    const MemoryBlock block = cache().take(bytes);
    if (block.data != nullptr) return block;
  }
  return map_block(bytes);
}

void release_block(MemoryBlock block) {
  const std::unique_lock lock(cache().mutex, std::try_to_lock);
  if (lock.owns_lock()) {
    cache().keep(block);
  } else {
    unmap_block(block);
  }
}

size_t cached_bytes() {
  const std::lock_guard lock(cache().mutex);
  return cache().bytes();
}

void empty_cache() {
  const std::lock_guard lock(cache().mutex);
  cache().give_back(SIZE_MAX);
}

}  // namespace fastremedy::cpu
