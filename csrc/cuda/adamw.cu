// AdamW in two launches: norm, clipping and step counts; then the update of all parameters.
#include "../core/adamw.h"
#include "../core/param_storage.h"
#include "adamw_update_stats.cuh"
#include "clip_grad_norm.cuh"

namespace fastremedy::cuda {
namespace {

// Two blocks may take 128 registers a thread; sm_75 to sm_120 take 98 to 128 and spill nothing.
// They have 64 KiB of float32 parameter, gradient and moments on their way to a multiprocessor. A
// third block would leave 80 registers, and spills.
#ifdef FASTREMEDY_EMULATION
constexpr int kUpdateBlockSize = 64;
#else
constexpr int kUpdateBlockSize = 256;
#endif
constexpr int kUpdateBlocks = 2;

// The last block of the norm counts a step for every tensor that has a gradient.
struct AdvanceSteps {
  AdamWArgs args;

  FASTREMEDY_DEVICE void operator()(const ClipResult& result) const {
    bool has_grad = false;
    for (int32_t t = threadIdx.x; t < args.num_tensors; t += kNormBlockSize) {
      if (args.norm.grads[t].data == nullptr) continue;
      has_grad = true;
      if (result.skip) continue;
      float* const step = as_global(args.tensors[t].step);
      const float next_step = *step + 1.0f;
      *step = next_step;
      AdamWHyper hyper = args.hypers[args.tensors[t].group];
      hyper.lr_tensor = as_global(hyper.lr_tensor);
      args.corrections[t] = adamw_correction(hyper, next_step);
    }
    const bool is_skipped = __syncthreads_or(has_grad) && result.skip;
    if (is_skipped && threadIdx.x == 0) *args.num_skipped += 1;
  }
};

// How the parameters of one tensor are stored; a wider one than 16 bits holds its value itself.
template <Rounding kRounding, class T>
class ParamStorage {
 public:
  FASTREMEDY_DEVICE ParamStorage(const AdamWTensor& tensor, uint64_t seed, int64_t begin)
      : dtype_(tensor.param_dtype),
        begin_(begin),
        param_(element_at(tensor.param, dtype_, begin)),
        residual_(element_at(tensor.residual, residual_dtype(), begin)) {
    if constexpr (kRounding == Rounding::kStochastic) {
      const auto step = static_cast<uint32_t>(*as_global(tensor.step));
      key_ = noise_key(seed, tensor.noise_stream, step);
    }
  }

  FASTREMEDY_DEVICE bool is_aligned() const {
    return cuda::is_aligned(param_) && (!has_residual() || cuda::is_aligned(residual_));
  }

  // In two parts, so that the loads of all operands are under way before the first is used.
  template <int kWidth>
  struct Loaded {
    Stored<T, kWidth> param;
    Stored<T, kWidth> residual;
  };

  template <int kWidth>
  FASTREMEDY_DEVICE Loaded<kWidth> load(int32_t i) const {
    Loaded<kWidth> loaded;
    loaded.param = cuda::load<T, kWidth>(param_, dtype_, i);
    if (has_residual()) loaded.residual = cuda::load<T, kWidth>(residual_, residual_dtype(), i);
    return loaded;
  }

  template <int kWidth>
  FASTREMEDY_DEVICE void unpack(const Loaded<kWidth>& loaded, T (&values)[kWidth]) const {
    if constexpr (kMayHaveResidual) {
      if (dtype_ == DType::kBFloat16) return add_residual<BFloat16>(loaded, values);
      if (dtype_ == DType::kFloat16) return add_residual<Float16>(loaded, values);
    }
    cuda::unpack(loaded.param, dtype_, values);
  }

  // Returns what the next step will load.
  template <int kWidth>
  FASTREMEDY_DEVICE Loaded<kWidth> store(int32_t i, const T (&values)[kWidth]) const {
    if constexpr (kIsNarrow) {
      if (dtype_ == DType::kBFloat16) return store_narrow<BFloat16>(i, values);
      if (dtype_ == DType::kFloat16) return store_narrow<Float16>(i, values);
    }
    const Loaded<kWidth> stored{pack(values, dtype_), {}};
    cuda::store(param_, dtype_, i, stored.param);
    return stored;
  }

 private:
  static constexpr bool kIsNarrow = sizeof(T) == sizeof(float) && kRounding != Rounding::kNearest;
  static constexpr bool kMayHaveResidual = kIsNarrow && kRounding != Rounding::kStochastic;

