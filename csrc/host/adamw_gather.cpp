// The begin of a step: whether all is as the table knows it, and where this step's gradients lie.
//
// Only the thread that holds the GIL can ask parameters for their gradients. Meanwhile the pool
// looks at tensors, through the stable ABI, which needs neither Python nor a reference of its own.
#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "adamw.h"

#ifndef FASTREMEDY_EMULATION
#include "../cpu/launch.h"
#include "../cpu/parallel.h"
#endif

namespace fastremedy::host {
namespace {

// What a thread takes at a time.
constexpr int64_t kTensorsPerPart = 256;
constexpr int64_t kRowsPerPart = 64;
constexpr size_t kFetchAhead = 6;

// Elements that a thread reads in less than 0.1 ms: so long the GIL may be held.
constexpr int64_t kSmall = 1 << 20;

PyObject* params_name() {
  static PyObject* const name = PyUnicode_InternFromString("params");
  return name;
}

PyTypeObject* tensor_type() {
  static const auto* const type = new py::object(py::module_::import("torch").attr("Tensor"));
  return reinterpret_cast<PyTypeObject*>(type->ptr());
}

}  // namespace

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

// False if the kernels cannot take the gradient as it is.
bool AdamWTable::read_grad(PyObject* grad, size_t row) {
  DLTensor view;
  DType dtype;
  if (!read_tensor(grad, &view) || !dtype_of(view, &dtype) || !same_device(view.device, device_) ||
      !rows_[row].layout.matches(view) || is_negated(grad, tensors_[row].numel)) {
    return false;
  }
  return take_grad(data_of(view), dtype, row);
}

bool AdamWTable::take_grad(void* data, DType dtype, size_t row) {
  if ((dtype == DType::kFloat64) != (tensors_[row].param_dtype == DType::kFloat64)) return false;
  // Null means that there is no gradient; an empty one has to have some other address.
  if (grads_[row].numel == 0) data = tensors_[row].step;
  if (data == nullptr) return false;
  grads_[row].data = data;
  grads_[row].dtype = dtype;
  return true;
}

std::optional<std::vector<int64_t>> AdamWTable::gather(const py::list& param_groups,
                                                       const py::dict& state) {
  const Clock clock;
  is_alone_ = is_small_ && way_.is_second();
  if (!groups_match(param_groups) || !state_matches(state)) return std::nullopt;
  for (const py::object& param : stateless_) {
    if (!grad_of(param.ptr()).is_none()) return std::nullopt;
  }
  if (!look_at_tensors()) return std::nullopt;
  num_grads_ = 0;
  has_float64_grad_ = false;
  std::vector<int64_t> unread;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (lookups_[i] != Lookup::kDone) unread.push_back(static_cast<int64_t>(i));
    count_grad(i);
  }
  gather_seconds_ = clock.seconds();
  return unread;
}

void AdamWTable::count_grad(size_t row) {
  if (grads_[row].data == nullptr) return;
  ++num_grads_;
  has_float64_grad_ |= grads_[row].dtype == DType::kFloat64;
}

void AdamWTable::ask_for_grads() {
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (i + kFetchAhead < rows_.size()) fetch_tensor(rows_[i + kFetchAhead].owner.ptr());
    py::object& grad = grad_owners_[i];
    grads_[i].data = nullptr;
    grad = grad_of(rows_[i].owner.ptr());
    if (!grad.is_none()) {
      grad = rows_[i].distribution.memory_of(std::move(grad));
      lookups_[i] = look_up(grad.ptr(), i);
    }
    if ((i + 1) % kRowsPerPart == 0) num_asked_.store(i + 1, std::memory_order_release);
  }
}

AdamWTable::Lookup AdamWTable::look_up(PyObject* grad, size_t row) {
  if (rows_[row].is_indirect || grad == nullptr) return Lookup::kFailed;
  // A minus sign is asked for in Python.
  const bool is_plain = Py_TYPE(grad) == tensor_type() && !can_be_negated(tensors_[row].numel);
  if (is_plain && handle_offset_ != 0) return Lookup::kPending;
  return read_grad(grad, row) ? Lookup::kDone : Lookup::kFailed;
}

#ifdef FASTREMEDY_EMULATION

void AdamWTable::prepare_gather() { lookups_.resize(rows_.size()); }
void AdamWTable::fetch_tensor(PyObject*) const {}

bool AdamWTable::look_at_tensors() {
  std::fill(lookups_.begin(), lookups_.end(), Lookup::kDone);
  ask_for_grads();
  for (size_t i = 0; i < rows_.size(); ++i) {  // without torch, DLPack has to tell
    const DLTensor param = require_tensor(keepalive_[i * kNumColumns], "param");
    if (data_of(param) != tensors_[i].param || !rows_[i].layout.matches(param)) return false;
    const DLTensor exp_avg = require_tensor(keepalive_[i * kNumColumns + 1], "exp_avg");
    if (data_of(exp_avg) != tensors_[i].exp_avg) return false;
    const DLTensor step = require_tensor(keepalive_[i * kNumColumns + 5], "step");
    if (data_of(step) != tensors_[i].step) return false;
  }
  return true;
}

