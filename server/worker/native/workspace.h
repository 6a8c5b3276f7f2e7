// Threads and activation buffers that encoders share: one computes at a time, so many models cost one set of both.
//
//   shared by all threads, one row per token            of one thread, one row per token of its tile
//     x    [T, H]    a layer's input                      y     [R, H]      after attention, normed
//     qkv  [T, 3 H]  queries (then results), keys, values  act  [R, chunk]  a piece of the wide inner layer
//     y, z, act      few tokens only (see encoder.h)
//
// Buffers grow with the largest batch and stay. Nothing in them survives a call.
#pragma once

#include <chrono>
#include <cstdlib>
#include <memory>
#include <vector>

#include <sys/mman.h>

#include "model.h"
#include "span_attention.h"
#include "threads.h"

namespace kv {

// Where a thread's time goes.
enum Part : int { kProducts, kAttention, kElementwise, kEmbedding, kNumParts };

struct alignas(64) Worker {
  Floats x, y, act, wide;
  SpanScratch spans;
  double seconds[kNumParts] = {};
};

// Adds the time since the last mark to a part.
class Stopwatch {
 public:
  explicit Stopwatch(Worker& w) : worker_(w), last_(clock::now()) {}
  void mark(Part part) {
    const auto now = clock::now();
    worker_.seconds[part] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  typedef std::chrono::steady_clock clock;
  Worker& worker_;
  clock::time_point last_;
};

// Floats in huge pages; growing forgets what they held.
class Buffer {
 public:
  float* data() const { return arena_ == nullptr ? nullptr : (float*)arena_->data; }
  void grow(size_t floats) {
    if (floats <= floats_) return;
    arena_ = nullptr;
    floats_ = 0;
    auto arena = std::make_unique<Arena>();
    if (!arena->allocate(floats * sizeof(float))) throw std::bad_alloc();
    arena_ = std::move(arena);
    floats_ = floats;
  }
  size_t bytes() const { return floats_ * sizeof(float); }

 private:
  std::unique_ptr<Arena> arena_;
  size_t floats_ = 0;
};

class Workspace {
 public:
  explicit Workspace(int threads) : pool(threads), workers(threads) {
    pool.reserve_phases(1);
    for (Worker& w : workers) w.wide.resize(kBlockK * NR);
  }
  ~Workspace() { pool.quiesce(); }

  size_t bytes() const { return x.bytes() + qkv.bytes() + y.bytes() + z.bytes() + act.bytes(); }

  // Call f(unit, thread) for every unit; the end waits for every thread, so f may lie on the caller's stack.
  template <class F>
  void run(long total, F f) {
    pool.run_units(total, f);
  }

  Pool pool;
  std::vector<Worker> workers;
  Buffer x, qkv, y, z, act;
};

}  // namespace kv
