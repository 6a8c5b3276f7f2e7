// A whole Llama-like forward pass as one job. Activations are float32 throughout; weights are float32 or bfloat16.
//
//   embed + rope table
//   per layer:  [norm] qkv (+ bias, q/k norm, rope, KV write) | attention | o (+ residual) |
//               [norm] gate, up (+ silu * mul)                | down (+ residual)
//   [norm of the wanted rows] lm_head
//
// Each | is one wait of the thread pool. Norms of few rows are computed by every thread for itself (cheaper than
// a wait). Work is cut into units of some panels by up to kBlockRows rows; a unit's products land in a buffer of its
// thread and are finished there.
//
// Packed matrices (panels as in gemm.h), one allocation each:
//
//   qkv      q heads | k heads | v heads, each head padded to whole panels: a unit is a head, so that it can rotate it
//   gate_up  gate 0 | up 0 | gate 1 | up 1 | ...   panels alternate: a unit holds both factors of its outputs
//   o, down, head                                  plain
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include <sys/mman.h>

#include "attention.h"
#include "gemm.h"
#include "threads.h"

namespace kv {

struct ModelConfig {
  int64_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, vocab;
  float norm_eps, rope_scaling, attention_scaling;
  int32_t weight_dtype, tied, num_threads;
};

// Memory for weights: huge pages where the system has them (fewer address translations while streaming).
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    if (base_ != nullptr) munmap(base_, size_);
  }
  bool allocate(size_t bytes) {
    size_ = round_up(bytes + 4096, 1 << 21) + (1 << 21);
    void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return false;
    base_ = p;
#ifdef MADV_HUGEPAGE
    madvise(p, size_, MADV_HUGEPAGE);
#endif
    data = (char*)round_up((intptr_t)p, 1 << 21);
    return true;
  }
  char* data = nullptr;

 private:
  void* base_ = nullptr;
  size_t size_ = 0;
};

struct Layer {
  Arena qkv, o, gate_up, down;
  std::vector<float> input_norm, post_norm, q_norm, k_norm, qkv_bias, o_bias, gate_up_bias, down_bias;
  int64_t window = 0;
  KvView kv;
};

static inline void rms_norm(const float* x, const float* w, float* out, long n, float eps) {
  vf sums[4] = {};
  long i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    KV_UNROLL for (int j = 0; j < 4; j++) {
      vf v = load<vf>(x + i + j * W);
      sums[j] += v * v;
    }
  vf total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0;
  for (int j = 0; j < W; j++) sum += total[j];
  for (; i < n; i++) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / (float)n + eps);
  for (i = 0; i + W <= n; i += W) store(out + i, load<vf>(x + i) * scale * load<vf>(w + i));
  for (; i < n; i++) out[i] = x[i] * scale * w[i];
}

class ModelBase {
 public:
  explicit ModelBase(const ModelConfig& c) : config(c), pool(c.num_threads), layers(c.num_layers) {
    shape = {(int)c.heads, (int)c.kv_heads, (int)c.head_dim};
  }
  virtual ~ModelBase() = default;
  virtual bool allocate() = 0;
  virtual const char* pack(int layer, int matrix, const void* src, int64_t rows, int64_t cols, int64_t stride) = 0;
  virtual const char* forward(const BatchView& batch, float* logits) = 0;

  const ModelConfig config;
  AttnShape shape;
  Pool pool;
  std::vector<Layer> layers;
  std::vector<float> final_norm, inv_freq, head_bias;
  const void* embedding = nullptr;  // row-major [vocab, hidden] of the weight type, owned by the caller; null: tied
  int64_t num_blocks = 0;
  int64_t max_tokens = 0, max_rows = 0;
  virtual void reserve(int64_t tokens, int64_t logit_rows) = 0;
};

enum Matrix : int32_t { kQ, kK, kV, kO, kGate, kUp, kDown, kHead };

