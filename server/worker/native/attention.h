// Attention over paged KV with carried online-softmax state.
//
//   one row of work = (query token, query head); its state is  m (running maximum), l (16 partial sums), acc[D]
//   one KV tile     = up to 16 positions of one block, at absolute positions; tiles are taken in order
//
//   shared prefix (group)         own blocks
//   [tile][tile][tile][tile] ---> s0: [tile][tile]       K and V of a shared tile are loaded and converted once for
//     rows of s0, s1, s2     ---> s1: [tile]             all rows of the group; the state is then carried on, so a
//                            ---> s2: [tile][tile]       row sees the same tiles in the same order, grouped or not
//
// A row's arithmetic is a function of its own query, position and KV: how rows are tiled, grouped, chunked or
// spread over threads cannot change a bit of it. Masked positions weigh exactly 0.
#pragma once

#include <algorithm>
#include <vector>

#include "batch.h"
#include "vec.h"

namespace kv {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// KV of one layer. Strides count elements.
struct KvView {
  const void* keys;
  const void* values;
  int64_t block_stride, slot_stride, head_stride;
  int32_t dtype, block_size;
};

struct AttnParams {
  float scaling, softcap;  // softcap 0: none
  int64_t window;          // 0: all
  const float* sinks;      // null: none
};

// Queries and results: [T, heads, dim] with strides in elements.
struct QueryView {
  const void* query;
  void* out;
  int64_t query_token_stride, query_head_stride, out_token_stride, out_head_stride;
  int32_t dtype;
};

// s[R][16] = q[R, D] * kt[D][16]
template <int R>
static __attribute__((noinline)) void scores_tile(int D, const float* kt, const float* q, int ldq, float* s) {
  vf acc[R][kTV];
  KV_UNROLL for (int r = 0; r < R; r++) KV_UNROLL for (int v = 0; v < kTV; v++) acc[r][v] = vf{};
#pragma GCC unroll 4
  for (int d = 0; d < D; d++) {
    vf k[kTV];
    KV_UNROLL for (int v = 0; v < kTV; v++) {
      k[v] = load<vf>(kt + d * kTile + v * W);
      KV_KEEP(k[v]);
    }
    KV_UNROLL for (int r = 0; r < R; r++) {
      vf x = splat(q[r * ldq + d]);
      KV_UNROLL for (int v = 0; v < kTV; v++) acc[r][v] += x * k[v];
    }
  }
  KV_UNROLL for (int r = 0; r < R; r++) KV_UNROLL for (int v = 0; v < kTV; v++) store(s + r * kTile + v * W, acc[r][v]);
}

// acc[R][C vectors] += p[R, n] * v[n][D]
template <int R, int C>
static __attribute__((noinline)) void values_tile(int n, const float* v, int ldv, const float* p, float* acc, int lda) {
  vf a[R][C];
  KV_UNROLL for (int r = 0; r < R; r++) KV_UNROLL for (int c = 0; c < C; c++) a[r][c] = load<vf>(acc + r * lda + c * W);
#pragma GCC unroll 4
  for (int j = 0; j < n; j++) {
    vf x[C];
    KV_UNROLL for (int c = 0; c < C; c++) {
      x[c] = load<vf>(v + j * ldv + c * W);
      KV_KEEP(x[c]);
    }
    KV_UNROLL for (int r = 0; r < R; r++) {
      vf w = splat(p[r * kTile + j]);
      KV_UNROLL for (int c = 0; c < C; c++) a[r][c] += w * x[c];
    }
  }
  KV_UNROLL for (int r = 0; r < R; r++) KV_UNROLL for (int c = 0; c < C; c++) store(acc + r * lda + c * W, a[r][c]);
}

template <int R = kAttnRows>
KV_INLINE void scores_rows(int rows, int D, const float* kt, const float* q, int ldq, float* s) {
  if constexpr (R > 0) {
    if (rows == R)
      scores_tile<R>(D, kt, q, ldq, s);
    else
      scores_rows<R - 1>(rows, D, kt, q, ldq, s);
  }
}
template <int C, int R>
KV_INLINE void values_rows(int rows, int n, const float* v, int ldv, const float* p, float* acc, int lda) {
  if constexpr (R > 0) {
    if (rows == R)
      values_tile<R, C>(n, v, ldv, p, acc, lda);
    else
      values_rows<C, R - 1>(rows, n, v, ldv, p, acc, lda);
  }
}

// One thread's working memory.
struct AttnScratch {
  int padded = 0, rows = 0;
  Floats memory;
  float *q, *acc, *l, *m, *kt, *v, *s, *zero;
  std::vector<int64_t> position;

