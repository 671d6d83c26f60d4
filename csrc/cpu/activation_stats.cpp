// Statistics of tensors: pieces of 64 K elements about their own pilot, merged in order, so that
// the result is the same for any number of threads.
#include "../core/activation_stats.h"

#include "activation_stats_loops.h"
#include "blocks.h"
#include "launch.h"
#include "parallel.h"

namespace fastremedy::cpu {
namespace {

constexpr int64_t kPieceSize = 65536;
constexpr int64_t kPilotElements = 16;
constexpr double kGoldenRatio = 1.6180339887498949;

// Below so many values of a row its histogram counts one by one: tables have to be emptied. That
// takes 1 ns each, or 5 if other pieces count in the same row.
constexpr int64_t kFewValues = 16384;

// So many values are added in double: rounding to float averages out in many.
constexpr int64_t kFewInFloat = 128;

// Rows [begin, end) of the outer dimension, of channels [first_channel, first_channel +
// num_channels). Of a tensor as a whole: elements [begin, end).
struct Piece {
  const StatsTensor* tensor;
  int64_t begin, end, first_channel, num_channels;
  int64_t first_partial;
};

// What a piece says about a row.
struct Partial {
  int64_t row;
  Moments moments;
  int64_t counts[kNumCounts] = {};
};

// Cuts tensors into pieces; returns the number of partials.
int64_t cut(const ActivationStatsArgs& args, std::vector<Piece>* pieces) {
  int64_t num_partials = 0;
  for (const StatsTensor* tensor = args.tensors; tensor < args.tensors + args.num_tensors;
       ++tensor) {
    if (tensor->numel() == 0) continue;
    const int64_t channels = tensor->channels, inner = tensor->inner;
    const bool is_whole = channels == 1;
    // Channels of a piece: all if they lie side by side; those of long lines in the order of
    // memory; otherwise one, which would have too few values in each piece.
    int64_t together = 1;
    if (inner == 1) together = channels;
    if (inner >= kBlockSize) together = std::max<int64_t>(1, kPieceSize / inner);
    const int64_t rows = is_whole ? tensor->numel() : tensor->outer;
    const int64_t row_size = is_whole ? 1 : std::min(together, channels) * inner;
    const int64_t step = std::max<int64_t>(1, kPieceSize / row_size);
    for (int64_t begin = 0; begin < rows; begin += step) {
      for (int64_t c = 0; c < channels; c += together) {
        const int64_t num_channels = std::min(together, channels - c);
        pieces->push_back(
            {tensor, begin, std::min(begin + step, rows), c, num_channels, num_partials});
        num_partials += num_channels;
      }
    }
  }
  return num_partials;
}

// The mean of a few elements out of n, and the size of what lies around it; get(i) reads one. The
// outermost may be outliers and count as those beside them. One element comes from each of as many
// equal parts, from another place in each, by the golden ratio: the same place would often be that
// of one channel and one pixel, which is no sample.
template <class T, class Get>
Pilot<T> choose_pilot(int64_t n, const Get& get) {
  T samples[kPilotElements];
  int64_t count = 0;
  const int64_t num_elements = std::min(n, kPilotElements);
  for (int64_t k = 0; k < num_elements; ++k) {
    const int64_t begin = k * n / num_elements, size = (k + 1) * n / num_elements - begin;
    const double place = static_cast<double>(k) * kGoldenRatio;
    const double share = place - static_cast<double>(static_cast<int64_t>(place));
    const T x = get(begin + static_cast<int64_t>(static_cast<double>(size) * share));
    if (is_finite(x)) samples[count++] = x;
  }
  if (count == 0) return {};
  std::sort(samples, samples + count);
  const T least = samples[count / 8], most = samples[count - 1 - count / 8];
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    sum += static_cast<double>(std::clamp(samples[k], least, most));
  }
  // Rounding must not move the mean of equal values.
  const T mean = std::clamp(static_cast<T>(sum / static_cast<double>(count)), least, most);
  const T spread = std::max(samples[count - 1] - mean, mean - samples[0]);
  const T size = spread > T(0) && is_finite(spread) ? spread : std::fabs(mean);
  const int exponent = size > T(0) ? std::clamp(std::ilogb(size), -100, 100) : 0;
  return {mean, static_cast<T>(std::ldexp(1.0, -exponent))};
}

// Whether sums about the pilot have lost digits. Those of two values that come equally often are
// 4e-7 off half a standard deviation beside their mean, 2e-6 one beside it, and 7e-6 at one and a
// half: rounding is that of powers about the pilot, and those about the mean are smaller. The mean
// of 16 samples is that far off once in twenty times.
template <class T>
bool is_off_center(const Moments& moments, const Pilot<T>& pilot) {
  const double d = moments.mean - static_cast<double>(pilot.value);
  return moments.count * d * d > 0.25 * moments.m2;
}

// Sums of the values of one row.
template <class T>
class Accumulator {
 public:
  Accumulator(int64_t numel, const Pilot<T>& pilot, uint32_t* tables = nullptr,
              int64_t* histogram = nullptr, bool is_alone = true)
      : is_few_(numel <= kFewInFloat),
        pilot_(pilot),
        tables_(tables),
        histogram_(histogram),
        is_alone_(is_alone) {}

