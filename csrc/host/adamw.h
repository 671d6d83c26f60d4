// The tensor table of an optimizer: what AdamW needs of all parameters of one device.
//
// Built once, it holds what does not change: pointers of parameters and state, sizes, chunks. A
// step reads .grad of every parameter, checks that nothing else has changed, and launches.
#pragma once

#include <atomic>
#include <optional>

#include "../core/arguments.h"
#include "device.h"
#include "dtensor.h"
#include "hyper.h"
#include "known_dict.h"
#include "quicker_way.h"
#include "retained_tensors.h"

namespace fastremedy::host {

// The lists that the table is built from; one entry per parameter with state.
struct AdamWColumns {
  py::list owners;  // parameters as the param groups hold them
  py::list specs;   // DTensorSpec of a DTensor, None of a plain tensor
  py::list params;  // what the kernels update; the owner itself unless it is indirect
  py::list exp_avgs;
  py::list exp_avg_sqs;
  py::list max_exp_avg_sqs;  // None without amsgrad
  py::list residuals;        // None without
  py::list steps;
  py::list groups;    // index of the param group
  py::list streams;   // keys the noise of stochastic rounding
  py::list indirect;  // True: Python hands the gradient over (complex, gaps in memory)
};

class AdamWTable {
 public:
  // `stateless`: parameters without state; when one gets a gradient the table is out of date.
  // `retained`: address of the RetainedTensors of columns.params, 0 where there are none.
  // `note_update`: tells autograd that columns.params change.
  AdamWTable(const AdamWColumns& columns, const py::list& stateless, const py::list& param_groups,
             const py::dict& state, uintptr_t retained, py::function note_update);
  ~AdamWTable();
  AdamWTable(const AdamWTable&) = delete;
  AdamWTable& operator=(const AdamWTable&) = delete;

  // Reads the gradients. None: the optimizer has changed, build a new table. Otherwise the rows
  // whose gradient the caller has to hand over with set_grad.
  std::optional<std::vector<int64_t>> gather(const py::list& param_groups, const py::dict& state);
  void set_grad(int64_t row, py::object grad);
  // This step's gradients as the kernels read them; None where there is none, or none is set yet.
  py::list grads() const;

  size_t num_grads() const { return num_grads_; }
  bool has_float64_grad() const { return has_float64_grad_; }
  // Whether one thread takes this step.
  bool is_alone() const { return is_alone_; }
  // Whether gradients are read through the stable ABI, by any thread.
  bool has_handles() const { return handle_offset_ != 0; }
  size_t workspace_bytes() const;

  struct Step {
    double max_norm;
    double norm_type;
    bool needs_norm;
    bool skip_nonfinite;
    py::object grad_scale;
    py::object found_inf;
    int32_t rounding;
    uint64_t seed;
    uintptr_t total_norm;    // scalar on the device, 0 if not needed
    uintptr_t num_skipped;   // int64 scalar on the device
    uintptr_t update_stats;  // float64 [rows, kNumUpdateStats] on the device, 0 if not wanted
    uintptr_t workspace;     // zeros at first, then left alone
  };

  // Updates; releases the gradients.
  void step(const Step& step);

 private:
  struct Row {
    py::object owner;
    Distribution distribution;
    Layout layout;
    bool is_indirect;
  };
  struct Group {
    py::object params;
    std::vector<py::object> members;
    HyperReader hypers;
  };

  bool groups_match(const py::list& param_groups);
  bool state_matches(const py::dict& state);
  void prepare_gather();
  // Asks for all gradients and reads them. False if a parameter or a state tensor has got other
  // memory, or a parameter another layout.
  bool look_at_tensors();
  void ask_for_grads();

  // What is known of a gradient so far.
  enum class Lookup : uint8_t {
    kDone,     // it is read, or there is none
    kPending,  // any thread may read it
    kFailed    // the kernels cannot take it as it is
  };
  Lookup look_up(PyObject* grad, size_t row);
  // Waits until rows [begin, end) have been asked for, and reads those that are pending.
  void read_pending(int64_t begin, int64_t end);
  void start_norm(int64_t begin, int64_t end);
  bool read_grad(PyObject* grad, size_t row);
  bool take_grad(void* data, DType dtype, size_t row);
  void count_grad(size_t row);
  const void* handle_of(PyObject* tensor) const;
  void fetch_tensor(PyObject* tensor) const;

  AdamWArgs arguments(const Step& step);
  void step_on_cpu(AdamWArgs args);
  void step_on_cuda(AdamWArgs args, uintptr_t workspace);

  DLDevice device_{};
  std::vector<Row> rows_;
  std::vector<Group> groups_;
  KnownDict state_;
  std::vector<KnownDict> states_;  // of the parameters
  std::vector<py::object> stateless_;
  static constexpr size_t kNumColumns = 6;
  std::vector<py::object> keepalive_;  // kNumColumns tensors a row, from params to steps
  py::function note_update_;
  RetainedTensors* retained_;
  size_t handle_offset_ = 0;  // of find_handle

  std::vector<AdamWTensor> tensors_;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> ranges_;
  std::vector<int32_t> whole_;  // one range
  std::vector<AdamWHyper> hypers_;
  std::vector<GradTensor> grads_;
  std::vector<py::object> grad_owners_;
  std::vector<Lookup> lookups_;        // of this step's gradients
  std::atomic<int64_t> num_asked_{0};  // rows whose owner and lookup are known
  size_t num_grads_ = 0;
  bool has_float64_grad_ = false;

  struct Norm {
    NormKind kind;
    double norm_type;
    bool operator==(const Norm& other) const {
      return kind == other.kind && norm_type == other.norm_type;
    }
  };
  bool is_small_ = false;  // CPU: a row is a chunk, and there is little to read
  bool is_alone_ = false;  // CPU: one thread takes this step
  double gather_seconds_ = 0;
  // CPU: a small step takes with the pool (0.09 ms instead of 0.15 for a thousand tensors), or
  // alone, where threads are far from each other: on two sockets it takes 0.28 ms with the pool.
  QuickerWay way_;
  bool has_partials_ = false;                 // CPU: those of last_norm_, from these gradients
  Norm last_norm_{NormKind::kNone, 2.0};      // CPU: what the last step took
  std::vector<double> partials_;              // CPU
  std::vector<UpdateStats> update_partials_;  // CPU
  std::vector<AdamWCorrection> corrections_;  // CPU
  uintptr_t uploaded_to_ = 0;                 // CUDA: workspace that holds tensors and chunks
  std::vector<char> uploaded_;                // CUDA: gradients and hyper-parameters as uploaded
  bool is_captured_ = false;                  // CUDA: replays of a graph upload, too
};

void bind_adamw(py::module_& module);

}  // namespace fastremedy::host
