// AdamW on the CPU: one pass over parameter, gradient and moments, block by block through L1.
#include "../core/adamw.h"

#include <algorithm>
#include <cstring>

#include "../core/param_storage.h"
#include "blocks.h"
#include "launch.h"
#include "parallel.h"

namespace fastremedy::cpu {
namespace {

template <bool kAmsgrad, class T>
FASTREMEDY_CLONES void update_block(const AdamWCoefficients<T>& coefficients,
                                    const T* __restrict grad, T* __restrict param,
                                    T* __restrict exp_avg, T* __restrict exp_avg_sq,
                                    T* __restrict max_exp_avg_sq, int64_t n) {
  const AdamWCoefficients<T> c = coefficients;
  for (int64_t i = 0; i < n; ++i) {
    T p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    T v_max = kAmsgrad ? max_exp_avg_sq[i] : T(0);
    fastremedy::adamw_update<kAmsgrad>(c, grad[i], p, m, v, v_max);
    param[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (kAmsgrad) max_exp_avg_sq[i] = v_max;
  }
}

// Those of the last chunk: the next one's are the same, unless its group or its step differs.
template <class T>
class KnownCoefficients {
 public:
  explicit KnownCoefficients(double grad_factor) : grad_factor_(grad_factor) {}

  const AdamWCoefficients<T>& get(const AdamWHyper& hyper, const AdamWCorrection& correction) {
    if (&hyper != hyper_ || std::memcmp(&correction, &correction_, sizeof(correction)) != 0) {
      coefficients_ = adamw_coefficients<T>(hyper, correction, grad_factor_);
      hyper_ = &hyper;
      correction_ = correction;
    }
    return coefficients_;
  }

 private:
  const double grad_factor_;
  const AdamWHyper* hyper_ = nullptr;
  AdamWCorrection correction_{};
  AdamWCoefficients<T> coefficients_{};
};

// Two neighbours of type bfloat16: a register of pairs splits into two of floats, and back, without
// an element changing its place.
struct Pair {
  float low, high;

  static inline __attribute__((always_inline)) Pair load(const uint16_t* stored) {
    uint32_t bits;
    std::memcpy(&bits, stored, sizeof(bits));
    return {bit_cast<float>(bits << 16), bit_cast<float>(bits & 0xffff0000u)};
  }
  inline __attribute__((always_inline)) void store(uint16_t* stored) const {
    const uint32_t bits =
        float_to_upper_bfloat16(low) >> 16 | (float_to_upper_bfloat16(high) & 0xffff0000u);
    std::memcpy(stored, &bits, sizeof(bits));
  }
};

// As update_block, where everything is bfloat16.
FASTREMEDY_CLONES void update_pairs(const AdamWCoefficients<float>& coefficients,
                                    const uint16_t* __restrict grad, uint16_t* __restrict param,
                                    uint16_t* __restrict exp_avg, uint16_t* __restrict exp_avg_sq,
                                    int64_t n) {
  const AdamWCoefficients<float> c = coefficients;
  float unused = 0;
  for (int64_t i = 0; i + 2 <= n; i += 2) {
    const Pair g = Pair::load(grad + i);
    Pair p = Pair::load(param + i), m = Pair::load(exp_avg + i), v = Pair::load(exp_avg_sq + i);
    fastremedy::adamw_update<false>(c, g.low, p.low, m.low, v.low, unused);
    fastremedy::adamw_update<false>(c, g.high, p.high, m.high, v.high, unused);
    p.store(param + i);
    m.store(exp_avg + i);
    v.store(exp_avg_sq + i);
  }
  if (n % 2 == 0) return;
  const int64_t last = n - 1;
  float p = bfloat16_to_float(param[last]), m = bfloat16_to_float(exp_avg[last]);
  float v = bfloat16_to_float(exp_avg_sq[last]);
  fastremedy::adamw_update<false>(c, bfloat16_to_float(grad[last]), p, m, v, unused);
  param[last] = float_to_bfloat16(p);
  exp_avg[last] = float_to_bfloat16(m);
  exp_avg_sq[last] = float_to_bfloat16(v);
}

// Elements of a chunk, where they lie.
template <class Stored>
struct Elements {
  Elements(const AdamWTensor& tensor, const GradTensor& grad_tensor, int64_t begin)
      : grad(static_cast<const Stored*>(grad_tensor.data) + begin),
        param(static_cast<Stored*>(tensor.param) + begin),
        exp_avg(static_cast<Stored*>(tensor.exp_avg) + begin),
        exp_avg_sq(static_cast<Stored*>(tensor.exp_avg_sq) + begin) {}
  const Stored* grad;
  Stored *param, *exp_avg, *exp_avg_sq;
};

// Updates a chunk in registers alone. False where blocks have to convert, or there is more to read
// or write.
template <class T>
bool update_in_place(const AdamWArgs& args, const AdamWTensor& tensor, const GradTensor& grad,
                     const AdamWCoefficients<T>& coefficients, int64_t begin, int64_t end) {
  const DType dtype = tensor.param_dtype;
  if (grad.dtype != dtype || tensor.state_dtype != dtype || tensor.max_exp_avg_sq != nullptr ||
      args.update_stats != nullptr) {
    return false;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dtype == DType::kFloat16) return false;
    if (dtype == DType::kBFloat16) {
      if (args.rounding != Rounding::kNearest) return false;
      const Elements<uint16_t> e(tensor, grad, begin);
      update_pairs(coefficients, e.grad, e.param, e.exp_avg, e.exp_avg_sq, end - begin);
      return true;
    }
  }
  const Elements<T> e(tensor, grad, begin);
  update_block<false, T>(coefficients, e.grad, e.param, e.exp_avg, e.exp_avg_sq, nullptr,
                         end - begin);
  return true;
}

template <class Format>
FASTREMEDY_CLONES void store_stochastic(const float* __restrict values, uint16_t* __restrict params,
                                        int64_t n, NoiseKey key, int64_t begin) {
  for (int64_t i = 0; i < n; ++i) {
    params[i] = Format::round_stochastic(values[i], noise_bits(key, begin + i));
  }
}

template <class Format>
FASTREMEDY_CLONES void load_kahan_block(const uint16_t* __restrict params,
                                        const uint16_t* __restrict residuals,
                                        float* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = load_kahan<Format>(params[i], residuals[i]);
}

template <class Format>
FASTREMEDY_CLONES void store_kahan_block(const float* __restrict values,
                                         uint16_t* __restrict params,
                                         uint16_t* __restrict residuals, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_kahan<Format>(values[i], params[i], residuals[i]);
}

template <class Format>
FASTREMEDY_CLONES void load_master_block(const uint16_t* __restrict params,
                                         float* __restrict masters, int64_t n) {
  for (int64_t i = 0; i < n; ++i) masters[i] = load_master<Format>(params[i], masters[i]);
}

// The parameter as the formula sees it: its own memory, a converted copy, or the master.
template <class T>
class ParamBlock {
 public:
  ParamBlock(const AdamWTensor& tensor, Rounding rounding, NoiseKey key)
      : tensor_(tensor), key_(key), rounding_(is_half(tensor) ? rounding : Rounding::kNearest) {}