  FASTREMEDY_DEVICE bool has_residual() const {
    return kMayHaveResidual && element_size(dtype_) == 2;
  }
  FASTREMEDY_DEVICE DType residual_dtype() const {
    return kRounding == Rounding::kMaster ? DType::kFloat32 : dtype_;
  }

  template <class Format, int kWidth>
  static FASTREMEDY_DEVICE void add_residual(const Loaded<kWidth>& loaded, T (&values)[kWidth]) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if constexpr (kRounding == Rounding::kKahan) {
        values[k] = load_kahan<Format>(loaded.param.half(k), loaded.residual.half(k));
      } else {
        const float master = bit_cast<float>(loaded.residual.words[k]);
        values[k] = load_master<Format>(loaded.param.half(k), master);
      }
    }
  }

  template <class Format, int kWidth>
  FASTREMEDY_DEVICE Loaded<kWidth> store_narrow(int32_t i, const T (&values)[kWidth]) const {
    Loaded<kWidth> stored;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      uint16_t bits;
      if constexpr (kRounding == Rounding::kStochastic) {
        bits = Format::round_stochastic(values[k], noise_bits(key_, begin_ + i + k));
      } else if constexpr (kRounding == Rounding::kKahan) {
        uint16_t residual_bits;
        store_kahan<Format>(values[k], bits, residual_bits);
        stored.residual.set_half(k, residual_bits);
      } else {
        float master;
        store_master<Format>(values[k], bits, master);
        stored.residual.words[k] = bit_cast<uint32_t>(master);
      }
      stored.param.set_half(k, bits);
    }
    cuda::store(param_, dtype_, i, stored.param);
    if constexpr (kMayHaveResidual) cuda::store(residual_, residual_dtype(), i, stored.residual);
    return stored;
  }

  const DType dtype_;
  const int64_t begin_;
  char* const param_;
  char* const residual_;
  NoiseKey key_;
};

// The operands of kWidth elements as memory has them.
template <class LoadedParams, class Vec>
struct LoadedOperands {
  LoadedParams params;
  Vec grads;
  Vec exp_avgs;
  Vec exp_avg_sqs;
  Vec max_exp_avg_sqs;
};

template <Rounding kRounding, bool kMeasures, bool kAmsgrad, class T>
FASTREMEDY_DEVICE void update_chunk(const AdamWArgs& args, Chunk chunk, const AdamWTensor& tensor,
                                    const GradTensor& grad) {
  using Storage = ParamStorage<kRounding, T>;
  const auto coefficients = adamw_coefficients<T>(
      args.hypers[tensor.group], args.corrections[chunk.tensor], args.norm.result->grad_factor);
  const Slice slice = slice_of(chunk, tensor.numel);
  const DType state_dtype = tensor.state_dtype;
  const Storage storage(tensor, args.seed, slice.begin);
  char* const grad_data = element_at(grad.data, grad.dtype, slice.begin);
  char* const exp_avg = element_at(tensor.exp_avg, state_dtype, slice.begin);
  char* const exp_avg_sq = element_at(tensor.exp_avg_sq, state_dtype, slice.begin);
  char* const max_exp_avg_sq = element_at(tensor.max_exp_avg_sq, state_dtype, slice.begin);
  const bool all_aligned = storage.is_aligned() && is_aligned(grad_data) && is_aligned(exp_avg) &&
                           is_aligned(exp_avg_sq) && (!kAmsgrad || is_aligned(max_exp_avg_sq));
  if constexpr (kMeasures) update_sums<kUpdateBlockSize>()[threadIdx.x] = {};
  for_each_vec<T, 1>(
      slice.size, all_aligned,
      [&](auto width, int32_t i) {
        constexpr int kWidth = decltype(width)::value;
        using Vec = Stored<T, kWidth>;
        LoadedOperands<typename Storage::template Loaded<kWidth>, Vec> loaded;
        loaded.params = storage.template load<kWidth>(i);
        loaded.grads = load<T, kWidth>(grad_data, grad.dtype, i);
        loaded.exp_avgs = load<T, kWidth>(exp_avg, state_dtype, i);
        loaded.exp_avg_sqs = load<T, kWidth>(exp_avg_sq, state_dtype, i);
        if constexpr (kAmsgrad) {
          loaded.max_exp_avg_sqs = load<T, kWidth>(max_exp_avg_sq, state_dtype, i);
        }
        return loaded;
      },
      [&](auto width, int32_t i, const auto& loaded) {
        constexpr int kWidth = decltype(width)::value;
        T params[kWidth], grads[kWidth], exp_avgs[kWidth], exp_avg_sqs[kWidth];
        T max_exp_avg_sqs[kWidth] = {};
        storage.unpack(loaded.params, params);
        unpack(loaded.grads, grad.dtype, grads);
        unpack(loaded.exp_avgs, state_dtype, exp_avgs);
        unpack(loaded.exp_avg_sqs, state_dtype, exp_avg_sqs);
        if constexpr (kAmsgrad) unpack(loaded.max_exp_avg_sqs, state_dtype, max_exp_avg_sqs);
        [[maybe_unused]] T before[kWidth];
        if constexpr (kMeasures) memcpy(before, params, sizeof(before));
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          adamw_update<kAmsgrad>(coefficients, grads[k], params[k], exp_avgs[k], exp_avg_sqs[k],
                                 max_exp_avg_sqs[k]);
        }
        [[maybe_unused]] const auto stored = storage.store(i, params);
        store(exp_avg, state_dtype, i, pack(exp_avgs, state_dtype));
        store(exp_avg_sq, state_dtype, i, pack(exp_avg_sqs, state_dtype));
        if constexpr (kAmsgrad) {
          store(max_exp_avg_sq, state_dtype, i, pack(max_exp_avg_sqs, state_dtype));
        }
        if constexpr (kMeasures) {
          T after[kWidth];
          storage.unpack(stored, after);
          add_elements(update_sums<kUpdateBlockSize>()[threadIdx.x], grads, before, after);
        }
      });
}