  void reserve(const AttnShape& shape) {
    const int need_rows = std::max(kTaskRows, shape.group());
    if (shape.padded() == padded && need_rows <= rows) return;
    padded = shape.padded();
    rows = need_rows;
    const size_t n = (size_t)rows * padded, t = (size_t)kTile * padded;
    memory.assign(2 * n + (size_t)rows * (kTile + 1) + 2 * t + kAttnRows * kTile + padded, 0.0f);
    float* p = memory.data();
    q = p, p += n, acc = p, p += n, l = p, p += (size_t)rows * kTile, kt = p, p += t, v = p, p += t;
    s = p, p += kAttnRows * kTile, zero = p, p += padded, m = p;
    position.resize(rows);
  }
};

template <class Q, class K>
class AttnTask {
 public:
  AttnTask(const AttnPlan& plan, const AttnShape& shape, const AttnParams& params, const KvView& kv,
           const QueryView& io, AttnScratch& scratch)
      : plan_(plan), b_(plan.batch), shape_(shape), params_(params), kv_(kv), io_(io), x_(scratch),
        G_(shape.group()), D_(shape.dim), P_(shape.padded()) {}

  void run(const QueryTile& tile, int kv_head) {
    tile_ = &tile;
    head_ = kv_head;
    load_queries();
    walk(tile.s0, tile.s1, 0, (int)plan_.groups.size(), 0);
    write_out();
  }

 private:
  int rows() const { return (tile_->t1 - tile_->t0) * G_; }

  void load_queries() {
    for (int t = tile_->t0, r = 0; t < tile_->t1; t++)
      for (int g = 0; g < G_; g++, r++) {
        const Q* from = (const Q*)io_.query + t * io_.query_token_stride + (head_ * G_ + g) * io_.query_head_stride;
        float* to = x_.q + r * P_;
        for (int d = 0; d < D_; d++) to[d] = load_elem(from + d);
        x_.position[r] = b_.positions[t];
        x_.m[r] = -INFINITY;
      }
    std::fill(x_.acc, x_.acc + rows() * P_, 0.0f);
    std::fill(x_.l, x_.l + rows() * kTile, 0.0f);
  }

  // Sequences [s0, s1), whose blocks before `block` are done; groups_[g0, g1) are those nested here.
  void walk(int s0, int s1, int g0, int g1, int block) {
    for (int s = s0; s < s1;) {
      while (g0 < g1 && plan_.groups[g0].stop <= s) g0++;
      if (g0 == g1 || plan_.groups[g0].start > s) {
        if (s + 1 < s1 && block < b_.max_blocks) prefetch(b_.block_tables[(s + 1) * b_.max_blocks + block]);
        segment(s, s + 1, block, INT32_MAX);
        s++;
        continue;
      }
      const Group& group = plan_.groups[g0];
      const int stop = std::min(group.stop, s1);
      int inner = g0 + 1;
      while (inner < g1 && plan_.groups[inner].start < group.stop) inner++;
      if (group.first_block > block)
        for (int i = s; i < stop; i++) segment(i, i + 1, block, group.first_block);
      segment(s, stop, group.first_block, group.last_block);
      walk(s, stop, g0 + 1, inner, group.last_block);
      s = stop;
      g0 = inner;
    }
  }

  // Let the tile's queries of sequences [s0, s1) see blocks [first, last) of s0's table.
  void segment(int s0, int s1, int first, int last) {
    const int t0 = std::max(tile_->t0, b_.query_starts[s0]), t1 = std::min(tile_->t1, b_.query_starts[s1]);
    if (t0 >= t1) return;
    int64_t lowest = b_.positions[t0], highest = lowest;
    for (int t = t0; t < t1; t++) {
      lowest = std::min(lowest, b_.positions[t]);
      highest = std::max(highest, b_.positions[t]);
    }
    const int64_t size = plan_.block_size, limit = highest + 1;
    if (params_.window > 0) first = (int)std::max<int64_t>(first, (lowest - params_.window + 1) / size);
    last = (int)std::min<int64_t>(last, highest / size + 1);
    const int32_t* table = b_.block_tables + s0 * b_.max_blocks;
    const int r0 = (t0 - tile_->t0) * G_, r1 = (t1 - tile_->t0) * G_;
    if (first + 1 < last) prefetch(table[first + 1]);
    for (int i = first; i < last; i++) {
      if (i + 2 < last) prefetch(table[i + 2]);
      for (int offset = 0; offset < size && i * size + offset < limit; offset += kTile) {
        const int64_t base = i * size + offset;
        const int count = (int)std::min<int64_t>({kTile, size - offset, limit - base});
        convert(table[i], offset, count);
        update(r0, r1, base, count);
      }
    }
  }

