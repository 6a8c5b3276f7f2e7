// A thread pool for one kind of job: a program of phases that every thread walks in the same order.
//
//   thread 0   [unit unit unit]wait[unit unit]wait ...      phase p is over when all of its units are *done*,
//   thread 1   [unit unit     ]wait[unit unit]wait ...      not when all threads have arrived
//   thread 2   ....... descheduled .........[ late: finds p done, walks on ]
//
// Units [0, total) of a phase are cut into one range per thread; a thread claims units from the front of its
// own range (neighbouring units lie side by side in memory), then from the ranges of the others. So a thread that
// lost its core delays the others by the one unit in its hands. The end of a job does not wait for threads
// that hold nothing either: each counter carries the job's epoch, and a thread left behind in an old job can claim
// nothing any more.
//
// The rule for job data: the caller writes it between begin() and run(). Threads read it to find out how many
// units there are, and claim() then checks that the epoch is still theirs, like a reader of a sequence lock.
// Memory that a job points to may be freed or moved only after quiesce().
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>

#include "vec.h"

namespace kv {

KV_INLINE void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spin briefly, then give the core away each time round.
struct Backoff {
  int spins = 0;
  void wait() {
    if (++spins < 2000)
      cpu_relax();
    else
      sched_yield();
  }
};

struct alignas(64) Counter {
  std::atomic<uint64_t> word{0};  // epoch << 32 | count
};

class Pool {
 public:
  typedef void (*Program)(void* job, uint64_t epoch, int thread);

  explicit Pool(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
  }

  int num_threads() const { return num_threads_; }
  std::mutex& caller_mutex() { return caller_mutex_; }

  // End the old job for good: after this, job data may be written.
  void begin() { epoch_.fetch_add(1); }

  // Run the program on all threads; return when all of its phases are done.
  void run(Program program, void* job) {
    uint64_t epoch = epoch_.load();
    program_.store(program, std::memory_order_relaxed);
    job_.store(job, std::memory_order_relaxed);
    open_.store(epoch);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    program(job, epoch, 0);
  }

  // Wait until no thread is inside any job.
  void quiesce() {
    begin();
    Backoff backoff;
    while (busy_.load() != 0) backoff.wait();
  }

  bool live(uint64_t epoch) const {
    std::atomic_thread_fence(std::memory_order_acquire);
    return epoch_.load(std::memory_order_acquire) == epoch;
  }

  // Make phases [0, count) exist. Not during a job.
  void reserve_phases(int count) {
    if (count <= num_phases_) return;
    quiesce();
    counters_ = std::vector<Counter>((size_t)count * (num_threads_ + 1));
    num_phases_ = count;
  }

  // One phase: call f(unit, thread) for every unit. Waits for every thread, so that the job may lie on this stack.
  template <class F>
  void run_units(long total, F& f) {
    struct Job {
      Pool* pool;
      long total;
      F* f;
    } job{this, total, &f};
    begin();
    run(
        [](void* p, uint64_t e, int t) {
          Job* j = (Job*)p;
          j->pool->for_each(0, e, t, j->total, [&](long i) { (*j->f)(i, t); });
        },
        &job);
    quiesce();
  }

  // Walk one phase: call f(unit) for every unit this thread claims, then wait until all are finished.
  template <class F>
  KV_INLINE void for_each(int phase, uint64_t epoch, int thread, long total, F f) {
    if (total <= 0) return;
    Counter* counters = &counters_[(size_t)phase * (num_threads_ + 1)];
    long mine = 0;
    for (int v = 0; v < num_threads_; v++) {
      const int owner = (thread + v) % num_threads_;
      const long begin = total * owner / num_threads_, end = total * (owner + 1) / num_threads_;
      for (long i; (i = claim(counters[owner], epoch, end - begin)) >= 0; mine++) f(begin + i);
    }
    finish(counters[num_threads_], epoch, mine, total);
  }

 private:
  long claim(Counter& counter, uint64_t epoch, long count) {
    if (!live(epoch)) return -1;
    uint64_t seen = counter.word.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t owner = seen >> 32, index = owner == epoch ? (seen & 0xffffffffu) : 0;
      if (owner > epoch || (long)index >= count) return -1;
      if (counter.word.compare_exchange_weak(seen, (epoch << 32) | (index + 1), std::memory_order_acq_rel))
        return (long)index;
      cpu_relax();
    }
  }

  void finish(Counter& counter, uint64_t epoch, long mine, long total) {
    const uint64_t goal = (epoch << 32) | (uint64_t)total;
    if (mine > 0) {
      uint64_t seen = counter.word.load(std::memory_order_acquire), now;
      do {
        now = (epoch << 32) | (((seen >> 32) == epoch ? (seen & 0xffffffffu) : 0) + (uint64_t)mine);
      } while (!counter.word.compare_exchange_weak(seen, now, std::memory_order_acq_rel));
      if (now == goal) return;
    }
    Backoff backoff;
    while (counter.word.load(std::memory_order_acquire) != goal) {
      if (!live(epoch)) return;
      backoff.wait();
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < 2000 && open_.load(std::memory_order_acquire) == seen; i++) cpu_relax();
      if (open_.load() == seen) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return open_.load() != seen || stop_.load(); });
        sleepers_.fetch_sub(1);
      }
      if (stop_.load()) return;
      busy_.fetch_add(1);
      seen = open_.load();
      Program program = program_.load(std::memory_order_relaxed);
      void* job = job_.load(std::memory_order_relaxed);
      if (epoch_.load() == seen) program(job, seen, thread);
      busy_.fetch_sub(1);
    }
  }

  const int num_threads_;
  int num_phases_ = 0;
  std::vector<Counter> counters_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<uint64_t> epoch_{1};
  alignas(64) std::atomic<uint64_t> open_{0};
  std::atomic<Program> program_{nullptr};
  std::atomic<void*> job_{nullptr};
  alignas(64) std::atomic<int> busy_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_, caller_mutex_;
  std::condition_variable wake_;
};

}  // namespace kv
