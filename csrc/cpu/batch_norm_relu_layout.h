// How elements are shared out among threads, and the order in which they are visited.
//
// Results do not depend on the number of threads: what is added up in which order follows from the
// shape alone.
#pragma once

#include <algorithm>

#include "../core/arguments.h"
#include "batch_norm_relu_masks.h"
#include "parallel.h"
#include "simd.h"
#include "tensor_block.h"

namespace fastremedy::cpu {

// Neighbouring elements, kBlockSize at most: whole rows, or a part of one.
struct Tile {
  int64_t begin;     // place of the first element in memory
  int64_t row_size;  // elements of each row here
  int64_t num_rows;
  int64_t row;      // the first
  int64_t column;   // of the first element in its row; the channel, if channels are last
  int64_t channel;  // of the first row, if channels are not last; its successors have the next
  int64_t ahead;    // distance in memory to elements that are read later

  int64_t size() const { return row_size * num_rows; }
};

class Layout {
 public:
  explicit Layout(const BatchNormShape& shape)
      : shape_(shape),
        row_size_(std::max<int64_t>(1, shape.row_size())),
        rows_of_period_(shape.channels_last ? repeats(shape) : 1),
        tile_rows_(std::max<int64_t>(1, kBlockSize / (rows_of_period_ * row_size_)) *
                   rows_of_period_),
        is_serial_(shape.count() * shape.channels <= kSerialElements) {}

  int64_t channels() const { return shape_.channels; }
  int64_t count() const { return shape_.count(); }
  DType dtype() const { return shape_.dtype; }

  // Whether results go past the cache, which a call's tensors would fill: what it reads, it reads
  // twice. (32, 512, 14, 14) with channels last takes 0.8 ms backward with that, 1.1 without.
  bool streams(int64_t num_tensors) const {
    return num_tensors * shape_.bytes() >= 2 * kStreamedBytes;
  }

  // Whether several threads may have rows of the same channel.
  bool shares_channels(bool reduces) const {
    return !is_serial_ && !(reduces && keeps_channels_whole());
  }

  // How many numbers of channels the tiles ask for; in columns those of a few rows, side by side.
  int64_t period() const { return shape_.channels * rows_of_period_; }

  // A tile of columns has whole periods, or a part of one.
  int64_t width(const Tile& tile) const { return std::min(period(), tile.size()); }

  template <class T>
  void repeat(T* values) const {
    for (int64_t i = shape_.channels; i < period(); ++i) values[i] = values[i - shape_.channels];
  }

  // The part of a mask that belongs to a tile. Rows that end with a byte are one long row.
  template <class Byte>
  MaskRows<Byte> mask_rows(const Tile& tile, Byte* mask) const {
    const int64_t stride = shape_.mask_row_size();
    Byte* const bytes = mask + tile.row * stride + tile.column / 8;
    if (tile.row_size == row_size_ && row_size_ % 8 == 0) return {bytes, 0, tile.size(), 1};
    return {bytes, stride, tile.row_size, tile.num_rows};
  }

  // visit(tile, n) for channels [begin, end): the first n elements of the tile's rows are among
  // their first.
  template <class Visit>
  void for_each_pilot_of_rows(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t i = 0; i < num_pilots(); i += row_size_) {
      const int64_t n = std::min(row_size_, num_pilots() - i);
      for_each_row_tile(i / row_size_, begin, end, 0, std::min(row_size_, kBlockSize), 0,
                        [&](const Tile& tile) { visit(tile, n); });
    }
  }

