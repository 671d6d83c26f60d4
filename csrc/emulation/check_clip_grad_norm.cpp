// The norm kernels against the definition of the norm.
#include "../cuda/clip_grad_norm_tensors.cuh"
#include "check.h"

namespace fastremedy::check {
namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kNormTypes[] = {2, 1, kInfinity, -kInfinity, 0, 0.5, 3, -1};

class Gradients {
 public:
  // A misaligned tensor begins one element after an aligned address.
  GradTensor& add(DType dtype, int64_t numel, double scale, bool is_misaligned = false) {
    const int size = element_size(dtype);
    void* const data = memory_.allocate(numel * size, is_misaligned ? size : 0);
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < numel; ++i) set(data, dtype, i, normal(random_));
    grads_.push_back({data, numel, dtype, 0});
    return grads_.back();
  }

  void add_sizes(double scale) {
    for (const DType dtype : kDTypes) {
      for (const int64_t numel : {0, 1, 7, 8, 9, 515}) {
        add(dtype, numel, scale);
        add(dtype, numel, scale, true);
      }
    }
    for (const int64_t offset : {-1, 0, 1}) {
      add(DType::kFloat32, cuda::kChunkSize + offset, scale, offset < 0);
      add(DType::kBFloat16, cuda::kChunkSize + offset, scale, offset < 0);
    }
    grads_[5].data = nullptr;
    grads_.back().data = nullptr;
  }

  ClipResult norm(double norm_type, double max_norm = kInfinity, bool measures_tensors = false) {
    Memory tables;
    GradNormArgs args{};
    const std::vector<Chunk> chunks = make_chunks(grads_);
    args.grads = tables.upload(grads_);
    args.chunks = tables.upload(chunks);
    args.num_chunks = static_cast<int32_t>(chunks.size());
    args.kind = norm_kind(norm_type);
    args.options.norm_type = norm_type;
    args.options.max_norm = max_norm;
    args.partials = tables.upload(std::vector<double>(chunks.size(), kNan));
    args.counter = tables.upload(std::vector<uint32_t>{0});
    args.result = tables.upload(std::vector<ClipResult>(1));
    args.total_norm = tables.upload(std::vector<double>{-1});
    args.total_norm_dtype = DType::kFloat64;
    if (measures_tensors) args.tensor_norms = tables.upload(room_for_tensor_norms());
    expect(cuda::launch_grad_norm(args, nullptr) == 0, "launch_grad_norm");
    expect(*args.counter == 0, "the counter returns to 0");
    const ClipResult result = *args.result;
    const double total_norm = *static_cast<double*>(args.total_norm);
    expect(is_close(total_norm, result.total_norm, 0), "total_norm is the result's");
    if (measures_tensors) expect_tensor_norms(args.tensor_norms, norm_type);
    if (max_norm != kInfinity) {
      expect(cuda::launch_scale_grads(args, nullptr) == 0, "launch_scale_grads");
    }
    expect(memory_.is_intact() && tables.is_intact(), "norm: guard bytes are written");
    return result;
  }

  void expect_norm(double norm_type, const std::string& what) {
    const double actual = norm(norm_type, kInfinity, true).total_norm;
    const long double expected = norm_of(grads_, norm_type);
    expect(is_close(actual, expected, norm_tolerance(norm_type)),
           what + ", norm type " + std::to_string(norm_type) + ": expected " +
               std::to_string(expected) + ", got " + std::to_string(actual));
  }

  void expect_scaled(double max_norm, const std::string& what) {
    std::vector<std::vector<double>> before;
    for (const GradTensor& grad : grads_) {
      auto& values = before.emplace_back();
      for (int64_t i = 0; grad.data && i < grad.numel; ++i) {
        values.push_back(get(grad.data, grad.dtype, i));
      }
    }
    const ClipResult result = norm(2, max_norm);
    const double coef = max_norm / (result.total_norm + 1e-6);
    expect(result.is_clipped == !(coef >= 1), what + ": is_clipped");
    expect(is_close(result.grad_factor, result.is_clipped ? coef : 1.0, 0), what + ": grad_factor");
    for (size_t t = 0; t < grads_.size(); ++t) {
      const DType dtype = grads_[t].dtype;
      for (size_t i = 0; i < before[t].size(); ++i) {
        const double value = before[t][i];
        const double product =
            dtype == DType::kFloat64
                ? value * result.grad_factor
                : static_cast<float>(value) * static_cast<float>(result.grad_factor);
        const double expected = result.is_clipped ? round_to(dtype, product) : value;
        if (is_close(get(grads_[t].data, dtype, i), expected, 0)) continue;
        expect(false, what + ": " + name_of(dtype) + " element " + std::to_string(i));
      }
    }
  }

 private:
  // An empty tensor has no chunk, and its norm is not written.
  std::vector<double> room_for_tensor_norms() const {
    std::vector<double> room;
    for (const GradTensor& grad : grads_) room.push_back(grad.numel == 0 ? 0 : kUnwritten);
    return room;
  }

