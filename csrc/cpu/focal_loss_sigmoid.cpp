// Sigmoid focal loss: every element is a problem of its own.
//
// Labels become a block of targets 0 and 1 in L1, so that both kinds of targets go through the same
// loops.
#include <algorithm>

#include "focal_loss_pass.h"

namespace fastremedy::cpu {
namespace {

// Weights of the classes, or of all of them at once.
template <class T>
struct ClassWeights {
  std::vector<T> positive, negative, pos_weight;

  explicit ClassWeights(const FocalLossArgs& args) {
    const bool has_classes = args.alphas.data || args.weight.data || args.pos_weight.data;
    for (int64_t c = 0; c < (has_classes ? args.shape.classes : 1); ++c) {
      const FocalWeights<T> weights = focal_weights<T>(
          alpha_of(args, c), value_of(args.weight, c, 1), value_of(args.pos_weight, c, 1));
      positive.push_back(weights.positive);
      negative.push_back(weights.negative);
      pos_weight.push_back(weights.pos_weight);
    }
  }
  bool is_uniform() const { return positive.size() == 1; }
};

// The pass over one range, block by block.
template <class T>
class SigmoidPass {
 public:
  SigmoidPass(const FocalLossArgs& args, const ClassWeights<T>& weights, bool has_ignored_labels)
      : args_(args),
        shape_(args.shape),
        weights_(weights),
        has_ignored_labels_(has_ignored_labels),
        is_ignored_soft_(!is_hard(static_cast<T>(args.ignore_index))),
        is_elementwise_(args.reduction == Reduction::kNone),
        gamma_(args.gamma),
        scale_(args.grad_input ? static_cast<T>(scale_of(args)) : T(1)),
        input_(args.input, shape_.dtype),
        probabilities_(args.probabilities, args.probabilities_dtype),
        loss_(is_elementwise_ ? args.loss : nullptr, args.loss_dtype, streams()),
        grad_output_(is_elementwise_ ? args.grad_output : nullptr, args.grad_output_dtype),
        grad_input_(args.grad_input, shape_.dtype, streams()) {}

  void run(int64_t begin, int64_t end, FocalSums* sums) {
    const auto size_at = [&](int64_t i) { return std::min(kBlockSize, end - i); };
    if (args_.labels) mark_labels(begin, size_at(begin));
    for (; begin < end; begin += kBlockSize) {
      run_block(begin, size_at(begin), sums);
      // Ahead of the streams: marks that were stored behind them would be waited for as long.
      const int64_t next = begin + kBlockSize;
      if (args_.labels && next < end) mark_labels(next, size_at(next));
      if (!loss_.is_null()) loss_.store(size_at(begin));
      if (!grad_input_.is_null()) grad_input_.store(size_at(begin));
    }
    finish_streams();
  }

 private:
  bool streams() const { return shape_.bytes() >= kStreamedBytes; }

  void run_block(int64_t begin, int64_t n, FocalSums* sums) {
    const T* const x = input_.load(begin, n);
    T* const losses = loss_.is_null() ? losses_ : loss_.place(begin);
    T* const grads = grad_input_.is_null() ? grads_ : grad_input_.place(begin);
    const T* const targets = args_.labels ? targets_ : probabilities_.load(begin, n);
    if (args_.stats) count_positives(x, targets, begin, n);
    if (args_.probabilities) fetch(targets + n, n);
    exp_of_logits(x, n, exponentials_);
    fetch(x + n, n);
    const bool are_targets_hard = args_.labels || are_hard(targets, n);
    compute(x, targets, are_targets_hard, begin, n, losses, grads);
    if (has_ignored_labels_) clear_ignored_labels(begin, n, losses, grads);
    if (args_.probabilities && !(are_targets_hard && is_ignored_soft_)) {
      sums->num_ignored += clear_ignored(targets, n, losses, grads);
    }
    if (args_.loss && loss_.is_null()) sums->loss += sum_block(losses, n);
    if (!grad_output_.is_null()) multiply(grads, grad_output_.load(begin, n), n);
  }

  bool is_class(int64_t label) const {
    return 0 <= label && label < shape_.classes && label != args_.ignore_index &&
           label != args_.background;
  }

  // visit(offset in the block, size, class, first label) for the parts of one class, inner > 1.
  template <class Visit>
  void for_parts(int64_t begin, int64_t n, const Visit& visit) const {
    for (int64_t offset = 0, size; offset < n; offset += size) {
      const int64_t plane = (begin + offset) / shape_.inner, s = (begin + offset) % shape_.inner;
      size = std::min(shape_.inner - s, n - offset);
      visit(offset, size, plane % shape_.classes, plane / shape_.classes * shape_.inner + s);
    }
  }

  // visit(offset in the block, size, label) for the parts of one row, inner == 1.
  template <class Visit>
  void for_rows(int64_t begin, int64_t n, const Visit& visit) const {
    const int64_t end = begin + n;
    for (int64_t row = begin / shape_.classes; row * shape_.classes < end; ++row) {
      const int64_t first = std::max(begin, row * shape_.classes);
      visit(first - begin, std::min(end, (row + 1) * shape_.classes) - first, args_.labels[row]);
    }
  }

