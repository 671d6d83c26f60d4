// What both ways through a softmax share: rows of many classes, and rows as lanes.
#pragma once

#include <algorithm>

#include "focal_loss_pass.h"

namespace fastremedy::cpu {

// Rows of up to so many classes are too short to be vectors.
inline constexpr int64_t kMostLaneClasses = 32;

FocalSums softmax_focal_loss_in_lanes(const FocalLossArgs& args);

template <class T>
void convert(const void* stored, DType dtype, T* values, int64_t n) {
  if (element_size(dtype) == sizeof(T)) {
    std::memcpy(values, stored, n * sizeof(T));
  } else if constexpr (sizeof(T) == sizeof(float)) {
    const auto* halves = static_cast<const uint16_t*>(stored);
    if (dtype == DType::kBFloat16) load_half<BFloat16>(halves, values, n);
    if (dtype == DType::kFloat16) load_half<Float16>(halves, values, n);
  }
}

template <class T>
void convert_back(const T* values, void* stored, DType dtype, int64_t n, bool streams) {
  if (element_size(dtype) == sizeof(T)) {
    const auto* bytes = reinterpret_cast<const char*>(values);
    if (streams) {
      stream_bytes(static_cast<char*>(stored), bytes, n * sizeof(T));
    } else {
      std::memcpy(stored, bytes, n * sizeof(T));
    }
  } else if constexpr (sizeof(T) == sizeof(float)) {
    auto* halves = static_cast<uint16_t*>(stored);
    if (dtype == DType::kBFloat16) store_half<BFloat16>(values, halves, n);
    if (dtype == DType::kFloat16) store_half<Float16>(values, halves, n);
  }
}

// Factors of the classes.
template <class T>
struct ClassFactors {
  std::vector<T> of_class;  // alpha * weight; one for all if there is no vector

  explicit ClassFactors(const FocalLossArgs& args) {
    const bool has_classes = args.alphas.data || args.weight.data;
    for (int64_t c = 0; c < (has_classes ? args.shape.classes : 1); ++c) {
      of_class.push_back(static_cast<T>(alpha_of(args, c) * value_of(args.weight, c, 1)));
    }
  }
  T operator[](int64_t c) const { return of_class[of_class.size() == 1 ? 0 : c]; }
};

// Calls pass.run(first row, number of rows), which returns a sum, for all tiles of up to `max_rows`
// rows; those of a tile have one `outer`, if inner is not 1. Every range of tiles has a pass.
template <class MakePass>
FocalSums for_row_tiles(const FocalLossShape& shape, int64_t max_rows, const MakePass& make_pass) {
  const int64_t rows = shape.inner == 1 ? shape.outer : shape.inner;
  const int64_t tiles_per_outer = (rows + max_rows - 1) / max_rows;
  const int64_t num_tiles = shape.inner == 1 ? tiles_per_outer : shape.outer * tiles_per_outer;
  const int64_t tiles_per_range = std::max<int64_t>(1, kRangeSize / (max_rows * shape.classes));
  const int64_t num_ranges = (num_tiles + tiles_per_range - 1) / tiles_per_range;
  std::vector<FocalSums> sums(num_ranges);
  parallel_for(num_ranges, false, num_ranges == 1, [&](int64_t range) {
    auto pass = make_pass();
    const int64_t end = std::min(num_tiles, (range + 1) * tiles_per_range);
    for (int64_t tile = range * tiles_per_range; tile < end; ++tile) {
      const int64_t begin = tile % tiles_per_outer * max_rows;
      sums[range].loss +=
          pass.run(tile / tiles_per_outer * rows + begin, std::min(max_rows, rows - begin));
    }
    finish_streams();
  });
  return add_up(sums);
}

// What the gradient of a row is multiplied by; `otherwise` if that is the same for all.
template <class T>
T row_scale(const FocalLossArgs& args, int64_t row, T otherwise) {
  if (!args.grad_output || args.reduction != Reduction::kNone) return otherwise;
  return static_cast<T>(load_scalar(element_at(args.grad_output, args.grad_output_dtype, row),
                                    args.grad_output_dtype));
}

}  // namespace fastremedy::cpu
