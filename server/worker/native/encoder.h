// A whole BERT-like forward pass over packed sequences as one job. Activations are float32 throughout; weights are
// float32 or bfloat16.
//
// Many tokens: rows are cut into tiles, and a tile walks through everything between two attentions in one go, so that
// what it holds stays in its core's second-level cache:
//
//   embed, norm, qkv  |  attention  |  out + x, norm, [up, activation, down] per chunk + , norm, qkv of the next layer  |  ...
//
// Few tokens: there are not enough tiles for the threads, so products are cut by columns instead:
//
//   embed, norm  |  qkv  |  attention  |  out + x  |  (norm) up, activation  |  down +  |  (norm) qkv  |  ...
//
// Each | is one wait of the thread pool; norms in brackets are computed by every thread for itself, cheaper than a wait.
//
// Every output of a product is bias + one chain of multiply-adds per block of k (+ residual), and the blocks are those
// of the chunks in both programs. So tiles, columns, threads and what else is in the batch cannot change a bit of a
// token's result.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "activations.h"
#include "workspace.h"

namespace kv {

struct EncoderConfig {
  int64_t num_layers, hidden, intermediate, heads, embedding, vocab, positions, types;
  float norm_eps, attention_scaling;
  int32_t weight_dtype, activation;
};

struct EncoderBatch {
  int64_t num_tokens, num_sequences;
  const int32_t* token_ids;
  const int32_t* position_ids;
  const int32_t* type_ids;  // may be null for a model without types
  const int32_t* lengths;
};

enum EncoderMatrix : int32_t { kEncQkv, kEncOut, kEncUp, kEncDown, kEncProject, kNumEncMatrices };
enum EncoderVector : int32_t {
  kVecQkvBias, kVecOutBias, kVecUpBias, kVecDownBias, kVecProjectBias,  // of the matrix of the same number
  kVecAttnGamma, kVecAttnBeta, kVecFfnGamma, kVecFfnBeta, kVecEmbedGamma, kVecEmbedBeta, kNumEncVectors
};

template <class T>
struct Packed {
  T* data = nullptr;
  long rows = 0, cols = 0;  // [N, K]
  int panels() const { return (int)ceil_div(rows, NR); }
  const T* panel(long p) const { return data + p * cols * NR; }
};

class EncoderBase {
 public:
  explicit EncoderBase(const EncoderConfig& c) : config(c) {}
  virtual ~EncoderBase() = default;
  virtual bool allocate() = 0;
  virtual size_t bytes() const = 0;
  virtual const char* pack(Workspace& space, int layer, int matrix, const void* src, int64_t rows, int64_t cols,
                           int64_t stride) = 0;
  virtual const char* set_vector(int layer, int which, const float* src, int64_t count) = 0;
  virtual const char* forward(Workspace& space, const EncoderBatch& batch, float* out) = 0;
  virtual double time_products(Workspace& space, int64_t tokens) = 0;

  // Row-major [n, embedding] of the weight type; owned by the caller. No types: null.
  void set_tables(const void* words, const void* positions, const void* types) {
    words_ = words, positions_ = positions, types_ = types;
  }
  // [heads, 2 * max_length - 1]: what is added to the scores of key - query = -(max_length - 1), ... .
  const char* set_distance_bias(const float* src, int64_t max_length) {
    const long count = 2 * max_length - 1, stride = count + W;
    distance_bias_.assign(config.heads * stride, 0.0f);
    for (long h = 0; h < config.heads; h++) std::copy_n(src + h * count, count, &distance_bias_[h * stride]);
    max_length_ = max_length;
    return nullptr;
  }

  const EncoderConfig config;

 protected:
  const void *words_ = nullptr, *positions_ = nullptr, *types_ = nullptr;
  std::vector<float> distance_bias_;
  int64_t max_length_ = 0;  // 0: no limit beside the position table
};

template <class T>
class Encoder final : public EncoderBase {
 public:
  explicit Encoder(const EncoderConfig& c)
      : EncoderBase(c), H_(c.hidden), I_(c.intermediate), E_(c.embedding), ld_x_(stride_of(std::max(H_, E_))),
        ld_qkv_(stride_of(3 * H_)), ld_act_(stride_of(I_)), layers_(c.num_layers) {}