template <class T>
class Model final : public ModelBase {
 public:
  explicit Model(const ModelConfig& c)
      : ModelBase(c), H_(c.hidden), I_(c.intermediate), D_(c.head_dim), head_panels_((int)ceil_div(c.head_dim, NR)),
        ld_x_(stride_of(H_)), ld_att_(stride_of(c.heads * D_)), ld_act_(stride_of(round_up(I_, NR))) {
    pool.reserve_phases(7 * (int)c.num_layers + 4);
    unit_cols_ = std::max(head_panels_, 4) * NR;
    scratch_.resize(c.num_threads);
    for (Scratch& s : scratch_) {
      s.c.resize((size_t)kBlockRows * unit_cols_ + 16);
      s.norm.resize(kOwnNormFloats + MR * 16 + ld_x_);
      s.wide.resize(kBlockK * NR);
      s.attn.reserve(shape);
    }
  }
  // Threads may still be walking the end of the last job.
  ~Model() override { pool.quiesce(); }

  bool allocate() override {
    const ModelConfig& c = config;
    bool ok = head_.allocate(bytes(panels(c.vocab), H_));
    for (Layer& l : layers)
      ok = ok && l.qkv.allocate(bytes((c.heads + 2 * c.kv_heads) * head_panels_, H_)) &&
           l.o.allocate(bytes(panels(H_), c.heads * D_)) && l.gate_up.allocate(bytes(2 * panels(I_), H_)) &&
           l.down.allocate(bytes(panels(H_), I_));
    return ok;
  }

  const char* pack(int layer, int matrix, const void* src, int64_t rows, int64_t cols, int64_t stride) override {
    std::lock_guard<std::mutex> lock(pool.caller_mutex());
    const ModelConfig& c = config;
    if (matrix != kHead && (layer < 0 || layer >= c.num_layers)) return "no such layer";
    pool.begin();
    PackJob j{(const T*)src, nullptr, rows, cols, stride, panels(rows), 0, 1, 0};
    Layer* l = matrix == kHead ? nullptr : &layers[layer];
    int64_t want_rows = H_, want_cols = H_;
    switch (matrix) {
      case kQ: case kK: case kV: {
        const int64_t heads = matrix == kQ ? c.heads : c.kv_heads;
        j.dst = (T*)l->qkv.data;
        j.first = (matrix == kQ ? 0 : matrix == kK ? c.heads : c.heads + c.kv_heads) * head_panels_;
        j.head_dim = D_;
        j.count = heads * head_panels_;
        want_rows = heads * D_;
        break;
      }
      case kO: j.dst = (T*)l->o.data, want_cols = c.heads * D_; break;
      case kGate: j.dst = (T*)l->gate_up.data, j.step = 2, want_rows = I_; break;
      case kUp: j.dst = (T*)l->gate_up.data, j.step = 2, j.first = 1, want_rows = I_; break;
      case kDown: j.dst = (T*)l->down.data, want_cols = I_; break;
      case kHead: j.dst = (T*)head_.data, want_rows = c.vocab; break;
      default: return "no such matrix";
    }
    if (rows != want_rows || cols != want_cols) return "a weight of the wrong shape";
    pack_ = j;
    pool.run([](void* self, uint64_t e, int t) { ((Model*)self)->pack_program(e, t); }, this);
    pool.quiesce();  // the source may be freed as soon as this returns
    return nullptr;
  }

  // Make room for steps of so many tokens and logit rows. Explicit, so that no step allocates.
  void reserve(int64_t tokens, int64_t rows) override {
    if (tokens <= max_tokens && rows <= max_rows) return;
    pool.quiesce();
    max_tokens = std::max(tokens, max_tokens);
    max_rows = std::max(rows, max_rows);
    x_.resize(max_tokens * ld_x_ + 16);
    norm_.resize(std::max(max_tokens, max_rows) * ld_x_ + 16);
    q_.resize(max_tokens * config.heads * D_ + 16);
    att_.resize(max_tokens * ld_att_ + 16);
    act_.resize(max_tokens * ld_act_ + 16);
    rope_.resize(max_tokens * D_ + 16);
    logit_rows_.resize(max_rows);
  }

