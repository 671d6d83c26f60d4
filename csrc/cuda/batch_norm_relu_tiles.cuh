// How batch normalisation takes its elements apart.
//
// A lane holds kWidth neighbours of a row. Blocks share a tile: all lanes of a channel if elements
// are contiguous, up to 8 lanes of every row if channels are last. The first launch walks the part
// of a block forwards, the second one backwards: what was read last is still in L2.
//
// Shape and alignment alone decide, so results are bitwise the same on every device.
#pragma once

#include "block.cuh"
#include "division.cuh"
#include "launch.h"
#include "vectors.cuh"

namespace fastremedy::cuda {

// Two blocks a multiprocessor may take 128 registers a thread; sm_75 to sm_120 take 35 to 128 and
// spill nothing. An H100 holds 264 of them at once.
#ifdef FASTREMEDY_EMULATION
inline constexpr int kNormalizeBlockSize = 64;
inline constexpr int64_t kBlocksAtOnce = 12;
#else
inline constexpr int kNormalizeBlockSize = 256;
inline constexpr int64_t kBlocksAtOnce = 264;
#endif
inline constexpr int kNormalizeBlocks = 2;

// A block is worth its launch if a thread has this many lanes to visit.
inline constexpr int64_t kFewestVisits = 4;

// Of vectors: a row of a tile is a cache line of 128 bytes in 16 bits.
inline constexpr int kMostColumns = 8;

// kVectors: 8 elements of a dtype that the compiler knows. Otherwise 1 of any dtype; neighbouring
// threads take neighbouring elements, and those of a warp write a mask together.
template <class Real, DType kDType, bool kVectors>
struct LaneType {
  using T = Real;
  static constexpr int kWidth = kVectors ? kVecSize<T> : 1;
  static constexpr int kMaxColumns = kVectors ? kMostColumns : kWarpSize;
  // Lanes of each operand that are under way to a thread at once: 64 bytes of vectors forwards, and
  // as much of gradient and input together.
  static constexpr int kForwardBatch = kVectors && kDType == DType::kFloat32 ? 2 : 4;
  static constexpr int kBackwardBatch = kVectors ? kForwardBatch / 2 : 4;

  static FASTREMEDY_DEVICE DType dtype(const BatchNormShape& shape) {
    return kVectors || sizeof(T) == sizeof(double) ? kDType : shape.dtype;
  }
};

struct Tiling {
  int64_t num_tiles;
  int64_t num_splits;     // blocks of a tile
  Divisor lanes_per_row;  // of kWidth 1: whole warps
  int64_t depth;          // visits of all threads that share a column
  int64_t split_depth;    // of them in one block
  int32_t columns;        // lanes side by side

  FASTREMEDY_HD int32_t rows() const { return kNormalizeBlockSize / columns; }
};

inline Tiling make_tiling(const BatchNormShape& shape, int width, int max_columns) {
  const int64_t unit = width == 1 ? kWarpSize : 1;
  const int64_t row_size = shape.row_size() > 0 ? shape.row_size() : 1;
  const int64_t lanes_per_row = ceil_div(ceil_div(row_size, width), unit) * unit;
  Tiling t;
  t.lanes_per_row = Divisor(lanes_per_row);
  if (shape.channels_last) {
    t.num_tiles = ceil_div(lanes_per_row, max_columns);
    t.columns = static_cast<int32_t>(ceil_div(lanes_per_row, t.num_tiles));
    t.depth = shape.num_rows();
  } else {
    t.num_tiles = shape.channels;
    t.columns = 1;
    t.depth = shape.spatial > 0 ? shape.batch * lanes_per_row : 0;
  }
  // All blocks run at once where that leaves few places empty, else in several waves.
  int64_t wanted = kBlocksAtOnce / t.num_tiles;
  if (10 * wanted * t.num_tiles < 9 * kBlocksAtOnce) {
    wanted = ceil_div(4 * kBlocksAtOnce, t.num_tiles);
  }
  const int64_t visits = ceil_div(ceil_div(t.depth, t.rows()), wanted);
  t.split_depth = (visits > kFewestVisits ? visits : kFewestVisits) * t.rows();
  t.num_splits = t.depth > 0 ? ceil_div(t.depth, t.split_depth) : 1;
  return t;
}

// Where the elements of a lane lie.
struct Place {
  int64_t row;
  int64_t column;
  int64_t element;
  bool is_inside;  // a lane of kWidth 1 may lie beyond its row
};

// The part of a tile that a block visits.
template <class Lane, bool kChannelsLast>
class Tile {
 public:
  static constexpr int kWidth = Lane::kWidth;
  static constexpr int kLaneChannels = kChannelsLast ? kWidth : 1;
  static constexpr int kMaxChannels = kChannelsLast ? kWidth * Lane::kMaxColumns : 1;

  FASTREMEDY_DEVICE Tile(const BatchNormShape& shape, const Tiling& tiling)
      : shape_(shape),
        tiling_(tiling),
        tile_(blockIdx.x % tiling.num_tiles),
        split_(blockIdx.x / tiling.num_tiles),
        column_(threadIdx.x % tiling.columns),
        row_(threadIdx.x / tiling.columns) {}

