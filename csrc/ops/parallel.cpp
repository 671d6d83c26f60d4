// torch's thread pool through the stable ABI.
// clang-format off: stable_abi.h first
#include "stable_abi.h"
// clang-format on

#include "../cpu/parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

namespace fastremedy::cpu {
namespace {

// A child of fork() has none of the pool's threads. GNU's OpenMP waits for them forever.
std::atomic<bool> has_pool{false};
std::atomic<bool> has_lost_pool{false};
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { has_lost_pool = has_pool.load(); });

}  // namespace

int num_threads() { return has_lost_pool ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

void run_on_all_threads(void (*body)(void* context, int thread), void* context) {
  has_pool = true;
  torch::stable::parallel_for(0, num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) body(context, static_cast<int>(begin));
  });
}

}  // namespace fastremedy::cpu
