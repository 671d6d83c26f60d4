// What the passes over the elements share, forward and backward.
#pragma once

#include <algorithm>
#include <type_traits>

#include "batch_norm_relu_channels.h"
#include "batch_norm_relu_layout.h"
#include "batch_norm_relu_loops.h"
#include "blocks.h"
#include "simd.h"
#include "stream.h"

namespace fastremedy::cpu {

// A tensor of any dtype to read, tile by tile as T.
template <class T>
class Input {
 public:
  Input(const void* data, DType dtype) : data_(const_cast<void*>(data)), dtype_(dtype) {}
  const T* load(const Tile& tile) { return block_.load(data_, dtype_, tile.begin, tile.size()); }

 private:
  void* const data_;
  const DType dtype_;
  Block<T> block_;
};

// One tile of a tensor of any dtype to write: place, then store.
template <class T>
class Output {
 public:
  Output(void* data, DType dtype, bool streams)
      : data_(data), dtype_(dtype), streams_(streams && element_size(dtype) == sizeof(T)) {}

  T* place(const Tile& tile) {
    memory_ = block_.place(data_, dtype_, tile.begin);
    return streams_ ? copy_ : memory_;
  }
  void store(const Tile& tile) {
    if (streams_) {
      stream_bytes(reinterpret_cast<char*>(memory_), reinterpret_cast<const char*>(copy_),
                   tile.size() * sizeof(T));
    } else {
      block_.store(tile.size());
    }
  }

 private:
  void* const data_;
  const DType dtype_;
  const bool streams_;
  T* memory_ = nullptr;
  Block<T> block_;
  alignas(64) T copy_[kBlockSize];
};

// What both directions share.
template <class T>
class Pass {
 protected:
  template <class Args>
  explicit Pass(const Args& args)
      : layout_(args.shape),
        saved_(args.saved),
        weight_(args.weight),
        bias_(args.bias),
        options_{zero_threshold<T>(args.shape.dtype), static_cast<T>(args.negative_slope)},
        mean_(layout_.period()),
        scale_(layout_.period()),
        shift_(layout_.period()) {}

  Input<T> reader(const void* data) const { return {data, layout_.dtype()}; }
  Output<T> writer(void* data) const { return {data, layout_.dtype(), layout_.streams()}; }

  void prefetch(const void* data, int64_t begin, int64_t n) const {
    constexpr int64_t kLineBytes = 64;
    const int element_bytes = element_size(layout_.dtype());
    const char* first = static_cast<const char*>(data) + begin * element_bytes;
    for (int64_t i = 0; i < n * element_bytes; i += kLineBytes) __builtin_prefetch(first + i);
  }

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
  const void* const saved_;
  const ChannelValues weight_, bias_;
  const ActivationOptions<T> options_;
  LineVector<T> mean_, scale_, shift_;
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
