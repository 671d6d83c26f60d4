// Focal loss: the entries, and what has to be known before the pass over the elements.
#include "focal_loss_pass.h"
#include "launch.h"

namespace fastremedy::cpu {
namespace {

FASTREMEDY_CLONES int64_t count_labels(const int64_t* __restrict labels, int64_t n, int64_t label) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += labels[i] == label;
  return count;
}

FASTREMEDY_CLONES bool are_classes(const int64_t* __restrict labels, int64_t n, uint64_t classes,
                                   int64_t ignore_index, int64_t background) {
  int64_t num_bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool is_class = static_cast<uint64_t>(labels[i]) < classes;
    num_bad += !(is_class | (labels[i] == ignore_index) | (labels[i] == background));
  }
  return num_bad == 0;
}

// Rows that do not count, and the weight of the others.
struct Labels {
  int64_t num_ignored = 0;
  double weight = 0;
};

Labels survey_labels(const FocalLossArgs& args) {
  const int64_t num_rows = args.shape.num_rows();
  Labels labels;
  labels.num_ignored = count_labels(args.labels, num_rows, args.ignore_index);
  labels.weight = static_cast<double>(num_rows - labels.num_ignored);
  if (args.form == FocalForm::kSoftmax && args.weight.data) {
    labels.weight = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t label = args.labels[row];
      if (label != args.ignore_index) labels.weight += value_of(args.weight, label, 1);
    }
  }
  return labels;
}

// What the mean divides by; elements that a pass will find to be ignored still count.
double normalizer_of(const FocalLossArgs& args, const Labels& labels) {
  if (args.form == FocalForm::kSoftmax) {
    return args.labels ? labels.weight : static_cast<double>(args.shape.num_rows());
  }
  return static_cast<double>(args.shape.numel() - labels.num_ignored * args.shape.classes);
}

FocalSums run(const FocalLossArgs& args, const Labels& labels) {
  return args.form == FocalForm::kSigmoid ? sigmoid_focal_loss(args, labels.num_ignored)
                                          : softmax_focal_loss(args);
}

}  // namespace

double load_scalar(const void* address, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return *static_cast<const float*>(address);
    case DType::kFloat64:
      return *static_cast<const double*>(address);
    case DType::kFloat16:
      return float16_to_float(*static_cast<const uint16_t*>(address));
    case DType::kBFloat16:
      return bfloat16_to_float(*static_cast<const uint16_t*>(address));
  }
  return 0;
}

void store_scalar(void* address, DType dtype, double value) {
  const auto narrow = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat32:
      *static_cast<float*>(address) = narrow;
      break;
    case DType::kFloat64:
      *static_cast<double*>(address) = value;
      break;
    case DType::kFloat16:
      *static_cast<uint16_t*>(address) = float_to_float16(narrow);
      break;
    case DType::kBFloat16:
      *static_cast<uint16_t*>(address) = float_to_bfloat16(narrow);
      break;
  }
}

FocalSums add_up(const std::vector<FocalSums>& sums) {
  FocalSums total;
  for (const FocalSums& part : sums) {
    total.loss += part.loss;
    total.num_ignored += part.num_ignored;
  }
  return total;
}

int64_t find_bad_label(const FocalLossArgs& args) {
  const int64_t num_rows = args.shape.num_rows();
  const int64_t background = args.form == FocalForm::kSigmoid ? args.background : args.ignore_index;
  const auto classes = static_cast<uint64_t>(args.shape.classes);
  if (are_classes(args.labels, num_rows, classes, args.ignore_index, background)) return -1;
  int64_t row = 0;
  while (are_classes(args.labels + row, 1, classes, args.ignore_index, background)) ++row;
  return row;
}

void focal_loss_forward(const FocalLossArgs& args) {
  const Labels labels = args.labels ? survey_labels(args) : Labels();
  if (args.normalizer) *args.normalizer = normalizer_of(args, labels);
  const FocalSums sums = run(args, labels);
  if (args.stats) args.stats[2 * args.shape.classes] = labels.num_ignored + sums.num_ignored;
  if (args.reduction == Reduction::kNone) return;
  double loss = sums.loss;
  if (args.reduction == Reduction::kMean) {
    if (sums.num_ignored > 0) {
      *args.normalizer -= static_cast<double>(sums.num_ignored);
      if (args.grad_input) {  // it was divided by another number: once more, with this one
        FocalLossArgs backward = args;
        backward.loss = nullptr;
        backward.stats = nullptr;
        run(backward, labels);
      }
    }
    loss /= *args.normalizer;
  }
  store_scalar(args.loss, args.loss_dtype, loss);
}

void focal_loss_backward(const FocalLossArgs& args) {
  run(args, args.labels ? survey_labels(args) : Labels());
}

}  // namespace fastremedy::cpu
