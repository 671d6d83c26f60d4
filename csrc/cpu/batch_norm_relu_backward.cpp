// Batch normalisation on the CPU, backward.
#include "../core/batch_norm_relu.h"
#include "batch_norm_relu_pass.h"
#include "launch.h"

namespace fastremedy::cpu {
namespace {

template <Activation kActivation, class T>
class Backward : Pass<T> {
  using Pass<T>::layout_, Pass<T>::options_, Pass<T>::normalizers;
  using Pass<T>::reader, Pass<T>::writer;

 public:
  explicit Backward(const BatchNormBackwardArgs& args)
      : Pass<T>(args, 3 + (args.residual != nullptr) + (args.grad_residual != nullptr), 6),
        args_(args),
        g_scale_(this->row(3)),
        x_scale_(this->row(4)),
        input_shift_(this->row(5)) {}

  void run() {
    const bool wants_sums = args_.training || args_.grad_weight.data || args_.grad_bias.data;
    const bool reduces = wants_sums && args_.phase != BatchNormPhase::kFinish;
    const bool applies =
        args_.phase != BatchNormPhase::kReduce && (args_.grad_input || args_.grad_residual);
    if (args_.phase == BatchNormPhase::kReduce) {
      args_.sums[2 * layout_.channels()] = static_cast<double>(layout_.count());
    }
    this->for_each_run(0, layout_.channels(),
                       [&](int64_t begin, int64_t n) { this->set_normalizers(begin, n); });
    this->repeat_normalizers();
    layout_.template run<T>(*this, reduces, applies);
  }

  void begin_rows(int64_t, int64_t) const {}
  void begin_columns(int64_t, int64_t) const {}

  void sum_rows(const Tile& tile, double* sums_g, double* sums_gx) const {
    alignas(64) T g[kBlockSize];
    visit(tile, normalize_tile_of_rows(tile), g,
          [&](auto activation, const Source<T>& x, const Source<T>& grad) {
            sum_grad_rows<activation.value>(x, grad, tile.row_size, tile.num_rows,
                                            normalizers(tile.channel), options_, sums_g, sums_gx);
          });
  }

  void sum_columns(const Tile& tile, T* sums_g, T* sums_gx) const {
    alignas(64) T g[kBlockSize];
    visit(tile, normalize_tile_of_columns(tile), g,
          [&](auto activation, const Source<T>& x, const Source<T>& grad) {
            sum_grad_columns<activation.value>(x, grad, tile.size(), layout_.width(tile),
                                               normalizers(tile.column), options_, sums_g, sums_gx);
          });
  }

  void finish(int64_t begin, int64_t end, const double* sums_g, const double* sums_gx) {
    this->for_each_run(begin, end, [&](int64_t first, int64_t n) {
      finish_run(first, n, sums_g + (first - begin), sums_gx + (first - begin));
    });
  }

  void repeat() {
    layout_.repeat(g_scale_);
    layout_.repeat(x_scale_);
    layout_.repeat(input_shift_);
  }

  void apply_to_rows(const Tile& tile) const {
    apply(tile, normalize_tile_of_rows(tile),
          [&](auto activation, auto batch_statistics, const Source<T>& x, const Source<T>& grad,
              T* dx) {
            input_grad_rows<activation.value, batch_statistics.value>(
                x, grad, dx, tile.row_size, tile.num_rows, normalizers(tile.channel),
                input_grads(tile.channel), options_);
          });
  }

  void apply_to_columns(const Tile& tile, int32_t*) const {
    apply(tile, normalize_tile_of_columns(tile),
          [&](auto activation, auto batch_statistics, const Source<T>& x, const Source<T>& grad,
              T* dx) {
            input_grad_columns<activation.value, batch_statistics.value>(
                x, grad, dx, tile.size(), layout_.width(tile), normalizers(tile.column),
                input_grads(tile.column), options_);
          });
  }

  int64_t* dead() const { return nullptr; }

 private:
  InputGrads<T> input_grads(int64_t c) const {
    return {&g_scale_[c], &x_scale_[c], &input_shift_[c]};
  }

