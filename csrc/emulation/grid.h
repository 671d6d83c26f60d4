// Runs the threads of a CUDA grid on the CPU, in one of two ways:
//
//   fibers        (default) one thread of the system switches between them at barriers. Fast and
//                 repeatable; a barrier that some threads of a block never reach is reported.
//   real threads  (FASTREMEDY_EMULATION_THREADS) one thread of the system each, so that
//                 ThreadSanitizer sees a missing barrier or fence as a data race.
//
// Up to kResidentBlocks blocks run at once, so what passes between blocks is tested as well. Not
// covered: weak memory order, partial warps, clusters, asynchronous copies, tensor cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifdef FASTREMEDY_EMULATION_THREADS
#include <pthread.h>
#include <semaphore.h>
#elif !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) \
  (static_cast<void>(address), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) \
  (static_cast<void>(address), static_cast<void>(size))
#endif

namespace fastremedy::emulation {

#ifdef FASTREMEDY_EMULATION_THREADS
inline constexpr bool kHasRealThreads = true;
#else
inline constexpr bool kHasRealThreads = false;
#endif

inline constexpr int kWarpSize = 32;
inline constexpr int kResidentBlocks = 6;
// Of the variables of all kernels together; what one may have, 48 KB, ptxas checks.
inline constexpr size_t kSharedBytes = 64 << 10;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "CUDA emulation: %s\n", reason);
  std::abort();
}

struct Index {
  Index(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
  Index at(unsigned i) const { return {i % x, i / x % y, i / (x * y)}; }

  unsigned x, y, z;
};

#ifdef FASTREMEDY_EMULATION_THREADS

class Barrier {
 public:
  explicit Barrier(int size) { pthread_barrier_init(&barrier_, nullptr, size); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

#else

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait();
  bool is_past(unsigned generation) const { return generation_ != generation; }

 private:
  const int size_;
  int arrived_ = 0;
  unsigned generation_ = 0;
};

#endif

// Exchanges of a warp or votes of a block. Two turns are kept: a thread that is ahead writes the
// next one while others still read this one, and cannot get further before they arrive.
class Exchange {
 public:
  explicit Exchange(int size) : barrier_(size), turns_{Values(size), Values(size)} {}

  const std::vector<uint64_t>& gather(int place, unsigned turn, uint64_t value) {
    Values& values = turns_[turn % 2];
    values[place] = value;
    barrier_.wait();
    return values;
  }

 private:
  using Values = std::vector<uint64_t>;
  Barrier barrier_;
  Values turns_[2];
};

struct Block {
  Block(Index grid, Index size, unsigned i)
      : grid(grid), size(size), index(grid.at(i)), barrier(size.count()), votes(size.count()) {
    if (size.count() % kWarpSize != 0) fail("a block must be a multiple of 32 threads");
    for (unsigned w = 0; w < size.count() / kWarpSize; ++w) warps.emplace_back(kWarpSize);
    std::memset(shared, 0xcd, sizeof(shared));  // shared memory starts undefined
    ASAN_POISON_MEMORY_REGION(shared, sizeof(shared));
  }
  ~Block() { ASAN_UNPOISON_MEMORY_REGION(shared, sizeof(shared)); }

  const Index grid, size, index;
  Barrier barrier;
  Exchange votes;
  std::deque<Exchange> warps;
  alignas(64) char shared[kSharedBytes];
};

struct Thread {
  Block* block;
  Index index;
  int place;  // in the block
  unsigned num_votes = 0;
  unsigned num_shuffles = 0;
  bool has_fenced = false;
  const unsigned* last_atomic = nullptr;  // its address
};

inline Thread*& current_thread() {
  static thread_local Thread* thread = nullptr;
  return thread;
}

inline std::atomic<bool>& has_failed_assert() {
  static std::atomic<bool> has_failed{false};
  return has_failed;
}

// Every variable in shared memory has one offset, the same in all blocks, and a gap before the
// next.
inline size_t reserve_shared(size_t bytes) {
  constexpr size_t kAlignment = 64;
  static std::atomic<size_t> end{0};
  const size_t begin = end.fetch_add((bytes / kAlignment + 2) * kAlignment);
  if (begin + bytes > kSharedBytes) fail("out of shared memory");
  return begin;
}

inline void* shared_memory(size_t offset, size_t bytes) {
  char* address = current_thread()->block->shared + offset;
  ASAN_UNPOISON_MEMORY_REGION(address, bytes);
  return address;
}

using Body = std::function<void()>;

#ifdef FASTREMEDY_EMULATION_THREADS

// A thread of the system, for one thread of each launch: to start one takes as long as a kernel.
class Worker {
 public:
  Worker() {
    sem_init(&has_work_, 0, 0);
    sem_init(&is_done_, 0, 0);
    std::thread([this] { work(); }).detach();
  }

  void run(Thread& thread, const Body& body) {
    thread_ = &thread;
    body_ = &body;
    sem_post(&has_work_);
  }
  void join() { wait(is_done_); }

 private:
  [[noreturn]] void work() {
    while (true) {
      wait(has_work_);
      current_thread() = thread_;
      (*body_)();
      sem_post(&is_done_);
    }
  }