  bool allocate() override {
    size_t elements = 0;
    const auto place = [&](Packed<T>& m, long rows, long cols) {
      m.rows = rows, m.cols = cols;
      m.data = (T*)(elements * sizeof(T));  // an offset until there is memory
      elements += round_up((long)m.panels() * cols * NR, 64);
    };
    if (E_ != H_) place(project_, H_, E_);
    for (Layer& l : layers_) {
      place(l.matrices[kEncQkv], 3 * H_, H_);
      place(l.matrices[kEncOut], H_, H_);
      place(l.matrices[kEncUp], I_, H_);
      place(l.matrices[kEncDown], H_, I_);
    }
    bytes_ = elements * sizeof(T);
    if (!arena_.allocate(bytes_)) return false;
    const auto settle = [&](Packed<T>& m) { m.data = (T*)(arena_.data + (size_t)m.data); };
    if (E_ != H_) settle(project_);
    for (Layer& l : layers_)
      for (Packed<T>& m : l.matrices) settle(m);
    return true;
  }

  size_t bytes() const override { return bytes_; }

  const char* pack(Workspace& space, int layer, int matrix, const void* src, int64_t rows, int64_t cols,
                   int64_t stride) override {
    if (matrix != kEncProject && (layer < 0 || layer >= config.num_layers)) return "no such layer";
    if (matrix < 0 || matrix >= kNumEncMatrices) return "no such matrix";
    const Packed<T>& m = matrix == kEncProject ? project_ : layers_[layer].matrices[matrix];
    if (m.data == nullptr || rows != m.rows || cols != m.cols) return "a weight of the wrong shape";
    std::lock_guard<std::mutex> lock(space.pool.caller_mutex());
    space.run(m.panels(), [&](long p, int) {
      pack_panel(m.data + p * cols * NR, (const T*)src + p * NR * stride, std::min<long>(rows - p * NR, NR), cols, stride);
    });
    return nullptr;
  }

  const char* set_vector(int layer, int which, const float* src, int64_t count) override {
    if (which < 0 || which >= kNumEncVectors) return "no such vector";
    const bool global = which == kVecProjectBias || which == kVecEmbedGamma || which == kVecEmbedBeta;
    if (!global && (layer < 0 || layer >= config.num_layers)) return "no such layer";
    const int64_t want = which == kVecQkvBias ? 3 * H_
                         : which == kVecUpBias ? I_
                         : which == kVecEmbedGamma || which == kVecEmbedBeta ? E_
                                                                            : H_;
    if (count != want) return "a vector of the wrong length";
    Floats v(round_up(count, NR), 0.0f);  // read in whole panels
    std::copy_n(src, count, v.data());
    (global ? vectors_ : layers_[layer].vectors)[which] = std::move(v);
    return nullptr;
  }

  const char* forward(Workspace& space, const EncoderBatch& b, float* out) override {
    std::lock_guard<std::mutex> lock(space.pool.caller_mutex());
    const char* error = check(b);
    if (error != nullptr || b.num_tokens == 0) return error;
    space.pool.quiesce();
    reserve(space, b);
    space_ = &space, batch_ = b, out_ = out;
    cut_spans(b.lengths, b.num_sequences, (int)config.heads, space.pool.num_threads(), spans_);
    for (Worker& w : space.workers) std::fill(w.seconds, w.seconds + kNumParts, 0.0);
    space.pool.run([](void* self, uint64_t e, int t) { ((Encoder*)self)->program(e, t); }, this);
    return nullptr;
  }