  auto normalize_tile_of_rows(const Tile& tile) const {
    return [this, &tile](const Source<T>& x, const Source<T>& residual, T* z) {
      normalize_rows<Activation::kIdentity, true>(x, residual, z, tile.row_size, tile.num_rows,
                                                  normalizers(tile.channel), options_);
    };
  }
  auto normalize_tile_of_columns(const Tile& tile) const {
    return [this, &tile](const Source<T>& x, const Source<T>& residual, T* z) {
      normalize_columns<Activation::kIdentity, true>(
          x, residual, z, tile.size(), layout_.width(tile), normalizers(tile.column), options_);
    };
  }

  void finish_run(int64_t begin, int64_t n, const double* sums_g, const double* sums_gx) {
    const int64_t channels = layout_.channels();
    const StatisticsRows<T> s = this->statistics(begin);
    auto count = static_cast<double>(layout_.count());
    double sum_g[kChannelRun], sum_gx[kChannelRun];
    if (args_.phase == BatchNormPhase::kFinish) {
      count = args_.sums[2 * channels];
      std::copy_n(args_.sums + begin, n, sum_g);
      std::copy_n(args_.sums + channels + begin, n, sum_gx);
    } else {
      double grad_weight[kChannelRun];
      for (int64_t i = 0; i < n; ++i) {
        sum_g[i] = sums_g[i];
        sum_gx[i] = centered_sum(s.get(i), sums_g[i], sums_gx[i]);
        grad_weight[i] = sum_gx[i] * static_cast<double>(s.invstd[i]);
      }
      store_channels(args_.grad_weight, begin, n, grad_weight);
      store_channels(args_.grad_bias, begin, n, sum_g);
    }
    if (args_.phase == BatchNormPhase::kReduce) {
      std::copy_n(sum_g, n, args_.sums + begin);
      std::copy_n(sum_gx, n, args_.sums + channels + begin);
      return;
    }
    T weight[kChannelRun];
    load_channels<T>(args_.weight, begin, n, 1, weight);
    find_input_grads(s, weight, count, sum_g, sum_gx, n, &g_scale_[begin], &x_scale_[begin],
                     &input_shift_[begin]);
  }

  // use(activation, x, grad): the gradient goes through `activation` still, which is the identity
  // where that was done here, with what the forward pass kept; then it lies in g.
  template <class Normalize, class Use>
  void visit(const Tile& tile, const Normalize& normalize_tile, T* g, const Use& use) const {
    const int64_t n = tile.size();
    auto input = reader(args_.input), grad_output = reader(args_.grad_output);
    const Source<T> x = input.load(tile), grad = grad_output.load(tile);
    if (args_.mask) {
      const bool is_leaky = kActivation == Activation::kLeakyReLU;
      find_masked_grads(layout_.mask_rows(tile, args_.mask), grad.values, g,
                        is_leaky ? options_.negative_slope : T(0));
    } else if (args_.residual) {
      alignas(64) T z[kBlockSize];
      auto residual = reader(args_.residual);
      normalize_tile(x, residual.load(tile), z);
      find_activation_grads<kActivation>(z, grad.values, g, n, options_);
    } else {
      return use(std::integral_constant<Activation, kActivation>(), x, grad);
    }
    use(std::integral_constant<Activation, Activation::kIdentity>(), x, Source<T>{g, grad.later});
  }

  template <class Normalize, class Write>
  void apply(const Tile& tile, const Normalize& normalize_tile, const Write& write) const {
    auto grad_residual = writer(args_.grad_residual);
    alignas(64) T own[kBlockSize];
    T* const place = args_.grad_residual ? grad_residual.place(tile.begin) : own;
    visit(tile, normalize_tile, place,
          [&](auto activation, const Source<T>& x, const Source<T>& g) {
            const int64_t n = tile.size();
            if (args_.grad_residual) {
              if (g.values != place) std::copy_n(g.values, n, place);
              grad_residual.store(n);
            }
            if (args_.grad_input == nullptr) return;
            auto grad_input = writer(args_.grad_input);
            T* dx = grad_input.place(tile.begin);
            if (args_.training) {
              write(activation, std::true_type(), x, g, dx);
            } else {
              write(activation, std::false_type(), x, g, dx);
            }
            grad_input.store(n);
          });
  }

  const BatchNormBackwardArgs& args_;
  T *const g_scale_, *const x_scale_, *const input_shift_;
};

}  // namespace

void batch_norm_relu_backward(const BatchNormBackwardArgs& args) { run_pass<Backward>(args); }

}  // namespace fastremedy::cpu
