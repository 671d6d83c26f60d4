// Softmax focal loss: a row at a time, from one read of its logits to loss and gradient.
#include "focal_loss_softmax.h"

#include <algorithm>
#include <cmath>

namespace fastremedy::cpu {
namespace {

// Neighbours along the inner dimension that are turned into rows together: a cache line of each
// class.
constexpr int64_t kGatheredRows = 16;

template <class T>
FASTREMEDY_CLONES T largest(const T* __restrict x, int64_t n) {
  T result = -static_cast<T>(HUGE_VAL);
  int64_t i = 0;
  if (n >= kNumLanes<T>) {
    Lanes<T> lanes = Lanes<T>::load(x);
    for (i = kNumLanes<T>; i + kNumLanes<T> <= n; i += kNumLanes<T>) {
      lanes.raise_to(Lanes<T>::load(x + i));
    }
    T values[kNumLanes<T>];
    std::memcpy(values, &lanes, sizeof(values));
    for (const T value : values) result = result > value ? result : value;
  }
  for (; i < n; ++i) result = result > x[i] ? result : x[i];
  return result;
}

template <class T>
FASTREMEDY_CLONES void exponentials(const T* __restrict x, int64_t n, T max, T* __restrict e) {
  for (int64_t i = 0; i < n; ++i) e[i] = exp_of_difference(x[i], max);
}

template <class T>
FASTREMEDY_CLONES void scaled(const T* __restrict e, int64_t n, T factor, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = e[i] * factor;
}

// What class c adds to the loss, and what multiplies [j = c] in the gradient. Near p = 1 the power
// has no digits: the largest class is left to its own.
template <GammaKind kKind, class T>
FASTREMEDY_CLONES void soft_terms(const T* __restrict x, const T* __restrict e,
                                  const T* __restrict shares, int64_t n, SoftmaxState<T> state,
                                  T log1p_rest, Gamma<T> gamma, T* __restrict losses,
                                  T* __restrict slopes) {
  const T inv_total = T(1) / (T(1) + state.rest);
  for (int64_t i = 0; i < n; ++i) {
    const T p = e[i] * inv_total;
    const ClassTerms<T> terms{p, T(1) - p, (state.max - x[i]) + log1p_rest};
    const auto of_class = focal_of_class(terms, power_of_class<kKind>(terms, gamma), gamma.value);
    losses[i] = shares[i] == T(0) ? T(0) : shares[i] * of_class.loss;
    slopes[i] = shares[i] == T(0) ? T(0) : shares[i] * of_class.slope;
  }
}

template <class T>
FASTREMEDY_CLONES void soft_grads(const T* __restrict e, const T* __restrict slopes, int64_t n,
                                  T inv_total, T sum, T scale, T* __restrict grads) {
  for (int64_t i = 0; i < n; ++i) {
    const T p = e[i] * inv_total;
    grads[i] = scale * (p * (sum - slopes[i]) - (T(1) - p) * slopes[i]);
  }
}

// In double beyond a block: rows may have 100 000 classes.
template <class T>
double sum_row(const T* values, int64_t n) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlockSize) {
    sum += sum_block(values + begin, std::min(kBlockSize, n - begin));
  }
  return sum;
}

// A few rows of a tensor [outer, classes, inner] of any dtype as T[rows, classes].
template <class T>
class Rows {
 public:
  Rows(const void* data, DType dtype, const FocalLossShape& shape, int64_t max_rows)
      : data_(const_cast<void*>(data)),
        dtype_(dtype),
        shape_(shape),
        streams_(shape.bytes() >= kStreamedBytes),
        copy_(data ? max_rows * shape.classes : 0) {}

  // Memory as it lies where it can be: it must not be written.
  const T* load(int64_t first, int64_t count) {
    if (shape_.inner == 1) {
      void* const rows = element_at(data_, dtype_, first * shape_.classes);
      if (element_size(dtype_) == sizeof(T)) return static_cast<const T*>(rows);
      convert(rows, dtype_, copy_.data(), count * shape_.classes);
    } else {
      T line[kGatheredRows];
      for (int64_t c = 0; c < shape_.classes; ++c) {
        convert(line_of(first, c), dtype_, line, count);
        for (int64_t r = 0; r < count; ++r) copy_[r * shape_.classes + c] = line[r];
      }
    }
    return copy_.data();
  }

