// Matrix products with packed weights, float32 accumulation, the same bits for every batch size.
//
// A weight matrix [N, K] is packed into panels of NR outputs (N padded with zeros):
//
//   float32   panel p:  [K][NR]        w[p*NR + 0 .. p*NR + NR-1] for k = 0, then k = 1, ...
//   bfloat16  panel p:  [K][NR]        the same, but each group of 2W outputs is stored as W words of 32 bits:
//                                      word i = output i in the low half, output W+i in the high half,
//                                      so that a shift and an and give two float vectors
//
// Every output is ONE chain of multiply-adds over k = 0, 1, ..., K-1. Tiles of 1 to MR rows, blocks of k
// (partial sums go through memory unrounded) and the split over threads change nothing in that chain. With kAdd it is
// one chain per block of k instead, added to what was there in order of the blocks, which depend on K alone.
#pragma once

#include "vec.h"

namespace kv {

constexpr long kBlockK = 320;    // k per cache block: MR rows of it and a panel in float32 share the first-level cache
constexpr int kBlockRows = 96;   // rows per unit: their k-block stays in the second-level cache
constexpr long kStreamAhead = 1536;  // bytes between use and prefetch of a panel that is read once

// What a product finds in c: nothing, chains to go on with, or a value to which each block of k is added.
enum Start { kFresh, kContinue, kAdd };

// Index of output j of a panel inside its row of NR elements.
KV_INLINE int panel_slot(const uint16_t*, int j) {
  int group = j / (2 * W), r = j % (2 * W);
  return group * 2 * W + (r % W) * 2 + r / W;
}
KV_INLINE int panel_slot(const float*, int j) { return j; }

KV_INLINE void load_panel_row(const float* b, vf out[NV]) {
  KV_UNROLL for (int v = 0; v < NV; v++) {
    out[v] = load<vf>(b + v * W);
    KV_KEEP(out[v]);
  }
}
KV_INLINE void load_panel_row(const uint16_t* b, vf out[NV]) {
  KV_UNROLL for (int v = 0; v < NV; v += 2) {
    vu pair = load<vu>(b + v * W);
    out[v] = as_f(pair << 16);
    out[v + 1] = as_f(pair & 0xffff0000u);
  }
}

// c[R, P*NR] (+)= a[R, kc] * P panels. With `ahead` null the tile is the only one of its panels: it streams them
// from memory, prefetching its own. Otherwise `ahead` walks over the panels that come next, `ahead_step` bytes
// per 4 k, so that the tiles of one panel fetch the next one between them.
template <int R, int P, class T>
static __attribute__((noinline)) void tile(long kc, const T* b, size_t panel_stride, const float* a, size_t lda,
                                           float* c, size_t ldc, Start start, const char* ahead,
                                           size_t ahead_step) {
  vf acc[R][P * NV];
  const float* row[R];
  KV_UNROLL for (int r = 0; r < R; r++) {
    row[r] = a + r * lda;
    KV_UNROLL for (int v = 0; v < P * NV; v++) acc[r][v] = start == kContinue ? load<vf>(c + r * ldc + v * W) : vf{};
  }
  long k = 0;
#define KV_STEP(kk)                                                                       \
  {                                                                                       \
    vf w[P * NV];                                                                         \
    KV_UNROLL for (int p = 0; p < P; p++) load_panel_row(b + p * panel_stride + (kk) * NR, w + p * NV); \
    KV_UNROLL for (int r = 0; r < R; r++) {                                               \
      vf x = splat(row[r][k + (kk)]);                                                     \
      KV_UNROLL for (int v = 0; v < P * NV; v++) acc[r][v] += x * w[v];                   \
    }                                                                                     \
  }
  for (; k + 4 <= kc; k += 4) {
    if (ahead == nullptr) {
      KV_UNROLL for (int p = 0; p < P; p++)
        for (size_t line = 0; line < 4 * NR * sizeof(T); line += 64)
          __builtin_prefetch((const char*)(b + p * panel_stride) + kStreamAhead + line, 0, 3);
    } else {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
    }
    KV_STEP(0) KV_STEP(1) KV_STEP(2) KV_STEP(3)
    b += 4 * NR;
  }
  for (; k < kc; k++) {
    KV_STEP(0)
    b += NR;
  }
#undef KV_STEP
  if (start == kAdd)
    KV_UNROLL for (int r = 0; r < R; r++)
      KV_UNROLL for (int v = 0; v < P * NV; v++) acc[r][v] += load<vf>(c + r * ldc + v * W);
  KV_UNROLL for (int r = 0; r < R; r++)
    KV_UNROLL for (int v = 0; v < P * NV; v++) store(c + r * ldc + v * W, acc[r][v]);
}

template <int P, class T, int R = MR>
KV_INLINE void tile_rows(int rows, long kc, const T* b, size_t ps, const float* a, size_t lda, float* c, size_t ldc,
                         Start start, const char* ahead, size_t step) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<R, P, T>(kc, b, ps, a, lda, c, ldc, start, ahead, step);
    else
      tile_rows<P, T, R - 1>(rows, kc, b, ps, a, lda, c, ldc, start, ahead, step);
  }
}