  // Seconds of the layers' bare matrix products for so many tokens, each a pass over all rows.
  double time_products(Workspace& space, int64_t tokens) override {
    std::lock_guard<std::mutex> lock(space.pool.caller_mutex());
    const Tiles tiles(tokens, tile_rows_most(), space.pool.num_threads());
    Buffer a, c;
    a.grow(tokens * std::max(ld_x_, ld_act_));
    c.grow(tokens * std::max(ld_qkv_, ld_act_));
    std::fill(a.data(), a.data() + tokens * std::max(ld_x_, ld_act_), 0.5f);
    std::fill(c.data(), c.data() + tokens * std::max(ld_qkv_, ld_act_), 0.0f);
    const auto start = std::chrono::steady_clock::now();
    for (const Layer& l : layers_)
      for (const Packed<T>& m : l.matrices)
        space.run(tiles.count, [&](long i, int thread) {
          const long lda = stride_of(m.cols), ldc = stride_of(m.rows), r0 = tiles.begin(i), n = tiles.begin(i + 1) - r0;
          gemm_panels(m.data, (size_t)m.cols * NR, m.panels(), m.cols, a.data() + r0 * lda, lda, (int)n,
                      c.data() + r0 * ldc, ldc, kFresh, space.workers[thread].wide.data(), m.data);
        });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  static constexpr long kChunk = 256;  // columns of the inner layer at a time; a multiple of NR, at most kBlockK
  static constexpr long kFewPerThread = 24;
  static_assert(kChunk % NR == 0 && kChunk <= kBlockK, "a chunk is whole panels and one block of k");

  struct Layer {
    Packed<T> matrices[kEncProject];
    Floats vectors[kNumEncVectors];
  };

  // Rows [0, T) in tiles, a multiple of the number of threads; tile i is [begin(i), begin(i+1)).
  struct Tiles {
    Tiles(long rows, long most, int threads) : rows(rows) {
      const long rounds = ceil_div(rows, most * threads);
      count = std::min(rounds * threads, rows);
    }
    long begin(long i) const { return rows * i / count; }
    long rows, count;
  };

  // Rows 64 bytes off a power of two: rows of one tile must not all fall on the same cache sets.
  static long stride_of(long n) { return round_up(n, NR > 16 ? NR : 16) + 16; }

  // So many rows of x, y and act fit the second-level cache beside a stream of panels.
  long tile_rows_most() const {
    const long fit = (440 << 10) / (4 * (2 * H_ + kChunk));
    return std::max<long>(24, std::min<long>(fit, 120));
  }
  long few_rows(int threads) const { return kFewPerThread * threads; }

  const char* check(const EncoderBatch& b) const {
    int64_t total = 0;
    for (int64_t i = 0; i < b.num_sequences; i++) {
      if (b.lengths[i] <= 0) return "a sequence without tokens";
      if (max_length_ != 0 && b.lengths[i] > max_length_) return "a sequence longer than the model's positions";
      total += b.lengths[i];
    }
    if (total != b.num_tokens) return "lengths that do not cover the tokens";
    const auto inside = [&](const int32_t* ids, int64_t count) {
      int32_t bad = 0;
      for (int64_t t = 0; t < b.num_tokens; t++) bad |= (ids[t] < 0) | (ids[t] >= count);
      return bad == 0;
    };
    if (!inside(b.token_ids, config.vocab)) return "a token id out of range";
    if (!inside(b.position_ids, config.positions)) return "a position out of range";
    if (config.types != 0 && !inside(b.type_ids, config.types)) return "a token type out of range";
    return nullptr;
  }

  // No thread is in any job.
  void reserve(Workspace& space, const EncoderBatch& b) {
    const long T_ = b.num_tokens, threads = space.pool.num_threads();
    few_ = T_ <= few_rows((int)threads);
    space.pool.reserve_phases(5 * (int)config.num_layers + 4);
    space.x.grow(T_ * ld_x_ + NR);
    space.qkv.grow(T_ * ld_qkv_ + NR);
    if (few_ || E_ != H_) space.y.grow(T_ * ld_x_ + NR);
    if (few_) space.z.grow(T_ * ld_x_ + NR), space.act.grow(T_ * ld_act_ + NR);
    long longest = 0;
    for (int64_t i = 0; i < b.num_sequences; i++) longest = std::max<long>(longest, b.lengths[i]);
    const long rows = few_ ? T_ : tile_rows_most();
    for (Worker& w : space.workers) {
      if ((long)w.y.size() < rows * ld_x_ + NR) w.y.resize(rows * ld_x_ + NR);
      if (few_ && (long)w.x.size() < rows * ld_x_ + NR) w.x.resize(rows * ld_x_ + NR);
      if ((long)w.act.size() < rows * (kChunk + 16)) w.act.resize(rows * (kChunk + 16));
      w.spans.reserve(longest, (int)(H_ / config.heads));
    }
  }

  void program(uint64_t e, int thread) {
    if (few_)
      program_by_columns(e, thread);
    else
      program_by_tiles(e, thread);
  }

  // ---- parts ----

  // c[rows, n] = bias.
  static void start_rows(const float* bias, float* c, long ldc, long rows, long n) {
    for (long r = 0; r < rows; r++, c += ldc) std::memcpy(c, bias, sizeof(float) * n);
  }
  // c[rows, panels p0 to p1) += a[rows, kc] * rows [k0, k0 + kc) of those panels; c and a point at their first column.
  static void add_product(const Packed<T>& m, long p0, long p1, long k0, long kc, const float* a, long lda, long rows,
                          float* c, long ldc, Worker& w, const T* next) {
    gemm_panels(m.panel(p0) + k0 * NR, (size_t)m.cols * NR, (int)(p1 - p0), kc, a, lda, (int)rows, c, ldc, kAdd,
                w.wide.data(), next);
  }
  static void whole_product(const Packed<T>& m, const Floats& bias, const float* a, long lda, long rows, float* c,
                            long ldc, Worker& w, const T* next) {
    start_rows(bias.data(), c, ldc, rows, m.panels() * NR);
    add_product(m, 0, m.panels(), 0, m.cols, a, lda, rows, c, ldc, w, next);
  }
  // Rows of x (+ residual, kept in x) to out, which may be x.
  void norm_rows(float* x, const float* residual, long ldx, const Floats& gamma, const Floats& beta, float* out,
                 long ldo, long rows) const {
    for (long r = 0; r < rows; r++)
      layer_norm(x + r * ldx, residual == nullptr ? nullptr : residual + r * ldx, gamma.data(), beta.data(),
                 out + r * ldo, H_, config.norm_eps);
  }

  void embed(long t, float* to) const {
    const T* word = (const T*)words_ + batch_.token_ids[t] * E_;
    const T* position = (const T*)positions_ + batch_.position_ids[t] * E_;
    const T* type = config.types == 0 ? nullptr : (const T*)types_ + batch_.type_ids[t] * E_;
    long i = 0;
    for (; i + W <= E_; i += W) {
      vf v = load_elems(word + i);
      if (type != nullptr) v += load_elems(type + i);
      store(to + i, v + load_elems(position + i));
    }
    for (; i < E_; i++)
      to[i] = load_elem(word + i) + (type != nullptr ? load_elem(type + i) : 0.0f) + load_elem(position + i);
    layer_norm(to, nullptr, vectors_[kVecEmbedGamma].data(), vectors_[kVecEmbedBeta].data(), to, E_, config.norm_eps);
  }

  void attention(int phase, uint64_t e, int thread) {
    Worker& w = space_->workers[thread];
    const long center = max_length_ - 1, stride = 2 * max_length_ - 1 + W;
    const SpanShape shape{ld_qkv_, (int)config.heads, (int)(H_ / config.heads), config.attention_scaling,
                          distance_bias_.empty() ? nullptr : distance_bias_.data(), stride, center};
    space_->pool.for_each(phase, e, thread, (long)spans_.size(), [&](long i) {
      Stopwatch watch(w);
      attend_span(spans_[i], shape, space_->qkv.data(), w.spans);
      watch.mark(kAttention);
    });
  }

  // ---- many tokens ----

  void program_by_tiles(uint64_t e, int thread) {
    const Tiles tiles(batch_.num_tokens, tile_rows_most(), space_->pool.num_threads());
    Worker& w = space_->workers[thread];
    int phase = 0;
    space_->pool.for_each(phase++, e, thread, tiles.count, [&](long i) {
      const long r0 = tiles.begin(i), rows = tiles.begin(i + 1) - r0;
      Stopwatch watch(w);
      float* x = space_->x.data() + r0 * ld_x_;
      float* first = E_ == H_ ? x : w.y.data();
      for (long r = 0; r < rows; r++) embed(r0 + r, first + r * ld_x_);
      watch.mark(kEmbedding);
      if (E_ != H_) whole_product(project_, vectors_[kVecProjectBias], first, ld_x_, rows, x, ld_x_, w, project_.data);
      qkv_tile(layers_[0], r0, rows, w, watch);
    });
    for (size_t l = 0; l < layers_.size(); l++) {
      attention(phase++, e, thread);
      space_->pool.for_each(phase++, e, thread, tiles.count, [&](long i) {
        const long r0 = tiles.begin(i), rows = tiles.begin(i + 1) - r0;
        Stopwatch watch(w);
        const bool last = l + 1 == layers_.size();
        layer_tile(layers_[l], r0, rows, last, w, watch);
        if (!last) qkv_tile(layers_[l + 1], r0, rows, w, watch);
      });
    }
  }

  void qkv_tile(const Layer& l, long r0, long rows, Worker& w, Stopwatch& watch) {
    whole_product(l.matrices[kEncQkv], l.vectors[kVecQkvBias], space_->x.data() + r0 * ld_x_, ld_x_, rows,
                  space_->qkv.data() + r0 * ld_qkv_, ld_qkv_, w, l.matrices[kEncQkv].data);
    watch.mark(kProducts);
  }

  void layer_tile(const Layer& l, long r0, long rows, bool last, Worker& w, Stopwatch& watch) {
    const Packed<T>&out = l.matrices[kEncOut], &up = l.matrices[kEncUp], &down = l.matrices[kEncDown];
    float *x = space_->x.data() + r0 * ld_x_, *y = w.y.data(), *act = w.act.data();
    const long ld_act = kChunk + 16;
    whole_product(out, l.vectors[kVecOutBias], space_->qkv.data() + r0 * ld_qkv_, ld_qkv_, rows, y, ld_x_, w, up.data);
    watch.mark(kProducts);
    norm_rows(y, x, ld_x_, l.vectors[kVecAttnGamma], l.vectors[kVecAttnBeta], y, ld_x_, rows);
    watch.mark(kElementwise);
    start_rows(l.vectors[kVecDownBias].data(), x, ld_x_, rows, down.panels() * NR);
    for (long n0 = 0; n0 < I_; n0 += kChunk) {
      const long kc = std::min(kChunk, I_ - n0), p0 = n0 / NR, p1 = p0 + ceil_div(kc, NR), cols = (p1 - p0) * NR;
      start_rows(l.vectors[kVecUpBias].data() + n0, act, ld_act, rows, cols);
      add_product(up, p0, p1, 0, H_, y, ld_x_, rows, act, ld_act, w, down.data + n0 * NR);
      watch.mark(kProducts);
      activate(config.activation, act, ld_act, (int)rows, cols);
      watch.mark(kElementwise);
      const T* next = n0 + kc < I_ ? up.panel(p1) : l.matrices[kEncQkv].data;
      add_product(down, 0, down.panels(), n0, kc, act, ld_act, rows, x, ld_x_, w, next);
      watch.mark(kProducts);
    }
    norm_rows(x, y, ld_x_, l.vectors[kVecFfnGamma], l.vectors[kVecFfnBeta], last ? out_ + r0 * H_ : x,
              last ? H_ : ld_x_, rows);
    watch.mark(kElementwise);
  }

  // ---- few tokens ----

  // One product cut by columns, in pieces of k; finish(c0, c1) takes the result.
  template <class Finish>
  void product(int phase, uint64_t e, int thread, const Packed<T>& m, const Floats& bias, long piece, const float* a,
               long lda, float* c, long ldc, Finish finish) {
    const long panels = m.panels(), width = width_of(panels), count = ceil_div(panels, width);
    const long rows = batch_.num_tokens;
    Worker& w = space_->workers[thread];
    space_->pool.for_each(phase, e, thread, count, [&](long i) {
      Stopwatch watch(w);
      const long p0 = i * width, p1 = std::min(p0 + width, panels), c0 = p0 * NR, c1 = p1 * NR;
      start_rows(bias.data() + c0, c + c0, ldc, rows, c1 - c0);
      for (long k0 = 0; k0 < m.cols; k0 += piece)
        add_product(m, p0, p1, k0, std::min(piece, m.cols - k0), a + k0, lda, rows, c + c0, ldc, w,
                    p1 < panels ? m.panel(p1) : m.data);
      watch.mark(kProducts);
      finish(c0, c1);
      watch.mark(kElementwise);
    });
  }
  // Panels per unit: few enough that the threads end together, and that a thread which lost its core can be helped.
  long width_of(long panels) const {
    const long threads = space_->pool.num_threads();
    long best = 1, best_cost = -1;
    for (long w = batch_.num_tokens <= MR ? 4 : 3; w >= 1; w--) {
      const long cost = ceil_div(ceil_div(panels, w), threads) * w;
      if (best_cost < 0 || cost < best_cost) best = w, best_cost = cost;
    }
    return best;
  }

  void program_by_columns(uint64_t e, int thread) {
    Workspace& s = *space_;
    Worker& w = s.workers[thread];
    const long rows = batch_.num_tokens;
    const auto nothing = [](long, long) {};
    const auto add = [rows, ld = ld_x_](float* to, const float* residual) {
      return [=](long c0, long c1) {
        for (long r = 0; r < rows; r++)
          for (long i = r * ld + c0; i < r * ld + c1; i += W) store(to + i, load<vf>(to + i) + load<vf>(residual + i));
      };
    };
    // Every thread norms all rows for itself, from what all threads share alone: a thread left behind may read rows of
    // a later layer, but then no unit that would use its result is left.
    const auto own = [&](float* shared, const Floats& gamma, const Floats& beta, float* to) {
      Stopwatch watch(w);
      if (s.pool.live(e)) norm_rows(shared, nullptr, ld_x_, gamma, beta, to, ld_x_, rows);
      watch.mark(kElementwise);
    };
    float *x = s.x.data(), *y = s.y.data(), *z = s.z.data(), *qkv = s.qkv.data(), *act = s.act.data();
    float *own_x = w.x.data(), *own_y = w.y.data();
    int phase = 0;
    s.pool.for_each(phase++, e, thread, rows, [&](long t) {
      Stopwatch watch(w);
      embed(t, (E_ == H_ ? x : y) + t * ld_x_);
      watch.mark(kEmbedding);
    });
    if (E_ != H_) product(phase++, e, thread, project_, vectors_[kVecProjectBias], E_, y, ld_x_, x, ld_x_, nothing);
    const float* in = x;
    for (const Layer& l : layers_) {
      const Packed<T>* m = l.matrices;
      const Floats* v = l.vectors;
      product(phase++, e, thread, m[kEncQkv], v[kVecQkvBias], H_, in, ld_x_, qkv, ld_qkv_, nothing);
      attention(phase++, e, thread);
      product(phase++, e, thread, m[kEncOut], v[kVecOutBias], H_, qkv, ld_qkv_, y, ld_x_, add(y, in));
      own(y, v[kVecAttnGamma], v[kVecAttnBeta], own_y);
      product(phase++, e, thread, m[kEncUp], v[kVecUpBias], H_, own_y, ld_x_, act, ld_act_, [&](long c0, long c1) {
        activate(config.activation, act + c0, ld_act_, (int)rows, c1 - c0);
      });
      product(phase++, e, thread, m[kEncDown], v[kVecDownBias], kChunk, act, ld_act_, z, ld_x_, add(z, own_y));
      if (&l != &layers_.back()) own(z, v[kVecFfnGamma], v[kVecFfnBeta], own_x);
      in = own_x;
    }
    const Floats* v = layers_.back().vectors;
    s.pool.for_each(phase++, e, thread, rows, [&](long t) {
      norm_rows(z + t * ld_x_, nullptr, ld_x_, v[kVecFfnGamma], v[kVecFfnBeta], out_ + t * H_, H_, 1);
    });
  }

  const long H_, I_, E_;
  const long ld_x_, ld_qkv_, ld_act_;
  Arena arena_;
  size_t bytes_ = 0;
  Packed<T> project_;
  std::vector<Layer> layers_;
  Floats vectors_[kNumEncVectors];
  // Of the call under way.
  Workspace* space_ = nullptr;
  EncoderBatch batch_{};
  float* out_ = nullptr;
  bool few_ = false;
  std::vector<Span> spans_;
};

}  // namespace kv