  T* place() { return copy_.data(); }

  void store(int64_t first, int64_t count) {
    if (shape_.inner == 1) {
      convert_back(copy_.data(), element_at(data_, dtype_, first * shape_.classes), dtype_,
                   count * shape_.classes, streams_);
      return;
    }
    T line[kGatheredRows];
    for (int64_t c = 0; c < shape_.classes; ++c) {
      for (int64_t r = 0; r < count; ++r) line[r] = copy_[r * shape_.classes + c];
      convert_back(line, line_of(first, c), dtype_, count, false);
    }
  }

 private:
  void* line_of(int64_t row, int64_t c) {
    const int64_t outer = row / shape_.inner, s = row % shape_.inner;
    return element_at(data_, dtype_, (outer * shape_.classes + c) * shape_.inner + s);
  }

  void* const data_;
  const DType dtype_;
  const FocalLossShape& shape_;
  const bool streams_;
  LineVector<T> copy_;
};

template <class T>
class SoftmaxPass {
 public:
  SoftmaxPass(const FocalLossArgs& args, const ClassFactors<T>& factors, int64_t max_rows)
      : args_(args),
        classes_(args.shape.classes),
        factors_(factors),
        is_soft_(!args.labels || args.label_smoothing != 0),
        gamma_(args.gamma),
        scale_(args.grad_input ? static_cast<T>(scale_of(args)) : T(1)),
        input_(args.input, args.shape.dtype, args.shape, max_rows),
        probabilities_(args.probabilities, args.probabilities_dtype, args.shape, max_rows),
        grad_input_(args.grad_input, args.shape.dtype, args.shape, max_rows),
        exponentials_(classes_),
        shares_(is_soft_ ? classes_ : 0),
        losses_(is_soft_ ? classes_ : 0),
        slopes_(is_soft_ ? classes_ : 0) {}

