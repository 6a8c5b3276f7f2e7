// Bidirectional attention inside each sequence of a packed batch, without padding.
//
//   qkv [T, 3 H]:   row t = q of all heads | k of all heads | v of all heads        results go over q, in place
//
//   one unit = some heads of one sequence, or some queries of one head:
//
//     keys  --transposed-->  [dim][NR] panels      scores = q * keys      a few query rows at a time, in the
//     values  --copied-->    [n][NR] panels        softmax, whole rows    first-level cache
//                                                  out = weights * values
//
// A query's arithmetic is a function of its own sequence: each score is one chain over dim, each output one chain over
// the keys, sums of a row have one order. How units are cut or spread over threads cannot change a bit.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace kv {

// Queries [q0, q1) of heads [head0, head1) of the sequence of `length` tokens that starts at token `start`.
struct Span {
  int32_t start, length, head0, head1, q0, q1;
};

struct SpanShape {
  long ld;             // of qkv
  int heads, dim;
  float scaling;
  const float* bias;   // added to scaled scores: row h, entry bias_center + (key - query); null: none
  long bias_stride, bias_center;
};

constexpr int kQueryRows = 4 * MR;

struct SpanScratch {
  long capacity = 0;
  int dim = 0;
  Floats keys, values, scores, out;

  void reserve(long length, int dim_) {
    if (length <= capacity && dim_ <= dim) return;
    capacity = std::max(length, capacity);
    dim = std::max(dim_, dim);
    const long padded = round_up(capacity, NR), wide = round_up(dim, NR);
    keys.resize(padded * dim);
    values.resize(padded * wide);
    scores.resize(kQueryRows * (padded + 16));
    out.resize(kQueryRows * wide);
  }
};

// Cut sequences into spans of about equal cost, several per thread.
static void cut_spans(const int32_t* lengths, int64_t count, int heads, int threads, std::vector<Span>& spans) {
  spans.clear();
  int64_t total = 0;
  const auto cost = [](int64_t n) { return n * (n + 16); };
  for (int64_t i = 0; i < count; i++) total += cost(lengths[i]) * heads;
  const int64_t want = std::max<int64_t>(total / (threads * 16), 1024);
  int32_t start = 0;
  for (int64_t i = 0; i < count; i++) {
    const int32_t n = lengths[i];
    const int64_t one = cost(n);
    const int per_span = (int)std::max<int64_t>(1, std::min<int64_t>(heads, want / one));
    // Each piece prepares the keys and values again, so pieces stay long.
    const int pieces = (int)std::max<int64_t>(1, std::min<int64_t>(one / (2 * want), n / 64));
    for (int h = 0; h < heads; h += per_span)
      for (int p = 0; p < pieces; p++)
        spans.push_back({start, n, h, std::min(h + per_span, heads), (int32_t)((int64_t)n * p / pieces),
                         (int32_t)((int64_t)n * (p + 1) / pieces)});
    start += n;
  }
}

static void transpose_keys(const float* k, long ld, int n, int dim, float* to) {
  for (int p0 = 0; p0 < n; p0 += NR, to += (size_t)dim * NR)
    for (int j = 0; j < NR; j += 8) {
      const float* from = k + (p0 + j) * ld;
      int d = 0;
      if (p0 + j + 8 <= n)
        for (; d + 8 <= dim; d += 8) {
          u8x m[8];
          KV_UNROLL for (int i = 0; i < 8; i++) m[i] = load<u8x>(from + i * ld + d);
          transpose8(m);
          KV_UNROLL for (int i = 0; i < 8; i++) store(to + (d + i) * NR + j, m[i]);
        }
      for (; d < dim; d++)
        for (int i = 0; i < 8; i++) to[d * NR + j + i] = p0 + j + i < n ? from[i * ld + d] : 0.0f;
    }
}

static void copy_values(const float* v, long ld, int n, int dim, float* to) {
  for (int d0 = 0; d0 < dim; d0 += NR, to += (size_t)n * NR) {
    const int cols = std::min(NR, dim - d0);
    if (cols == NR)
      for (int i = 0; i < n; i++)
        KV_UNROLL for (int c = 0; c < NV; c++) store(to + i * NR + c * W, load<vf>(v + i * ld + d0 + c * W));
    else
      for (int i = 0; i < n; i++)
        for (int c = 0; c < NR; c++) to[i * NR + c] = c < cols ? v[i * ld + d0 + c] : 0.0f;
  }
}

// Turn n scores into weights e^(s - largest), in place; return 1 / their sum. The row has room up to a multiple of W.
static float softmax_row(float* s, int n, float scaling, const float* bias) {
  const int end = (int)round_up(n, W);
  for (int i = n; i < end; i++) s[i] = -INFINITY;
  vf top = splat(-INFINITY);
  if (bias == nullptr) {
    for (int i = 0; i < end; i += W) {
      const vf x = load<vf>(s + i);
      top = x > top ? x : top;
    }
    top *= scaling;
  } else {
    for (int i = 0; i < end; i += W) {
      const vf x = load<vf>(s + i) * scaling + load<vf>(bias + i);
      store(s + i, x);
      top = x > top ? x : top;
    }
    scaling = 1.0f;
  }
  float largest = top[0];
  for (int j = 1; j < W; j++) largest = top[j] > largest ? top[j] : largest;
  vf sums = {};
  for (int i = 0; i < end; i += W) {
    const vf e = vexp(load<vf>(s + i) * scaling - largest);
    store(s + i, e);
    sums += e;
  }
  float sum = 0;
  for (int j = 0; j < W; j++) sum += sums[j];
  return 1.0f / sum;
}

static void attend_span(const Span& span, const SpanShape& shape, float* qkv, SpanScratch& x) {
  const int n = span.length, dim = shape.dim;
  const long ld = shape.ld, hidden = (long)shape.heads * dim, lds = round_up(n, NR) + 16, ldo = round_up(dim, NR);
  float inverse[kQueryRows];
  for (int h = span.head0; h < span.head1; h++) {
    float* q = qkv + span.start * ld + h * dim;
    transpose_keys(q + hidden, ld, n, dim, x.keys.data());
    copy_values(q + 2 * hidden, ld, n, dim, x.values.data());
    for (int q0 = span.q0; q0 < span.q1; q0 += kQueryRows) {
      const int rows = std::min(kQueryRows, span.q1 - q0);
      float* rows_q = q + q0 * ld;
      float* s = x.scores.data();
      for (int p0 = 0; p0 < n; p0 += NR) {
        const float* b = x.keys.data() + (size_t)p0 * dim;
        panel_rows(rows, dim, b, rows_q, ld, s + p0, lds, kFresh, (const char*)b, 0);
      }
      for (int r = 0; r < rows; r++) {
        const float* bias = nullptr;
        if (shape.bias != nullptr) bias = shape.bias + h * shape.bias_stride + shape.bias_center - (q0 + r);
        inverse[r] = softmax_row(s + r * lds, n, shape.scaling, bias);
      }
      float* out = x.out.data();
      for (int d0 = 0; d0 < dim; d0 += NR) {
        const float* b = x.values.data() + (size_t)d0 * n;
        panel_rows(rows, n, b, s, lds, out + d0, ldo, kFresh, (const char*)b, 0);
      }
      for (int r = 0; r < rows; r++) {
        int d = 0;
        for (; d + W <= dim; d += W) store(rows_q + r * ld + d, load<vf>(out + r * ldo + d) * inverse[r]);
        for (; d < dim; d++) rows_q[r * ld + d] = out[r * ldo + d] * inverse[r];
      }
    }
  }
}

}  // namespace kv
