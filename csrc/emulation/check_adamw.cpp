// The AdamW kernels: every step against the formula in long double with a bound of the rounding
// error, and the bits of narrow parameters against rounding in plain arithmetic.
#include "adamw_problem.h"

namespace fastremedy::check {
namespace {

class Model {
 public:
  explicit Model(Rounding rounding) : rounding_(rounding) {
    const auto add_group = [&](double beta1, double beta2, bool maximize, bool amsgrad,
                               bool decoupled) {
      hypers_.push_back({1e-2, beta1, beta2, 1e-8, 0.1, nullptr, maximize, amsgrad, decoupled, 0});
    };
    add_group(0.9, 0.999, false, false, true);
    add_group(0.9, 0.999, false, true, true);
    add_group(0.2, 0.3, true, false, false);
    add_group(0.0, 0.95, true, true, false);
    hypers_[2].lr_tensor = memory_.upload(std::vector<float>{0.02f});
  }

  void add_sizes() {
    for (const DTypes dtypes : kDTypes) {
      int32_t group = 0;
      for (const int64_t numel : {0, 1, 7, 8, 9, 515}) add(dtypes, numel, group++ % 4);
      for (const Operand misaligned : {kParam, kGrad, kExpAvg, kExpAvgSq, kMax, kResidual}) {
        add(dtypes, 515, misaligned == kMax ? 1 : group++ % 4, misaligned);
      }
    }
    for (size_t t = 3; t < grads_.size(); t += 7) grads_[t].data = nullptr;
    for (const int64_t offset : {-1, 0, 1, 600}) {
      add({DType::kBFloat16, DType::kFloat32}, cuda::kChunkSize + offset, offset == 0);
    }
  }

  void add_empty() { add(kDTypes[0], 0, 0); }

  std::vector<GradTensor>& grads() { return grads_; }

  void step(NormKind kind, const ClipOptions& options, bool expect_skip, const char* what,
            bool is_measured = false) {
    Memory tables;
    AdamWArgs args = arguments(kind, options, tables);
    if (is_measured) measure(args, tables);
    std::vector<Before> before;
    for (size_t t = 0; t < tensors_.size(); ++t) before.push_back(snapshot(tensors_[t]));
    expect(cuda::launch_adamw_prepare(args, nullptr) == 0, "launch_adamw_prepare");
    expect(cuda::launch_adamw_update(args, nullptr) == 0, "launch_adamw_update");
    expect(memory_.is_intact() && tables.is_intact(), "adamw: guard bytes are written");
    expect(*args.norm.counter == 0, "the counter returns to 0");

    const ClipResult result = *args.norm.result;
    expect(result.skip == expect_skip, std::string(what) + ": skip");
    const bool has_grad = std::any_of(grads_.begin(), grads_.end(),
                                      [](const GradTensor& grad) { return grad.data != nullptr; });
    expect(*args.num_skipped == 5 + (expect_skip && has_grad), std::string(what) + ": num_skipped");
    double expected_norm = 0;
    if (kind != NormKind::kNone) {
      expected_norm = norm_of(grads_, options.norm_type);
      // Where these checks have both norm and scale, it is a double.
      if (options.grad_scale) expected_norm /= *static_cast<const double*>(options.grad_scale);
      expect(is_close(*static_cast<float*>(args.norm.total_norm), expected_norm,
                      norm_tolerance(options.norm_type) + std::ldexp(1.0, -24)),
             std::string(what) + ": total_norm");
    }
    expect(is_close(result.total_norm, expected_norm, norm_tolerance(options.norm_type)),
           std::string(what) + ": total_norm of the result");
    for (size_t t = 0; t < tensors_.size(); ++t) {
      const bool is_updated = grads_[t].data != nullptr && !expect_skip;
      expect_tensor(t, before[t], is_updated, result.grad_factor, what);
      if (is_measured) expect_measured(t, before[t], is_updated, args.update_stats[t], what);
    }
    expect(!is_measured || *args.update_counter == 0, "the counter of the update returns to 0");
  }

 private:
  static constexpr double kUnwritten = -1;
  static constexpr uint64_t kSeed = 0x123456789abcdefull;

  DType residual_dtype(DType param) const {
    return rounding_ == Rounding::kMaster ? DType::kFloat32 : param;
  }

  enum Operand { kNone, kParam, kGrad, kExpAvg, kExpAvgSq, kMax, kResidual };

