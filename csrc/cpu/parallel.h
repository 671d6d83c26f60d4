// The threads of torch's own pool, without a torch header: torch.set_num_threads holds here too.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace fastremedy::cpu {

int num_threads();

// Runs body(context, thread) on every thread of the pool. They are numbered from 0; the calling one
// is among them.
void run_on_all_threads(void (*body)(void* context, int thread), void* context);

// Up to here one thread does it all: that takes less than 0.1 ms, and waking the others can take
// longer (15 ms were seen on a virtual machine whose threads had gone to sleep).
inline constexpr int64_t kSerialRanges = 4;

// Neighbouring ranges that one thread begins with, on a cache line of their own. torch's operators
// share out their work like this, so a thread finds in its cache what it has written before.
struct alignas(64) ThreadShare {
  int64_t begin, size;
  std::atomic<int64_t> num_taken;
};
inline constexpr int kMostShares = 64;

// Calls visit(range) for all ranges [0, num_ranges). Threads that are done with their share help
// the others with theirs, so a slow core or an uneven range delays nobody. The calling thread does
// meanwhile() first: what it alone can do, such as everything that needs Python.
template <class Visit, class Meanwhile>
void parallel_for(int64_t num_ranges, bool backwards, bool is_serial, const Visit& visit,
                  const Meanwhile& meanwhile) {
  if (is_serial || num_ranges == 1 || num_threads() == 1) {
    meanwhile();
    for (int64_t i = 0; i < num_ranges; ++i) visit(backwards ? num_ranges - 1 - i : i);
    return;
  }
  struct Work {
    ThreadShare shares[kMostShares];
    int num_shares;
    bool backwards;
    const Visit* visit;
    const Meanwhile* meanwhile;
    std::thread::id caller;    // shown as every thread where the pool is in use already
    bool has_begun;            // the caller
    std::exception_ptr error;  // the pool would lose what it is
  } work;
  work.num_shares = num_threads() < kMostShares ? num_threads() : kMostShares;
  work.backwards = backwards;
  work.visit = &visit;
  work.meanwhile = &meanwhile;
  work.caller = std::this_thread::get_id();
  work.has_begun = false;
  for (int s = 0; s < work.num_shares; ++s) {
    ThreadShare& share = work.shares[s];
    share.begin = num_ranges * s / work.num_shares;
    share.size = num_ranges * (s + 1) / work.num_shares - share.begin;
    share.num_taken.store(0, std::memory_order_relaxed);
  }
  const auto body = [](void* context, int thread) {
    auto& w = *static_cast<Work*>(context);
    if (std::this_thread::get_id() == w.caller && !w.has_begun) {
      w.has_begun = true;
      try {
        (*w.meanwhile)();
      } catch (...) {
        w.error = std::current_exception();
      }
    }
    for (int s = 0; s < w.num_shares; ++s) {
      ThreadShare& share = w.shares[(thread + s) % w.num_shares];
      for (int64_t i; (i = share.num_taken.fetch_add(1, std::memory_order_relaxed)) < share.size;) {
        (*w.visit)(share.begin + (w.backwards ? share.size - 1 - i : i));
      }
    }
  };
  run_on_all_threads(body, &work);
  if (work.error) std::rethrow_exception(work.error);
}

template <class Visit>
void parallel_for(int64_t num_ranges, bool backwards, bool is_serial, const Visit& visit) {
  parallel_for(num_ranges, backwards, is_serial, visit, [] {});
}

// Calls visit(begin, end) with the first and the last item of every range.
template <class Visit, class Meanwhile>
void parallel_over(const std::vector<int32_t>& range_begins, bool backwards, const Visit& visit,
                   const Meanwhile& meanwhile) {
  const auto num_ranges = static_cast<int64_t>(range_begins.size()) - 1;
  parallel_for(
      num_ranges, backwards, num_ranges <= kSerialRanges,
      [&](int64_t range) { visit(range_begins[range], range_begins[range + 1]); }, meanwhile);
}

template <class Visit>
void parallel_over(const std::vector<int32_t>& range_begins, bool backwards, const Visit& visit) {
  parallel_over(range_begins, backwards, visit, [] {});
}

}  // namespace fastremedy::cpu
