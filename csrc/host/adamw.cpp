#include "adamw.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#ifndef FASTREMEDY_EMULATION
#include "../cpu/launch.h"
#include "../cpu/parallel.h"
#endif

namespace fastremedy::host {
namespace {

PyObject* params_name() {
  static PyObject* const name = PyUnicode_InternFromString("params");
  return name;
}

void* data_or_null(const py::object& tensor, const char* name) {
  return tensor.is_none() ? nullptr : data_of(require_tensor(tensor, name));
}

py::object item(const py::list& list, size_t i) {
  return py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list.ptr(), i));
}

}  // namespace

AdamWTable::AdamWTable(const AdamWColumns& columns, const py::list& stateless,
                       const py::list& param_groups, const py::dict& state, uintptr_t retained,
                       py::function note_update)
    : state_(state),
      note_update_(std::move(note_update)),
      retained_(reinterpret_cast<RetainedTensors*>(retained)) {
  const size_t count = py::len(columns.owners);
  for (size_t i = 0; i < count; ++i) {
    const py::object param = item(columns.params, i);
    const DLTensor view = require_tensor(param, "param");
    const py::object exp_avg = item(columns.exp_avgs, i);
    const DLTensor state_view = require_tensor(exp_avg, "exp_avg");
    device_ = view.device;
    AdamWTensor tensor{};
    tensor.param = data_of(view);
    tensor.numel = numel_of(view);
    if (!dtype_of(view, &tensor.param_dtype) || !dtype_of(state_view, &tensor.state_dtype)) {
      throw py::type_error("parameters and state must be float32, float64, float16 or bfloat16");
    }
    tensor.exp_avg = data_of(state_view);
    tensor.exp_avg_sq = data_or_null(item(columns.exp_avg_sqs, i), "exp_avg_sq");
    tensor.max_exp_avg_sq = data_or_null(item(columns.max_exp_avg_sqs, i), "max_exp_avg_sq");
    tensor.residual = data_or_null(item(columns.residuals, i), "residual");
    tensor.step = static_cast<float*>(data_or_null(item(columns.steps, i), "step"));
    tensor.group = item(columns.groups, i).cast<int32_t>();
    tensor.noise_stream = item(columns.streams, i).cast<uint32_t>();
    tensors_.push_back(tensor);
    const py::object owner = item(columns.owners, i);
    rows_.push_back({owner, Distribution(owner, item(columns.specs, i)), Layout(view),
                     item(columns.indirect, i).cast<bool>()});
    const py::list* const kept[kNumColumns] = {&columns.params,      &columns.exp_avgs,
                                               &columns.exp_avg_sqs, &columns.max_exp_avg_sqs,
                                               &columns.residuals,   &columns.steps};
    for (const py::list* column : kept) {
      keepalive_.push_back(item(*column, i));
    }
  }
  for (const py::handle param : stateless) {
    stateless_.push_back(py::reinterpret_borrow<py::object>(param));
  }
  for (const py::handle handle : param_groups) {
    Group group{handle[params_name()], {}, {}};
    for (const py::handle param : group.params) {
      group.members.push_back(py::reinterpret_borrow<py::object>(param));
    }
    groups_.push_back(std::move(group));
  }
  hypers_.resize(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    groups_[g].hypers.read(item(param_groups, g), device_, &hypers_[g]);
  }
  for (const auto& [_, values] : state) {
    // torch lets users keep anything in `state`.
    if (PyDict_Check(values.ptr())) states_.emplace_back(py::reinterpret_borrow<py::dict>(values));
  }

#ifdef FASTREMEDY_EMULATION
  const int64_t chunk_size = cuda::kChunkSize;
#else
  const int64_t chunk_size = is_cuda(device_) ? cuda::kChunkSize : cpu::kChunkSize;
#endif
  grads_.resize(count);
  grad_owners_.resize(count);
  for (size_t i = 0; i < count; ++i) {
    grads_[i].numel = tensors_[i].numel;
    for (int64_t c = 0; c < num_chunks(tensors_[i].numel, chunk_size); ++c) {
      chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(c)});
    }
  }
#ifndef FASTREMEDY_EMULATION
  if (!is_cuda(device_)) {
    ranges_ = cpu::make_ranges(chunks_, grads_.data());
    partials_.resize(chunks_.size());
    corrections_.resize(count);
  }
#endif
}

AdamWTable::~AdamWTable() {
#ifndef FASTREMEDY_EMULATION
  if (retained_ != nullptr) release(retained_);
#endif
}

