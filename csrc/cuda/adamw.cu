// AdamW in two launches: norm, clipping and step counts; then the update of all parameters.
#include "../core/adamw.h"

#include "../core/param_storage.h"
#include "clip_grad_norm.cuh"

namespace fastremedy::cuda {
namespace {

#ifdef FASTREMEDY_EMULATION
constexpr int kUpdateBlockSize = 64;
#else
constexpr int kUpdateBlockSize = 256;
#endif

// The last block of the norm counts the step of every tensor that has a gradient.
struct AdvanceSteps {
  AdamWArgs args;

  FASTREMEDY_DEVICE void operator()(const ClipResult& result) const {
    bool has_grad = false;
    for (int32_t t = threadIdx.x; t < args.num_tensors; t += kNormBlockSize) {
      if (args.norm.grads[t].data == nullptr) continue;
      has_grad = true;
      if (result.skip) continue;
      float* const step = as_global(args.tensors[t].step);
      *step += 1.0f;
      args.corrections[t] = adamw_correction(args.hypers[args.tensors[t].group], *step);
    }
    const bool is_skipped = __syncthreads_or(has_grad) && result.skip;
    if (is_skipped && threadIdx.x == 0) *args.num_skipped += 1;
  }
};

template <Rounding kRounding>
inline constexpr bool kHasResidual = kRounding == Rounding::kKahan || kRounding == Rounding::kMaster;

template <Rounding kRounding, class Format, int kWidth>
FASTREMEDY_DEVICE void load_half_params(const Stored<float, kWidth>& param,
                                        const Stored<float, kWidth>& residual,
                                        float (&values)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if constexpr (kRounding == Rounding::kKahan) {
      values[k] = load_kahan<Format>(param.half(k), residual.half(k));
    } else {
      values[k] = load_master<Format>(param.half(k), bit_cast<float>(residual.words[k]));
    }
  }
}

template <Rounding kRounding, class Format, int kWidth>
FASTREMEDY_DEVICE void store_half_params(const float (&values)[kWidth], NoiseKey key, int64_t i,
                                         Stored<float, kWidth>& param,
                                         Stored<float, kWidth>& residual) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    uint16_t bits;
    if constexpr (kRounding == Rounding::kKahan) {
      uint16_t residual_bits;
      store_kahan<Format>(values[k], bits, residual_bits);
      residual.set_half(k, residual_bits);
    } else if constexpr (kRounding == Rounding::kMaster) {
      float master;
      store_master<Format>(values[k], bits, master);
      residual.words[k] = bit_cast<uint32_t>(master);
    } else {
      bits = Format::round_stochastic(values[k], noise_bits(key, i + k));
    }
    param.set_half(k, bits);
  }
}

// One tensor's share of a chunk.
template <Rounding kRounding, bool kAmsgrad, class T>
class Updater {
 public:
  FASTREMEDY_DEVICE Updater(const AdamWArgs& args, int32_t index, const GradTensor& grad)
      : tensor_(args.tensors[index]), grad_(grad.data) {
    coefficients_ = adamw_coefficients<T>(args.hypers[tensor_.group], args.corrections[index],
                                          args.norm.result->grad_factor);
    if constexpr (kRounding == Rounding::kStochastic) {
      const auto step = static_cast<uint32_t>(*as_global(tensor_.step));
      key_ = noise_key(args.seed, tensor_.noise_stream, step);
    }
    constexpr bool kMayHaveResidual = kRounding == Rounding::kKahan || ...;
  }
};

}  // namespace
