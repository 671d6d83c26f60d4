// The BatchNorm kernels: statistics and sums against long double, and every element against the
// formula, bit for bit, which is itself held to long double.
#include "batch_norm_call.h"

namespace fastremedy::check {
namespace {

template <class T>
class Problem : BatchNormCall<T> {
  using Call = BatchNormCall<T>;
  using Call::at;
  using Call::bias_;
  using Call::c_;
  using Call::channel_of;
  using Call::copy;
  using Call::dead_;
  using Call::get;
  using Call::grad_bias_;
  using Call::grad_input_;
  using Call::grad_output_;
  using Call::grad_residual_;
  using Call::grad_weight_;
  using Call::input_;
  using Call::kEps;
  using Call::kMomentum;
  using Call::kSlope;
  using Call::kTolerance;
  using Call::mask_;
  using Call::mask_bit;
  using Call::memory_;
  using Call::name;
  using Call::num_batches_tracked_;
  using Call::num_counters_;
  using Call::numel_;
  using Call::output_;
  using Call::residual_;
  using Call::running_mean_;
  using Call::running_var_;
  using Call::saved;
  using Call::saved_;
  using Call::scratch_;
  using Call::shape;
  using Call::stored;
  using Call::sums_;
  using Call::weight_;
  using Call::z_of;

 public:
  using Call::Call;

  void check() {
    forward();
    if (numel_ > 0) backward();
    expect(memory_.is_intact(), name("guard bytes are written"));
    expect(std::all_of(scratch_.counters, scratch_.counters + num_counters_,
                       [](uint32_t counter) { return counter == 0; }),
           name("the counters return to 0"));
  }

 private:
  void forward() {
    BatchNormForwardArgs args{};
    args.shape = shape();
    args.activation = c_.activation;
    args.training = c_.training;
    args.cumulative = c_.cumulative;
    args.momentum = kMomentum;
    args.eps = kEps;
    args.negative_slope = kSlope;
    args.input = input_;
    args.residual = residual_;
    args.output = output_;
    args.mask = mask_;
    args.dead = dead_;
    args.saved = saved_;
    args.weight = weight_;
    args.bias = bias_;
    args.running_mean = running_mean_;
    args.running_var = running_var_;
    args.num_batches_tracked = num_batches_tracked_;
    args.sums = sums_;
    find_moments();
    const std::vector<double> old_mean = copy(running_mean_), old_var = copy(running_var_);
    run_phases(
        [&](BatchNormPhase phase) {
          args.phase = phase;
          return cuda::launch_batch_norm_relu_forward(args, scratch_, nullptr);
        },
        [&] {
          for (int64_t c = 0; numel_ > 0 && c < shape().channels; ++c) {
            const Wide n = shape().count(), mean = means_[c];
            const Wide squares = n * (variances_[c] + mean * mean);
            expect(is_near(sums_[c], n * mean, kTolerance * n * (std::fabs(mean) + 1)) &&
                       is_near(sums_[shape().channels + c], squares, kTolerance * squares),
                   name("sums", c));
          }
        });
    expect(*num_batches_tracked_ == 4 + c_.training, name("num_batches_tracked"));
    if (numel_ == 0) return;
    for (int64_t c = 0; c < shape().channels; ++c) expect_statistics(c, old_mean, old_var);
    expect_output();
  }

  template <class Launch, class AfterReduce>
  void run_phases(Launch launch, AfterReduce after_reduce) {
    if (!c_.in_phases) return expect(launch(BatchNormPhase::kBoth) == 0, name("launch"));
    expect(launch(BatchNormPhase::kReduce) == 0, name("launch of kReduce"));
    expect(sums_[2 * shape().channels] == shape().count(), name("count"));
    after_reduce();
    for (int64_t i = 0; i <= 2 * shape().channels; ++i) sums_[i] *= kRanks;
    expect(launch(BatchNormPhase::kFinish) == 0, name("launch of kFinish"));
  }

  void find_moments() {
    means_.assign(shape().channels, 0);
    variances_.assign(shape().channels, 0);
    for (int64_t i = 0; i < numel_; ++i) means_[channel_of(i)] += at(input_, i);
    for (Wide& mean : means_) mean /= shape().count();
    for (int64_t i = 0; i < numel_; ++i) {
      const Wide d = at(input_, i) - means_[channel_of(i)];
      variances_[channel_of(i)] += d * d / shape().count();
    }
  }