bool AdamWTable::groups_match(const py::list& param_groups) {
  if (param_groups.size() != groups_.size()) return false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups.ptr(), g);
    if (PyDict_GetItemWithError(group, params_name()) != groups_[g].params.ptr()) return false;
    PyObject* params = groups_[g].params.ptr();
    const std::vector<py::object>& members = groups_[g].members;
    const py::object sequence = py::reinterpret_steal<py::object>(
        PySequence_Fast(params, "params must be a list of parameters"));
    if (!sequence) throw py::error_already_set();
    if (static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr())) != members.size()) {
      return false;
    }
    PyObject* const* items = PySequence_Fast_ITEMS(sequence.ptr());
    for (size_t i = 0; i < members.size(); ++i) {
      if (items[i] != members[i].ptr()) return false;
    }
    if (!groups_[g].hypers.read(py::reinterpret_borrow<py::dict>(group), device_, &hypers_[g])) {
      return false;
    }
  }
  return true;
}

bool AdamWTable::state_matches(const py::dict& state) {
  return state.is(state_.dict()) && state_.is_unchanged() &&
         std::all_of(states_.begin(), states_.end(),
                     [](KnownDict& values) { return values.is_unchanged(); });
}

template <class Meanwhile>
bool AdamWTable::tensors_are_in_place(const Meanwhile& meanwhile) const {
#ifdef FASTREMEDY_EMULATION
  meanwhile();
  for (size_t i = 0; i < rows_.size(); ++i) {  // without torch, DLPack has to tell
    const DLTensor param = require_tensor(keepalive_[i * kNumColumns], "param");
    if (data_of(param) != tensors_[i].param || !rows_[i].layout.matches(param)) return false;
    const DLTensor exp_avg = require_tensor(keepalive_[i * kNumColumns + 1], "exp_avg");
    if (data_of(exp_avg) != tensors_[i].exp_avg) return false;
    const DLTensor step = require_tensor(keepalive_[i * kNumColumns + 5], "step");
    if (data_of(step) != tensors_[i].step) return false;
  }
  return true;
#else
  constexpr int64_t kPart = 256;
  const int64_t count = retained_ == nullptr ? 0 : num_retained(retained_);
  std::atomic<bool> are_in_place{true};
  cpu::parallel_for((count + kPart - 1) / kPart, false, is_cuda(device_) || count <= 4 * kPart,
                    [&](int64_t part) {
                      const int64_t begin = part * kPart, end = std::min(begin + kPart, count);
                      if (!is_in_place(retained_, begin, end)) are_in_place = false;
                    },
                    meanwhile);
  return are_in_place;
#endif
}

// False if the kernels cannot take the gradient as it is.
bool AdamWTable::read_grad(PyObject* grad, size_t row) {
  DLTensor view;
  DType dtype;
  if (!read_tensor(grad, &view) || !dtype_of(view, &dtype)) return false;
  const bool is_double = tensors_[row].param_dtype == DType::kFloat64;
  if (!same_device(view.device, device_) || is_double != (dtype == DType::kFloat64) ||
      !rows_[row].layout.matches(view) || is_negated(grad, tensors_[row].numel)) {
    return false;
  }
  // Null means that there is no gradient; an empty one has to have some other address.
  grads_[row].data = grads_[row].numel == 0 ? tensors_[row].step : data_of(view);
  grads_[row].dtype = dtype;
  ++num_grads_;
  has_float64_grad_ |= is_double;
  return true;
}

std::optional<std::vector<int64_t>> AdamWTable::gather(const py::list& param_groups,
                                                       const py::dict& state) {
  if (!groups_match(param_groups) || !state_matches(state)) return std::nullopt;
  for (const py::object& param : stateless_) {
    if (!grad_of(param.ptr()).is_none()) return std::nullopt;
  }
  std::vector<int64_t> unread;
  if (!tensors_are_in_place([&] { unread = read_grads(); })) return std::nullopt;
  return unread;
}

std::vector<int64_t> AdamWTable::read_grads() {
  num_grads_ = 0;
  has_float64_grad_ = false;
  std::vector<int64_t> unread;
  for (size_t i = 0; i < rows_.size(); ++i) {
    py::object& grad = grad_owners_[i];
    grads_[i].data = nullptr;
    grad = grad_of(rows_[i].owner.ptr());
    if (grad.is_none()) continue;
    grad = rows_[i].distribution.memory_of(std::move(grad));
    if (rows_[i].is_indirect || !grad || !read_grad(grad.ptr(), i)) {
      unread.push_back(static_cast<int64_t>(i));
    }
  }
  return unread;
}

void AdamWTable::set_grad(int64_t row, py::object grad) {
  if (!read_grad(grad.ptr(), row)) {
    throw py::value_error("gradient of row " + std::to_string(row) +
                          " must have the parameter's device, dtype, shape and strides");
  }
  grad_owners_[row] = std::move(grad);
}

py::list AdamWTable::grads() const {
  py::list list(grad_owners_.size());
  for (size_t i = 0; i < grad_owners_.size(); ++i) {
    list[i] = grad_owners_[i] ? grad_owners_[i] : py::none();
  }
  return list;
}

