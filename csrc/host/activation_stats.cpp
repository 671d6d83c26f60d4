// Tensors of one call as the kernels see them. fastremedy/ops/activation_stats_dispatch.py has
// checked shapes and layouts.
#include "activation_stats.h"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "device.h"

#ifndef FASTREMEDY_EMULATION
#include "../cpu/launch.h"
#endif

namespace fastremedy::host {
namespace {

using Sizes = std::tuple<int64_t, int64_t, int64_t>;  // outer, channels, inner

// Without sizes every tensor counts as a whole. Nothing if kernels cannot read one as it lies, or
// it is on another device than the first.
std::optional<std::vector<StatsTensor>> stats_tensors(
    const py::list& tensors, const std::optional<std::vector<Sizes>>& sizes,
    const std::vector<int32_t>& first_rows) {
  DLDevice device{};
  std::vector<StatsTensor> result;
  result.reserve(first_rows.size());
  for (size_t i = 0; i < first_rows.size(); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    DLTensor view;
    DType dtype;
    if (!read_tensor(tensor, &view) || !dtype_of(view, &dtype)) return std::nullopt;
    if (i == 0) device = view.device;
    if (!same_device(view.device, device)) return std::nullopt;
    const int64_t numel = numel_of(view);
    if (!sizes && (!is_dense(view) || is_negated(tensor, numel))) return std::nullopt;
    const auto [outer, channels, inner] = sizes ? (*sizes)[i] : Sizes(1, 1, numel);
    result.push_back({data_of(view), outer, channels, inner, first_rows[i], dtype});
  }
  return result;
}

// False if kernels cannot read a tensor as it lies; nothing has happened then.
bool update(const py::list& tensors, const std::optional<std::vector<Sizes>>& sizes,
            const std::vector<int32_t>& first_rows, py::handle armed, py::handle moments,
            py::handle counts, py::handle histogram, const py::args& scratch) {
  const auto list = stats_tensors(tensors, sizes, first_rows);
  if (!list) return false;
  const DLTensor view = require_tensor(moments, "moments");
  ActivationStatsArgs args{};
  args.tensors = list->data();
  args.num_tensors = static_cast<int32_t>(list->size());
  args.armed = static_cast<const int32_t*>(data_or_null(armed, "armed"));
  args.moments = static_cast<double*>(data_of(view));
  args.counts = static_cast<int64_t*>(data_or_null(counts, "counts"));
  args.histogram = static_cast<int64_t*>(data_or_null(histogram, "histogram"));
  if (is_cuda(view.device)) {
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
    const DeviceGuard guard(view.device);
    const cuda::ActivationStatsScratch addresses{
        reinterpret_cast<uint32_t*>(scratch[0].cast<uintptr_t>()),
        reinterpret_cast<void*>(scratch[1].cast<uintptr_t>())};
    check_cuda(cuda::launch_activation_stats(args, addresses, current_stream(view.device)));
    return true;
#endif
  }
#ifndef FASTREMEDY_EMULATION
  static_cast<void>(scratch);
  const py::gil_scoped_release release;
  cpu::activation_stats(args);
#endif
  return true;
}

// How many counters and bytes of partial results the CUDA kernels need; None where update is false.
std::optional<std::pair<size_t, size_t>> scratch_size(
    const py::list& tensors, const std::optional<std::vector<Sizes>>& sizes,
    const std::vector<int32_t>& first_rows) {
  const auto list = stats_tensors(tensors, sizes, first_rows);
  if (!list) return std::nullopt;
#if defined(FASTREMEDY_WITH_CUDA) || defined(FASTREMEDY_EMULATION)
  const cuda::ActivationStatsScratchSize size =
      cuda::activation_stats_scratch_size(list->data(), static_cast<int32_t>(list->size()));
  return std::pair(size.num_counters, size.partial_bytes);
#else
  return std::pair<size_t, size_t>(0, 0);
#endif
}

}  // namespace

// Arguments are positional: names would double the time of a call.
void bind_activation_stats(py::module_& module) {
  module.def("activation_stats_update", &update);
  module.def("activation_stats_scratch_size", &scratch_size);
}

}  // namespace fastremedy::host