  void add(const T* values, int64_t n) {
    for (; n > 0; values += kBlockSize, n -= kBlockSize) {
      add_stretch(values, std::min(n, kBlockSize));
    }
  }

  void finish(Partial* partial) const {
    partial->moments =
        central_moments(static_cast<double>(num_finite_), static_cast<double>(pilot_.value),
                        powers_, static_cast<double>(min_), static_cast<double>(max_));
    std::copy_n(counts_, kNumCounts, partial->counts);
    if (tables_) move_tables(tables_, histogram_);
  }

 private:
  void add_stretch(const T* values, int64_t n) {
    const StretchSums<T> sums = is_few_        ? StretchSums<T>()
                                : tables_      ? sum_stretch<true>(values, n, pilot_, tables_)
                                : has_avx512() ? sum_stretch_avx512(values, n, pilot_)
                                               : sum_stretch<false>(values, n, pilot_, tables_);
    int64_t next = sums.count;
    if (sums.has_lost(pilot_)) {
      for (int64_t i = 0; i < next; ++i) add_with_care(values[i]);
    } else if (next > 0) {
      const double unit = 1 / static_cast<double>(pilot_.scale);
      powers_.s1 += static_cast<double>(sums.powers.s1) * unit;
      powers_.s2 += static_cast<double>(sums.powers.s2) * (unit * unit);
      powers_.s3 += static_cast<double>(sums.powers.s3) * (unit * unit * unit);
      powers_.s4 += static_cast<double>(sums.powers.s4) * (unit * unit * unit * unit);
      powers_.l1 += static_cast<double>(sums.powers.l1);
      count(Count::kZero) += sums.num_zero;
      count(Count::kNegative) += sums.num_negative;
      num_finite_ += next;
      min_ = std::min(min_, sums.min);
      max_ = std::max(max_, sums.max);
    }
    for (; next < n; ++next) {
      add_with_care(values[next]);
      if (tables_) ++tables_[bucket_of(values[next])];
    }
    if (histogram_ && !tables_) {
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t bucket = bucket_of(values[i]);
        if (!is_finite_bucket(bucket)) continue;
        if (is_alone_) {
          ++histogram_[bucket];
        } else {
          __atomic_fetch_add(histogram_ + bucket, 1, __ATOMIC_RELAXED);
        }
      }
    }
  }

  void add_with_care(T x) {
    if (!is_finite(x)) {
      ++count(x != x ? Count::kNaN : x > T(0) ? Count::kPositiveInf : Count::kNegativeInf);
      return;
    }
    powers_.add(static_cast<double>(x), static_cast<double>(x) - static_cast<double>(pilot_.value));
    count(Count::kZero) += x == T(0);
    count(Count::kNegative) += x < T(0);
    ++num_finite_;
    min_ = std::min(min_, x);
    max_ = std::max(max_, x);
  }

  int64_t& count(Count which) { return counts_[static_cast<int>(which)]; }

  const bool is_few_;
  const Pilot<T> pilot_;
  uint32_t* const tables_;
  int64_t* const histogram_;
  const bool is_alone_;  // no other piece counts in the histogram
  int64_t num_finite_ = 0;
  PowerSums<double> powers_;
  T min_ = static_cast<T>(HUGE_VAL), max_ = -static_cast<T>(HUGE_VAL);
  int64_t counts_[kNumCounts] = {};
};

template <class T>
class PiecePass {
 public:
  PiecePass(const ActivationStatsArgs& args, const Piece& piece, Partial* partials)
      : args_(args), piece_(piece), tensor_(*piece.tensor), partials_(partials) {}

  void run() {
    const int64_t num_rows = piece_.end - piece_.begin;
    if (tensor_.channels > 1 && tensor_.inner == 1) {
      run_channels(num_rows);
    } else if (tensor_.channels == 1) {
      run_lines(0, 1, num_rows, [&](int64_t) { return piece_.begin; });
    } else {
      for (int64_t c = 0; c < piece_.num_channels; ++c) {
        run_lines(c, num_rows, tensor_.inner, [&](int64_t line) {
          const int64_t row = piece_.begin + line, channel = piece_.first_channel + c;
          return (row * tensor_.channels + channel) * tensor_.inner;
        });
      }
    }
  }

