// How statistics take tensors apart.
//
// A tile is one row of the statistics or, if channels are last, up to 32 neighbouring rows, and
// threads share its columns. Splits share a tile. One split of one tile is a unit, which one block
// visits. The shape, dtype and alignment of a tensor alone decide about its units, so results are
// bitwise the same on every device.
#pragma once

#include "block.cuh"
#include "division.cuh"
#include "launch.h"
#include "vectors.cuh"

namespace fastremedy::cuda {

// Blocks of a multiprocessor at least: 5 may take 96 registers a thread, and 86 KB hold their
// histograms. 640 threads have 40 KB under way; an H100 needs 18 KB (3.35 TB/s for 0.7 us).
template <class T>
inline constexpr int kStatsResident = sizeof(T) == sizeof(float) ? 5 : 4;

// Two rounds of all that an H100 holds at once. What a unit costs beside its elements is worth some
// 2000 of them.
#ifdef FASTREMEDY_EMULATION
inline constexpr int kStatsBlockSize = 64;
inline constexpr int64_t kStatsBlocks = 7;
inline constexpr int64_t kFewestOfUnit = 1500;
#else
inline constexpr int kStatsBlockSize = 128;
inline constexpr int64_t kStatsBlocks = 1320;
inline constexpr int64_t kFewestOfUnit = 16384;
#endif

// Of 4 bytes each they are a cache line.
inline constexpr int kMostStatsColumns = 32;

// Units with no more elements in a column are added in double: rounding to float changes the fourth
// moment of 2 elements by 1.2e-6, and averages out in many.
inline constexpr int kMostOfSmall = 1024;

// Samples of every column of a unit.
inline constexpr int kNumSamples = 16;

struct StatsJob {
  const void* data;
  int64_t outer, channels, inner;
  int32_t first_row;
  int32_t first_unit;     // of the launch; units of a tile are neighbours
  int32_t first_partial;  // [tiles, num_splits, columns], unless num_splits is 1
  int32_t num_splits;
  DType dtype;
  int32_t columns;  // a power of 2

  FASTREMEDY_HD bool channels_last() const { return channels > 1 && inner == 1; }
};

struct StatsBatch {
  const int32_t* armed;
  double* moments;
  int64_t* counts;
  int64_t* histogram;
  ActivationStatsScratch scratch;
  int32_t num_jobs;
  int32_t num_units;
  StatsJob jobs[kMaxStatsTensors];

  FASTREMEDY_DEVICE const StatsJob& job_of(int32_t unit) const {
    int32_t low = 0, high = num_jobs - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (jobs[middle].first_unit <= unit) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return jobs[low];
  }
};
static_assert(sizeof(StatsBatch) <= 4096, "what a kernel takes as arguments on every device");

// One split of one tile.
struct StatsUnit {
  const StatsJob& job;
  int32_t tile, split;
  int column;  // of the thread

  FASTREMEDY_DEVICE StatsUnit(const StatsJob& job, int32_t unit)
      : job(job),
        tile((unit - job.first_unit) / job.num_splits),
        split((unit - job.first_unit) % job.num_splits),
        column(static_cast<int>(threadIdx.x) % job.columns) {}

  FASTREMEDY_DEVICE int64_t channel_of(int column) const {
    return static_cast<int64_t>(tile) * job.columns + column;
  }
  FASTREMEDY_DEVICE bool has_column() const { return channel_of(column) < job.channels; }
  FASTREMEDY_DEVICE int64_t row() const { return job.first_row + channel_of(column); }
};

// The elements of a unit. A lane is what a thread loads at once: an aligned window of 16 bytes, of
// which some elements belong to the row, or one element if channels are last.
template <class T, DType kDType, bool kChannelsLast>
class StatsPart {
 public:
  static constexpr int kSize = kDType == DType::kFloat64 ? 8 : kDType == DType::kFloat32 ? 4 : 2;
  static constexpr int kWidth = kChannelsLast ? 1 : kAccessBytes / kSize;
  static constexpr int kBatch = kChannelsLast ? 8 : 4;  // lanes under way to a thread at once

  // Bit b * kWidth + k of the mask: element k of lane b belongs to the row.
  struct Batch {
    Stored<T, kWidth> lanes[kBatch];
    uint32_t mask = 0;

    static constexpr uint32_t kFull = ~0u >> (32 - kBatch * kWidth);
    FASTREMEDY_DEVICE bool is_full() const { return mask == kFull; }
    FASTREMEDY_DEVICE bool has(int b, int k) const { return mask >> (b * kWidth + k) & 1; }
  };

  explicit FASTREMEDY_DEVICE StatsPart(const StatsUnit& unit)
      : unit_(unit), job_(unit.job), sample_size_(job_.channels * job_.inner) {
    int64_t depth = job_.outer;
    if constexpr (kChannelsLast) {
      step_segment_ = step() * sample_size_;
    } else {
      const bool heads_differ = job_.outer > 1 && sample_size_ % kWidth != 0;
      const int head = heads_differ ? kWidth - 1 : head_of(unit_.tile * job_.inner);
      num_windows_ = (head + job_.inner + kWidth - 1) / kWidth;
      step_segment_ = step() / num_windows_ * sample_size_;
      step_window_ = static_cast<int>(step() % num_windows_);
      depth *= num_windows_;
    }
    const int64_t split_depth = (depth + job_.num_splits - 1) / job_.num_splits;
    const int64_t end = (unit_.split + 1) * split_depth;
    begin_ = unit_.split * split_depth;
    end_ = end < depth ? end : depth;
  }