template <Rounding kRounding, bool kMeasures>
__global__ void __launch_bounds__(kUpdateBlockSize, kUpdateBlocks)
    adamw_update_kernel(AdamWArgs args) {
  if (args.norm.result->skip) return;
  // Backwards: the gradients that the norm read last are still in L2.
  for (int32_t c = args.norm.num_chunks - 1 - blockIdx.x; c >= 0; c -= gridDim.x) {
    const Chunk chunk = args.norm.chunks[c];
    const GradTensor grad = args.norm.grads[chunk.tensor];
    if (grad.data == nullptr) continue;
    const AdamWTensor tensor = args.tensors[chunk.tensor];
    const bool is_amsgrad = tensor.max_exp_avg_sq != nullptr;
    if (tensor.param_dtype == DType::kFloat64) {
      is_amsgrad ? update_chunk<kRounding, kMeasures, true, double>(args, chunk, tensor, grad)
                 : update_chunk<kRounding, kMeasures, false, double>(args, chunk, tensor, grad);
    } else {
      is_amsgrad ? update_chunk<kRounding, kMeasures, true, float>(args, chunk, tensor, grad)
                 : update_chunk<kRounding, kMeasures, false, float>(args, chunk, tensor, grad);
    }
    // Unsigned: the upper half of a signed offset would take a register all the way.
    const auto place = static_cast<uint32_t>(c);
    if constexpr (kMeasures) write_partial<kUpdateBlockSize>(args.update_partials[place]);
  }
  if constexpr (kMeasures) {
    if (is_last_block(args.update_counter, gridDim.x)) write_update_stats<kUpdateBlockSize>(args);
  }
}

template <Rounding kRounding>
int launch_update(const AdamWArgs& args, void* stream) {
  const auto launch = [&](auto kernel) {
    return launch_over_chunks<kUpdateBlockSize>(kernel, args.norm.num_chunks, stream, args);
  };
  return args.update_stats != nullptr ? launch(adamw_update_kernel<kRounding, true>)
                                      : launch(adamw_update_kernel<kRounding, false>);
}

}  // namespace

int launch_adamw_prepare(const AdamWArgs& args, void* stream) {
  return launch_norm(args.norm, AdvanceSteps{args}, stream);
}

int launch_adamw_update(const AdamWArgs& args, void* stream) {
  switch (args.rounding) {
    case Rounding::kNearest:
      return launch_update<Rounding::kNearest>(args, stream);
    case Rounding::kStochastic:
      return launch_update<Rounding::kStochastic>(args, stream);
    case Rounding::kKahan:
      return launch_update<Rounding::kKahan>(args, stream);
    case Rounding::kMaster:
      return launch_update<Rounding::kMaster>(args, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace fastremedy::cuda