 private:
  // The lines of channel c of the piece.
  template <class BeginOf>
  void run_lines(int64_t c, int64_t num_lines, int64_t line_size, const BeginOf& begin_of) {
    const auto get = [&](int64_t i) { return *load(begin_of(i / line_size) + i % line_size, 1); };
    sum_row(c, num_lines * line_size, get, [&](Accumulator<T>& sums) {
      for (int64_t line = 0; line < num_lines; ++line) {
        const int64_t begin = begin_of(line);
        for (int64_t i = 0; i < line_size; i += kBlockSize) {
          const int64_t n = std::min(kBlockSize, line_size - i);
          sums.add(load(begin + i, n), n);
        }
      }
    });
  }

  // Channels side by side: turned into lines first.
  void run_channels(int64_t num_rows) {
    const int64_t channels = tensor_.channels;
    const int64_t stride = num_rows + kNumLanes<T>;  // lines of a power of 2 would share cache sets
    LineVector<T> lines(stride * channels);
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t c = 0; c < channels; c += kBlockSize) {
        const int64_t n = std::min(kBlockSize, channels - c);
        const T* const values = load((piece_.begin + r) * channels + c, n);
        for (int64_t k = 0; k < n; ++k) lines[(c + k) * stride + r] = values[k];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T* const line = lines.data() + c * stride;
      const auto get = [&](int64_t i) { return line[i]; };
      sum_row(c, num_rows, get, [&](Accumulator<T>& sums) { sums.add(line, num_rows); });
    }
  }

  // add(sums) adds all values of channel c of the piece, get(i) reads one.
  template <class Get, class Add>
  void sum_row(int64_t c, int64_t numel, const Get& get, const Add& add) {
    Partial* const partial = partials_ + c;
    Pilot<T> pilot = choose_pilot<T>(numel, get);
    for (bool is_second : {false, true}) {  // one call of add, which is inlined
      Accumulator<T> sums = is_second ? Accumulator<T>(numel, pilot) : accumulator(c, pilot, numel);
      add(sums);
      sums.finish(partial);
      if (!is_off_center(partial->moments, pilot)) break;
      pilot.value = static_cast<T>(partial->moments.mean);
    }
  }

  Accumulator<T> accumulator(int64_t c, const Pilot<T>& pilot, int64_t numel) {
    partials_[c].row = tensor_.first_row + piece_.first_channel + c;
    const int64_t num_rows = tensor_.channels == 1 ? tensor_.numel() : tensor_.outer;
    const bool is_alone = piece_.end - piece_.begin == num_rows;
    if (!args_.histogram) return {numel, pilot};
    static thread_local LineVector<uint32_t> tables;  // empty between rows
    if (numel >= kFewValues) tables.resize(kNumTables * kTableSize);
    int64_t* const histogram = args_.histogram + partials_[c].row * kNumBuckets;
    return {numel, pilot, numel >= kFewValues ? tables.data() : nullptr, histogram, is_alone};
  }

  const T* load(int64_t begin, int64_t n) {
    return block_.load(const_cast<void*>(tensor_.data), tensor_.dtype, begin, n);
  }

  const ActivationStatsArgs& args_;
  const Piece& piece_;
  const StatsTensor& tensor_;
  Partial* const partials_;
  Block<T> block_;
};

void merge_into(const ActivationStatsArgs& args, const Partial& partial) {
  auto* const row = reinterpret_cast<Moments*>(args.moments) + partial.row;
  *row = merge(*row, partial.moments);
  int64_t* const counts = args.counts + partial.row * kNumCounts;
  for (int k = 0; k < kNumCounts; ++k) counts[k] += partial.counts[k];
}

}  // namespace

void activation_stats(const ActivationStatsArgs& args) {
  if (args.armed && *args.armed == 0) return;
  std::vector<Piece> pieces;
  std::vector<Partial> partials(cut(args, &pieces));
  const auto num_pieces = static_cast<int64_t>(pieces.size());
  // A few pieces take less time than waking threads.
  parallel_for(num_pieces, false, num_pieces <= 2, [&](int64_t i) {
    const Piece& piece = pieces[i];
    Partial* const first = partials.data() + piece.first_partial;
    if (piece.tensor->dtype == DType::kFloat64) {
      PiecePass<double>(args, piece, first).run();
    } else {
      PiecePass<float>(args, piece, first).run();
    }
  });
  for (const Partial& partial : partials) merge_into(args, partial);
}

}  // namespace fastremedy::cpu