  // Rows of one `outer`, or of any if inner is 1. Returns the sum of their losses.
  double run(int64_t first, int64_t count) {
    const T* const x = input_.load(first, count);
    const T* const targets = args_.probabilities ? probabilities_.load(first, count) : nullptr;
    double total = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r, offset = r * classes_;
      T* const grads = args_.grad_input ? grad_input_.place() + offset : nullptr;
      const double loss = run_row(row, x + offset, targets ? targets + offset : nullptr, grads);
      total += loss;
      if (args_.loss && args_.reduction == Reduction::kNone) {
        store_scalar(element_at(args_.loss, args_.loss_dtype, row), args_.loss_dtype, loss);
      }
    }
    if (args_.grad_input) grad_input_.store(first, count);
    return total;
  }

 private:
  double run_row(int64_t row, const T* x, const T* targets, T* grads) {
    if (args_.labels && args_.labels[row] == args_.ignore_index) {
      if (grads) std::fill_n(grads, classes_, T(0));
      return 0;
    }
    const T scale = grads ? row_scale(args_, row, scale_) : T(1);
    return is_soft_ ? run_soft(row, x, targets, scale, grads)
                    : run_hard(x, args_.labels[row], scale, grads);
  }

  double run_hard(const T* x, int64_t label, T scale, T* grads) {
    T* const e = exponentials_.data();
    const T max = largest(x, classes_);
    fetch(x + classes_, classes_);
    exponentials(x, classes_, max, e);
    const T of_label = e[label];
    e[label] = 0;
    // In double, which is cheap once a row: gamma multiplies the error of q.
    const double others = sum_row(e, classes_), total = others + of_label;
    ClassTerms<T> terms;
    terms.p = static_cast<T>(of_label / total);
    const double q = others / total;
    terms.q = static_cast<T>(q);
    terms.ce = static_cast<T>(of_label >= others ? std::log1p(others / of_label)
                                                 : std::log(total) + (max - x[label]));
    const auto power = static_cast<T>(power_of_label(q, Gamma<double>(args_.gamma)));
    const auto of_class = focal_of_class(terms, factors_[label] * power, gamma_.value);
    if (args_.stats) count(args_, label, terms.p);
    if (grads) {
      scaled(e, classes_, static_cast<T>(of_class.slope / total) * scale, grads);
      grads[label] = -of_class.slope * terms.q * scale;
    }
    return of_class.loss;
  }

  double run_soft(int64_t row, const T* x, const T* targets, T scale, T* grads) {
    T *const e = exponentials_.data(), *const slopes = slopes_.data();
    SoftmaxState<T> state;
    state.max = largest(x, classes_);
    fetch(x + classes_, classes_);
    if (targets) fetch(targets + classes_, classes_);
    exponentials(x, classes_, state.max, e);
    const int64_t top = std::find(x, x + classes_, state.max) - x;
    if (top < classes_) e[top] = 0;
    state.rest = static_cast<T>(sum_row(e, classes_));
    if (top < classes_) e[top] = 1;
    const T log1p_rest = std::log1p(state.rest), total = T(1) + state.rest;

    const int64_t label =
        targets ? std::max_element(targets, targets + classes_) - targets : args_.labels[row];
    if (args_.stats) count(args_, label, e[label] / total);
    for (int64_t c = 0; c < classes_; ++c) {
      const T target = targets ? targets[c] : T(c == label);
      shares_[c] = factors_[c] * smooth(target, static_cast<T>(args_.label_smoothing),
                                        T(1) / static_cast<T>(classes_));
    }
    with_gamma_kind(args_.gamma, [&](auto kind) {
      soft_terms<decltype(kind)::value>(x, e, shares_.data(), classes_, state, log1p_rest, gamma_,
                                        losses_.data(), slopes);
    });
    ClassTerms<T> of_top{};
    if (top < classes_) {
      of_top = class_terms(state.max, state, log1p_rest);
      const auto of_class = focal_of_class(of_top, power_of_label(of_top.q, gamma_), gamma_.value);
      losses_[top] = shares_[top] == T(0) ? T(0) : shares_[top] * of_class.loss;
      slopes[top] = shares_[top] == T(0) ? T(0) : shares_[top] * of_class.slope;
    }
    if (grads) {
      const T sum = static_cast<T>(sum_row(slopes, classes_));
      soft_grads(e, slopes, classes_, T(1) / total, sum, scale, grads);
      if (top < classes_) {
        grads[top] = scale * (of_top.p * (sum - slopes[top]) - of_top.q * slopes[top]);
      }
    }
    return sum_row(losses_.data(), classes_);
  }

  const FocalLossArgs& args_;
  const int64_t classes_;
  const ClassFactors<T>& factors_;
  const bool is_soft_;
  const Gamma<T> gamma_;
  const T scale_;
  Rows<T> input_, probabilities_, grad_input_;
  LineVector<T> exponentials_, shares_, losses_, slopes_;
};

template <class T>
FocalSums run(const FocalLossArgs& args) {
  const ClassFactors<T> factors(args);
  const FocalLossShape& shape = args.shape;
  const int64_t max_rows = shape.inner == 1 ? std::max<int64_t>(1, kBlockSize / shape.classes)
                                            : std::min(kGatheredRows, shape.inner);
  return for_row_tiles(shape, max_rows, [&] { return SoftmaxPass<T>(args, factors, max_rows); });
}

}  // namespace

FocalSums softmax_focal_loss(const FocalLossArgs& args) {
  const bool has_long_rows = args.shape.inner == 1 && args.shape.classes > kMostLaneClasses;
  const bool is_soft = args.probabilities || args.label_smoothing != 0;
  if (!has_long_rows && !is_soft) return softmax_focal_loss_in_lanes(args);
  return args.shape.dtype == DType::kFloat64 ? run<double>(args) : run<float>(args);
}

}  // namespace fastremedy::cpu