  const char* forward(const BatchView& batch, float* logits) override {
    std::lock_guard<std::mutex> lock(pool.caller_mutex());
    pool.begin();
    if (batch.num_tokens > max_tokens || batch.num_logit_rows > max_rows)
      reserve(batch.num_tokens, batch.num_logit_rows);
    const int size = layers[0].kv.block_size;
    const char* error = plan_.prepare(batch, shape, size, num_blocks, pool.num_threads());
    if (error != nullptr) return error;
    for (int64_t t = 0; t < batch.num_tokens; t++) {
      if (batch.token_ids[t] < 0 || batch.token_ids[t] >= config.vocab) return "a token id out of range";
      if (batch.slots[t] < 0 || batch.slots[t] >= num_blocks * size) return "a slot out of range";
    }
    for (int64_t r = 0; r < batch.num_logit_rows; r++) {
      if (batch.logit_rows[r] < 0 || batch.logit_rows[r] >= batch.num_tokens) return "a logit row out of range";
      logit_rows_[r] = batch.logit_rows[r];
    }
    logits_ = logits;
    pool.run([](void* self, uint64_t e, int t) { ((Model*)self)->program(e, t); }, this);
    return nullptr;
  }

 private:
  static constexpr int64_t kOwnNormFloats = 8192;  // up to so many floats, each thread norms all rows for itself

  struct Scratch {
    Floats c, norm, wide;
    AttnScratch attn;
  };
  struct PackJob {
    const T* src;
    T* dst;
    int64_t rows, cols, stride, count, first, step, head_dim;
  };

  static int64_t panels(int64_t n) { return ceil_div(n, NR); }
  static size_t bytes(int64_t panels, int64_t k) { return (size_t)panels * k * NR * sizeof(T); }
  // Rows 64 bytes off a power of two: rows of one tile must not all fall on the same cache sets.
  static int64_t stride_of(int64_t n) { return round_up(n, 16) + 16; }

  void pack_program(uint64_t e, int thread) {
    pool.for_each(0, e, thread, pack_.count, [&](long i) {
      const PackJob& j = pack_;
      int64_t row = i * NR, left = j.rows - row;
      if (j.head_dim != 0) {
        const int64_t head = i / head_panels_, in_head = i % head_panels_ * NR;
        row = head * j.head_dim + in_head;
        left = j.head_dim - in_head;
      }
      pack_panel(j.dst + (j.first + i * j.step) * j.cols * NR, j.src + row * j.stride, std::min<int64_t>(left, NR),
                 j.cols, j.stride);
    });
  }

  // Rows [0, T) in blocks; block i is [begin(i), begin(i+1)).
  struct RowBlocks {
    explicit RowBlocks(long rows) : rows(rows), count(ceil_div(rows, kBlockRows)) {
      size = count == 0 ? 0 : round_up(ceil_div(rows, count), MR);
      if (size > kBlockRows) size = kBlockRows;
      count = count == 0 ? 0 : ceil_div(rows, size);
    }
    long begin(long i) const { return std::min(i * size, rows); }
    long rows, count, size;
  };

  // How many of `total` panel groups one unit takes: few enough that the threads end together.
  long unit_width(long total, long widest, long row_blocks) const {
    if (row_blocks > 1) return widest;
    const long n = pool.num_threads();
    long best = 1, best_cost = -1;
    for (long w = widest; w >= 1; w /= 2) {
      const long cost = ceil_div(ceil_div(total, w), n) * w;
      if (best_cost < 0 || cost < best_cost) best = w, best_cost = cost;
    }
    return best;
  }

  // Multiply rows of `a` by all panels of a matrix; finish(row0, rows, first group, groups, c, ldc) per unit.
  template <class F>
  void product(int phase, uint64_t e, int thread, const Arena& weights, long K, long groups, int per_group, long widest,
               const float* a, long lda, long rows, F finish) {
    const RowBlocks blocks(rows);
    const long width = unit_width(groups, widest, blocks.count), cols = ceil_div(groups, width);
    const size_t group_size = (size_t)per_group * K * NR;
    float* c = scratch_[thread].c.data();
    const long ldc = unit_cols_;
    pool.for_each(phase, e, thread, cols * blocks.count, [&](long unit) {
      const long col = unit / blocks.count, block = unit % blocks.count;
      const long g0 = col * width, n = std::min(width, groups - g0), r0 = blocks.begin(block);
      const int count = (int)(blocks.begin(block + 1) - r0);
      const T* w = (const T*)weights.data + g0 * group_size;
      const T* next = col + 1 < cols ? w + n * group_size : (const T*)weights.data;
      gemm_unit(w, (int)n * per_group, K, a + r0 * lda, lda, count, c, ldc, scratch_[thread].wide.data(), block + 1 < blocks.count ? w : next);
      finish(r0, count, g0, n, c, ldc);
    });
  }