  FASTREMEDY_DEVICE const BatchNormShape& shape() const { return shape_; }
  FASTREMEDY_DEVICE const Tiling& tiling() const { return tiling_; }
  FASTREMEDY_DEVICE int64_t index() const { return tile_; }
  FASTREMEDY_DEVICE int64_t split() const { return split_; }

  FASTREMEDY_DEVICE int64_t first_channel() const {
    return kChannelsLast ? tile_ * tiling_.columns * kWidth : tile_;
  }
  FASTREMEDY_DEVICE int num_channels() const {
    if (!kChannelsLast) return 1;
    const int64_t left = shape_.channels - first_channel();
    const int64_t most = tiling_.columns * kWidth;
    return static_cast<int>(left < most ? left : most);
  }
  // The first channel of the thread in the tile.
  FASTREMEDY_DEVICE int lane_channel() const { return kChannelsLast ? column_ * kWidth : 0; }

  // The p-th element of a channel in the order of batch and space.
  FASTREMEDY_DEVICE int64_t element_of(int64_t channel, int64_t p) const {
    if (kChannelsLast) return p * shape_.channels + channel;
    const int64_t sample = p / shape_.spatial;
    return (sample * shape_.channels + channel) * shape_.spatial + p % shape_.spatial;
  }

  // use(place, load(place)) for every lane of the thread, with kBatch loads under way at once. The
  // threads of a warp stay together if kWidth is 1.
  template <int kBatch, bool kBackwards, class Load, class Use>
  FASTREMEDY_DEVICE void for_each(Load load, Use use) const {
    const int32_t step = tiling_.rows();
    const int64_t begin = split_ * tiling_.split_depth + row_;
    const int64_t past = (split_ + 1) * tiling_.split_depth;
    const int64_t end = past < tiling_.depth ? past : tiling_.depth;
    const bool has_lane =
        row_ < step && tile_ * tiling_.columns + column_ < tiling_.lanes_per_row.value();
    const bool has_visits = begin < end && (!kChannelsLast || has_lane);
    const int64_t num_visits = has_visits ? (end - begin + step - 1) / step : 0;
    const auto place = [&](int64_t visit) {
      return place_at(begin + (kBackwards ? num_visits - 1 - visit : visit) * step);
    };
    int64_t visit = 0;
    for (; visit + kBatch <= num_visits; visit += kBatch) {
      Place places[kBatch];
      decltype(load(places[0])) batch[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        places[b] = place(visit + b);
        batch[b] = load(places[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) use(places[b], batch[b]);
    }
#pragma unroll 1
    for (; visit < num_visits; ++visit) {
      const Place last = place(visit);
      use(last, load(last));
    }
  }

 private:
  FASTREMEDY_DEVICE Place place_at(int64_t depth) const {
    Place p;
    if constexpr (kChannelsLast) {
      p.row = depth;
      p.column = (tile_ * tiling_.columns + column_) * kWidth;
    } else {
      const int64_t sample = tiling_.lanes_per_row.quotient(depth);
      p.row = sample * shape_.channels + tile_;
      p.column = (depth - sample * tiling_.lanes_per_row.value()) * kWidth;
    }
    p.element = p.row * shape_.row_size() + p.column;
    p.is_inside = kWidth > 1 || p.column < shape_.row_size();
    return p;
  }

  const BatchNormShape& shape_;
  const Tiling& tiling_;
  const int64_t tile_;
  const int64_t split_;
  const int column_;
  const int row_;
};

// The elements of a lane, zeros beyond the row.
template <class Lane, Reuse kReuse>
FASTREMEDY_DEVICE auto load_lane(const void* data, const BatchNormShape& shape, const Place& p) {
  const DType dtype = Lane::dtype(shape);
  Stored<typename Lane::T, Lane::kWidth> stored;
  if (p.is_inside) {
    stored =
        load<typename Lane::T, Lane::kWidth, kReuse>(element_at(data, dtype, p.element), dtype, 0);
  }
  return stored;
}

template <class Lane>
FASTREMEDY_DEVICE void store_lane(void* data, const BatchNormShape& shape, const Place& p,
                                  const typename Lane::T (&values)[Lane::kWidth]) {
  const DType dtype = Lane::dtype(shape);
  if (p.is_inside) store(element_at(data, dtype, p.element), dtype, 0, pack(values, dtype));
}

// Bit k is that of element k.
template <class Lane>
FASTREMEDY_DEVICE uint32_t load_mask(const uint8_t* mask, const BatchNormShape& shape,
                                     const Place& p) {
  if (!p.is_inside) return 0;
  const uint32_t byte = mask[p.row * shape.mask_row_size() + p.column / 8];
  return Lane::kWidth == 8 ? byte : byte >> (p.column % 8);
}

template <class Lane>
FASTREMEDY_DEVICE void store_mask(uint8_t* mask, const BatchNormShape& shape, const Place& p,
                                  uint32_t bits) {
  static_assert(Lane::kWidth == 8 || Lane::kWidth == 1, "a byte has one writer");
  if constexpr (Lane::kWidth == 1) {
    bits = __ballot_sync(kAllLanes, p.is_inside && bits) >> (p.column % kWarpSize);
  }
  if (p.is_inside && p.column % 8 == 0) {
    mask[p.row * shape.mask_row_size() + p.column / 8] = static_cast<uint8_t>(bits);
  }
}

}  // namespace fastremedy::cuda
