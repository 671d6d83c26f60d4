// What the passes over the elements share, forward and backward.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "batch_norm_relu_channels.h"
#include "batch_norm_relu_layout.h"
#include "batch_norm_relu_loops.h"
#include "simd.h"
#include "tensor_block.h"

namespace fastremedy::cpu {

// A tile at a time, while the one that is read later is on its way.
template <class T>
class TileReader {
 public:
  TileReader(const void* data, DType dtype) : data_(data), dtype_(dtype), block_(data, dtype) {}

  Source<T> load(const Tile& tile) {
    const T* const values = block_.load(tile.begin, tile.size());
    if (element_size(dtype_) == sizeof(T)) return {values, values + tile.ahead};
    // Beside a converted copy lies nothing to ask for. For the next elements in memory the
    // conversion did.
    const auto* const later = static_cast<const uint16_t*>(data_) + tile.begin + tile.ahead;
    const int64_t n = std::abs(tile.ahead) > kBlockSize ? tile.size() : 0;
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(later + i);
    return {values, values};
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(uint16_t);

  const void* const data_;
  const DType dtype_;
  TensorBlock<T> block_;
};

// What both directions share.
template <class T>
class Pass {
 protected:
  // The call has so many tensors of elements, and rows of numbers of the channels: three for z,
  // those after them for the direction.
  template <class Args>
  Pass(const Args& args, int64_t num_tensors, int64_t num_rows)
      : layout_(args.shape),
        streams_(layout_.streams(num_tensors)),
        saved_(args.saved),
        weight_(args.weight),
        bias_(args.bias),
        options_{zero_threshold<T>(args.shape.dtype), static_cast<T>(args.negative_slope)},
        stride_((layout_.period() + kNumLanes<T> - 1) / kNumLanes<T> * kNumLanes<T>),
        rows_(num_rows * stride_),
        mean_(row(0)),
        scale_(row(1)),
        shift_(row(2)) {}

  T* row(int64_t i) { return rows_.data() + i * stride_; }

  TileReader<T> reader(const void* data) const { return {data, layout_.dtype()}; }
  TensorBlock<T> writer(void* data) const { return {data, layout_.dtype(), streams_}; }

  StatisticsRows<T> statistics(int64_t begin) const { return {saved_, layout_.channels(), begin}; }

  // visit(begin, n) for the channels [begin, end).
  template <class Visit>
  static void for_each_run(int64_t begin, int64_t end, const Visit& visit) {
    for (; begin < end; begin += kChannelRun) visit(begin, std::min(kChannelRun, end - begin));
  }

  void set_normalizers(int64_t begin, int64_t n) {
    T weight[kChannelRun], bias[kChannelRun];
    load_channels<T>(weight_, begin, n, 1, weight);
    load_channels<T>(bias_, begin, n, 0, bias);
    find_normalizers(statistics(begin), weight, bias, n, &mean_[begin], &scale_[begin],
                     &shift_[begin]);
  }

  void repeat_normalizers() {
    layout_.repeat(mean_);
    layout_.repeat(scale_);
    layout_.repeat(shift_);
  }

  Normalizers<T> normalizers(int64_t c) const { return {&mean_[c], &scale_[c], &shift_[c]}; }

  const Layout layout_;
  const bool streams_;  // results go past the cache
  const void* const saved_;
  const ChannelValues weight_, bias_;
  const ActivationOptions<T> options_;
  const int64_t stride_;
  LineVector<T> rows_;  // one piece of memory: each takes as long as a hundred channels
  T *const mean_, *const scale_, *const shift_;
};

// Runs Direction<activation, T>(args).
template <template <Activation, class> class Direction, class Args>
void run_pass(const Args& args) {
  const auto run_with = [&](auto activation) {
    if (args.shape.dtype == DType::kFloat64) {
      Direction<activation.value, double>(args).run();
    } else {
      Direction<activation.value, float>(args).run();
    }
  };
  switch (args.activation) {
    case Activation::kIdentity:
      return run_with(std::integral_constant<Activation, Activation::kIdentity>());
    case Activation::kReLU:
      return run_with(std::integral_constant<Activation, Activation::kReLU>());
    case Activation::kLeakyReLU:
      return run_with(std::integral_constant<Activation, Activation::kLeakyReLU>());
    case Activation::kELU:
      return run_with(std::integral_constant<Activation, Activation::kELU>());
    case Activation::kSiLU:
      return run_with(std::integral_constant<Activation, Activation::kSiLU>());
  }
}

}  // namespace fastremedy::cpu
