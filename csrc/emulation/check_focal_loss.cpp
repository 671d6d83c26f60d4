// The focal loss kernels against the definition in long double.
#include "focal_loss_problem.h"

namespace fastremedy::check {
namespace {

struct Size {
  int64_t outer, classes, inner;
};

class Cases {
 public:
  void check(Size size, DType dtype, FocalForm form, bool has_labels) {
    constexpr double kGammas[] = {0, 0.5, 1, 2, 5};
    FocalLossCase c{};
    c.shape = {size.outer, size.classes, size.inner, dtype};
    c.form = form;
    c.reduction = static_cast<Reduction>(choose(3));
    c.has_labels = has_labels;
    c.gamma = kGammas[num_cases_ % 5];
    c.smoothing = choose(3) == 0 ? 0.1 : 0;
    c.has_hard_targets = choose(4) == 0;
    c.has_ignored = choose(2) == 0;
    c.is_all_ignored = choose(16) == 0;
    c.is_masked = form == FocalForm::kSoftmax && c.smoothing == 0 && choose(4) == 0;
    c.has_background = form == FocalForm::kSigmoid && choose(2) == 0;
    c.has_alpha = choose(2) == 0;
    c.has_alphas = choose(3) == 0;
    c.has_weight = choose(3) == 0;
    c.has_pos_weight = form == FocalForm::kSigmoid && choose(3) == 0;
    c.has_stats = choose(3) == 0;
    c.is_misaligned = choose(3) == 0;
    c.is_for_inference = choose(8) == 0;
    const bool is_half = dtype == DType::kFloat16 || dtype == DType::kBFloat16;
    c.target_dtype = is_half || choose(2) == 0 ? dtype : DType::kFloat32;
    c.loss_dtype = choose(2) == 0 ? dtype : dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    c.class_dtype = choose(4) == 0 ? DType::kFloat64 : DType::kFloat32;
    run(c, [](auto& problem) { problem.check(); });
  }

  void check_bad_label(FocalForm form, int64_t label) {
    FocalLossCase c{};
    c.shape = {9, 5, 1, DType::kFloat32};
    c.form = form;
    c.has_labels = c.has_stats = true;
    c.reduction = Reduction::kMean;
    run(c, [&](auto& problem) { problem.check_bad_label(label); });
  }

 private:
  unsigned choose(unsigned n) { return random_() % n; }

  template <class Use>
  void run(const FocalLossCase& c, Use use) {
    if (c.shape.dtype == DType::kFloat64) {
      FocalLossProblem<double> problem(c, num_cases_++);
      use(problem);
    } else {
      FocalLossProblem<float> problem(c, num_cases_++);
      use(problem);
    }
  }

  std::mt19937 random_{0};
  unsigned num_cases_ = 0;
};

}  // namespace

void check_focal_loss() {
  constexpr FocalForm kForms[] = {FocalForm::kSigmoid, FocalForm::kSoftmax};
  Cases cases;
  if (emulation::kHasRealThreads) {  // slow, and what threads exchange depends on the layout alone
    for (const FocalForm form : kForms) {
      for (const bool has_labels : {false, true}) {
        for (const Size size : {Size{40, 33, 1}, Size{3, 7, 30}, Size{9, 1025, 1}}) {
          for (int i = 0; i < 2; ++i) cases.check(size, DType::kFloat32, form, has_labels);
        }
      }
    }
    return;
  }
  // Vectors, parts of a warp, whole warps, blocks, all of them and some more or less.
  constexpr Size kSizes[] = {{1, 1, 1},    {1, 2, 1},    {7, 8, 1},    {65, 3, 1},  {130, 10, 1},
                             {31, 80, 1},  {5, 91, 1},   {3, 256, 1},  {2, 263, 1}, {9, 1000, 1},
                             {2, 1024, 1}, {9, 1025, 1}, {2, 2056, 1}, {2, 5, 64},  {3, 9, 7},
                             {1, 4, 65},   {2, 520, 3},  {1, 17, 1024}};
  for (const Size size : kSizes) {
    for (const DType dtype :
         {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
      for (const FocalForm form : kForms) {
        for (const bool has_labels : {false, true}) {
          for (int i = 0; i < 3; ++i) cases.check(size, dtype, form, has_labels);
        }
      }
    }
  }
  // Threads with more than 64 vectors.
  cases.check({3000, 80, 1}, DType::kFloat32, FocalForm::kSigmoid, true);
  cases.check({1, 1200, 9}, DType::kFloat32, FocalForm::kSoftmax, true);
  cases.check({1, 1200, 9}, DType::kFloat32, FocalForm::kSoftmax, false);
  for (const FocalForm form : kForms) {
    for (const int64_t label : {int64_t{5}, int64_t{-1}, INT64_MIN, INT64_MAX}) {
      cases.check_bad_label(form, label);
    }
  }
}

}  // namespace fastremedy::check
