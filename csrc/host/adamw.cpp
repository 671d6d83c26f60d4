#include "adamw.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>

#ifndef FASTREMEDY_EMULATION
#include "../cpu/launch.h"
#include "../cpu/parallel.h"
#endif

namespace fastremedy::host {
namespace {

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
    Group group{handle["params"], {}, {}};
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
  prepare_gather();
#ifndef FASTREMEDY_EMULATION
  if (!is_cuda(device_)) {
    ranges_ = cpu::make_ranges(chunks_, grads_.data());
    whole_ = {0, static_cast<int32_t>(chunks_.size())};
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

void AdamWTable::set_grad(int64_t row, py::object grad) {
  if (!read_grad(grad.ptr(), row)) {
    throw py::value_error("gradient of row " + std::to_string(row) +
                          " must have the parameter's device, dtype, shape and strides");
  }
  count_grad(row);
  has_partials_ = false;
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
  const Clock clock;
  const std::vector<int32_t>& ranges = is_alone_ ? whole_ : ranges_;
  {
    const py::gil_scoped_release release;
    const Norm norm{args.norm.kind, args.norm.options.norm_type};
    cpu::adamw_prepare(args, ranges, has_partials_ && norm == last_norm_);
    last_norm_ = norm;
  }
  if (result.skip) return;
  PyThreadState* released = nullptr;
  cpu::adamw_update(args, ranges, [&] {
    note_update_();
    released = PyEval_SaveThread();
  });
  if (released != nullptr) PyEval_RestoreThread(released);
  if (is_small_) way_.note(gather_seconds_ + clock.seconds());
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
      .def_property_readonly("is_alone", &AdamWTable::is_alone)
      .def_property_readonly("has_handles", &AdamWTable::has_handles)
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