  // A misaligned operand begins one element after an aligned address.
  void add(DTypes dtypes, int64_t numel, int32_t group, Operand misaligned = kNone) {
    const auto random_array = [&](Operand operand, DType dtype, double scale) {
      const int size = element_size(dtype);
      void* const data = memory_.allocate(numel * size, operand == misaligned ? size : 0);
      std::normal_distribution<double> normal(0, scale);
      for (int64_t i = 0; i < numel; ++i) set(data, dtype, i, i % 11 == 10 ? 0.0 : normal(random_));
      return data;
    };
    AdamWTensor tensor{};
    tensor.numel = numel;
    tensor.param_dtype = dtypes.param;
    tensor.state_dtype = dtypes.state;
    tensor.group = group;
    tensor.noise_stream = static_cast<uint32_t>(tensors_.size());
    tensor.param = random_array(kParam, dtypes.param, 1);
    tensor.exp_avg = random_array(kExpAvg, dtypes.state, 0.1);
    tensor.exp_avg_sq = random_array(kExpAvgSq, dtypes.state, 0.1);
    make_positive(tensor.exp_avg_sq, dtypes.state, numel);
    if (hypers_[group].amsgrad) {
      tensor.max_exp_avg_sq = random_array(kMax, dtypes.state, 0.1);
      make_positive(tensor.max_exp_avg_sq, dtypes.state, numel);
    }
    if (is_narrow(dtypes.param) && rounding_ >= Rounding::kKahan) {
      tensor.residual = random_array(kResidual, residual_dtype(dtypes.param), 1e-3);
      for (int64_t i = 0; rounding_ == Rounding::kMaster && i < numel; ++i) {
        if (i % 5 == 4) continue;  // a stale master: the parameter was set from outside
        const double param = get(tensor.param, dtypes.param, i);
        set(tensor.residual, DType::kFloat32, i, param + 0.3 * spacing(dtypes.param, param));
      }
    }
    tensor.step = memory_.upload(std::vector<float>{static_cast<float>(tensors_.size() % 3)});
    tensors_.push_back(tensor);
    grads_.push_back({random_array(kGrad, dtypes.param, 0.1), numel, dtypes.param, 0});
  }

  static void make_positive(void* data, DType dtype, int64_t numel) {
    for (int64_t i = 0; i < numel; ++i) set(data, dtype, i, std::fabs(get(data, dtype, i)));
  }

  AdamWArgs arguments(NormKind kind, const ClipOptions& options, Memory& tables) {
    const std::vector<Chunk> chunks = make_chunks(grads_);
    AdamWArgs args{};
    args.norm.grads = tables.upload(grads_);
    args.norm.chunks = tables.upload(chunks);
    args.norm.num_chunks = static_cast<int32_t>(chunks.size());
    args.norm.kind = kind;
    args.norm.options = options;
    args.norm.partials = tables.upload(std::vector<double>(chunks.size()));
    args.norm.counter = tables.upload(std::vector<uint32_t>{0});
    args.norm.result = tables.upload(std::vector<ClipResult>(1));
    args.norm.total_norm = tables.upload(std::vector<float>{-1});
    args.norm.total_norm_dtype = DType::kFloat32;
    args.tensors = tables.upload(tensors_);
    args.hypers = tables.upload(hypers_);
    args.corrections = tables.upload(std::vector<AdamWCorrection>(tensors_.size()));
    args.num_skipped = tables.upload(std::vector<int64_t>{5});
    args.num_tensors = static_cast<int32_t>(tensors_.size());
    args.rounding = rounding_;
    args.seed = kSeed;
    return args;
  }

  static void measure(AdamWArgs& args, Memory& tables) {
    const auto rows = [](size_t count, double x) {
      return std::vector<UpdateStats>(count, {x, x, x, x, x});
    };
    args.update_stats = tables.upload(rows(args.num_tensors, kUnwritten));
    args.update_partials = tables.upload(rows(args.norm.num_chunks, 2 * kUnwritten));
    args.update_counter = tables.upload(std::vector<uint32_t>{0});
  }

  Before snapshot(const AdamWTensor& tensor) const {
    const auto copy = [&](const void* data, DType dtype) {
      std::vector<double> values;
      for (int64_t i = 0; data && i < tensor.numel; ++i) values.push_back(get(data, dtype, i));
      return values;
    };
    return {copy(tensor.param, tensor.param_dtype),
            copy(tensor.exp_avg, tensor.state_dtype),
            copy(tensor.exp_avg_sq, tensor.state_dtype),
            copy(tensor.max_exp_avg_sq, tensor.state_dtype),
            copy(tensor.residual, residual_dtype(tensor.param_dtype)),
            *tensor.step};
  }