  // Norm `rows` rows of x (those listed, if `list` is given). Returns where this thread finds the result.
  const float* norm(int phase, uint64_t e, int thread, const float* weight, const int64_t* list, long rows) {
    const bool own = rows * ld_x_ <= kOwnNormFloats || rows == 1;
    float* out = own ? scratch_[thread].norm.data() : norm_.data();
    auto one = [&](long r) {
      rms_norm(x_.data() + (list != nullptr ? list[r] : r) * ld_x_, weight, out + r * ld_x_, H_, config.norm_eps);
    };
    if (!own)
      pool.for_each(phase, e, thread, rows, one);
    else if (pool.live(e))
      for (long r = 0; r < rows; r++) one(r);
    return out;
  }

  void program(uint64_t e, int thread) {
    const ModelConfig& c = config;
    const BatchView& b = plan_.batch;
    const long rows = b.num_tokens, q_dim = c.heads * D_;
    int phase = 0;
    pool.for_each(phase++, e, thread, rows, [&](long t) { embed(t); });
    for (Layer& l : layers) {
      const float* a = norm(phase++, e, thread, l.input_norm.data(), nullptr, rows);
      product(phase++, e, thread, l.qkv, H_, c.heads + 2 * c.kv_heads, head_panels_, 1, a, ld_x_, rows,
              [&](long r0, int n, long head, long, float* y, long ldc) { finish_head(l, r0, n, head, y, ldc); });
      const AttnParams params{c.attention_scaling, 0.0f, l.window, nullptr};
      const QueryView io{q_.data(), att_.data(), q_dim, D_, ld_att_, D_, kFloat32};
      pool.for_each(phase++, e, thread, (long)plan_.tiles.size() * c.kv_heads, [&](long i) {
        attention_unit(plan_, shape, params, l.kv, io, scratch_[thread].attn, i);
      });
      const auto add = [&](const std::vector<float>& bias) {
        return [&](long r0, int n, long g0, long groups, float* y, long ldc) {
          const long n0 = g0 * NR, cols = std::min(groups * NR, H_ - n0);
          for (int r = 0; r < n; r++) {
            float* x = x_.data() + (r0 + r) * ld_x_ + n0;
            const float* from = y + r * ldc;
            if (!bias.empty())
              for (long i = 0; i < cols; i++) x[i] += from[i] + bias[n0 + i];
            else
              for (long i = 0; i < cols; i++) x[i] += from[i];
          }
        };
      };
      product(phase++, e, thread, l.o, q_dim, panels(H_), 1, 4, att_.data(), ld_att_, rows, add(l.o_bias));
      a = norm(phase++, e, thread, l.post_norm.data(), nullptr, rows);
      product(phase++, e, thread, l.gate_up, H_, panels(I_), 2, 2, a, ld_x_, rows,
              [&](long r0, int n, long g0, long groups, float* y, long ldc) {
                for (int r = 0; r < n; r++)
                  for (long g = 0; g < groups; g++) gate(l, r0 + r, g0 + g, y + r * ldc + 2 * g * NR);
              });
      product(phase++, e, thread, l.down, I_, panels(H_), 1, 4, act_.data(), ld_act_, rows, add(l.down_bias));
    }
    const float* a = norm(phase++, e, thread, final_norm.data(), logit_rows_.data(), b.num_logit_rows);
    product(phase++, e, thread, head_, H_, panels(c.vocab), 1, 4, a, ld_x_, b.num_logit_rows,
            [&](long r0, int n, long g0, long groups, float* y, long ldc) {
              const long n0 = g0 * NR, cols = std::min<long>(groups * NR, c.vocab - n0);
              for (int r = 0; r < n; r++)
                std::memcpy(logits_ + (r0 + r) * c.vocab + n0, y + r * ldc, sizeof(float) * cols);
            });
  }