  T* load(int64_t begin, int64_t n) {
    begin_ = begin;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rounding_ == Rounding::kKahan || rounding_ == Rounding::kMaster) {
        return is_bfloat16() ? load_with_residual<BFloat16>(n) : load_with_residual<Float16>(n);
      }
    }
    return values_ = block_.load(tensor_.param, tensor_.param_dtype, begin, n);
  }

  void store(int64_t n) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rounding_ != Rounding::kNearest) {
        return is_bfloat16() ? store_rounded<BFloat16>(n) : store_rounded<Float16>(n);
      }
    }
    block_.store(n);
  }

 private:
  static bool is_half(const AdamWTensor& tensor) {
    return tensor.param_dtype == DType::kBFloat16 || tensor.param_dtype == DType::kFloat16;
  }
  bool is_bfloat16() const { return tensor_.param_dtype == DType::kBFloat16; }
  uint16_t* params() const { return static_cast<uint16_t*>(tensor_.param) + begin_; }
  uint16_t* compensations() const { return static_cast<uint16_t*>(tensor_.residual) + begin_; }
  float* masters() const { return static_cast<float*>(tensor_.residual) + begin_; }

  template <class Format>
  float* load_with_residual(int64_t n) {
    if (rounding_ == Rounding::kMaster) {
      load_master_block<Format>(params(), masters(), n);
      return masters();
    }
    load_kahan_block<Format>(params(), compensations(), copy_, n);
    return copy_;
  }

  template <class Format>
  void store_rounded(int64_t n) {
    if (rounding_ == Rounding::kMaster) {
      store_half<Format>(masters(), params(), n);
    } else if (rounding_ == Rounding::kKahan) {
      store_kahan_block<Format>(copy_, params(), compensations(), n);
    } else {
      store_stochastic<Format>(values_, params(), n, key_, begin_);
    }
  }

  const AdamWTensor& tensor_;
  const NoiseKey key_;
  const Rounding rounding_;
  int64_t begin_ = 0;
  T* values_ = nullptr;
  Block<T> block_;
  alignas(64) T copy_[kBlockSize];
};

