// Batch normalisation on the CPU, forward. The elements are read twice in either direction: once
// for the sums, and once, in the opposite order, for the result.
#include "../core/batch_norm_relu.h"

#include "batch_norm_relu_pass.h"
#include "launch.h"

namespace fastremedy::cpu {
namespace {

// normalize_rows with ReLU, and the number of zeros of each row. To read the results again would
// wait for their lines of memory: 64 K of them take 16 us then, and 12 this way.
template <bool kAdds, class T>
FASTREMEDY_CLONES void normalize_and_count_rows(Source<T> input, Source<T> residual,
                                                T* __restrict y, int64_t row_size, int64_t num_rows,
                                                Normalizers<T> channels,
                                                ActivationOptions<T> options,
                                                int32_t* __restrict zeros) {
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  for (int64_t r = 0; r < num_rows; ++r, y += row_size) {
    const T* __restrict x = input.values, * __restrict added = residual.values;
    const Normalizer<T> c = channels[r];
    // Results that are kept are not 0: no threshold is negative.
    const auto is_zero = [&](int64_t i) __attribute__((always_inline)) {
      const T z = normalize(x[i], c.mean, c.scale, c.shift), sum = kAdds ? z + added[i] : z;
      y[i] = activate<Activation::kReLU>(sum, threshold, negative_slope);
      return is_positive(sum, threshold) ? T(0) : T(1);
    };
    Lanes<T> sum;
    int64_t i = 0;
    for (; i + kNumLanes<T> <= row_size; i += kNumLanes<T>) {
      input.ask(i);
      if (kAdds) residual.ask(i);
      T zero[kNumLanes<T>];
#pragma omp simd
      for (int64_t lane = 0; lane < kNumLanes<T>; ++lane) zero[lane] = is_zero(i + lane);
      sum.add(Lanes<T>::load(zero));
    }
    T rest = 0;
    for (; i < row_size; ++i) rest += is_zero(i);
    zeros[r] = static_cast<int32_t>(sum_of(sum) + rest);
    input.advance(row_size);
    if (kAdds) residual.advance(row_size);
  }
}

FASTREMEDY_CLONES void count_flags_in_rows(const uint8_t* __restrict flags, int64_t row_size,
                                           int64_t num_rows, int32_t* __restrict zeros) {
  for (int64_t r = 0; r < num_rows; ++r, flags += row_size) {
    int32_t count = 0;
    for (int64_t i = 0; i < row_size; ++i) count += flags[i] == 0;
    zeros[r] = count;
  }
}

template <class Value>
FASTREMEDY_CLONES void count_zeros_in_columns(const Value* __restrict values, int64_t n,
                                              int64_t width, int32_t* __restrict zeros) {
  for (; n > 0; n -= width, values += width) {
    for (int64_t i = 0; i < width; ++i) zeros[i] += values[i] == Value(0);
  }
}

template <Activation kActivation, class T>
class Forward : Pass<T> {
  using Pass<T>::layout_, Pass<T>::options_, Pass<T>::reader, Pass<T>::writer;

 public:
  explicit Forward(const BatchNormForwardArgs& args)
      : Pass<T>(args, 2 + (args.residual != nullptr), 4),
        args_(args),
        pilot_(this->row(3)),
        tells_from_output_(kActivation == Activation::kReLU || (!args.mask && !args.dead)),
        reduces_(args.training && args.phase != BatchNormPhase::kFinish),
        shares_channels_(layout_.shares_channels(reduces_)) {}

  void run() {
    const bool applies = args_.phase != BatchNormPhase::kReduce;
    if (applies && args_.training && args_.num_batches_tracked) *args_.num_batches_tracked += 1;
    if (!applies) args_.sums[2 * layout_.channels()] = static_cast<double>(layout_.count());
    layout_.template run<T>(*this, reduces_, applies);
  }

  // The pilots of channels [begin, end).
  void begin_rows(int64_t begin, int64_t end) {
    layout_.for_each_pilot_of_rows(begin, end, [&](const Tile& tile, int64_t n) {
      auto input = reader(args_.input);
      sum_heads(input.load(tile).values, tile.row_size, tile.num_rows, n, &pilot_[tile.channel]);
    });
    find_pilots(begin, end);
  }

