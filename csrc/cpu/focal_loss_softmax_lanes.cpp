// Softmax focal loss of labels with rows as the lanes of vectors: where the classes of a row are
// few or do not lie side by side, so that there is nothing to vectorise along them.
#include <algorithm>
#include <cmath>

#include "focal_loss_softmax.h"

namespace fastremedy::cpu {
namespace {

// Half a KiB of float of every class: 21 classes take 10 KiB.
constexpr int64_t kLaneRows = 128;

// One value of every row.
template <class T>
struct RowValues {
  alignas(64) T max[kLaneRows], of_label[kLaneRows], x_label[kLaneRows];
  alignas(64) double others[kLaneRows];  // gamma multiplies the error of 1 - p
  alignas(64) T p[kLaneRows], q[kLaneRows], ce[kLaneRows], total[kLaneRows];
  alignas(64) T factor[kLaneRows];  // alpha * weight of the label
  alignas(64) T scale[kLaneRows];   // of the gradient
  alignas(64) T loss[kLaneRows], of_others[kLaneRows], grad_of_label[kLaneRows];
  alignas(64) int32_t label[kLaneRows];  // -1: ignored
};

template <class T>
FASTREMEDY_CLONES void raise_to(const T* __restrict x, int64_t n, T* __restrict max) {
  for (int64_t b = 0; b < n; ++b) max[b] = max[b] > x[b] ? max[b] : x[b];
}

template <class T>
FASTREMEDY_CLONES void add_exponentials(const T* __restrict x, int64_t n, int32_t c,
                                        const int32_t* __restrict labels, const T* __restrict max,
                                        T* __restrict e, T* __restrict of_label,
                                        double* __restrict others, T* __restrict x_label) {
  for (int64_t b = 0; b < n; ++b) {
    const bool is_label = labels[b] == c;
    const T value = exp_of_difference(x[b], max[b]);
    e[b] = value;
    of_label[b] = is_label ? value : of_label[b];
    x_label[b] = is_label ? x[b] : x_label[b];
    others[b] += static_cast<double>(is_label ? T(0) : value);
  }
}

template <class T>
FASTREMEDY_CLONES void finish_rows(const T* __restrict of_label, const double* __restrict others,
                                   const T* __restrict max, const T* __restrict x_label, int64_t n,
                                   T* __restrict p, T* __restrict q, T* __restrict ce,
                                   T* __restrict total) {
  for (int64_t b = 0; b < n; ++b) {
    const double sum = others[b] + static_cast<double>(of_label[b]);
    const T rest = static_cast<T>(others[b]);
    total[b] = static_cast<T>(sum);
    p[b] = of_label[b] / total[b];
    q[b] = static_cast<T>(others[b] / sum);
    // Above 1/2 from what is missing to 1, below from the logarithm, which is at least log(2).
    const bool is_likely = of_label[b] >= rest;
    const T near_one = log1p_of(is_likely ? rest / of_label[b] : T(0));
    const T far = log_of(total[b]) + (max[b] - x_label[b]);
    ce[b] = is_likely ? near_one : far;
  }
}

template <class T>
FASTREMEDY_CLONES void combine_rows(const T* __restrict p, const T* __restrict q,
                                    const T* __restrict ce, const T* __restrict total,
                                    const T* __restrict powers, const T* __restrict scale,
                                    const int32_t* __restrict labels, int64_t n, T gamma,
                                    T* __restrict loss, T* __restrict of_others,
                                    T* __restrict grad_of_label) {
  for (int64_t b = 0; b < n; ++b) {
    const auto of_class = focal_of_class(ClassTerms<T>{p[b], q[b], ce[b]}, powers[b], gamma);
    const bool counts = labels[b] >= 0;
    loss[b] = counts ? of_class.loss : T(0);
    of_others[b] = of_class.slope / total[b] * scale[b];
    grad_of_label[b] = -of_class.slope * q[b] * scale[b];
  }
}

template <class T>
FASTREMEDY_CLONES void write_grads(const T* __restrict e, const T* __restrict of_others,
                                   const T* __restrict grad_of_label,
                                   const int32_t* __restrict labels, int64_t n, int32_t c,
                                   T* __restrict grads) {
  for (int64_t b = 0; b < n; ++b) {
    const T grad = labels[b] == c ? grad_of_label[b] : e[b] * of_others[b];
    grads[b] = labels[b] >= 0 ? grad : T(0);
  }
}

// The pass over the rows of one range, tile by tile: x[classes][rows].
template <class T>
class LanesPass {
 public:
  LanesPass(const FocalLossArgs& args, const ClassFactors<T>& factors)
      : args_(args),
        classes_(args.shape.classes),
        factors_(factors),
        gamma_(args.gamma),
        scale_(args.grad_input ? static_cast<T>(scale_of(args)) : T(1)),
        x_(classes_ * kLaneRows),
        e_(classes_ * kLaneRows),
        packed_(args.shape.inner == 1 ? classes_ * kLaneRows : 0) {}

