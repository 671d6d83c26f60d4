// Runs the CUDA kernels on the CPU, under the sanitizers, against plain loops. Exit status 0: all
// is well. Compile with FASTREMEDY_EMULATION, and with FASTREMEDY_EMULATION_THREADS for real
// threads.
#include "check.h"

namespace fastremedy::check {
namespace {

void check_upload() {
  const cuda::Stream capturing{true};
  void* const streams[] = {nullptr, const_cast<cuda::Stream*>(&capturing)};
  for (void* const stream : streams) {
    expect(cuda::is_capturing(stream) == (stream != nullptr), "is_capturing");
    for (const size_t bytes : {0, 1, 3967, 3968, 3969, 10000}) {
      Memory memory;
      std::vector<char> source(bytes);
      for (size_t i = 0; i < bytes; ++i) source[i] = static_cast<char>(i * 31 + i / 256);
      char* const destination = static_cast<char*>(memory.allocate(bytes));
      expect(cuda::upload(destination, source.data(), bytes, stream) == 0, "upload");
      expect(std::equal(source.begin(), source.end(), destination) && memory.is_intact(),
             "upload of " + std::to_string(bytes) + " bytes");
    }
  }
}

void check_device() {
  expect(cuda::find_kernels() == 0 && cuda::current_device() == 0, "one device");
  expect(cuda::set_device(0) == 0 && cuda::set_device(1) != 0, "set_device");
  expect(std::string(cuda::error_string(0)) == "no error", "error_string");
}

}  // namespace
}  // namespace fastremedy::check

int main() {
  using namespace fastremedy::check;
  check_device();
  check_upload();
  check_clip_grad_norm();
  check_adamw();
  check_batch_norm_relu();
  check_focal_loss();
  check_activation_stats();
  std::printf("%d failures\n", num_failures);
  return num_failures == 0 ? 0 : 1;
}
