// What the passes over the elements share, forward and backward.
#pragma once

#include <algorithm>
#include <type_traits>

#include "batch_norm_relu_channels.h"
#include "batch_norm_relu_layout.h"
#include "batch_norm_relu_loops.h"
#include "simd.h"
#include "tensor_block.h"

namespace fastremedy::cpu {

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

  TensorBlock<T> reader(const void* data) const { return {data, layout_.dtype()}; }
  TensorBlock<T> writer(void* data) const { return {data, layout_.dtype(), layout_.streams()}; }

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
