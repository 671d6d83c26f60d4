#include "blocks.h"

namespace fastremedy::cpu {

template <class Format>
FASTREMEDY_CLONES void load_half(const uint16_t* __restrict stored, float* __restrict values,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = Format::to_float(stored[i]);
}

template <class Format>
FASTREMEDY_CLONES void store_half(const float* __restrict values, uint16_t* __restrict stored,
                                  int64_t n) {
  for (int64_t i = 0; i < n; ++i) stored[i] = Format::round(values[i]);
}

template void load_half<BFloat16>(const uint16_t*, float*, int64_t);
template void load_half<Float16>(const uint16_t*, float*, int64_t);
template void store_half<BFloat16>(const float*, uint16_t*, int64_t);
template void store_half<Float16>(const float*, uint16_t*, int64_t);

}  // namespace fastremedy::cpu