  static void wait(sem_t& semaphore) {
    while (sem_wait(&semaphore) != 0) {  // a signal came
    }
  }

  sem_t has_work_, is_done_;
  Thread* thread_;
  const Body* body_;
};

inline void run_threads(std::vector<Thread>& threads, const Body& body) {
  static auto& workers = *new std::deque<Worker>;  // which wait for work until the process ends
  while (workers.size() < threads.size()) workers.emplace_back();
  for (size_t i = 0; i < threads.size(); ++i) workers[i].run(threads[i], body);
  for (size_t i = 0; i < threads.size(); ++i) workers[i].join();
}

#else

// Where a thread goes on, with a stack of its own. The contexts of the system keep a mask of
// signals, too, for which each switch takes two system calls: most of the time of a barrier.
#ifdef __x86_64__

class Context {
 public:
  void start(char* stack, size_t bytes, void (*body)()) {
    // What `go` takes from the stack: six registers and the address to return to, after which the
    // top is 8 bytes off a multiple of 16, as behind a call.
    void** const end = reinterpret_cast<void**>(stack + bytes);
    end[-2] = reinterpret_cast<void*>(body);
    end[-1] = nullptr;  // a backtrace of the body ends here
    top_ = end - 8;
  }
  void go_to(Context& other) { go(&top_, other.top_); }

 private:
  [[gnu::naked, gnu::noinline]] static void go(void**, void*) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi)\n"
        "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
  }

  void* top_ = nullptr;
};

#else

class Context {
 public:
  void start(char* stack, size_t bytes, void (*body)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    makecontext(&context_, body, 0);
  }
  void go_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

class Scheduler {
 public:
  // Switches between the threads until all are done.
  void run(std::vector<Thread>& threads, const Body& body) {
    body_ = &body;
    fibers_.resize(threads.size());
    if (num_stacks_ < threads.size()) {
      num_stacks_ = threads.size();
      stacks_.reset(new char[num_stacks_ * kStackBytes]);
    }
    for (size_t i = 0; i < threads.size(); ++i) start(threads[i], i);
    size_t num_done = 0;
    // Rounds alternate in direction: no thread is always the first.
    for (bool is_forward = true; num_done < threads.size(); is_forward = !is_forward) {
      bool is_stuck = true;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        running_ = &fibers_[is_forward ? i : fibers_.size() - 1 - i];
        if (running_->is_done) continue;
        if (running_->barrier && !running_->barrier->is_past(running_->generation)) continue;
        current_thread() = running_->thread;
        main_.go_to(running_->context);
        num_done += running_->is_done;
        is_stuck = false;
      }
      if (is_stuck) fail("deadlock: threads wait at a barrier that others never reach");
    }
    current_thread() = nullptr;
  }

  void wait(const Barrier* barrier, unsigned generation) {
    running_->barrier = barrier;
    running_->generation = generation;
    running_->context.go_to(main_);
    running_->barrier = nullptr;
  }

  static Scheduler& instance() {
    static thread_local Scheduler scheduler;
    return scheduler;
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10;  // of a fiber

  struct Fiber {
    Context context;
    Thread* thread;
    const Barrier* barrier;
    unsigned generation;
    bool is_done;
  };

  void start(Thread& thread, size_t i) {
    Fiber& fiber = fibers_[i];
    fiber.thread = &thread;
    fiber.barrier = nullptr;
    fiber.is_done = false;
    fiber.context.start(stacks_.get() + i * kStackBytes, kStackBytes, [] {
      Scheduler& scheduler = instance();
      (*scheduler.body_)();
      scheduler.running_->is_done = true;
      scheduler.running_->context.go_to(scheduler.main_);  // for good
    });
  }

  const Body* body_ = nullptr;
  Fiber* running_ = nullptr;
  Context main_;
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  size_t num_stacks_ = 0;
};

inline void Barrier::wait() {
  if (++arrived_ == size_) {
    arrived_ = 0;
    ++generation_;
  } else {
    Scheduler::instance().wait(this, generation_);
  }
}

inline void run_threads(std::vector<Thread>& threads, const Body& body) {
  Scheduler::instance().run(threads, body);
}

#endif

// What launches leave instead of running while a graph is captured; null otherwise.
using Graph = std::vector<Body>;

inline Graph*& captured_graph() {
  static Graph* graph = nullptr;
  return graph;
}

inline void launch(Index grid, Index block_size, const Body& body) {
  if (Graph* const graph = captured_graph()) {
    graph->push_back([=] { launch(grid, block_size, body); });
    return;
  }
  const unsigned num_threads = block_size.count();
  for (unsigned first = 0; first < grid.count(); first += kResidentBlocks) {
    std::deque<Block> blocks;
    std::vector<Thread> threads;
    const unsigned last = std::min(grid.count(), first + kResidentBlocks);
    for (unsigned i = first; i < last; ++i) {
      Block& block = blocks.emplace_back(grid, block_size, i);
      for (unsigned t = 0; t < num_threads; ++t) {
        threads.push_back({&block, block_size.at(t), static_cast<int>(t)});
      }
    }
    run_threads(threads, body);
  }
}

}  // namespace fastremedy::emulation