  void mark_labels(int64_t begin, int64_t n) {
    if (shape_.inner > 1) {
      for_parts(begin, n, [&](int64_t offset, int64_t size, int64_t c, int64_t first) {
        const bool is_positive = is_class(c);
        const int64_t* const labels = args_.labels + first;
        for (int64_t i = 0; i < size; ++i) targets_[offset + i] = is_positive & (labels[i] == c);
      });
      return;
    }
    std::fill_n(targets_, n, T(0));
    int64_t first_class = begin % shape_.classes;
    for_rows(begin, n, [&](int64_t offset, int64_t size, int64_t label) {
      const int64_t i = label - first_class;
      if (is_class(label) && 0 <= i && i < size) targets_[offset + i] = T(1);
      first_class = 0;
    });
  }

  void count_positives(const T* x, const T* targets, int64_t begin, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (!(targets[i] > T(0.5)) || targets[i] == static_cast<T>(args_.ignore_index)) continue;
      count(args_, (begin + i) / shape_.inner % shape_.classes,
            probability_of_target(x[i], targets[i]));
    }
  }

  void compute(const T* x, const T* targets, bool are_targets_hard, int64_t begin, int64_t n,
               T* losses, T* grads) {
    const T smoothing = static_cast<T>(args_.label_smoothing);
    const bool is_soft = args_.label_smoothing != 0 || !are_targets_hard;
    const auto compute_with = [&](auto weights) {
      with_gamma_kind(args_.gamma, [&](auto kind) {
        constexpr GammaKind kKind = decltype(kind)::value;
        if (is_soft) {
          focal_of_soft_targets<kKind>(x, exponentials_, targets, n, smoothing, weights, gamma_,
                                       scale_, losses, grads);
        } else {
          focal_of_hard_targets<kKind>(x, exponentials_, targets, n, weights, gamma_, scale_,
                                       losses, grads);
        }
      });
    };
    if (weights_.is_uniform()) {
      compute_with(
          UniformWeights<T>{{weights_.positive[0], weights_.negative[0], weights_.pos_weight[0]}});
    } else {
      fill(weights_.positive, begin, n, positive_);
      fill(weights_.negative, begin, n, negative_);
      fill(weights_.pos_weight, begin, n, pos_weight_);
      compute_with(ElementWeights<T>{positive_, negative_, pos_weight_});
    }
  }

  void fill(const std::vector<T>& of_class, int64_t begin, int64_t n, T* values) const {
    if (shape_.inner > 1) {
      for_parts(begin, n, [&](int64_t offset, int64_t size, int64_t c, int64_t) {
        std::fill_n(values + offset, size, of_class[c]);
      });
      return;
    }
    int64_t c = begin % shape_.classes;
    for (int64_t offset = 0, size; offset < n; offset += size, c = 0) {
      size = std::min(shape_.classes - c, n - offset);
      std::copy_n(of_class.data() + c, size, values + offset);
    }
  }

  // Elements that are ignored have no loss and no gradient, whatever the input is.
  void clear_ignored_labels(int64_t begin, int64_t n, T* losses, T* grads) const {
    const auto clear = [&](int64_t offset, int64_t size) {
      std::fill_n(losses + offset, size, T(0));
      std::fill_n(grads + offset, size, T(0));
    };
    if (shape_.inner > 1) {
      for_parts(begin, n, [&](int64_t offset, int64_t size, int64_t, int64_t first) {
        for (int64_t i = 0; i < size; ++i) {
          if (args_.labels[first + i] == args_.ignore_index) clear(offset + i, 1);
        }
      });
    } else {
      for_rows(begin, n, [&](int64_t offset, int64_t size, int64_t label) {
        if (label == args_.ignore_index) clear(offset, size);
      });
    }
  }

  int64_t clear_ignored(const T* targets, int64_t n, T* losses, T* grads) const {
    const T ignored = static_cast<T>(args_.ignore_index);
    const int64_t num_ignored = count_equal(targets, n, ignored);
    for (int64_t i = 0; i < (num_ignored ? n : 0); ++i) {
      if (targets[i] == ignored) losses[i] = grads[i] = T(0);
    }
    return num_ignored;
  }

  const FocalLossArgs& args_;
  const FocalLossShape& shape_;
  const ClassWeights<T>& weights_;
  const bool has_ignored_labels_;
  const bool is_ignored_soft_;
  const bool is_elementwise_;
  const Gamma<T> gamma_;
  const T scale_;
  TensorBlock<T> input_, probabilities_, loss_, grad_output_, grad_input_;
  alignas(64) T targets_[kBlockSize];
  alignas(64) T exponentials_[kBlockSize];
  alignas(64) T losses_[kBlockSize];
  alignas(64) T grads_[kBlockSize];
  alignas(64) T positive_[kBlockSize];
  alignas(64) T negative_[kBlockSize];
  alignas(64) T pos_weight_[kBlockSize];
};

template <class T>
FocalSums run(const FocalLossArgs& args, int64_t num_ignored) {
  const ClassWeights<T> weights(args);
  const int64_t numel = args.shape.numel(), num_ranges = (numel + kRangeSize - 1) / kRangeSize;
  std::vector<FocalSums> sums(num_ranges);
  parallel_for(num_ranges, false, num_ranges == 1, [&](int64_t range) {
    const int64_t begin = range * kRangeSize;
    SigmoidPass<T>(args, weights, num_ignored > 0)
        .run(begin, std::min(begin + kRangeSize, numel), &sums[range]);
  });
  return add_up(sums);
}

}  // namespace

FocalSums sigmoid_focal_loss(const FocalLossArgs& args, int64_t num_ignored) {
  return args.shape.dtype == DType::kFloat64 ? run<double>(args, num_ignored)
                                             : run<float>(args, num_ignored);
}

}  // namespace fastremedy::cpu
