// Focal loss: the launches.
#include "focal_loss_sigmoid.cuh"
#include "focal_loss_softmax.cuh"

namespace fastremedy::cuda {
namespace {

// Rows of more classes get a block.
constexpr int64_t kMostClassesOfWarp = 1024;

template <class Use>
int with_gamma_kind(double gamma, Use use) {
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

template <class... Args>
int launch(void (*kernel)(Args...), int64_t num_blocks, void* stream, const Args&... args) {
  FASTREMEDY_LAUNCH(kernel, static_cast<unsigned>(num_blocks), kFocalBlockSize,
                    static_cast<cudaStream_t>(stream), args...);
  return status_of(cudaGetLastError());
}

int64_t blocks_for(int64_t num_items, int64_t items_per_block) {
  const int64_t num_blocks = ceil_div(num_items, items_per_block);
  return num_blocks < kMostFocalBlocks ? num_blocks : kMostFocalBlocks;
}

template <class... Pointers>
bool are_aligned(Pointers... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % kAccessBytes == 0));
}

template <class T>
int64_t num_sigmoid_blocks(const FocalLossShape& shape) {
  return blocks_for(shape.numel(), kFocalBlockSize * kVecSize<T>);
}

template <class T>
SigmoidPlan<T> sigmoid_plan(const FocalLossArgs& args) {
  SigmoidPlan<T> plan;
  plan.gamma = Gamma<T>(args.gamma);
  plan.weights = focal_weights<T>(args.alpha, 1, 1);
  plan.smoothing = static_cast<T>(args.label_smoothing);
  plan.ignored = static_cast<T>(args.ignore_index);
  plan.inner = Divisor(args.shape.inner);
  plan.classes = Divisor(args.shape.classes);
  plan.has_class_values = args.alphas.data || args.weight.data || args.pos_weight.data;
  plan.is_aligned = are_aligned(args.input, args.probabilities, args.grad_input);
  if (args.reduction == Reduction::kNone) {
    plan.is_aligned &= are_aligned(args.loss, args.grad_output);
  }
  return plan;
}

template <class T>
SoftmaxPlan<T> softmax_plan(const FocalLossArgs& args) {
  const FocalLossShape& shape = args.shape;
  SoftmaxPlan<T> plan;
  plan.gamma = Gamma<T>(args.gamma);
  plan.alpha = static_cast<T>(args.alpha);
  plan.smoothing = static_cast<T>(args.label_smoothing);
  plan.share = static_cast<T>(1 / static_cast<double>(shape.classes));
  plan.inner = Divisor(shape.inner);
  plan.has_vectors = shape.inner == 1 && shape.classes % kVecSize<T> == 0 &&
                     are_aligned(args.input, args.probabilities, args.grad_input);
  plan.threads_per_row = 1;
  if (shape.inner > 1) return plan;
  // Without vectors neighbouring threads read neighbours: 4 classes of each keep most of them busy.
  const int64_t num_packs = ceil_div(shape.classes, plan.has_vectors ? kVecSize<T> : 4);
  while (plan.threads_per_row < kWarpSize && plan.threads_per_row < num_packs) {
    plan.threads_per_row *= 2;
  }
  if (shape.classes > kMostClassesOfWarp) plan.threads_per_row = kFocalBlockSize;
  return plan;
}

template <class T>
int64_t num_softmax_blocks(const FocalLossShape& shape, const SoftmaxPlan<T>& plan) {
  return blocks_for(shape.num_rows(), kFocalBlockSize / plan.threads_per_row);
}

bool is_soft(const FocalLossArgs& args) {
  return args.labels == nullptr || args.label_smoothing != 0;
}

template <class T>
int launch_sigmoid_forward(const FocalLossArgs& args, const FocalLossScratch& scratch,
                           void* stream) {
  const SigmoidPlan<T> plan = sigmoid_plan<T>(args);
  const int64_t num_blocks = num_sigmoid_blocks<T>(args.shape);
  return with_gamma_kind(args.gamma, [&](auto kind) {
    constexpr GammaKind kKind = decltype(kind)::value;
    const auto kernel = args.labels ? sigmoid_forward_kernel<kKind, true, T>
                                    : sigmoid_forward_kernel<kKind, false, T>;
    return launch(kernel, num_blocks, stream, args, plan, scratch);
  });
}

template <class T>
int launch_sigmoid_backward(const FocalLossArgs& args, void* stream) {
  const SigmoidPlan<T> plan = sigmoid_plan<T>(args);
  const int64_t num_blocks = num_sigmoid_blocks<T>(args.shape);
  return with_gamma_kind(args.gamma, [&](auto kind) {
    constexpr GammaKind kKind = decltype(kind)::value;
    const auto kernel = args.labels ? sigmoid_backward_kernel<kKind, true, T>
                                    : sigmoid_backward_kernel<kKind, false, T>;
    return launch(kernel, num_blocks, stream, args, plan);
  });
}

template <class T>
int launch_softmax_forward(const FocalLossArgs& args, const FocalLossScratch& scratch,
                           void* stream) {
  const SoftmaxPlan<T> plan = softmax_plan<T>(args);
  const int64_t num_blocks = num_softmax_blocks(args.shape, plan);
  const bool is_block = plan.threads_per_row > kWarpSize;
  if (!is_soft(args)) {
    const auto kernel = is_block ? softmax_forward_kernel<GammaKind::kAny, false, true, T>
                                 : softmax_forward_kernel<GammaKind::kAny, false, false, T>;
    return launch(kernel, num_blocks, stream, args, plan, scratch);
  }
  return with_gamma_kind(args.gamma, [&](auto kind) {
    constexpr GammaKind kKind = decltype(kind)::value;
    const auto kernel = is_block ? softmax_forward_kernel<kKind, true, true, T>
                                 : softmax_forward_kernel<kKind, true, false, T>;
    return launch(kernel, num_blocks, stream, args, plan, scratch);
  });
}

template <class T>
int launch_softmax_backward(const FocalLossArgs& args, void* stream) {
  const SoftmaxPlan<T> plan = softmax_plan<T>(args);
  const int64_t num_blocks = num_softmax_blocks(args.shape, plan);
  if (!is_soft(args)) {
    return launch(softmax_backward_kernel<GammaKind::kAny, false, T>, num_blocks, stream, args,
                  plan);
  }
  return with_gamma_kind(args.gamma, [&](auto kind) {
    constexpr GammaKind kKind = decltype(kind)::value;
    return launch(softmax_backward_kernel<kKind, true, T>, num_blocks, stream, args, plan);
  });
}

}  // namespace

