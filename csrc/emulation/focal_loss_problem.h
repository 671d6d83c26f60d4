// One call of focal loss: its case, its tensors, and what is expected of both directions.
#pragma once

#include "focal_loss_exactly.h"

namespace fastremedy::check {

inline constexpr int64_t kIgnore = -100, kBackground = -3;

struct FocalLossCase {
  FocalLossShape shape;
  FocalForm form;
  Reduction reduction;
  bool has_labels, has_hard_targets, has_ignored, has_background, is_all_ignored, is_masked;
  bool has_alpha, has_alphas, has_weight, has_pos_weight, has_stats, is_misaligned;
  bool is_for_inference;
  DType target_dtype, loss_dtype, class_dtype;
  double gamma, smoothing;
};

template <class T>
class FocalLossProblem {
 public:
  FocalLossProblem(const FocalLossCase& c, unsigned seed) : c_(c), random_(seed) {
    const int64_t numel = shape().numel(), rows = shape().num_rows();
    input_ = allocate(shape().dtype, numel);
    for (int64_t i = 0; i < numel; ++i) set(input_, shape().dtype, i, logit());
    if (c_.has_labels) {
      make_labels();
    } else {
      make_probabilities();
    }
    const auto class_values = [&](bool exists) {
      ChannelValues values{};
      if (!exists) return values;
      values = {memory_.allocate(shape().classes * element_size(c_.class_dtype)), c_.class_dtype,
                0};
      for (int64_t c = 0; c < shape().classes; ++c) {
        set(values.data, c_.class_dtype, c, uniform(0.2, 0.9));
      }
      return values;
    };
    args_.shape = shape();
    args_.form = c_.form;
    args_.reduction = c_.reduction;
    args_.input = input_;
    args_.labels = labels_;
    args_.probabilities = probabilities_;
    args_.probabilities_dtype = c_.target_dtype;
    args_.gamma = c_.gamma;
    args_.alpha = c_.has_alpha ? 0.3 : is_sigmoid() ? -1 : 1;
    args_.alphas = class_values(c_.has_alphas);
    args_.weight = class_values(c_.has_weight);
    args_.pos_weight = class_values(c_.has_pos_weight);
    args_.label_smoothing = c_.smoothing;
    args_.ignore_index = kIgnore;
    args_.background = c_.has_background ? kBackground : kIgnore;
    num_losses_ = c_.reduction != Reduction::kNone ? 1 : is_sigmoid() ? numel : rows;
    args_.loss = allocate(c_.loss_dtype, num_losses_);
    args_.loss_dtype = c_.loss_dtype;
    if (!is_sigmoid() && !c_.is_for_inference) {
      args_.saved = memory_.upload(std::vector<T>(3 * rows, T(-7)));
    }
    if (c_.reduction == Reduction::kMean) args_.normalizer = memory_.upload<double>({-7});
    if (c_.has_stats) args_.stats = memory_.upload(std::vector<int64_t>(num_stats()));
    scratch_.counter = memory_.upload<uint32_t>({0});
    scratch_.partials = static_cast<double*>(
        memory_.allocate(cuda::focal_loss_num_partials(shape(), c_.form) * sizeof(double)));
  }

  void check() {
    find_exact();
    expect(cuda::launch_focal_loss_forward(args_, scratch_, nullptr) == 0, name("forward"));
    expect_losses();
    if (c_.has_stats) expect_stats();
    if (!c_.is_for_inference) backward();
    expect_intact();
  }

  // A label that is no class is reported, and its row does not count.
  void check_bad_label(int64_t label) {
    labels_[shape().num_rows() / 2] = label;
    const int code = cuda::launch_focal_loss_forward(args_, scratch_, nullptr);
    expect(code == cuda::cudaErrorAssert, name("a bad label"));
    labels_[shape().num_rows() / 2] = kIgnore;
    find_exact();
    expect_losses();
    expect_intact();
  }

 private:
  static constexpr Wide kUnit = sizeof(T) == 4 ? 1e-6 : 1e-14;
  static constexpr Wide kSmallest = sizeof(T) == 4 ? 1e-35 : 1e-300;