  const K* key(int block, int slot) const {
    return (const K*)kv_.keys + block * kv_.block_stride + slot * kv_.slot_stride + head_ * kv_.head_stride;
  }
  const K* value(int block, int slot) const {
    return (const K*)kv_.values + block * kv_.block_stride + slot * kv_.slot_stride + head_ * kv_.head_stride;
  }

  // Inlined by force: as a function without visible effects its calls would be optimised away.
  KV_INLINE void prefetch(int block) const {
    for (int slot = 0; slot < plan_.block_size; slot++)
      for (size_t line = 0; line < D_ * sizeof(K); line += 64) {
        __builtin_prefetch((const char*)key(block, slot) + line, 0, 3);
        __builtin_prefetch((const char*)value(block, slot) + line, 0, 3);
      }
  }

  // Bring a tile to float32: keys transposed [D][16], values [16][D]. Positions from `count` on become zeros, so that
  // whatever an earlier owner left in the slots (a NaN, say) cannot spread.
  void convert(int block, int offset, int count) {
    const K* rows[kTile];
    for (int j = 0; j < kTile; j++) rows[j] = j < count ? key(block, offset + j) : (const K*)x_.zero;
    transpose(rows);
    for (int j = 0; j < kTile; j++) {
      float* to = x_.v + j * P_;
      if (j >= count) {
        std::fill(to, to + D_, 0.0f);
        continue;
      }
      copy_value(value(block, offset + j), to);
    }
  }
  void copy_value(const float* from, float* to) { std::memcpy(to, from, sizeof(float) * D_); }
  // Pairs are split by a shift and an and: of each 2W elements the even ones come first. write_out() puts the
  // results back in order.
  void copy_value(const uint16_t* from, float* to) {
    int d = 0;
    for (; d + 2 * W <= D_; d += 2 * W) {
      const vu pairs = load<vu>(from + d);
      store(to + d, pairs << 16);
      store(to + d + W, pairs & 0xffff0000u);
    }
    for (; d < D_; d++) to[d] = from_bf16(from[d]);
  }
  // Where element d of a value lies in the tile and in acc.
  int place(int d) const {
    const int group = d / (2 * W) * (2 * W), r = d - group;
    if (sizeof(K) == sizeof(float) || group + 2 * W > D_) return d;
    return group + r / 2 + r % 2 * W;
  }
  void transpose(const float* const rows[kTile]) {
    for (int h = 0; h < kTile; h += 8)
      for (int d = 0; d + 8 <= D_; d += 8) {
        u8x m[8];
        KV_UNROLL for (int j = 0; j < 8; j++) m[j] = load<u8x>(rows[h + j] + d);
        transpose8(m);
        KV_UNROLL for (int j = 0; j < 8; j++) store(x_.kt + (d + j) * kTile + h, m[j]);
      }
  }
  void transpose(const uint16_t* const rows[kTile]) {
    for (int h = 0; h < kTile; h += 8) {
      int d = 0;
      for (; d + 16 <= D_; d += 16) {
        u8x m[8];
        KV_UNROLL for (int j = 0; j < 8; j++) m[j] = load<u8x>(rows[h + j] + d);
        transpose8(m);
        KV_UNROLL for (int j = 0; j < 8; j++) {
          store(x_.kt + (d + 2 * j) * kTile + h, m[j] << 16);
          store(x_.kt + (d + 2 * j + 1) * kTile + h, m[j] & 0xffff0000u);
        }
      }
      for (; d < D_; d++)
        for (int j = 0; j < 8; j++) x_.kt[d * kTile + h + j] = from_bf16(rows[h + j][d]);
    }
  }

  void update(int r0, int r1, int64_t base, int count) {
    const int pieces = (int)ceil_div(r1 - r0, kAttnRows);
    for (int i = 0, r = r0; i < pieces; i++) {
      const int n = (int)ceil_div(r1 - r, pieces - i);
      scores_rows(n, D_, x_.kt, x_.q + r * P_, P_, x_.s);
      for (int j = 0; j < n; j++) softmax(r + j, x_.s + j * kTile, base, count);
      float* acc = x_.acc + r * P_;
      int d = 0;
      if (n <= kAttnRows / 2)
        for (; d + 2 * kTile <= P_; d += 2 * kTile)
          values_rows<2 * kTV, kAttnRows / 2>(n, kTile, x_.v + d, P_, x_.s, acc + d, P_);
      for (; d < P_; d += kTile) values_rows<kTV, kAttnRows>(n, kTile, x_.v + d, P_, x_.s, acc + d, P_);
      r += n;
    }
  }

