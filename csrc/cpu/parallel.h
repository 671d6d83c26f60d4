// The threads of torch's own pool, without a torch header: torch.set_num_threads holds here too.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastremedy::cpu {

int num_threads();

// Runs body(context) on every thread of the pool, the calling one included.
void run_on_all_threads(void (*body)(void* context), void* context);

// Up to here one thread does it all: that takes less than 0.1 ms, and waking the others can take
// longer (15 ms were seen on a virtual machine whose threads had gone to sleep).
inline constexpr int64_t kSerialRanges = 8;

// Calls visit(range) for all ranges [0, num_ranges). Threads take the next range as they get free,
// so a slow core or an uneven range delays nobody.
template <class Visit>
void parallel_for(int64_t num_ranges, bool backwards, bool is_serial, const Visit& visit) {
  struct Shared {
    int64_t num_ranges;
    bool backwards;
    const Visit* visit;
    std::atomic<int64_t> next;
  } shared{num_ranges, backwards, &visit, {0}};
  const auto body = [](void* context) {
    auto& s = *static_cast<Shared*>(context);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.num_ranges;) {
      (*s.visit)(s.backwards ? s.num_ranges - 1 - i : i);
    }
  };
  if (is_serial || num_ranges == 1 || num_threads() == 1) {
    body(&shared);
  } else {
    run_on_all_threads(body, &shared);
  }
}

// Calls visit(begin, end) with the first and the last item of every range.
template <class Visit>
void parallel_over(const int32_t* range_begins, int64_t num_ranges, bool backwards,
                   const Visit& visit) {
  parallel_for(num_ranges, backwards, num_ranges <= kSerialRanges,
               [&](int64_t range) { visit(range_begins[range], range_begins[range + 1]); });
}

}  // namespace fastremedy::cpu
