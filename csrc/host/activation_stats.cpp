// Tensors of one call as the kernels see them. fastremedy/ops/activation_stats_dispatch.py has
// checked shapes and layouts.
#include "activation_stats.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <mutex>
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

// A tensor that counts as a whole; false if kernels cannot read it as it lies.
bool read_whole(PyObject* tensor, int32_t row, DLTensor* view, StatsTensor* out) {
  DType dtype;
  if (!read_tensor(tensor, view) || !dtype_of(*view, &dtype)) return false;
  const int64_t numel = numel_of(*view);
  *out = {data_of(*view), 1, 1, numel, row, dtype};
  return is_dense(*view) && !is_negated(tensor, numel);
}

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
    StatsTensor found;
    if (!sizes) {
      if (!read_whole(tensor, first_rows[i], &view, &found)) return std::nullopt;
    } else {
      if (!read_tensor(tensor, &view) || !dtype_of(view, &found.dtype)) return std::nullopt;
      const auto [outer, channels, inner] = (*sizes)[i];
      found = {data_of(view), outer, channels, inner, first_rows[i], found.dtype};
    }
    if (i == 0) device = view.device;
    if (!same_device(view.device, device)) return std::nullopt;
    result.push_back(found);
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

#ifndef FASTREMEDY_EMULATION
// Rows on the CPU to which a monitor adds all the time: what stays the same is read once. Methods
// return false, and have done nothing, if kernels cannot read a tensor as it lies. They may be
// called from several threads.
class StatsRows {
 public:
  StatsRows(const py::object& model, const py::object& armed, const py::object& moments,
            const py::object& counts, const py::object& histogram)
      : keepalive_{model, armed, moments, counts, histogram} {
    args_.armed = static_cast<const int32_t*>(data_or_null(armed, "armed"));
    args_.moments = static_cast<double*>(data_or_null(moments, "moments"));
    args_.counts = static_cast<int64_t*>(data_or_null(counts, "counts"));
    args_.histogram = static_cast<int64_t*>(data_or_null(histogram, "histogram"));
  }

  // What a module of the model returns, if its call counts; otherwise nothing, and true.
  bool add_output(py::handle output, int32_t row) {
    StatsTensor found;
    if (!read_on_cpu(output.ptr(), row, &found)) return false;
    if (is_watched()) run(&found, 1);
    return true;
  }

  bool add(const py::list& tensors, const std::vector<int32_t>& rows) {
    std::vector<StatsTensor> list(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      if (!read_on_cpu(PyList_GET_ITEM(tensors.ptr(), i), rows[i], &list[i])) return false;
    }
    run(list.data(), list.size());
    return true;
  }

  // Gradients of parameters; those that have none are passed over.
  bool add_grads(const py::list& params, const std::vector<int32_t>& rows) {
    std::vector<py::object> grads;
    std::vector<StatsTensor> list;
    grads.reserve(rows.size());
    list.reserve(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      py::object grad = grad_of(PyList_GET_ITEM(params.ptr(), i));
      if (grad.is_none()) continue;
      if (!read_on_cpu(grad.ptr(), rows[i], &list.emplace_back())) return false;
      grads.push_back(std::move(grad));
    }
    run(list.data(), list.size());
    return true;
  }

  // Moves the first rows to tensors of that many.
  void take(py::handle moments, py::handle counts) {
    auto* const taken_moments = static_cast<Moments*>(data_or_null(moments, "moments"));
    auto* const taken_counts = static_cast<int64_t*>(data_or_null(counts, "counts"));
    const int64_t num_rows = require_tensor(moments, "moments").shape[0];
    const std::lock_guard<std::mutex> lock(mutex_);
    auto* const rows = reinterpret_cast<Moments*>(args_.moments);
    std::copy_n(rows, num_rows, taken_moments);
    std::fill_n(rows, num_rows, Moments());
    std::copy_n(args_.counts, num_rows * kNumCounts, taken_counts);
    std::fill_n(args_.counts, num_rows * kNumCounts, 0);
  }