// Adds in lanes, which hides the latency of the addition and does not depend on the vector size.
template <class T>
FASTREMEDY_CLONES void add_block(const T* __restrict grad, const T* __restrict before,
                                 const T* __restrict after, int64_t n, UpdateStats& sums) {
  constexpr int64_t kLanes = 16;
  double grad_sq[kLanes] = {}, weight_sq[kLanes] = {}, update_sq[kLanes] = {};
  double moved[kLanes] = {}, stuck[kLanes] = {};
  const auto add = [&](int64_t lane, int64_t i) {
    UpdateStats s{grad_sq[lane], weight_sq[lane], update_sq[lane], moved[lane], stuck[lane]};
    add_element(s, grad[i], before[i], after[i]);
    grad_sq[lane] = s.grad_sq;
    weight_sq[lane] = s.weight_sq;
    update_sq[lane] = s.update_sq;
    moved[lane] = s.moved;
    stuck[lane] = s.stuck;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, i + lane);
  }
  for (; i < n; ++i) add(i % kLanes, i);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    add_sums(sums, {grad_sq[lane], weight_sq[lane], update_sq[lane], moved[lane], stuck[lane]});
  }
}

// `sums` is null, or gets what the update did to the chunk.
template <class T>
void update_chunk(const AdamWArgs& args, const AdamWTensor& tensor, const GradTensor& grad,
                  const AdamWCoefficients<T>& coefficients, int64_t begin, int64_t end,
                  UpdateStats* sums) {
  const auto step = static_cast<uint32_t>(*tensor.step);
  ParamBlock<T> param(tensor, args.rounding, noise_key(args.seed, tensor.noise_stream, step));
  Block<T> grad_block, exp_avg, exp_avg_sq, max_exp_avg_sq;
  const DType state_dtype = tensor.state_dtype;
  alignas(64) T before[kBlockSize];
  if (sums != nullptr) *sums = {};
  for (int64_t i = begin; i < end; i += kBlockSize) {
    const int64_t n = std::min(kBlockSize, end - i);
    const T* g = grad_block.load(grad.data, grad.dtype, i, n);
    T* p = param.load(i, n);
    if (sums != nullptr) std::copy_n(p, n, before);
    T* m = exp_avg.load(tensor.exp_avg, state_dtype, i, n);
    T* v = exp_avg_sq.load(tensor.exp_avg_sq, state_dtype, i, n);
    if (tensor.max_exp_avg_sq != nullptr) {
      T* v_max = max_exp_avg_sq.load(tensor.max_exp_avg_sq, state_dtype, i, n);
      update_block<true>(coefficients, g, p, m, v, v_max, n);
      max_exp_avg_sq.store(n);
    } else {
      update_block<false, T>(coefficients, g, p, m, v, nullptr, n);
    }
    param.store(n);
    exp_avg.store(n);
    exp_avg_sq.store(n);
    if (sums != nullptr) add_block<T>(g, before, param.load(i, n), n, *sums);
  }
}

