// The statistics kernels against plain loops in long double.
#include "activation_stats_problem.h"

namespace fastremedy::check {
namespace {

struct Size {
  int64_t outer, channels, inner;
};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

class Cases {
 public:
  void check(const std::vector<StatsCase>& cases, bool has_histogram) {
    StatsProblem problem(cases, has_histogram, seed_++);
    const int times = 1 + seed_ % 2;
    for (int i = 0; i < times; ++i) problem.run();
    problem.expect_rows(times);
  }

  void check(Size size, DType dtype, Filling filling, bool has_histogram) {
    check({{size.outer, size.channels, size.inner, dtype, filling, seed_ % 3 == 0}}, has_histogram);
  }

  // Of every dtype, layout and filling; more than one launch takes.
  std::vector<StatsCase> many(int num_tensors) {
    constexpr Size kSizes[] = {{1, 1, 100}, {0, 1, 5},    {5, 3, 1},    {2, 3, 7},  {0, 4, 1},
                               {1, 1, 1},   {300, 40, 1}, {1, 1, 4000}, {3, 2, 64}, {1, 1, 1600}};
    std::vector<StatsCase> cases;
    for (int i = 0; i < num_tensors; ++i) {
      const Size size = kSizes[random_() % std::size(kSizes)];
      const auto filling = static_cast<Filling>(random_() % static_cast<int>(Filling::kCount));
      cases.push_back({size.outer, size.channels, size.inner, kDTypes[random_() % 4], filling,
                       random_() % 3 == 0});
    }
    return cases;
  }

  void check_armed() {
    StatsProblem problem({{1, 1, 3000, DType::kFloat32, Filling::kNormal, false}}, true, 0);
    int32_t armed = 0;
    problem.run(&armed);
    problem.expect_rows(0);
    armed = 1;
    problem.run(&armed);
    problem.expect_rows(1);
  }

  void check_repeatable() {
    const std::vector<StatsCase> cases = many(30);
    StatsProblem first(cases, false, 1), second(cases, true, 1);
    first.run();
    second.run();
    expect(first.equals(second), "activation_stats twice");
  }

 private:
  unsigned seed_ = 0;
  std::mt19937 random_{0};
};

}  // namespace

void check_activation_stats() {
  Cases cases;
  if (emulation::kHasRealThreads) {  // slow, and what threads exchange depends on the layout alone
    for (const Size size : {Size{1, 1, 4000}, Size{100, 3, 7}, Size{300, 40, 1}}) {
      for (const bool has_histogram : {false, true}) {
        cases.check(size, DType::kFloat32, Filling::kNonFinite, has_histogram);
      }
    }
    cases.check(cases.many(4), true);
    return;
  }
  cases.check({}, true);
  // Windows of 16 bytes, batches of all threads, units, and one element more or less.
  for (const int64_t n : {0,    1,    2,    3,    7,    8,    9,    63,   65,   255,   256,  257,
                          1023, 1024, 1025, 1499, 1500, 1501, 2047, 2049, 3001, 12345, 40000}) {
    for (const DType dtype : kDTypes) {
      cases.check({1, 1, n}, dtype, Filling::kNormal, n % 2 == 0);
    }
  }
  constexpr Size kSizes[] = {{1, 1, 5000}, {7, 1, 300},  {2, 5, 64},   {9, 3, 49},  {40, 2, 1},
                             {33, 3, 1},   {700, 10, 1}, {300, 40, 1}, {90, 64, 1}, {1, 9, 1},
                             {5, 3, 3},    {1, 4, 700},  {600, 2, 7},  {9000, 3, 1}};
  for (const Size size : kSizes) {
    for (const DType dtype : kDTypes) {
      for (int f = 0; f < static_cast<int>(Filling::kCount); ++f) {
        cases.check(size, dtype, static_cast<Filling>(f), f % 3 == 0);
      }
    }
  }
  for (const int num_tensors : {2, 63, 64, 65, 200}) {
    cases.check(cases.many(num_tensors), num_tensors % 2 == 0);
  }
  cases.check_armed();
  cases.check_repeatable();
}

}  // namespace fastremedy::check