  void expect_tensor(size_t t, const Before& before, bool is_updated, double grad_factor,
                     const char* what) const {
    const AdamWTensor& tensor = tensors_[t];
    const Before after = snapshot(tensor);
    const std::string name = std::string(what) + ", tensor " + std::to_string(t) + " of " +
                             std::to_string(tensor.numel) + " " + name_of(tensor.param_dtype) +
                             " with " + name_of(tensor.state_dtype) + " state";
    expect(after.step == before.step + is_updated, name + ": step");
    if (!is_updated) {
      expect(after.params == before.params && after.exp_avgs == before.exp_avgs &&
                 after.exp_avg_sqs == before.exp_avg_sqs &&
                 after.max_exp_avg_sqs == before.max_exp_avg_sqs &&
                 after.residuals == before.residuals,
             name + ": nothing changes");
    } else if (tensor.param_dtype == DType::kFloat64) {
      expect_updated<double>(t, before, after, grad_factor, name);
    } else {
      expect_updated<float>(t, before, after, grad_factor, name);
    }
  }

  void expect_measured(size_t t, const Before& before, bool is_updated, const UpdateStats& actual,
                       const char* what) const {
    const GradTensor& grad = grads_[t];
    const Before after = snapshot(tensors_[t]);
    ExpectedUpdate expected;
    for (int64_t i = 0; is_updated && i < grad.numel; ++i) {
      expected.add(get(grad.data, grad.dtype, i), value_of(before, grad.dtype, rounding_, i),
                   value_of(after, grad.dtype, rounding_, i));
    }
    const bool is_right = is_updated
                              ? expected.matches(actual)
                              : actual.grad_sq == kUnwritten && actual.weight_sq == kUnwritten &&
                                    actual.update_sq == kUnwritten && actual.moved == kUnwritten &&
                                    actual.stuck == kUnwritten;
    expect(is_right, std::string(what) + ", tensor " + std::to_string(t) + " of " +
                         std::to_string(grad.numel) + " " + name_of(grad.dtype) +
                         ": what the step did");
  }

  // The formula is held to exact arithmetic, then the kernel to the formula: bit for bit.
  template <class T>
  void expect_updated(size_t t, const Before& before, const Before& after, double grad_factor,
                      const std::string& name) const {
    using Real = Bounded<T>;
    using Double = Bounded<double>;  // what depends on the step is computed in double, then rounded
    using Wide = long double;
    const AdamWTensor& tensor = tensors_[t];
    const AdamWHyper& hyper = hypers_[tensor.group];
    const Wide lr = hyper.lr_tensor ? *hyper.lr_tensor : hyper.lr;
    const auto bias_correction = [&](double beta) {
      return Double::exact(1) - Double::rounded(std::pow(Wide{beta}, after.step));
    };
    const Double step_size = Double::exact(lr) / bias_correction(hyper.beta1);
    const Double inv_sqrt = Double::exact(1) / sqrt(bias_correction(hyper.beta2));
    const Real weight_decay = Real::rounded(hyper.weight_decay);
    const Real lr_decay = Real::rounded(lr * hyper.weight_decay);
    const Real one_minus_beta1 = Real::rounded(1 - Wide{hyper.beta1});
    const Real one_minus_beta2 = Real::rounded(1 - Wide{hyper.beta2});
    const Real factor = Real::rounded(hyper.maximize ? -grad_factor : grad_factor);
    const auto coefficients =
        adamw_coefficients<T>(hyper, adamw_correction(hyper, after.step), grad_factor);
    for (int64_t i = 0; i < tensor.numel; ++i) {
      const double grad = get(grads_[t].data, grads_[t].dtype, i);
      const double param = value_of(before, tensor.param_dtype, rounding_, i);
      const double last_max = hyper.amsgrad ? before.max_exp_avg_sqs[i] : 0;

      const Real p = Real::exact(param);
      const Real m = Real::exact(before.exp_avgs[i]);
      const Real v = Real::exact(before.exp_avg_sqs[i]);
      Real g = Real::exact(grad) * factor;
      if (!hyper.decoupled_weight_decay) g = g + weight_decay * p;
      const Real exp_avg = m + one_minus_beta1 * (g - m);
      const Real exp_avg_sq = v + one_minus_beta2 * (g * g - v);
      Real second_moment = exp_avg_sq;
      if (hyper.amsgrad) second_moment.value = std::max<Wide>(exp_avg_sq.value, last_max);
      const Real denom = sqrt(second_moment) * Real::rounded(inv_sqrt.value, inv_sqrt.error) +
                         Real::rounded(hyper.eps);
      const Real update = Real::rounded(step_size.value, step_size.error) * (exp_avg / denom);
      const Real decay = hyper.decoupled_weight_decay ? lr_decay * p : Real::exact(0);

      T new_p = param, new_m = before.exp_avgs[i], new_v = before.exp_avg_sqs[i];
      T new_max = last_max;
      if (hyper.amsgrad) {
        adamw_update<true>(coefficients, static_cast<T>(grad), new_p, new_m, new_v, new_max);
      } else {
        adamw_update<false>(coefficients, static_cast<T>(grad), new_p, new_m, new_v, new_max);
      }
      // Twice the bound: means are taken from the nearer end, which is another order of operations.
      const auto is_near = [](T actual, const Real& exact) {
        return std::fabs(actual - exact.value) <= 2 * exact.error;
      };
      const char* wrong = nullptr;
      if (!is_near(new_m, exp_avg) || !is_near(new_v, exp_avg_sq) ||
          !is_near(new_p, p - (decay + update))) {
        wrong = ": formula";
      } else if (after.exp_avgs[i] != stored_as(tensor.state_dtype, new_m) ||
                 after.exp_avg_sqs[i] != stored_as(tensor.state_dtype, new_v)) {
        wrong = ": moments";
      } else if (hyper.amsgrad &&
                 after.max_exp_avg_sqs[i] != stored_as(tensor.state_dtype, new_max)) {
        wrong = ": max_exp_avg_sq";
      } else if (!is_stored(tensor, after, i, new_p)) {
        wrong = ": parameter";
      }
      if (wrong) return expect(false, name + wrong + " at element " + std::to_string(i));
    }
  }