  // visit(tile) for the first elements of channels [begin, end), which are last.
  template <class Visit>
  void for_each_pilot_of_columns(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t row = 0; row < num_pilots(); ++row) {
      for (int64_t column = begin; column < end; column += kBlockSize) {
        const int64_t size = std::min(kBlockSize, end - column);
        visit(Tile{row * row_size_ + column, size, 1, row, column, 0, 0});
      }
    }
  }

  int64_t num_pilots() const { return std::min<int64_t>(kPilotElements, count()); }

  // A pass over the elements: begin and sums, then finish for all channels, then results. The sums
  // are of type double for tiles of rows; for tiles of columns T, added up in double.
  template <class T, class Pass>
  void run(Pass& pass, bool reduces, bool applies) const {
    if (shape_.channels_last) {
      run_columns<T>(pass, reduces, applies);
    } else if (!reduces) {
      run_images(pass, applies);
    } else if (keeps_channels_whole()) {
      run_channels(pass, applies);
    } else {
      run_few_channels(pass, applies);
    }
  }

 private:
  static constexpr int64_t kChunkElements = 16384;
  // One thread is done with as many before another, which waits in a loop, has seen them.
  static constexpr int64_t kSerialElements = 2 * kChunkElements;

  // Where memory is read in its order. With the caches cold, (32, 512, 7, 7) with channels last
  // takes 0.34 ms backward with that, 0.65 without; in the cache nobody notices.
  static constexpr int64_t kAhead = kBlockSize;

  bool keeps_channels_whole() const {
    return shape_.channels >= 4 * num_threads() || count() <= kChunkElements;
  }

  // From beyond the caches memory comes fast in its own order only, tile by tile.
  static bool is_cached(const BatchNormShape& shape) { return shape.bytes() <= int64_t{4} << 20; }

  // Short rows are taken together, for columns that vectors divide. Few, for what belongs to a
  // column is read once for all of a tile's periods: were the tile one period, (32, 64, 56, 56)
  // would take 6.2 ms forward and backward instead of 5.1.
  static int64_t repeats(const BatchNormShape& shape) {
    constexpr int64_t kMinWidth = 64, kVector = 16;
    const int64_t row_size = std::max<int64_t>(1, shape.row_size());
    const int64_t most = std::max<int64_t>(1, kBlockSize / row_size);
    int64_t rows = 1;
    while (rows < most && (rows * row_size < kMinWidth || rows * row_size % kVector != 0)) ++rows;
    return rows;
  }

  // visit(tile) for channels [begin, end) of an image, and columns [first, last).
  template <class Visit>
  void for_each_row_tile(int64_t image, int64_t begin, int64_t end, int64_t first, int64_t last,
                         int64_t ahead, const Visit& visit) const {
    for (int64_t c = begin; c < end; c += tile_rows_) {
      const int64_t row = image * shape_.channels + c, num_rows = std::min(tile_rows_, end - c);
      for (int64_t column = first; column < last; column += kBlockSize) {
        const int64_t size = std::min(kBlockSize, last - column);
        visit(Tile{row * row_size_ + column, size, num_rows, row, column, c, ahead});
      }
    }
  }

  // A thread that takes channels from beginning to end finds them in its cache again. It jumps from
  // image to image, where the hardware does not follow and has to be told.
  template <class Pass>
  void run_channels(Pass& pass, bool applies) const {
    const int64_t range_size = std::max<int64_t>(1, kChunkElements / count());
    const int64_t num_ranges = (shape_.channels + range_size - 1) / range_size;
    parallel_for(num_ranges, false, is_serial_, [&](int64_t range) {
      const int64_t begin = range * range_size;
      const int64_t end = std::min(begin + range_size, shape_.channels);
      LineVector<double> sums(2 * (end - begin));
      double *const first = sums.data(), *const second = first + (end - begin);
      pass.begin_rows(begin, end);
      for (int64_t image = 0; image < shape_.batch; ++image) {
        const int64_t ahead = distance(image, image + 1);
        if (row_size_ <= kBlockSize) {
          for_each_row_tile(image, begin, end, 0, row_size_, ahead, [&](const Tile& tile) {
            const int64_t i = tile.channel - begin;
            pass.sum_rows(tile, first + i, second + i);
          });
          continue;
        }
        for (int64_t c = begin; c < end; ++c) {
          for (int64_t column = 0; column < row_size_; column += kChunkElements) {
            double part[2] = {0, 0};  // as run_few_channels adds up
            for_each_row_tile(image, c, c + 1, column, std::min(column + kChunkElements, row_size_),
                              ahead,
                              [&](const Tile& tile) { pass.sum_rows(tile, &part[0], &part[1]); });
            first[c - begin] += part[0];
            second[c - begin] += part[1];
          }
        }
      }
      pass.finish(begin, end, first, second);
      // Where L2 holds two ranges the next one arrives while the results of this one leave.
      const int64_t next = begin + num_threads() * range_size;
      const bool fetches_next =
          range_size * count() <= 2 * kChunkElements && next < shape_.channels;
      for (int64_t image = shape_.batch; applies && image-- > 0;) {
        const int64_t ahead =
            fetches_next ? distance(image, shape_.batch - 1 - image) + (next - begin) * row_size_
                         : distance(image, image - 1);
        for_each_row_tile(image, begin, end, 0, row_size_, ahead,
                          [&](const Tile& tile) { pass.apply_to_rows(tile); });
      }
      finish_streams();
    });
  }

  // From a row to what a thread reads after it: usually that of the next image.
  int64_t distance(int64_t image, int64_t next) const {
    if (row_size_ > kChunkElements) return kAhead;
    return next < 0 || next >= shape_.batch ? 0 : (next - image) * shape_.channels * row_size_;
  }

  // Too few channels for the threads: each is cut into parts of rows.
  template <class Pass>
  void run_few_channels(Pass& pass, bool applies) const {
    const int64_t parts_of_row = (row_size_ + kChunkElements - 1) / kChunkElements;
    const int64_t num_parts = shape_.batch * parts_of_row;  // of a channel
    const auto for_each_tile = [&](int64_t range, const auto& visit) {
      const int64_t c = range / num_parts, part = range % num_parts;
      const int64_t first = part % parts_of_row * kChunkElements;
      for_each_row_tile(part / parts_of_row, c, c + 1, first,
                        std::min(first + kChunkElements, row_size_), kAhead, visit);
    };
    LineVector<double> partials(2 * shape_.channels * num_parts);
    pass.begin_rows(0, shape_.channels);
    parallel_for(shape_.channels * num_parts, false, is_serial_, [&](int64_t range) {
      for_each_tile(range, [&](const Tile& tile) {
        pass.sum_rows(tile, &partials[2 * range], &partials[2 * range + 1]);
      });
    });
    for (int64_t c = 0; c < shape_.channels; ++c) {
      double totals[2] = {0, 0};
      for (int64_t range = c * num_parts; range < (c + 1) * num_parts; ++range) {
        totals[0] += partials[2 * range];
        totals[1] += partials[2 * range + 1];
      }
      pass.finish(c, c + 1, &totals[0], &totals[1]);
    }
    if (!applies) return;
    parallel_for(shape_.channels * num_parts, true, is_serial_, [&](int64_t range) {
      for_each_tile(range, [&](const Tile& tile) { pass.apply_to_rows(tile); });
      finish_streams();
    });
  }

  // Without sums there is one pass, in the order of memory.
  template <class Pass>
  void run_images(Pass& pass, bool applies) const {
    const LineVector<double> no_sums(2 * shape_.channels);
    pass.finish(0, shape_.channels, no_sums.data(), no_sums.data());
    if (!applies) return;
    const int64_t parts_of_row = (row_size_ + kChunkElements - 1) / kChunkElements;
    const int64_t range_size = std::max<int64_t>(1, kChunkElements / row_size_);
    const int64_t ranges_of_image = (shape_.channels + range_size - 1) / range_size;
    const int64_t num_ranges = shape_.batch * ranges_of_image * parts_of_row;
    parallel_for(count() > 0 ? num_ranges : 0, false, is_serial_, [&](int64_t range) {
      const int64_t begin = range / parts_of_row % ranges_of_image * range_size;
      const int64_t first = range % parts_of_row * kChunkElements;
      for_each_row_tile(range / parts_of_row / ranges_of_image, begin,
                        std::min(begin + range_size, shape_.channels), first,
                        std::min(first + kChunkElements, row_size_), kAhead,
                        [&](const Tile& tile) { pass.apply_to_rows(tile); });
      finish_streams();
    });
  }

  template <class T, class Pass>
  void run_columns(Pass& pass, bool reduces, bool applies) const {
    // A chunk leaves 16 bytes for each channel, which is little beside 32 rows of it, and takes as
    // long to sum up as a few thousand elements.
    const int64_t chunk_elements =
        std::clamp(count() * row_size_ / 32, kChunkElements, 8 * kChunkElements);
    const int64_t at_least =
        is_serial_ ? count() : std::max<int64_t>(32, chunk_elements / row_size_);
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t even_rows = count() > 0 ? ceil_div(count(), ceil_div(count(), at_least)) : 1;
    const int64_t chunk_rows = ceil_div(even_rows, tile_rows_) * tile_rows_;
    const int64_t num_chunks = ceil_div(count(), chunk_rows);
    const auto for_each_tile = [&](int64_t chunk, const auto& visit) {
      const int64_t last = std::min((chunk + 1) * chunk_rows, count());
      // Down a panel of columns: numbers of 1024 channels stay in L1, those of all need not.
      const int64_t panel = is_cached(shape_) ? kBlockSize : row_size_;
      for (int64_t left = 0; left < row_size_; left += panel) {
        for (int64_t row = chunk * chunk_rows, num_rows; row < last; row += num_rows) {
          num_rows = std::min(tile_rows_, last - row);
          if (num_rows > rows_of_period_) num_rows -= num_rows % rows_of_period_;
          for (int64_t column = left; column < std::min(left + panel, row_size_);
               column += kBlockSize) {
            const int64_t size = std::min(kBlockSize, row_size_ - column);
            visit(Tile{row * row_size_ + column, size, num_rows, row, column, 0, kAhead});
          }
        }
      }
    };
    const int64_t channels = shape_.channels;
    LineVector<double> partials(2 * channels * (reduces ? std::max<int64_t>(1, num_chunks) : 1));
    double* const totals = partials.data();  // what the first chunk leaves
    if (reduces) {
      pass.begin_columns(0, channels);
      parallel_for(num_chunks, false, is_serial_, [&](int64_t chunk) {
        LineVector<T> sums(2 * period());
        T *const first = sums.data(), *const second = first + period();
        for_each_tile(chunk, [&](const Tile& tile) {
          pass.sum_columns(tile, &first[tile.column], &second[tile.column]);
        });
        double* const partial = &partials[2 * channels * chunk];
        for (int64_t i = 0; i < period(); i += channels) {
          for (int64_t c = 0; c < channels; ++c) {
            partial[c] += first[i + c];
            partial[channels + c] += second[i + c];
          }
        }
      });
      for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
        const double* const partial = &partials[2 * channels * chunk];
        for (int64_t i = 0; i < 2 * channels; ++i) totals[i] += partial[i];
      }
    }
    pass.finish(0, channels, totals, totals + channels);
    if (!applies) return;
    pass.repeat();
    parallel_for(num_chunks, true, is_serial_, [&](int64_t chunk) {
      LineVector<int32_t> dead(pass.dead() ? period() : 0);
      for_each_tile(chunk, [&](const Tile& tile) { pass.apply_to_columns(tile, dead.data()); });
      finish_streams();
      for (size_t i = 0; i < dead.size(); ++i) {
        __atomic_fetch_add(pass.dead() + i % channels, dead[i], __ATOMIC_RELAXED);
      }
    });
  }

  const BatchNormShape shape_;
  const int64_t row_size_, rows_of_period_, tile_rows_;
  const bool is_serial_;
};

}  // namespace fastremedy::cpu
