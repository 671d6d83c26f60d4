// Statistics of tensors in one pass.
//
// Each block leaves the moments of its unit at a fixed place, and the last block of a tile merges
// those in a fixed order: the result is bitwise the same in every run.
#include <type_traits>

#include "activation_stats_histogram.cuh"

namespace fastremedy::cuda {
namespace {

FASTREMEDY_DEVICE void merge_values(double (&values)[kNumMoments],
                                    const double (&others)[kNumMoments]) {
  Moments mine, other;
  memcpy(&mine, values, sizeof(mine));
  memcpy(&other, others, sizeof(other));
  mine = merge(mine, other);
  memcpy(values, &mine, sizeof(mine));
}

// The row of the column gets what the unit found, and the units before it.
FASTREMEDY_DEVICE void merge_into_row(const StatsBatch& batch, const StatsUnit& unit,
                                      const Moments& of_unit, StatsShared& shared) {
  const StatsJob& job = unit.job;
  const int columns = job.columns, row_of_block = static_cast<int>(threadIdx.x) / columns;
  const bool has_result = row_of_block == 0 && unit.has_column();
  Moments result = of_unit;
  if (job.num_splits > 1) {
    const int32_t first_unit = unit.tile * job.num_splits;
    auto* const partials = static_cast<Moments*>(batch.scratch.partials) + job.first_partial +
                           static_cast<int64_t>(first_unit) * columns + unit.column;
    if (has_result) partials[unit.split * columns] = of_unit;
    __syncthreads();  // the fence below is for the writes of all threads
    uint32_t* const counter = batch.scratch.counters + job.first_unit + first_unit;
    if (!is_last_block(counter, static_cast<uint32_t>(job.num_splits))) return;
    result = Moments();
    if (unit.has_column()) {
#pragma unroll 1
      for (int s = row_of_block; s < job.num_splits; s += kStatsBlockSize / columns) {
        result = merge(result, partials[s * columns]);
      }
    }
    double values[kNumMoments];
    memcpy(values, &result, sizeof(values));
    reduce_columns(values, columns, shared, merge_values);
    memcpy(&result, values, sizeof(values));
  }
  if (has_result) {
    auto* const row = reinterpret_cast<Moments*>(batch.moments) + unit.row();
    *row = merge(*row, result);
  }
}

// What the thread finds in its elements.
template <DType kDType, bool kChannelsLast, bool kHistogram, class T>
FASTREMEDY_DEVICE void visit_elements(const StatsUnit& unit, int64_t* histogram,
                                      StatsShared& shared, StatsTotals<T>& totals) {
  using Part = StatsPart<T, kDType, kChannelsLast>;
  using Buckets = std::conditional_t<!kHistogram, NoBuckets,
                                     std::conditional_t<kChannelsLast, ColumnBuckets, RowBuckets>>;
  const Part part(unit);
  choose_pilots<T>(part, unit.job.columns, shared);
  const Pilot<T> pilot(shared, unit.column);
  Buckets buckets(shared, histogram);
  part.for_each_batch([&](const auto& batch, int visit) {
    Stretch<T> stretch;
    const auto add = [&](auto is_full) {
#pragma unroll
      for (int b = 0; b < Part::kBatch; ++b) {
        T x[Part::kWidth];
        unpack(batch.lanes[b], kDType, x);
#pragma unroll
        for (int k = 0; k < Part::kWidth; ++k) {
          if (!is_full.value && !batch.has(b, k)) continue;
          stretch.add(x[k], pilot);
          buckets.add(x[k]);
        }
      }
    };
    if (batch.is_full()) {
      add(std::true_type());
    } else {
      add(std::false_type());
    }
    if (!part.is_small() && stretch.is_exact(pilot)) {
      totals.add(stretch);
    } else {
      NonFinite non_finite;
      part.for_each_element(visit, [&](T x) {
        if (is_finite(x)) {
          totals.add(x, pilot);
        } else {
          non_finite.add(x);
        }
      });
      non_finite.add_to(shared, unit.column);
    }
  });
  buckets.finish();
}

template <bool kHistogram, class T>
FASTREMEDY_DEVICE void visit_unit(const StatsBatch& batch, const StatsUnit& unit) {
  StatsShared& shared = stats_shared();
  StatsTotals<T> totals;
  const auto visit = [&](auto dtype) {
    constexpr DType kDType = decltype(dtype)::value;
    int64_t* const histogram = kHistogram ? batch.histogram + unit.row() * kNumBuckets : nullptr;
    if (unit.job.channels_last()) {
      visit_elements<kDType, true, kHistogram>(unit, histogram, shared, totals);
    } else {
      visit_elements<kDType, false, kHistogram>(unit, histogram, shared, totals);
    }
  };
  if constexpr (sizeof(T) == sizeof(double)) {
    visit(std::integral_constant<DType, DType::kFloat64>());
  } else if (unit.job.dtype == DType::kFloat32) {
    visit(std::integral_constant<DType, DType::kFloat32>());
  } else if (unit.job.dtype == DType::kFloat16) {
    visit(std::integral_constant<DType, DType::kFloat16>());
  } else {
    visit(std::integral_constant<DType, DType::kBFloat16>());
  }

  double values[StatsTotals<T>::kNumValues];
  totals.get(values);
  reduce_columns(values, unit.job.columns, shared, StatsTotals<T>::combine);
  if (static_cast<int>(threadIdx.x) < unit.job.columns && unit.has_column()) {
    int64_t* const counts = batch.counts + unit.row() * kNumCounts;
    add_count(counts + static_cast<int>(Count::kZero), static_cast<uint32_t>(values[6]));
    add_count(counts + static_cast<int>(Count::kNegative), static_cast<uint32_t>(values[7]));
#pragma unroll
    for (int k = 0; k < NonFinite::kNumKinds; ++k) {
      add_count(counts + NonFinite::kFirst + k, shared.non_finite[k][unit.column]);
    }
  }
  const Pilot<T> pilot(shared, unit.column);
  merge_into_row(batch, unit, StatsTotals<T>::moments(values, pilot), shared);
}

template <class T, bool kHistogram>
__global__ void __launch_bounds__(kStatsBlockSize, kStatsResident<T>)
    activation_stats_kernel(const __grid_constant__ StatsBatch batch) {
  if (batch.armed && *batch.armed == 0) return;
#pragma unroll 1
  for (int32_t unit = blockIdx.x; unit < batch.num_units; unit += gridDim.x) {
    visit_unit<kHistogram, T>(batch, StatsUnit(batch.job_of(unit), unit));
  }
}

StatsJob make_job(const StatsTensor& tensor) {
  StatsJob job{};
  job.data = tensor.data;
  job.outer = tensor.channels == 1 ? 1 : tensor.outer;
  job.channels = tensor.channels;
  job.inner = tensor.channels == 1 ? tensor.outer * tensor.inner : tensor.inner;
  job.first_row = tensor.first_row;
  job.dtype = tensor.dtype;
  job.columns = 1;
  while (job.channels_last() && job.columns < kMostStatsColumns && job.columns < job.channels) {
    job.columns *= 2;
  }
  return job;
}

// use(batch, is double) for each launch: at most kMaxStatsTensors tensors of float64 or of other
// dtypes, none of them empty.
template <class Use>
int for_each_launch(const StatsTensor* tensors, int32_t num_tensors, Use use) {
  for (const bool is_double : {false, true}) {
    StatsBatch batch{};
    int64_t num_partials = 0;
    const auto flush = [&] {
      const int code = batch.num_jobs > 0 ? use(batch, num_partials, is_double) : 0;
      batch.num_jobs = batch.num_units = 0;
      num_partials = 0;
      return code;
    };
    for (int32_t i = 0; i < num_tensors; ++i) {
      const StatsTensor& tensor = tensors[i];
      if ((tensor.dtype == DType::kFloat64) != is_double || tensor.numel() == 0) continue;
      StatsJob job = make_job(tensor);
      const int64_t num_tiles = ceil_div(job.channels, job.columns);
      const int64_t wanted = ceil_div(kStatsBlocks, num_tiles);
      const int64_t most = ceil_div(ceil_div(tensor.numel(), num_tiles), kFewestOfUnit);
      job.num_splits = static_cast<int32_t>(wanted < most ? wanted : most);
      job.first_unit = batch.num_units;
      job.first_partial = static_cast<int32_t>(num_partials);
      const int64_t num_units = num_tiles * job.num_splits;
      batch.num_units += static_cast<int32_t>(num_units);
      if (job.num_splits > 1) num_partials += num_units * job.columns;
      batch.jobs[batch.num_jobs++] = job;
      if (batch.num_jobs < kMaxStatsTensors) continue;
      if (const int code = flush(); code != 0) return code;
    }
    if (const int code = flush(); code != 0) return code;
  }
  return 0;
}

template <class T>
int launch(const StatsBatch& batch, void* stream) {
  const auto kernel =
      batch.histogram ? activation_stats_kernel<T, true> : activation_stats_kernel<T, false>;
  const int64_t num_blocks = batch.num_units < kStatsBlocks ? batch.num_units : kStatsBlocks;
  FASTREMEDY_LAUNCH(kernel, static_cast<unsigned>(num_blocks), kStatsBlockSize,
                    static_cast<cudaStream_t>(stream), batch);
  return status_of(cudaGetLastError());
}

}  // namespace

ActivationStatsScratchSize activation_stats_scratch_size(const StatsTensor* host_tensors,
                                                         int32_t num_tensors) {
  ActivationStatsScratchSize size{0, 0};
  for_each_launch(host_tensors, num_tensors, [&](const auto& batch, int64_t num_partials, bool) {
    const auto counters = static_cast<size_t>(batch.num_units);
    const size_t bytes = num_partials * sizeof(Moments);
    size.num_counters = counters > size.num_counters ? counters : size.num_counters;
    size.partial_bytes = bytes > size.partial_bytes ? bytes : size.partial_bytes;
    return 0;
  });
  return size;
}

int launch_activation_stats(const ActivationStatsArgs& args, const ActivationStatsScratch& scratch,
                            void* stream) {
  return for_each_launch(
      args.tensors, args.num_tensors, [&](StatsBatch& batch, int64_t, bool is_double) {
        batch.armed = args.armed;
        batch.moments = args.moments;
        batch.counts = args.counts;
        batch.histogram = args.histogram;
        batch.scratch = scratch;
        return is_double ? launch<double>(batch, stream) : launch<float>(batch, stream);
      });
}

}  // namespace fastremedy::cuda
