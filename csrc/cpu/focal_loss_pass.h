// What the two forms share: values of classes, sums, and tensors of any dtype block by block.
#pragma once

#include <vector>

#include "focal_loss_loops.h"
#include "parallel.h"
#include "tensor_block.h"

namespace fastremedy::cpu {

// A piece of work for a thread: about 50 us.
inline constexpr int64_t kRangeSize = 65536;

double load_scalar(const void* address, DType dtype);
void store_scalar(void* address, DType dtype, double value);

// Asks for what is read next, up to a page: the hardware does not look beyond the one it is in.
template <class T>
void fetch(const T* values, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T), kPage = 4096 / sizeof(T);
  for (int64_t i = 0; i < (n < kPage ? n : kPage); i += kLine) __builtin_prefetch(values + i);
}

inline double value_of(const ChannelValues& values, int64_t c, double otherwise) {
  if (values.data == nullptr) return otherwise;
  return load_scalar(element_at(values.data, values.dtype, c), values.dtype);
}

// alpha of every class where there are such.
inline double alpha_of(const FocalLossArgs& args, int64_t c) {
  return value_of(args.alphas, c, args.alpha);
}

// What all gradients are multiplied by; kNone has one factor for each loss instead.
inline double scale_of(const FocalLossArgs& args) {
  if (args.reduction == Reduction::kNone) return 1;
  const double grad_output =
      args.grad_output ? load_scalar(args.grad_output, args.grad_output_dtype) : 1;
  return args.reduction == Reduction::kMean ? grad_output / *args.normalizer : grad_output;
}

// Sums of a range: ranges are the same for any number of threads, and are added in order.
struct FocalSums {
  double loss = 0;
  int64_t num_ignored = 0;
};
FocalSums add_up(const std::vector<FocalSums>& sums);

inline void add_to(int64_t* counter, int64_t value) {
  __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

// Counts one row of a label, or one element of a positive target.
template <class T>
void count(const FocalLossArgs& args, int64_t c, T p_t) {
  add_to(args.stats + c, 1);
  add_to(args.stats + args.shape.classes + c, in_probability_units(p_t));
}

// use(constant) with gamma's kind as a template argument.
template <class Use>
auto with_gamma_kind(double gamma, const Use& use) {
  switch (gamma_kind(gamma)) {
    case GammaKind::kZero:
      return use(std::integral_constant<GammaKind, GammaKind::kZero>());
    case GammaKind::kOne:
      return use(std::integral_constant<GammaKind, GammaKind::kOne>());
    case GammaKind::kTwo:
      return use(std::integral_constant<GammaKind, GammaKind::kTwo>());
    case GammaKind::kAny:
      break;
  }
  return use(std::integral_constant<GammaKind, GammaKind::kAny>());
}

// The whole of either direction: what is null is not read or written. `num_ignored` labels are.
FocalSums sigmoid_focal_loss(const FocalLossArgs& args, int64_t num_ignored);
FocalSums softmax_focal_loss(const FocalLossArgs& args);

}  // namespace fastremedy::cpu