// Bring kc rows of a panel to float32, for several tiles.
static inline const float* widen(const float* b, long, float*) { return b; }
static inline const float* widen(const uint16_t* b, long kc, float* to) {
  for (long k = 0; k < kc; k++) {
    vf w[NV];
    load_panel_row(b + k * NR, w);
    KV_UNROLL for (int v = 0; v < NV; v++) store(to + k * NR + v * W, w[v]);
  }
  return to;
}

// One panel's k-block against all rows, MR at a time (the last two tiles share what is left).
template <class T>
static void panel_rows(int rows, long kc, const T* b, const float* a, size_t lda, float* c, size_t ldc, Start start,
                       const char* ahead, size_t step) {
  for (int r = 0; r < rows;) {
    const int left = rows - r, n = left >= 2 * MR ? MR : left > MR ? (left + 1) / 2 : left;
    tile_rows<1, T>(n, kc, b, 0, a + r * lda, lda, c + r * ldc, ldc, start, ahead, step);
    ahead += kc / 4 * step;
    r += n;
  }
}

// c[rows, np*NR] (+)= a[rows, K] * np panels, `ps` elements apart. `wide` holds kBlockK * NR floats; `next` is what this
// thread probably multiplies next.
template <class T>
static void gemm_panels(const T* panels, size_t ps, int np, long K, const float* a, size_t lda, int rows, float* c,
                        size_t ldc, Start start, float* wide, const T* next) {
  const int tiles = (int)ceil_div(rows, MR);
  const long blocks = ceil_div(K, kBlockK), kc_max = round_up(ceil_div(K, blocks), 8);
  if (tiles == 1) {
    // Memory is the limit. Few rows leave registers free: several panels at once hide the latency of the multiply-adds.
    const long kc_one = start == kAdd ? kc_max : K;
    for (int p = 0; p < np;) {
      const int n = rows == 1 && np - p >= 4 ? 4 : rows <= 2 && np - p >= 2 ? 2 : 1;
      for (long k0 = 0; k0 < K; k0 += kc_one) {
        const long kc = std::min(kc_one, K - k0);
        const T* b = panels + p * ps + k0 * NR;
        if (n == 4)
          tile<1, 4, T>(kc, b, ps, a + k0, lda, c + p * NR, ldc, start, nullptr, 0);
        else if (n == 2)
          tile_rows<2, T, 2>(rows, kc, b, ps, a + k0, lda, c + p * NR, ldc, start, nullptr, 0);
        else
          tile_rows<1, T>(rows, kc, b, ps, a + k0, lda, c + p * NR, ldc, start, nullptr, 0);
      }
      p += n;
    }
    return;
  }
  for (long k0 = 0; k0 < K; k0 += kc_max) {
    const long kc = std::min(kc_max, K - k0);
    const Start block_start = start == kFresh && k0 > 0 ? kContinue : start;
    for (int p = 0; p < np; p++) {
      const T* b = panels + p * ps + k0 * NR;
      const char* ahead = (const char*)(p + 1 < np ? b + ps : k0 + kc < K ? panels + (k0 + kc) * NR : next);
      const size_t step = 4 * NR * sizeof(T) / tiles;
      if (tiles > 2)
        panel_rows(rows, kc, widen(b, kc, wide), a + k0, lda, c + p * NR, ldc, block_start, ahead, step);
      else
        panel_rows(rows, kc, b, a + k0, lda, c + p * NR, ldc, block_start, ahead, step);
    }
  }
}

// c[rows, np*NR] = a[rows, K] * np consecutive panels of a whole matrix. rows <= kBlockRows.
template <class T>
static void gemm_unit(const T* panels, int np, long K, const float* a, size_t lda, int rows, float* c, size_t ldc,
                      float* wide, const T* next) {
  gemm_panels(panels, (size_t)K * NR, np, K, a, lda, rows, c, ldc, kFresh, wide, next);
}

// Pack rows [0, rows) of a row-major matrix into panels 0, step, 2*step, ... of dst.
template <class T>
static void pack_panel(T* dst, const T* src, long rows, long K, long src_stride) {
  for (long k = 0; k < K; k++)
    for (int j = 0; j < NR; j++) dst[k * NR + panel_slot(dst, j)] = j < rows ? src[j * src_stride + k] : T(0);
}

}  // namespace kv