 private:
  // Subclasses may have no memory of their own.
  static bool read_on_cpu(PyObject* tensor, int32_t row, StatsTensor* out) {
    static PyObject* const plain =
        py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
    static PyObject* const parameter =
        py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    DLTensor view;
    return (type == plain || type == parameter) && read_whole(tensor, row, &view, out) &&
           view.device.device_type == kDLCPU;
  }

  // fastremedy.stats.hooks.is_watched
  bool is_watched() const {
    static PyObject* const name = PyUnicode_InternFromString("training");
    static PyObject* const graph_task =
        py::object(py::module_::import("torch._C").attr("_current_graph_task_id")).release().ptr();
    const auto is_training =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(keepalive_[0].ptr(), name));
    if (!is_training) throw py::error_already_set();
    const auto id = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(graph_task));
    if (!id) throw py::error_already_set();
    return PyObject_IsTrue(is_training.ptr()) == 1 && PyLong_AsLongLong(id.ptr()) == -1;
  }

  void run(const StatsTensor* tensors, size_t count) {
    ActivationStatsArgs args = args_;
    args.tensors = tensors;
    args.num_tensors = static_cast<int32_t>(count);
    int64_t numel = 0;
    for (size_t i = 0; i < count; ++i) numel += tensors[i].numel();
    // Another thread that has the rows may need the interpreter to go on: wait without it. Whoever
    // gives the interpreter up may get it back after 5 ms, so that small tensors do not.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock && numel <= kFewElements) {
      cpu::activation_stats(args);
      return;
    }
    const py::gil_scoped_release release;
    const auto held = lock ? std::move(lock) : std::unique_lock<std::mutex>(mutex_);
    cpu::activation_stats(args);
  }

  static constexpr int64_t kFewElements = 131072;  // they take 20 us

  std::array<py::object, 5> keepalive_;
  ActivationStatsArgs args_{};
  std::mutex mutex_;
};

// add_output as a function of Python's own: the way through pybind11 takes 2 us between layers,
// where nothing of it is in a cache, and this one half a microsecond.
PyObject* call_add_output(PyObject* capsule, PyObject* const* args, Py_ssize_t num_args) {
  if (num_args != 2) {
    PyErr_SetString(PyExc_TypeError, "add_output takes an output and its row");
    return nullptr;
  }
  const long row = PyLong_AsLong(args[1]);
  if (row == -1 && PyErr_Occurred()) return nullptr;
  auto* const rows = static_cast<StatsRows*>(PyCapsule_GetPointer(capsule, nullptr));
  try {
    return PyBool_FromLong(rows->add_output(args[0], static_cast<int32_t>(row)));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

py::object add_output_of(const py::object& rows) {
  static PyMethodDef definition = {
      "add_output", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_add_output)),
      METH_FASTCALL, nullptr};
  const auto release = [](PyObject* capsule) {
    Py_DECREF(static_cast<PyObject*>(PyCapsule_GetContext(capsule)));
  };
  const py::capsule capsule(rows.cast<StatsRows*>(), nullptr, +release);
  if (PyCapsule_SetContext(capsule.ptr(), py::object(rows).release().ptr()) != 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, capsule.ptr()));
}
#endif

}  // namespace

// Arguments are positional: names would double the time of a call.
void bind_activation_stats(py::module_& module) {
  module.def("activation_stats_update", &update);
  module.def("activation_stats_scratch_size", &scratch_size);
#ifndef FASTREMEDY_EMULATION
  py::class_<StatsRows>(module, "ActivationStatsRows")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&>())
      .def_property_readonly("add_output", &add_output_of)
      .def("add", &StatsRows::add)
      .def("add_grads", &StatsRows::add_grads)
      .def("take", &StatsRows::take);
#endif
}

}  // namespace fastremedy::host