template <class T>
void update(const AdamWArgs& args, int32_t i, KnownCoefficients<T>& known) {
  const Chunk chunk = args.norm.chunks[i];
  const GradTensor& grad = args.norm.grads[chunk.tensor];
  const AdamWTensor& tensor = args.tensors[chunk.tensor];
  const AdamWCoefficients<T>& coefficients =
      known.get(args.hypers[tensor.group], args.corrections[chunk.tensor]);
  const int64_t begin = chunk.index * kChunkSize;
  const int64_t end = std::min(begin + kChunkSize, tensor.numel);
  if (update_in_place(args, tensor, grad, coefficients, begin, end)) return;
  UpdateStats* const sums = args.update_stats ? args.update_partials + i : nullptr;
  update_chunk(args, tensor, grad, coefficients, begin, end, sums);
}

void fetch_chunk(const AdamWArgs& args, const Chunk& chunk) {
  const GradTensor& grad = args.norm.grads[chunk.tensor];
  if (grad.data == nullptr) return;
  const AdamWTensor& tensor = args.tensors[chunk.tensor];
  const int64_t begin = chunk.index * kChunkSize;
  fetch(element_at(grad.data, grad.dtype, begin));
  fetch(element_at(tensor.param, tensor.param_dtype, begin));
  fetch(element_at(tensor.exp_avg, tensor.state_dtype, begin));
  fetch(element_at(tensor.exp_avg_sq, tensor.state_dtype, begin));
}

void add_partials(const AdamWArgs& args) {
  for (int32_t t = 0; t < args.num_tensors; ++t) {
    if (args.norm.grads[t].data != nullptr) args.update_stats[t] = {};
  }
  for (int32_t i = 0; i < args.norm.num_chunks; ++i) {
    const int32_t t = args.norm.chunks[i].tensor;
    if (args.norm.grads[t].data != nullptr) {
      add_sums(args.update_stats[t], args.update_partials[i]);
    }
  }
}

}  // namespace

void adamw_prepare(const AdamWArgs& args, const std::vector<int32_t>& ranges, bool has_partials) {
  grad_norm(args.norm, ranges, has_partials);
  if (args.norm.result->skip) {
    ++*args.num_skipped;
    return;
  }
  // Most parameters share group and step: their correction is computed once.
  int32_t known_group = -1;
  float known_step = 0;
  AdamWCorrection known{};
  for (int32_t i = 0; i < args.num_tensors; ++i) {
    if (args.norm.grads[i].data == nullptr) continue;
    const AdamWTensor& tensor = args.tensors[i];
    const float step = *tensor.step + 1;
    *tensor.step = step;
    if (tensor.group != known_group || step != known_step) {
      known = adamw_correction(args.hypers[tensor.group], step);
      known_group = tensor.group;
      known_step = step;
    }
    args.corrections[i] = known;
  }
}

void adamw_update(const AdamWArgs& args, const std::vector<int32_t>& ranges,
                  const std::function<void()>& meanwhile) {
  const auto visit = [&](int32_t first, int32_t last) {
    KnownCoefficients<float> known(args.norm.result->grad_factor);
    KnownCoefficients<double> known_double(args.norm.result->grad_factor);
    for (int32_t i = first; i < last; ++i) {
      if (i + kFetchAhead < last) fetch_chunk(args, args.norm.chunks[i + kFetchAhead]);
      const int32_t t = args.norm.chunks[i].tensor;
      if (args.norm.grads[t].data == nullptr) continue;
      if (args.tensors[t].param_dtype == DType::kFloat64) {
        update(args, i, known_double);
      } else {
        update(args, i, known);
      }
    }
  };
  // Backwards: the gradients that the norm read last are still in the cache.
  parallel_over(ranges, true, visit, meanwhile);
  if (args.update_stats != nullptr) add_partials(args);
}

}  // namespace fastremedy::cpu