  void expect_statistics(int64_t c, const std::vector<double>& old_mean,
                         const std::vector<double>& old_var) {
    const ChannelStatistics<T> s = saved(c);
    if (!c_.training) {
      means_[c] = old_mean[c];
      variances_[c] = old_var[c];
    }
    const Wide mean = means_[c], variance = variances_[c];
    const Wide error = kTolerance * std::sqrt(variance);
    expect(is_near(Wide{s.mean} + s.mean_low, mean, error), name("mean", c));
    expect(is_near(s.variance, variance, kTolerance * variance), name("variance", c));
    expect(is_near(s.invstd * std::sqrt(variance + kEps), variance == variance ? 1 : variance,
                   kTolerance),
           name("invstd", c));
    if (running_mean_.data == nullptr) return;
    const Wide momentum = c_.cumulative ? Wide{1} / 5 : kMomentum;
    const Wide n = shape().count() * (c_.in_phases ? kRanks : 1);
    const auto expect_running = [&](const ChannelValues& running, double old, Wide value,
                                    const char* what) {
      const Wide expected = c_.training ? (1 - momentum) * old + momentum * value : old;
      const double actual = get(running, c, 0);
      const Wide unit = expected == expected && std::isfinite((double)expected)
                            ? spacing(running.dtype, expected)
                            : 0;
      expect(is_near(actual, expected, kTolerance * (std::fabs(value) + 1) + unit) ||
                 actual == expected,
             name(what, c));
    };
    expect_running(running_mean_, old_mean[c], mean, "running_mean");
    expect_running(running_var_, old_var[c], n > 1 ? variance * n / (n - 1) : std::nanl(""),
                   "running_var");
  }

  void expect_output() {
    const T threshold = zero_threshold<T>(shape().dtype);
    std::vector<int64_t> dead(shape().channels);
    std::vector<bool> bits;
    for (int64_t i = 0; i < numel_; ++i) {
      const int64_t c = channel_of(i);
      const T z = z_of(i);
      const T y = with_activation<T>(c_.activation, [&](auto activation) {
        return activate<decltype(activation)::value>(z, threshold, T(kSlope));
      });
      const bool keeps = with_activation<T>(c_.activation, [&](auto activation) {
        return keeps_grad<decltype(activation)::value>(z, threshold);
      });
      dead[c] += !is_positive(z, threshold);
      const Wide scaled =
          (at(input_, i) - means_[c]) / std::sqrt(variances_[c] + kEps) * get(weight_, c, 1);
      const Wide others = get(bias_, c, 0) + (residual_ ? at(residual_, i) : 0);
      const Wide exact = activate_exactly(c_.activation, scaled + others, kSlope);
      const Wide error = 4 * kTolerance * (std::fabs(scaled) + std::fabs(others) + 1);
      const char* wrong = nullptr;
      if (!is_near(y, exact, error)) wrong = "formula";
      if (!same(at(output_, i), stored(y))) wrong = "output";
      if (mask_ && mask_bit(i) != keeps) wrong = "mask";
      if (wrong) return expect(false, name(wrong, i));
    }
    for (int64_t c = 0; dead_ && c < shape().channels; ++c) {
      expect(dead_[c] == dead[c], name("dead", c));
    }
  }

  void backward() {
    BatchNormBackwardArgs args{};
    args.shape = shape();
    args.activation = c_.activation;
    args.training = c_.training;
    args.negative_slope = kSlope;
    args.grad_output = grad_output_;
    args.input = input_;
    const bool uses_sign =
        c_.activation == Activation::kReLU || c_.activation == Activation::kLeakyReLU;
    args.mask = uses_sign ? mask_ : nullptr;
    args.residual = args.mask ? nullptr : residual_;
    args.saved = saved_;
    args.weight = weight_;
    args.bias = bias_;
    args.grad_input = c_.wants_grad_input ? grad_input_ : nullptr;
    args.grad_residual = c_.wants_grad_residual ? grad_residual_ : nullptr;
    args.grad_weight = grad_weight_;
    args.grad_bias = grad_bias_;
    args.sums = sums_;
    find_grads();
    run_phases(
        [&](BatchNormPhase phase) {
          args.phase = phase;
          return cuda::launch_batch_norm_relu_backward(args, scratch_, nullptr);
        },
        [&] {
          for (int64_t c = 0; c < shape().channels; ++c) {
            expect_sum(sums_[c], sum_g_[c], abs_g_[c], 0, "sum of g", c);
            expect_sum(sums_[shape().channels + c], sum_gx_[c], abs_gx_[c], 0, "sum of gx", c);
          }
        });
    for (int64_t c = 0; weight_.data && c < shape().channels; ++c) {
      const Wide invstd = 1 / std::sqrt(variances_[c] + kEps);
      const auto unit = [&](Wide x) {
        return std::isfinite((double)x) ? spacing(c_.param_dtype, x) : 0;
      };
      expect_sum(get(grad_bias_, c, 0), sum_g_[c], abs_g_[c], unit(sum_g_[c]), "grad_bias", c);
      expect_sum(get(grad_weight_, c, 0), sum_gx_[c] * invstd, abs_gx_[c] * invstd,
                 unit(sum_gx_[c] * invstd), "grad_weight", c);
    }
    for (int64_t i = 0; i < numel_; ++i) {
      if (const char* wrong = wrong_grad(i)) return expect(false, name(wrong, i));
    }
  }

  void expect_sum(double actual, Wide expected, Wide magnitude, double unit, const char* what,
                  int64_t c) {
    expect(is_near(actual, expected, 2 * kTolerance * magnitude + unit), name(what, c));
  }

