// torch's thread pool through the stable ABI.
// clang-format off: stable_abi.h first
#include "stable_abi.h"
// clang-format on

#include "../cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fastremedy::cpu {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_on_all_threads(void (*body)(void* context, int thread), void* context) {
  torch::stable::parallel_for(0, num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) body(context, static_cast<int>(begin));
  });
}

}  // namespace fastremedy::cpu