#else

void AdamWTable::prepare_gather() {
  lookups_.resize(rows_.size());
  if (retained_ != nullptr) {
    std::vector<const void*> params;
    for (size_t i = 0; i < rows_.size(); ++i) params.push_back(keepalive_[i * kNumColumns].ptr());
    handle_offset_ = find_handle(retained_, params, tensor_type()->tp_basicsize);
  }
  int64_t numel = 0;
  is_small_ = !is_cuda(device_) && chunks_.size() == rows_.size();
  for (const AdamWTensor& tensor : tensors_) {
    is_small_ &= num_chunks(tensor.numel, cpu::kChunkSize) == 1;
    numel += tensor.numel;
  }
  is_small_ &= numel <= kSmall;
}

const void* AdamWTable::handle_of(PyObject* tensor) const {
  return reinterpret_cast<const char*>(tensor) + handle_offset_;
}

// What torch reads of a parameter to find its gradient. It waits for memory in between, and a
// thousand parameters are in no cache of the first level.
void AdamWTable::fetch_tensor(PyObject* tensor) const {
  if (handle_offset_ == 0) return;
  const char* content;
  std::memcpy(&content, handle_of(tensor), sizeof(content));
  for (int line = 0; line < 3; ++line) __builtin_prefetch(content + line * 64);
}

bool AdamWTable::look_at_tensors() {
  const int64_t num_places = retained_ == nullptr ? 0 : num_retained(retained_);
  const int64_t num_place_parts = (num_places + kTensorsPerPart - 1) / kTensorsPerPart;
  const auto num_rows = static_cast<int64_t>(rows_.size());
  const int64_t num_row_parts =
      handle_offset_ == 0 ? 0 : (num_rows + kRowsPerPart - 1) / kRowsPerPart;
  const bool is_serial = is_cuda(device_) || is_alone_ || num_places <= 4 * kTensorsPerPart;
  const bool starts_norm = is_small_ && num_row_parts > 0 && !is_serial;
  std::fill(lookups_.begin(), lookups_.end(), Lookup::kDone);
  num_asked_.store(0, std::memory_order_relaxed);
  std::atomic<bool> are_in_place{true};
  std::atomic<int64_t> num_taken{0};
  const auto look = [&](int64_t) {
    // One after the other: rows come to be known from the first on.
    const int64_t part = num_taken++;
    if (part < num_place_parts) {
      const int64_t begin = part * kTensorsPerPart;
      const int64_t end = std::min(begin + kTensorsPerPart, num_places);
      if (!is_in_place(retained_, begin, end)) are_in_place = false;
    } else {
      const int64_t begin = (part - num_place_parts) * kRowsPerPart;
      const int64_t end = std::min(begin + kRowsPerPart, num_rows);
      read_pending(begin, end);
      if (starts_norm) start_norm(begin, end);
    }
  };
  const auto ask = [&] {
    try {
      ask_for_grads();
    } catch (...) {
      num_asked_.store(num_rows, std::memory_order_release);  // nobody has to wait
      throw;
    }
    num_asked_.store(num_rows, std::memory_order_release);
  };
  has_partials_ = false;
  cpu::parallel_for(num_place_parts + num_row_parts, false, is_serial, look, ask);
  has_partials_ = starts_norm;
  return are_in_place;
}

void AdamWTable::start_norm(int64_t begin, int64_t end) {
  GradNormArgs args{};
  args.grads = grads_.data();
  args.chunks = chunks_.data();
  args.num_chunks = static_cast<int32_t>(chunks_.size());
  args.kind = last_norm_.kind;
  args.options.norm_type = last_norm_.norm_type;
  args.partials = partials_.data();
  if (args.kind != NormKind::kNone) {
    cpu::grad_norm_partials(args, static_cast<int32_t>(begin), static_cast<int32_t>(end));
  }
}

void AdamWTable::read_pending(int64_t begin, int64_t end) {
  while (num_asked_.load(std::memory_order_acquire) < end) std::this_thread::yield();
  for (int64_t i = begin; i < end; ++i) {
    if (lookups_[i] != Lookup::kPending) continue;
    void* data;
    DType dtype;
    const void* const handle = handle_of(grad_owners_[i].ptr());
    const bool is_taken =
        fastremedy::read_grad(retained_, i, handle, &data, &dtype) && take_grad(data, dtype, i);
    lookups_[i] = is_taken ? Lookup::kDone : Lookup::kFailed;
  }
}

#endif

}  // namespace fastremedy::host
