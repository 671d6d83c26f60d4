// Focal loss: the entries, and what has to be known before the pass over the elements.
#include "focal_loss_pass.h"
#include "launch.h"

namespace fastremedy::cpu {
namespace {

// Rows that count, and the sum of their weights.
struct Labels {
  int64_t num_ignored = 0;
  double weight = 0;
};

Labels survey_labels(const FocalLossArgs& args) {
  Labels labels;
  const int64_t num_rows = args.shape.num_rows();
  for (int64_t row = 0; row < num_rows; ++row) {
    labels.num_ignored += args.labels[row] == args.ignore_index;
  }
  const bool is_weighted = args.form == FocalForm::kSoftmax && args.weight.data;
  labels.weight = static_cast<double>(num_rows - labels.num_ignored);
  if (!is_weighted) return labels;
  labels.weight = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t label = args.labels[row];
    if (label != args.ignore_index) labels.weight += value_of(args.weight, label, 1);
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
  for (int64_t row = 0; row < args.shape.num_rows(); ++row) {
    const int64_t label = args.labels[row];
    const bool is_class = 0 <= label && label < args.shape.classes;
    const bool is_background = args.form == FocalForm::kSigmoid && label == args.background;
    if (!is_class && !is_background && label != args.ignore_index) return row;
  }
  return -1;
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