int64_t focal_loss_num_partials(const FocalLossShape& shape, FocalForm form) {
  if (form == FocalForm::kSoftmax) return 2 * blocks_for(shape.num_rows(), 1);
  return 2 * (shape.dtype == DType::kFloat64 ? num_sigmoid_blocks<double>(shape)
                                             : num_sigmoid_blocks<float>(shape));
}

int launch_focal_loss_forward(const FocalLossArgs& args, const FocalLossScratch& scratch,
                              void* stream) {
  const bool is_double = args.shape.dtype == DType::kFloat64;
  if (args.form == FocalForm::kSigmoid) {
    return is_double ? launch_sigmoid_forward<double>(args, scratch, stream)
                     : launch_sigmoid_forward<float>(args, scratch, stream);
  }
  return is_double ? launch_softmax_forward<double>(args, scratch, stream)
                   : launch_softmax_forward<float>(args, scratch, stream);
}

int launch_focal_loss_backward(const FocalLossArgs& args, void* stream) {
  const bool is_double = args.shape.dtype == DType::kFloat64;
  if (args.form == FocalForm::kSigmoid) {
    return is_double ? launch_sigmoid_backward<double>(args, stream)
                     : launch_sigmoid_backward<float>(args, stream);
  }
  return is_double ? launch_softmax_backward<double>(args, stream)
                   : launch_softmax_backward<float>(args, stream);
}

}  // namespace fastremedy::cuda