  void begin_columns(int64_t begin, int64_t end) {
    layout_.for_each_pilot_of_columns(begin, end, [&](const Tile& tile) {
      auto input = reader(args_.input);
      add_to(&pilot_[tile.column], input.load(tile), tile.size());
    });
    find_pilots(begin, end);
    layout_.repeat(pilot_);
  }

  void sum_rows(const Tile& tile, double* sums, double* sums_of_squares) const {
    auto input = reader(args_.input);
    cpu::sum_rows(input.load(tile), tile.row_size, tile.num_rows, &pilot_[tile.channel], sums,
                  sums_of_squares);
  }

  void sum_columns(const Tile& tile, T* sums, T* sums_of_squares) const {
    auto input = reader(args_.input);
    cpu::sum_columns(input.load(tile), tile.size(), layout_.width(tile), &pilot_[tile.column], sums,
                     sums_of_squares);
  }

  void finish(int64_t begin, int64_t end, const double* sums, const double* sums_of_squares) {
    this->for_each_run(begin, end, [&](int64_t first, int64_t n) {
      const double *sum = sums + (first - begin), *squares = sums_of_squares + (first - begin);
      if (args_.phase == BatchNormPhase::kReduce) return give_sums(first, n, sum, squares);
      if (args_.training) {
        finish_training(first, n, sum, squares);
      } else {
        double mean[kChannelRun], variance[kChannelRun], zero[kChannelRun] = {};
        load_channels<double>(args_.running_mean, first, n, 0, mean);
        load_channels<double>(args_.running_var, first, n, 1, variance);
        find_statistics(1, mean, zero, variance, args_.eps, n, this->statistics(first));
      }
      this->set_normalizers(first, n);
    });
  }

  void repeat() { this->repeat_normalizers(); }

  void apply_to_rows(const Tile& tile) const {
    int32_t zeros[kBlockSize];
    const auto normalize = [&](auto activation, auto adds, const Source<T>& x,
                               const Source<T>& residual, T* y) {
      normalize_rows<activation.value, adds.value>(x, residual, y, tile.row_size, tile.num_rows,
                                                   this->normalizers(tile.channel), options_);
    };
    const auto normalize_and_count = [&](auto adds, const Source<T>& x, const Source<T>& residual,
                                         T* y) {
      normalize_and_count_rows<adds.value>(x, residual, y, tile.row_size, tile.num_rows,
                                           this->normalizers(tile.channel), options_, zeros);
    };
    apply(tile, normalize, normalize_and_count, [&](const uint8_t* flags) {
      count_flags_in_rows(flags, tile.row_size, tile.num_rows, zeros);
    });
    if (args_.dead) add_dead(tile, zeros);
  }

  void apply_to_columns(const Tile& tile, int32_t* dead) const {
    const auto normalize = [&](auto activation, auto adds, const Source<T>& x,
                               const Source<T>& residual, T* y) {
      normalize_columns<activation.value, adds.value>(x, residual, y, tile.size(),
                                                      layout_.width(tile),
                                                      this->normalizers(tile.column), options_);
    };
    const auto count = [&](const auto* values) {
      count_zeros_in_columns(values, tile.size(), layout_.width(tile), dead + tile.column);
    };
    const auto normalize_and_count = [&](auto adds, const Source<T>& x, const Source<T>& residual,
                                         T* y) {
      normalize(std::integral_constant<Activation, Activation::kReLU>(), adds, x, residual, y);
      count(y);
    };
    apply(tile, normalize, normalize_and_count, count);
  }

  int64_t* dead() const { return args_.dead; }

 private:
  // From the sums of the first elements.
  void find_pilots(int64_t begin, int64_t end) {
    const T inv_count = T(1) / static_cast<T>(layout_.num_pilots());
    for (int64_t c = begin; c < end; ++c) pilot_[c] = usable_pilot(pilot_[c] * inv_count);
  }

  // About zero, so that ranks with other pilots can add theirs.
  void give_sums(int64_t begin, int64_t n, const double* sums, const double* squares) const {
    for (int64_t i = 0; i < n; ++i) {
      const double pilot = pilot_[begin + i];
      const double total = sums[i] + static_cast<double>(layout_.count()) * pilot;
      args_.sums[begin + i] = total;
      args_.sums[layout_.channels() + begin + i] = squares[i] + pilot * (sums[i] + total);
    }
  }