  void expect_tensor_norms(const double* norms, double norm_type) const {
    for (size_t t = 0; t < grads_.size(); ++t) {
      const long double expected = norm_of({grads_[t]}, norm_type);
      expect(is_close(norms[t], expected, norm_tolerance(norm_type)),
             "norm of tensor " + std::to_string(t) + ", norm type " + std::to_string(norm_type) +
                 ": expected " + std::to_string(expected) + ", got " + std::to_string(norms[t]));
    }
  }

  static constexpr double kUnwritten = -1;

  std::mt19937 random_{0};
  std::vector<GradTensor> grads_;
  Memory memory_;
};

void check_values() {
  Gradients ordinary;
  ordinary.add_sizes(1);
  for (const double norm_type : kNormTypes) {
    ordinary.expect_norm(norm_type, "normal values");
    if (emulation::kHasRealThreads && norm_type == 1) break;
  }
}

void check_extremes() {
  for (const double scale : {1e20, 1e-22, 1e-39, 0.0}) {  // squares: infinite, 0; values: subnormal
    Gradients extreme;
    extreme.add(DType::kFloat32, 1000, scale);
    extreme.add(DType::kFloat32, cuda::kChunkSize + 1, scale, true);
    extreme.add(DType::kBFloat16, 1000, scale);
    for (const double norm_type : {2.0, 1.0, kInfinity, -kInfinity}) {
      extreme.expect_norm(norm_type, "values of " + std::to_string(scale));
    }
  }
  Gradients nothing;
  for (const double norm_type : kNormTypes) nothing.expect_norm(norm_type, "no tensors");
  nothing.add(DType::kFloat32, 0, 1);
  nothing.add(DType::kFloat32, 100, 1).data = nullptr;
  for (const double norm_type : kNormTypes) nothing.expect_norm(norm_type, "no elements");
}

void check_nonfinite() {
  for (const DType dtype : kDTypes) {
    for (const double value : {kNan, -kInfinity}) {
      for (const int64_t place : {5, 1030}) {  // in a vector, in the tail
        Gradients gradients;
        gradients.add(DType::kFloat32, 50, 1);
        set(gradients.add(dtype, 1031, 1).data, dtype, place, value);
        gradients.add(DType::kBFloat16, 50, 1);
        for (const double norm_type : kNormTypes) {
          gradients.expect_norm(norm_type, std::to_string(value) + " in " + name_of(dtype));
        }
      }
    }
  }
}

void check_determinism() {
  Gradients gradients;
  gradients.add_sizes(1);
  for (const double norm_type : {2.0, 0.5}) {
    const double expected = gradients.norm(norm_type).total_norm;
    for (const int num_multiprocessors : {1, 2, 5}) {
      cuda::num_multiprocessors = num_multiprocessors;
      expect(gradients.norm(norm_type).total_norm == expected, "same norm with any grid");
    }
    cuda::num_multiprocessors = 3;
  }
}

void check_scaling() {
  Gradients gradients;
  gradients.add_sizes(1);
  gradients.expect_scaled(1e6, "norm below max_norm");
  gradients.expect_scaled(0.5, "norm above max_norm");
  set(gradients.add(DType::kFloat32, 9, 1).data, DType::kFloat32, 8, kNan);
  gradients.expect_scaled(0.5, "norm is NaN");
}

// Partials without the elements behind them: a tensor of 100 chunks takes several turns of a warp.
void check_tensors_of_many_chunks() {
  constexpr int kBlockSize = 64, kSize = 2;
  std::vector<GradTensor> tensors;
  for (const int num_chunks : {1, 100, 1, 0, 2, 33, 32, 31, 1, 65, 64, 300}) {
    tensors.push_back({nullptr, num_chunks * cuda::kChunkSize, DType::kFloat32, 0});
  }
  const std::vector<Chunk> chunks = make_chunks(tensors);
  std::vector<double> partials, expected(tensors.size() * kSize);
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (int k = 0; k < kSize; ++k) {
      partials.push_back(static_cast<double>(c * c + k));
      expected[chunks[c].tensor * kSize + k] += partials.back();
    }
  }
  Memory memory;
  GradNormArgs args{};
  args.grads = memory.upload(tensors);
  args.chunks = memory.upload(chunks);
  args.num_chunks = static_cast<int32_t>(chunks.size());
  const double* const in = memory.upload(partials);
  double* const out = memory.upload(std::vector<double>(expected.size()));
  emulation::launch(1, kBlockSize, [=] {
    cuda::for_each_tensor<kBlockSize, kSize>(
        args, in, 0, [](double a, double b) { return a + b; },
        [&](int32_t tensor, const double (&sums)[kSize]) {
          for (int k = 0; k < kSize; ++k) out[tensor * kSize + k] += sums[k];
        });
  });
  expect(std::equal(expected.begin(), expected.end(), out) && memory.is_intact(),
         "sums of tensors of many chunks");
}

}  // namespace

void check_clip_grad_norm() {
  check_values();
  check_scaling();
  check_tensors_of_many_chunks();
  if (emulation::kHasRealThreads) return;  // slow, and the rest is about values
  check_extremes();
  check_nonfinite();
  check_determinism();
}

}  // namespace fastremedy::check