  FASTREMEDY_DEVICE bool is_small() const { return (end_ - begin_) * kWidth <= kMostOfSmall; }

  // The i-th of kNumSamples evenly spaced elements of a column, NaN where there is none.
  FASTREMEDY_DEVICE T sample(int i, int column) const {
    const int64_t p = begin_ + (end_ - begin_) * (2 * i + 1) / (2 * kNumSamples);
    if (p < end_ && unit_.channel_of(column) < job_.channels) {
      const Range range = range_at(cursor_at(p, column));
      if (range.begin < range.end) return load_one(range.first + range.begin);
    }
    return static_cast<T>(NAN);
  }

  // use(batch, visit) for all lanes of the thread, kBatch visits at once.
  template <class Use>
  FASTREMEDY_DEVICE void for_each_batch(Use use) const {
    const int num_visits = this->num_visits();
    if (num_visits == 0) return;
    Cursor cursor = cursor_at(visit_at(0), unit_.column);
#pragma unroll 1
    for (int visit = 0; visit < num_visits; visit += kBatch) {
      Batch batch;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (visit + b < num_visits) {
          batch.mask |= load_lane(cursor, batch.lanes[b]) << (b * kWidth);
        }
        advance(cursor);
      }
      use(batch, visit);
    }
  }

  // use(element) for those of a batch again, in few instructions instead of little time.
  template <class Use>
  FASTREMEDY_DEVICE void for_each_element(int visit, Use use) const {
    const int num_visits = this->num_visits();
#pragma unroll 1
    for (int b = 0; b < kBatch && visit + b < num_visits; ++b) {
      const Range range = range_at(cursor_at(visit_at(visit + b), unit_.column));
#pragma unroll 1
      for (int k = range.begin; k < range.end; ++k) use(load_one(range.first + k));
    }
  }

 private:
  struct Cursor {
    int64_t segment;  // first element of the row in this sample; the element if channels are last
    int64_t window;
  };
  struct Range {
    int64_t first;  // element of the window; it may lie before the tensor
    int begin, end;
  };

  // Lanes of a column that the block visits at once.
  FASTREMEDY_DEVICE int step() const { return kStatsBlockSize / job_.columns; }
  FASTREMEDY_DEVICE int64_t visit_at(int visit) const {
    return begin_ + static_cast<int>(threadIdx.x) / job_.columns +
           static_cast<int64_t>(visit) * step();
  }
  FASTREMEDY_DEVICE int num_visits() const {
    const int64_t left = end_ - visit_at(0);
    return left > 0 && unit_.has_column() ? static_cast<int>((left + step() - 1) / step()) : 0;
  }
  FASTREMEDY_DEVICE int head_of(int64_t element) const {
    const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(job_.data) / kSize);
    return static_cast<int>((offset + element) % kWidth);
  }

  FASTREMEDY_DEVICE Cursor cursor_at(int64_t p, int column) const {
    if constexpr (kChannelsLast) return {p * sample_size_ + unit_.channel_of(column), 0};
    const int64_t sample = p / num_windows_;
    return {sample * sample_size_ + unit_.tile * job_.inner, p - sample * num_windows_};
  }
  FASTREMEDY_DEVICE void advance(Cursor& cursor) const {
    cursor.segment += step_segment_;
    if constexpr (!kChannelsLast) {
      cursor.window += step_window_;
      if (cursor.window < num_windows_) return;
      cursor.window -= num_windows_;
      cursor.segment += sample_size_;
    }
  }

  FASTREMEDY_DEVICE Range range_at(const Cursor& cursor) const {
    if constexpr (kChannelsLast) return {cursor.segment, 0, 1};
    const int head = head_of(cursor.segment);
    const int64_t first = cursor.segment - head + cursor.window * kWidth;
    const int64_t left = cursor.segment + job_.inner - first;
    return {first, cursor.window == 0 ? head : 0, left < kWidth ? static_cast<int>(left) : kWidth};
  }

  // Returns which elements belong to the row. A window may hold its neighbours, too, but nothing
  // outside the tensor is read.
  FASTREMEDY_DEVICE uint32_t load_lane(const Cursor& cursor, Stored<T, kWidth>& lane) const {
    const Range range = range_at(cursor);
    if (range.begin >= range.end) return 0;
    const char* const data = element_at(job_.data, kDType, range.first);
    bool is_vector = true;
    if constexpr (kWidth > 1) {
      is_vector = range.first >= 0 && range.first + kWidth <= job_.outer * sample_size_;
    }
    if (is_vector) {
      lane = load<T, kWidth>(data, kDType, 0);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (k < range.begin || k >= range.end) continue;
        const Stored<T, 1> one = load<T, 1>(data, kDType, k);
        if constexpr (kSize == 2) {
          lane.set_half(k, one.half(0));
        } else {
          memcpy(lane.words + k * kSize / 4, one.words, kSize);
        }
      }
    }
    return (1u << range.end) - (1u << range.begin);
  }

  FASTREMEDY_DEVICE T load_one(int64_t i) const {
    T value[1];
    unpack(load<T, 1>(element_at(job_.data, kDType, i), kDType, 0), kDType, value);
    return value[0];
  }

  const StatsUnit& unit_;
  const StatsJob& job_;
  const int64_t sample_size_;
  int64_t num_windows_ = 1, step_segment_ = 0;
  int step_window_ = 0;
  int64_t begin_, end_;
};

}  // namespace fastremedy::cuda