  void finish_training(int64_t begin, int64_t n, const double* sums, const double* squares) const {
    auto count = static_cast<double>(layout_.count());
    double pilots[kChannelRun], sum[kChannelRun], sum_of_squares[kChannelRun];
    if (args_.phase == BatchNormPhase::kFinish) {
      count = args_.sums[2 * layout_.channels()];
      for (int64_t i = 0; i < n; ++i) {
        const double total = args_.sums[begin + i];
        pilots[i] = total / count;
        sum[i] = 0;
        sum_of_squares[i] = args_.sums[layout_.channels() + begin + i] - pilots[i] * total;
      }
    } else {
      std::copy_n(&pilot_[begin], n, pilots);
      std::copy_n(sums, n, sum);
      std::copy_n(squares, n, sum_of_squares);
    }
    const StatisticsRows<T> s = this->statistics(begin);
    find_statistics(count, pilots, sum, sum_of_squares, args_.eps, n, s);
    if (count == 0) return;
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = static_cast<double>(s.mean[i]) + static_cast<double>(s.mean_low[i]);
      sum_of_squares[i] = unbiased(s.variance[i], count);
    }
    update_running(args_.running_mean, begin, n, sum);
    update_running(args_.running_var, begin, n, sum_of_squares);
  }

  void update_running(const ChannelValues& values, int64_t begin, int64_t n,
                      const double* batch) const {
    if (values.data == nullptr) return;
    const bool is_average = args_.cumulative && args_.num_batches_tracked;
    const double momentum =
        is_average ? 1 / static_cast<double>(*args_.num_batches_tracked) : args_.momentum;
    double running[kChannelRun];
    load_channels<double>(values, begin, n, 0, running);
    for (int64_t i = 0; i < n; ++i) running[i] = moving_average(running[i], batch[i], momentum);
    store_channels(values, begin, n, running);
  }

  void add_dead(const Tile& tile, const int32_t* zeros) const {
    int64_t* const total = args_.dead + tile.channel;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      if (!shares_channels_) {
        total[r] += zeros[r];
      } else {
        __atomic_fetch_add(total + r, zeros[r], __ATOMIC_RELAXED);
      }
    }
  }

  // These are of rows or of columns: normalize(activation, adds, x, residual, y);
  // normalize_and_count(adds, x, residual, y), which counts zeros of ReLU's outputs; count(flags),
  // those of flags of what is positive.
  template <class Normalize, class NormalizeAndCount, class Count>
  void apply(const Tile& tile, const Normalize& normalize,
             const NormalizeAndCount& normalize_and_count, const Count& count) const {
    const int64_t n = tile.size();
    auto input = reader(args_.input), residual = reader(args_.residual);
    auto output = writer(args_.output);
    const Source<T> x = input.load(tile);
    const auto with_residual = [&](const auto& use) {
      if (args_.residual) {
        use(std::true_type(), residual.load(tile));
      } else {
        use(std::false_type(), Source<T>{});
      }
    };
    T* const y = output.place(tile.begin);
    uint8_t flags[kBlockSize];
    if (tells_from_output_) {
      with_residual([&](auto adds, const Source<T>& added) {
        if (args_.dead) {
          normalize_and_count(adds, x, added, y);
        } else {
          normalize(std::integral_constant<Activation, kActivation>(), adds, x, added, y);
        }
      });
      if (args_.mask) find_kept<kActivation>(y, flags, n, T(0));
    } else {
      alignas(64) T z[kBlockSize];
      with_residual([&](auto adds, const Source<T>& added) {
        normalize(std::integral_constant<Activation, Activation::kIdentity>(), adds, x, added, z);
      });
      if (args_.dead) {
        find_positive(z, flags, n, options_.threshold);
        count(static_cast<const uint8_t*>(flags));
      }
      if (args_.mask) find_kept<kActivation>(z, flags, n, options_.threshold);
      activate_all<kActivation>(z, y, n, options_);
    }
    if (args_.mask) pack_bits(flags, layout_.mask_rows(tile, args_.mask));
    output.store(n);
  }

  const BatchNormForwardArgs& args_;
  T* const pilot_;
  const bool tells_from_output_;  // what else is asked for
  const bool reduces_;
  const bool shares_channels_;  // atomics wait for all results that are on their way to memory
};

}  // namespace

void batch_norm_relu_forward(const BatchNormForwardArgs& args) { run_pass<Forward>(args); }

}  // namespace fastremedy::cpu