AdamWArgs AdamWTable::arguments(const Step& step) {
  AdamWArgs args{};
  args.norm.kind = step.needs_norm ? norm_kind(step.norm_type) : NormKind::kNone;
  args.norm.num_chunks = static_cast<int32_t>(chunks_.size());
  ClipOptions& options = args.norm.options;
  options.max_norm = step.max_norm;
  options.norm_type = step.norm_type;
  options.skip_nonfinite = step.skip_nonfinite;
  options.grad_scale =
      scalar_pointer(step.grad_scale, "grad_scale", device_, &options.grad_scale_dtype);
  options.found_inf =
      static_cast<const float*>(scalar_pointer(step.found_inf, "found_inf", device_));
  args.norm.total_norm = reinterpret_cast<void*>(step.total_norm);
  args.norm.total_norm_dtype = has_float64_grad_ ? DType::kFloat64 : DType::kFloat32;
  args.num_tensors = static_cast<int32_t>(tensors_.size());
  args.num_skipped = reinterpret_cast<int64_t*>(step.num_skipped);
  args.rounding = static_cast<Rounding>(step.rounding);
  args.seed = step.seed;
  args.update_stats = reinterpret_cast<UpdateStats*>(step.update_stats);
  return args;
}

void AdamWTable::step(const Step& step) {
  const AdamWArgs args = arguments(step);
  if (is_cuda(device_)) {
    step_on_cuda(args, step.workspace);
    note_update_();  // the host does not know whether the step is skipped
  } else {
    step_on_cpu(args);
  }
  for (py::object& grad : grad_owners_) grad = py::object();
}

void AdamWTable::step_on_cpu(AdamWArgs args) {
#ifdef FASTREMEDY_EMULATION
  static_cast<void>(args);
  throw std::runtime_error("the emulation has no CPU kernels");
#else
  ClipResult result;
  args.norm.grads = grads_.data();
  args.norm.chunks = chunks_.data();
  args.norm.partials = partials_.data();
  args.norm.result = &result;
  args.tensors = tensors_.data();
  args.hypers = hypers_.data();
  args.corrections = corrections_.data();
  if (args.update_stats != nullptr) {
    update_partials_.resize(chunks_.size());
    args.update_partials = update_partials_.data();
  }
  {
    const py::gil_scoped_release release;
    cpu::adamw_prepare(args, ranges_);
  }
  if (result.skip) return;
  PyThreadState* released = nullptr;
  cpu::adamw_update(args, ranges_, [&] {
    note_update_();
    released = PyEval_SaveThread();
  });
  if (released != nullptr) PyEval_RestoreThread(released);
#endif
}

void bind_adamw(py::module_& module) {
  py::class_<AdamWTable>(module, "AdamWTable", py::module_local())
      .def(py::init([](py::list owners, py::list specs, py::list params, py::list exp_avgs,
                       py::list exp_avg_sqs, py::list max_exp_avg_sqs, py::list residuals,
                       py::list steps, py::list groups, py::list streams, py::list indirect,
                       const py::list& stateless, const py::list& param_groups,
                       const py::dict& state, uintptr_t retained, py::function note_update) {
             return new AdamWTable({owners, specs, params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs,
                                    residuals, steps, groups, streams, indirect},
                                   stateless, param_groups, state, retained,
                                   std::move(note_update));
           }),
           py::kw_only(), py::arg("owners"), py::arg("specs"), py::arg("params"),
           py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"),
           py::arg("residuals"), py::arg("steps"), py::arg("groups"), py::arg("streams"),
           py::arg("indirect"), py::arg("stateless"), py::arg("param_groups"), py::arg("state"),
           py::arg("retained"), py::arg("note_update"))
      .def("gather", &AdamWTable::gather, py::arg("param_groups"), py::arg("state"))
      .def("set_grad", &AdamWTable::set_grad, py::arg("row"), py::arg("grad"))
      .def("grads", &AdamWTable::grads)
      .def_property_readonly("num_grads", &AdamWTable::num_grads)
      .def_property_readonly("has_float64_grad", &AdamWTable::has_float64_grad)
      .def("workspace_bytes", &AdamWTable::workspace_bytes)
      .def(
          "step",
          [](AdamWTable& table, double max_norm, double norm_type, bool needs_norm,
             bool skip_nonfinite, py::object grad_scale, py::object found_inf, int32_t rounding,
             uint64_t seed, uintptr_t total_norm, uintptr_t num_skipped, uintptr_t update_stats,
             uintptr_t workspace) {
            table.step({max_norm, norm_type, needs_norm, skip_nonfinite, grad_scale, found_inf,
                        rounding, seed, total_norm, num_skipped, update_stats, workspace});
          },
          py::arg("max_norm"), py::arg("norm_type"), py::arg("needs_norm"),
          py::arg("skip_nonfinite"), py::arg("grad_scale"), py::arg("found_inf"),
          py::arg("rounding"), py::arg("seed"), py::arg("total_norm"), py::arg("num_skipped"),
          py::arg("update_stats"), py::arg("workspace"));
}

}  // namespace fastremedy::host