  const FocalLossShape& shape() const { return c_.shape; }
  bool is_sigmoid() const { return c_.form == FocalForm::kSigmoid; }
  int64_t num_stats() const { return 2 * shape().classes + 1; }
  Wide tolerance() const { return kUnit * (3 + 2 * c_.gamma); }
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random_);
  }
  double logit() {
    constexpr double kFar[] = {0, 1, -1, 20, -20, 80, -80, 1e3, -1e4};
    return random_() % 8 == 0 ? kFar[random_() % 9]
                              : std::normal_distribution<double>(0, 3)(random_);
  }
  void* allocate(DType dtype, int64_t numel) {
    const int size = element_size(dtype);
    return memory_.allocate(numel * size, c_.is_misaligned ? size : 0);
  }
  std::string name(const std::string& what, int64_t i = -1) const {
    const auto number = [](auto n) { return std::to_string(n); };
    return std::string("focal_loss ") + (is_sigmoid() ? "sigmoid " : "softmax ") +
           number(shape().outer) + "x" + number(shape().classes) + "x" + number(shape().inner) +
           " " + name_of(shape().dtype) + (c_.has_labels ? " labels" : " probabilities") +
           " gamma " + number(c_.gamma) + " smoothing " + number(c_.smoothing) + " reduction " +
           number(static_cast<int>(c_.reduction)) + (c_.is_misaligned ? " misaligned" : "") +
           (c_.has_stats ? " stats" : "") + ": " + what + (i < 0 ? "" : " at " + number(i));
  }

  int64_t element(int64_t row, int64_t c) const {
    return (row / shape().inner * shape().classes + c) * shape().inner + row % shape().inner;
  }
  int64_t row_of(int64_t i) const {
    return i / (shape().classes * shape().inner) * shape().inner + i % shape().inner;
  }
  int64_t class_of(int64_t i) const { return i / shape().inner % shape().classes; }

  // Classes that the model rules out.
  void mask(int64_t row, int64_t label) {
    for (int64_t c = 0; c_.is_masked && c < shape().classes * 3 / 4; ++c) {
      if (c != label) set(input_, shape().dtype, element(row, c), -HUGE_VAL);
    }
  }

  // Rows that do not count hold NaN and infinity.
  void make_labels() {
    std::vector<int64_t> labels(shape().num_rows());
    for (int64_t row = 0; row < shape().num_rows(); ++row) {
      labels[row] = random_() % shape().classes;
      mask(row, labels[row]);
      if (c_.has_background && random_() % 3 == 0) labels[row] = kBackground;
      if (!c_.is_all_ignored && !(c_.has_ignored && random_() % 3 == 0)) continue;
      labels[row] = kIgnore;
      for (int64_t c = 0; c < shape().classes; ++c) {
        set(input_, shape().dtype, element(row, c), row % 2 ? std::nan("") : HUGE_VAL);
      }
    }
    labels_ = memory_.upload(labels);
  }

  void make_probabilities() {
    const int64_t classes = shape().classes;
    probabilities_ = allocate(c_.target_dtype, shape().numel());
    for (int64_t row = 0; row < shape().num_rows(); ++row) {
      const int64_t label = random_() % classes;
      if (c_.has_hard_targets) mask(row, label);
      std::vector<double> t(classes);
      double sum = 0;
      for (int64_t c = 0; c < classes; ++c) sum += t[c] = uniform(0, 1);
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t i = element(row, c);
        double target = is_sigmoid() ? t[c] : t[c] / sum;
        if (is_sigmoid() && random_() % 2 == 0) target = random_() % 2;
        if (c_.has_hard_targets) target = c == label;
        if (is_sigmoid() && (c_.is_all_ignored || (c_.has_ignored && random_() % 3 == 0))) {
          target = kIgnore;
          set(input_, shape().dtype, i, std::nan(""));
        }
        set(probabilities_, c_.target_dtype, i, target);
      }
    }
  }

  bool is_ignored(int64_t i) const {
    if (c_.has_labels) return labels_[row_of(i)] == kIgnore;
    return is_sigmoid() && get(probabilities_, c_.target_dtype, i) == kIgnore;
  }
  Wide raw_target(int64_t i) const {
    return c_.has_labels ? labels_[row_of(i)] == class_of(i)
                         : get(probabilities_, c_.target_dtype, i);
  }
  Wide class_value(const ChannelValues& values, int64_t c, Wide otherwise) const {
    return values.data ? get(values.data, values.dtype, c) : otherwise;
  }

  void find_exact() {
    const int64_t classes = shape().classes;
    elements_.assign(shape().numel(), {});
    rows_.assign(shape().num_rows(), 0);
    stats_.assign(num_stats(), 0);
    sum_ = normalizer_ = 0;
    for (int64_t row = 0; row < shape().num_rows(); ++row) {
      if (!is_sigmoid()) {
        find_exact_row(row);
      } else if (c_.has_labels && is_ignored(element(row, 0))) {
        ++stats_[2 * classes];
      } else {
        for (int64_t c = 0; c < classes; ++c) find_exact_element(element(row, c), c);
      }
    }
  }

  void find_exact_element(int64_t i, int64_t c) {
    if (is_ignored(i)) {
      ++stats_[2 * shape().classes];
      return;
    }
    const Wide x = get(input_, shape().dtype, i), target = raw_target(i);
    const Wide alpha = class_value(args_.alphas, c, args_.alpha);
    const Wide weight = class_value(args_.weight, c, 1);
    elements_[i] = sigmoid_focal_exactly(x, target * (1 - c_.smoothing) + c_.smoothing / 2,
                                         c_.gamma, (alpha < 0 ? 1 : alpha) * weight,
                                         (alpha < 0 ? 1 : 1 - alpha) * weight,
                                         class_value(args_.pos_weight, c, 1));
    sum_ += elements_[i].loss;
    normalizer_ += 1;
    const Wide p = 1 / (1 + std::exp(-x));
    if (target > 0.5) count(c, target * p + (1 - target) * (1 - p));
  }

  void find_exact_row(int64_t row) {
    const int64_t classes = shape().classes;
    if (is_ignored(element(row, 0))) {
      ++stats_[2 * classes];
      return;
    }
    std::vector<Wide> x, weights, targets;
    for (int64_t c = 0; c < classes; ++c) {
      x.push_back(get(input_, shape().dtype, element(row, c)));
      targets.push_back(raw_target(element(row, c)));
      const Wide target = targets[c] * (1 - c_.smoothing) + c_.smoothing / classes;
      weights.push_back(target * class_value(args_.alphas, c, args_.alpha) *
                        class_value(args_.weight, c, 1));
    }
    const ExactRow exact = softmax_focal_exactly(x, weights, c_.gamma);
    for (int64_t c = 0; c < classes; ++c) elements_[element(row, c)] = exact.classes[c];
    rows_[row] = exact.loss;
    sum_ += exact.loss;
    const int64_t label = std::max_element(targets.begin(), targets.end()) - targets.begin();
    normalizer_ += c_.has_labels ? class_value(args_.weight, label, 1) : 1;
    count(label, exact.probabilities[label]);
  }

  void count(int64_t label, Wide probability) {
    ++stats_[label];
    stats_[shape().classes + label] += probability / kProbabilityUnit;
  }

  bool is_near(Wide actual, Wide expected, Wide magnitude, DType dtype) const {
    if (expected != expected) return actual != actual;
    const double limit = dtype == DType::kFloat16 ? 65504 : 3e38;
    if (std::fabs(expected) > limit) return std::fabs(actual) >= limit;
    const double unit = dtype == shape().dtype && sizeof(T) == sizeof(double)
                            ? 0
                            : spacing(dtype, static_cast<double>(expected));
    return std::fabs(actual - expected) <= tolerance() * magnitude + kSmallest + unit;
  }

  void expect_losses() {
    const auto expect_loss = [&](int64_t i, Wide expected) {
      const double actual = get(args_.loss, c_.loss_dtype, i);
      expect(is_near(actual, expected, std::fabs(expected), c_.loss_dtype),
             name("loss " + std::to_string(actual) + ", not " +
                      std::to_string(static_cast<double>(expected)),
                  i));
    };
    if (c_.reduction == Reduction::kNone) {
      for (int64_t i = 0; i < num_losses_; ++i) {
        expect_loss(i, is_sigmoid() ? elements_[i].loss : rows_[i]);
      }
    } else if (c_.reduction == Reduction::kSum) {
      expect_loss(0, sum_);
    } else {
      expect_loss(0, normalizer_ == 0 ? std::nanl("") : sum_ / normalizer_);
      expect(std::fabs(*args_.normalizer - normalizer_) <= kUnit * normalizer_, name("normalizer"));
    }
  }

  void expect_stats() {
    const int64_t classes = shape().classes;
    for (int64_t i = 0; i < num_stats(); ++i) {
      const bool is_probability = i >= classes && i < 2 * classes;
      const Wide error =
          is_probability ? (tolerance() / kProbabilityUnit + 1) * stats_[i - classes] : 0;
      expect(std::fabs(args_.stats[i] - stats_[i]) <= error, name("stats", i));
    }
  }

  void backward() {
    FocalLossArgs args = args_;
    void* const grad_output = allocate(c_.loss_dtype, num_losses_);
    for (int64_t i = 0; i < num_losses_; ++i) set(grad_output, c_.loss_dtype, i, uniform(-1, 2));
    args.loss = nullptr;
    args.grad_output = grad_output;
    args.grad_output_dtype = c_.loss_dtype;
    args.grad_input = allocate(shape().dtype, shape().numel());
    expect(cuda::launch_focal_loss_backward(args, nullptr) == 0, name("backward"));
    for (int64_t i = 0; i < shape().numel(); ++i) {
      const int64_t place = num_losses_ == 1 ? 0 : is_sigmoid() ? i : row_of(i);
      Wide grad = get(grad_output, c_.loss_dtype, place);
      if (c_.reduction == Reduction::kMean) grad /= normalizer_;
      const Exact& exact = elements_[i];
      const double actual = get(args.grad_input, shape().dtype, i);
      const bool is_right = is_ignored(i)
                                ? actual == 0
                                : is_near(actual, grad * exact.slope,
                                          std::fabs(grad) * exact.magnitude, shape().dtype);
      if (is_right) continue;
      return expect(false, name("gradient " + std::to_string(actual) + ", not " +
                                    std::to_string(static_cast<double>(grad * exact.slope)),
                                i));
    }
  }

  void expect_intact() {
    expect(memory_.is_intact(), name("guard bytes are written"));
    expect(*scratch_.counter == 0, name("the counter returns to 0"));
  }

  const FocalLossCase c_;
  std::mt19937 random_;
  Memory memory_;
  FocalLossArgs args_{};
  cuda::FocalLossScratch scratch_;
  void *input_, *probabilities_ = nullptr;
  int64_t* labels_ = nullptr;
  int64_t num_losses_;
  std::vector<Exact> elements_;
  std::vector<Wide> rows_, stats_;
  Wide sum_, normalizer_;
};

}  // namespace fastremedy::check