  bool is_stored(const AdamWTensor& tensor, const Before& after, int64_t i, double value) const {
    const DType dtype = tensor.param_dtype;
    const double param = after.params[i];
    if (is_narrow(dtype) && rounding_ == Rounding::kStochastic) {
      const NoiseKey key = noise_key(kSeed, tensor.noise_stream, static_cast<uint32_t>(after.step));
      return param == round_stochastic(dtype, value, noise_bits(key, i));
    }
    if (param != stored_as(dtype, value)) return false;
    if (after.residuals.empty()) return true;
    const bool is_kahan = rounding_ == Rounding::kKahan;
    return after.residuals[i] == (is_kahan ? round_to(dtype, value - param) : value);
  }

  const Rounding rounding_;
  std::mt19937 random_{0};
  Memory memory_;
  std::vector<AdamWHyper> hypers_;
  std::vector<AdamWTensor> tensors_;
  std::vector<GradTensor> grads_;
};

void check_rounding(Rounding rounding) {
  Memory scalars;
  const float* const zero = scalars.upload(std::vector<float>{0});
  const float* const two = scalars.upload(std::vector<float>{2});
  ClipOptions options{};
  options.norm_type = 2;
  options.max_norm = HUGE_VAL;

  Model model(rounding);
  model.add_sizes();
  ClipOptions clipping = options;
  clipping.max_norm = 1;
  model.step(NormKind::kL2, clipping, false, "clipping", true);

  ClipOptions scaled = options;
  scaled.grad_scale = two;
  scaled.found_inf = zero;
  model.step(NormKind::kNone, scaled, false, "loss scale");
  scaled.found_inf = two;
  model.step(NormKind::kNone, scaled, true, "found_inf", true);

  if (emulation::kHasRealThreads || rounding != Rounding::kNearest) return;
  // What follows concerns the norm and the steps, not how parameters are stored.
  ClipOptions checked = options;
  checked.skip_nonfinite = 1;
  checked.max_norm = 2;
  checked.grad_scale = scalars.upload(std::vector<double>{3});
  checked.grad_scale_dtype = DType::kFloat64;
  for (const double norm_type : {1.0, HUGE_VAL, 3.0}) {
    checked.norm_type = norm_type;
    model.step(norm_kind(norm_type), checked, false, "finite gradients", norm_type == 3.0);
  }
  GradTensor& last = model.grads().back();
  set(last.data, last.dtype, last.numel - 1, std::numeric_limits<double>::quiet_NaN());
  model.step(NormKind::kMax, checked, true, "NaN gradient");

  for (GradTensor& grad : model.grads()) grad.data = nullptr;
  model.step(NormKind::kNone, scaled, true, "no gradients", true);

  Model no_chunks(rounding);
  no_chunks.step(NormKind::kNone, options, false, "no tensors", true);
  no_chunks.add_empty();
  no_chunks.step(NormKind::kNone, options, false, "no elements", true);
}

}  // namespace

void check_adamw() {
  for (const Rounding rounding :
       {Rounding::kNearest, Rounding::kStochastic, Rounding::kKahan, Rounding::kMaster}) {
    check_rounding(rounding);
  }
}

}  // namespace fastremedy::check