  // Turn one row's 16 scores into weights, updating m and l (and acc, where the maximum rose).
  KV_INLINE void softmax(int r, float* s, int64_t base, int count) {
    vf x[kTV];
    KV_UNROLL for (int v = 0; v < kTV; v++) x[v] = load<vf>(s + v * W) * params_.scaling;
    if (params_.softcap != 0.0f)
      KV_UNROLL for (int v = 0; v < kTV; v++) x[v] = vtanh(x[v] / params_.softcap) * params_.softcap;
    const int64_t p = x_.position[r];
    const int high = (int)std::min<int64_t>(count, p + 1 - base);
    const int low = params_.window > 0 ? (int)std::max<int64_t>(0, std::min<int64_t>(kTile, p - params_.window + 1 - base)) : 0;
    if (low > 0 || high < kTile) {
      KV_UNROLL for (int v = 0; v < kTV; v++) {
        vi index;
        KV_UNROLL for (int i = 0; i < W; i++) index[i] = v * W + i;
        x[v] = (index >= low) & (index < high) ? x[v] : splat(-INFINITY);
      }
    }
    KV_UNROLL for (int v = 0; v < kTV; v++) store(s + v * W, x[v]);
    const float top = hmax(max8(load<f8>(s), load<f8>(s + 8)));
    float m = x_.m[r];
    float* l = x_.l + r * kTile;
    if (top > m) {
      const float alpha = exp1(m - top);
      float* acc = x_.acc + r * P_;
      for (int d = 0; d < P_; d += W) store(acc + d, load<vf>(acc + d) * alpha);
      KV_UNROLL for (int v = 0; v < kTV; v++) store(l + v * W, load<vf>(l + v * W) * alpha);
      x_.m[r] = m = top;
    }
    const float shift = m == -INFINITY ? 0.0f : m;
    KV_UNROLL for (int v = 0; v < kTV; v++) {
      x[v] = vexp(x[v] - shift);
      store(s + v * W, x[v]);
      store(l + v * W, load<vf>(l + v * W) + x[v]);
    }
  }

  void write_out() {
    for (int t = tile_->t0, r = 0; t < tile_->t1; t++)
      for (int g = 0; g < G_; g++, r++) {
        float sum = hsum(load<f8>(x_.l + r * kTile) + load<f8>(x_.l + r * kTile + 8)), rescale = 1.0f;
        if (params_.sinks != nullptr) {
          const float sink = params_.sinks[head_ * G_ + g], m = x_.m[r], top = m > sink ? m : sink;
          rescale = exp1(m - top);
          sum = sum * rescale + exp1(sink - top);
        }
        const float inverse = rescale / sum;
        Q* to = (Q*)io_.out + t * io_.out_token_stride + (head_ * G_ + g) * io_.out_head_stride;
        for (int d = 0; d < D_; d++) store_elem(to + d, x_.acc[r * P_ + place(d)] * inverse);
      }
  }

  const AttnPlan& plan_;
  const BatchView& b_;
  const AttnShape& shape_;
  const AttnParams& params_;
  const KvView& kv_;
  const QueryView& io_;
  AttnScratch& x_;
  const int G_, D_, P_;
  const QueryTile* tile_ = nullptr;
  int head_ = 0;
};

// Unit i of [0, tiles * kv_heads): heavy tiles first.
static inline void attention_unit(const AttnPlan& plan, const AttnShape& shape, const AttnParams& params, const KvView& kv,
                                  const QueryView& io, AttnScratch& scratch, long i) {
  const QueryTile& tile = plan.tiles[i / shape.kv_heads];
  const int head = (int)(i % shape.kv_heads);
  if (kv.dtype == kBfloat16) {
    if (io.dtype == kBfloat16)
      AttnTask<uint16_t, uint16_t>(plan, shape, params, kv, io, scratch).run(tile, head);
    else
      AttnTask<float, uint16_t>(plan, shape, params, kv, io, scratch).run(tile, head);
  } else if (io.dtype == kBfloat16) {
    AttnTask<uint16_t, float>(plan, shape, params, kv, io, scratch).run(tile, head);
  } else {
    AttnTask<float, float>(plan, shape, params, kv, io, scratch).run(tile, head);
  }
}

}  // namespace kv