  // One token's embedding row, and the cosines and sines of its position.
  void embed(long t) {
    const int64_t id = plan_.batch.token_ids[t];
    float* x = x_.data() + t * ld_x_;
    if (embedding != nullptr) {
      const T* row = (const T*)embedding + id * H_;
      for (long k = 0; k < H_; k++) x[k] = load_elem(row + k);
    } else {
      const T* panel = (const T*)head_.data + id / NR * H_ * NR + panel_slot((const T*)nullptr, (int)(id % NR));
      for (long k = 0; k < H_; k++) x[k] = load_elem(panel + k * NR);
    }
    float* rope = rope_.data() + t * D_;
    const long half = D_ / 2;
    for (long i = 0; i < half; i++) {
      const float angle = (float)plan_.batch.positions[t] * inv_freq[i];
      rope[i] = std::cos(angle) * config.rope_scaling;
      rope[half + i] = std::sin(angle) * config.rope_scaling;
    }
  }

  void finish_head(const Layer& l, long r0, int n, long head, float* y, long ldc) {
    const ModelConfig& c = config;
    const bool is_q = head < c.heads, is_k = !is_q && head < c.heads + c.kv_heads;
    const std::vector<float>& norm_weight = is_q ? l.q_norm : l.k_norm;
    const long half = D_ / 2;
    for (int r = 0; r < n; r++, y += ldc) {
      const long t = r0 + r;
      if (!l.qkv_bias.empty())
        for (long d = 0; d < D_; d++) y[d] += l.qkv_bias[head * D_ + d];
      if (is_q || is_k) {
        if (!norm_weight.empty()) rms_norm(y, norm_weight.data(), y, D_, c.norm_eps);
        const float* cosines = rope_.data() + t * D_;
        const float* sines = cosines + half;
        for (long i = 0; i < half; i++) {
          const float a = y[i], b = y[half + i];
          y[i] = a * cosines[i] - b * sines[i];
          y[half + i] = b * cosines[i] + a * sines[i];
        }
      }
      if (is_q) {
        std::memcpy(q_.data() + (t * c.heads + head) * D_, y, sizeof(float) * D_);
        continue;
      }
      const int64_t slot = plan_.batch.slots[t], kv_head = (head - c.heads) % c.kv_heads;
      const int64_t at = slot / l.kv.block_size * l.kv.block_stride + slot % l.kv.block_size * l.kv.slot_stride +
                         kv_head * l.kv.head_stride;
      void* base = (void*)(is_k ? l.kv.keys : l.kv.values);
      if (l.kv.dtype == kBfloat16)
        for (long d = 0; d < D_; d++) ((uint16_t*)base)[at + d] = to_bf16(y[d]);
      else
        std::memcpy((float*)base + at, y, sizeof(float) * D_);
    }
  }

  // y holds a gate panel's NR outputs, then the up panel's.
  void gate(const Layer& l, long t, long group, float* y) {
    if (!l.gate_up_bias.empty())
      for (int i = 0; i < NR; i++) {
        const long n = group * NR + i;
        if (n < I_) y[i] += l.gate_up_bias[n], y[NR + i] += l.gate_up_bias[I_ + n];
      }
    float* out = act_.data() + t * ld_act_ + group * NR;
    KV_UNROLL for (int v = 0; v < NV; v++) store(out + v * W, vsilu(load<vf>(y + v * W)) * load<vf>(y + NR + v * W));
  }

  const long H_, I_, D_;
  const int head_panels_;
  const long ld_x_, ld_att_, ld_act_;
  long unit_cols_;
  Arena head_;
  std::vector<Scratch> scratch_;
  Floats x_, norm_, q_, att_, act_, rope_;
  std::vector<int64_t> logit_rows_;  // a copy: threads that lag behind may look at it after the batch is gone
  AttnPlan plan_;
  PackJob pack_{};
  float* logits_ = nullptr;
};

}  // namespace kv