  double run(int64_t first, int64_t count) {
    RowValues<T>& rows = rows_;
    load_rows(first, count);
    std::fill_n(rows.max, count, -static_cast<T>(HUGE_VAL));
    std::fill_n(rows.of_label, count, T(0));
    std::fill_n(rows.others, count, 0.0);
    std::fill_n(rows.x_label, count, T(0));
    for (int64_t c = 0; c < classes_; ++c) raise_to(x_.data() + c * kLaneRows, count, rows.max);
    for (int64_t c = 0; c < classes_; ++c) {
      add_exponentials(x_.data() + c * kLaneRows, count, static_cast<int32_t>(c), rows.label,
                       rows.max, e_.data() + c * kLaneRows, rows.of_label, rows.others,
                       rows.x_label);
    }
    finish_rows(rows.of_label, rows.others, rows.max, rows.x_label, count, rows.p, rows.q, rows.ce,
                rows.total);
    for (int64_t b = 0; b < count; ++b) {
      rows.factor[b] *= power_of_label(rows.q[b], gamma_);
      if (args_.stats && rows.label[b] >= 0) cpu::count(args_, rows.label[b], rows.p[b]);
    }
    combine_rows(rows.p, rows.q, rows.ce, rows.total, rows.factor, rows.scale, rows.label, count,
                 gamma_.value, rows.loss, rows.of_others, rows.grad_of_label);
    if (args_.grad_input) {
      for (int64_t c = 0; c < classes_; ++c) {
        write_grads(e_.data() + c * kLaneRows, rows.of_others, rows.grad_of_label, rows.label,
                    count, static_cast<int32_t>(c), x_.data() + c * kLaneRows);
      }
      store_grads(first, count);
    }
    if (args_.loss && args_.reduction == Reduction::kNone) {
      TensorBlock<T> loss(args_.loss, args_.loss_dtype);
      std::copy_n(rows.loss, count, loss.place(first));
      loss.store(count);
    }
    return sum_block(rows.loss, count);
  }

 private:
  void load_rows(int64_t first, int64_t count) {
    for (int64_t b = 0; b < count; ++b) {
      const int64_t label = args_.labels[first + b];
      const bool counts = label != args_.ignore_index;
      rows_.label[b] = counts ? static_cast<int32_t>(label) : -1;
      rows_.factor[b] = counts ? factors_[label] : T(0);
      rows_.scale[b] = row_scale(args_, first + b, scale_);
    }
    const FocalLossShape& shape = args_.shape;
    if (shape.inner > 1) {
      for (int64_t c = 0; c < classes_; ++c) {
        convert(element_at(args_.input, shape.dtype, line_of(first, c)), shape.dtype,
                x_.data() + c * kLaneRows, count);
      }
      return;
    }
    convert(element_at(args_.input, shape.dtype, first * classes_), shape.dtype, packed_.data(),
            count * classes_);
    for (int64_t c = 0; c < classes_; ++c) {
      for (int64_t b = 0; b < count; ++b) x_[c * kLaneRows + b] = packed_[b * classes_ + c];
    }
  }

  void store_grads(int64_t first, int64_t count) {
    const FocalLossShape& shape = args_.shape;
    const bool streams = shape.bytes() >= kStreamedBytes;
    if (shape.inner > 1) {
      for (int64_t c = 0; c < classes_; ++c) {
        convert_back(x_.data() + c * kLaneRows,
                     element_at(args_.grad_input, shape.dtype, line_of(first, c)), shape.dtype,
                     count, streams);
      }
      return;
    }
    for (int64_t c = 0; c < classes_; ++c) {
      for (int64_t b = 0; b < count; ++b) packed_[b * classes_ + c] = x_[c * kLaneRows + b];
    }
    convert_back(packed_.data(), element_at(args_.grad_input, shape.dtype, first * classes_),
                 shape.dtype, count * classes_, streams);
  }

  // The first of neighbouring elements of a class.
  int64_t line_of(int64_t row, int64_t c) const {
    const int64_t inner = args_.shape.inner;
    return (row / inner * classes_ + c) * inner + row % inner;
  }

  const FocalLossArgs& args_;
  const int64_t classes_;
  const ClassFactors<T>& factors_;
  const Gamma<T> gamma_;
  const T scale_;
  LineVector<T> x_, e_, packed_;
  RowValues<T> rows_;
};

template <class T>
FocalSums run(const FocalLossArgs& args) {
  const ClassFactors<T> factors(args);
  return for_row_tiles(args.shape, kLaneRows, [&] { return LanesPass<T>(args, factors); });
}

}  // namespace

FocalSums softmax_focal_loss_in_lanes(const FocalLossArgs& args) {
  return args.shape.dtype == DType::kFloat64 ? run<double>(args) : run<float>(args);
}

}  // namespace fastremedy::cpu