  void find_grads() {
    const T threshold = zero_threshold<T>(shape().dtype);
    grads_.resize(numel_);
    for (auto* sums : {&sum_g_, &sum_gx_, &abs_g_, &abs_gx_}) sums->assign(shape().channels, 0);
    for (int64_t i = 0; i < numel_; ++i) {
      const int64_t c = channel_of(i);
      const T z = z_of(i), dy = static_cast<T>(at(grad_output_, i));
      const T g = with_activation<T>(c_.activation, [&](auto activation) {
        return activation_grad<decltype(activation)::value>(z, dy, threshold, T(kSlope));
      });
      if (std::fabs(z) > 1e-3) {
        const Wide exact = dy * slope_exactly(c_.activation, z, kSlope);
        if (!is_near(g, exact, 4 * kTolerance * std::fabs(dy))) expect(false, name("slope", i));
      }
      const Wide gx = g * (at(input_, i) - means_[c]);
      grads_[i] = g;
      sum_g_[c] += g;
      sum_gx_[c] += gx;
      abs_g_[c] += std::fabs(g);
      abs_gx_[c] += std::fabs(gx);
    }
  }

  const char* wrong_grad(int64_t i) const {
    const int64_t c = channel_of(i);
    const T g = c_.wants_grad_residual ? grads_[i] : T(-7);
    if (!same(at(grad_residual_, i), stored(g))) return "grad_residual";
    if (!c_.wants_grad_input) return at(grad_input_, i) == -7 ? nullptr : "grad_input, not wanted";
    const Wide n = shape().count(), invstd = 1 / std::sqrt(variances_[c] + kEps);
    const Wide scale = get(weight_, c, 1) * invstd;
    Wide grad = grads_[i] * scale, magnitude = std::fabs(grad);
    if (c_.training) {
      const Wide x = (at(input_, i) - means_[c]) * invstd;
      grad -= scale * (sum_g_[c] / n + x * invstd * sum_gx_[c] / n);
      magnitude += std::fabs(scale) * (abs_g_[c] + std::fabs(x) * invstd * abs_gx_[c]) / n;
    }
    const double actual = at(grad_input_, i);
    const double unit = grad == grad ? spacing(shape().dtype, grad) : 0;
    return is_near(actual, grad, 8 * kTolerance * magnitude + unit) ? nullptr : "grad_input";
  }

  std::vector<Wide> means_, variances_, sum_g_, sum_gx_, abs_g_, abs_gx_;
  std::vector<T> grads_;
};

void check_case(const Case& c, unsigned seed) {
  if (c.shape.dtype == DType::kFloat64) {
    Problem<double>(c, seed).check();
  } else {
    Problem<float>(c, seed).check();
  }
}

struct Size {
  int64_t batch, channels, spatial;
};

}  // namespace

void check_batch_norm_relu() {
  constexpr Size kSizes[] = {{5, 16, 56}, {40, 5, 64}, {7, 1, 520}, {2, 1, 1},
                             {3, 7, 1},   {2, 8, 8},   {1, 9, 33},  {5, 65, 7},
                             {2, 3, 49},  {9, 72, 16}, {3, 130, 31}};
  std::mt19937 random(0);
  unsigned seed = 0;
  const auto choose = [&](unsigned n) { return random() % n; };
  const auto check_size = [&](Size size, DType dtype, int channels_last) {
    Case c{};
    c.shape = {size.batch, size.channels, size.spatial, channels_last, dtype};
    c.activation = static_cast<Activation>(seed % 5);
    c.training = choose(4) > 0;
    c.in_phases = c.training && choose(3) == 0;
    c.cumulative = choose(3) == 0;
    c.has_residual = choose(2) == 0;
    c.has_mask = choose(2) == 0;
    c.has_dead = choose(2) == 0;
    c.has_affine = choose(4) > 0;
    c.has_running = choose(4) > 0;
    c.is_misaligned = choose(4) == 0;
    c.has_nan = choose(4) == 0;
    c.wants_grad_input = choose(4) > 0;
    c.wants_grad_residual = choose(2) == 0;
    c.param_dtype = choose(2) == 0 ? dtype : DType::kFloat32;
    c.mean = dtype == DType::kFloat32 && choose(2) == 0 ? 1e4 : 0.7;
    check_case(c, seed++);
  };
  if (emulation::kHasRealThreads) {  // slow, and what threads exchange depends on the layout alone
    for (const int channels_last : {0, 1}) {
      for (int i = 0; i < 3; ++i) check_size(kSizes[i], DType::kFloat32, channels_last);
    }
    return;
  }
  for (const Size size : kSizes) {
    for (const DType dtype :
         {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
      for (const int channels_last : {0, 1}) {
        for (int i = 0; i < 3; ++i) check_size(size, dtype, channels_last);
      }
    }
  }
  // Threads with more than 64 visits, and a rank without elements.
  for (const int channels_last : {0, 1}) {
    check_size({2, 1, 70000}, DType::kFloat32, channels_last);
    check_size({2, 520, 600}, DType::kBFloat16, channels_last);
    for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
      Case empty{};
      empty.training = empty.in_phases = true;
      empty.shape = {0, 9, 5, channels_last, dtype};
      check_case(empty, seed++);
      empty.shape = {3, 8, 0, channels_last, dtype};
      check_case(empty, seed++);
    }
  }
}

}  // namespace fastremedy::check
