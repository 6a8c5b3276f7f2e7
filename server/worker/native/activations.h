// What an encoder does to rows between its matrix products: activations and the layer norm.
//
// Elementwise, or one fixed order of sums per row: a row's result depends on that row alone.
#pragma once

#include "vec.h"

namespace kv {

enum Activation : int32_t { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

// x times the normal distribution function. The function is 1/2 + x P(x^2) / Q(x^2) on [-5.6, 5.6], constant beyond;
// P and Q are a least-maximum fit of ours (error of the fit 1e-8, of the float32 arithmetic 3e-7 at most).
KV_INLINE vf vgelu(vf x) {
  const vf lo = splat(-5.6f), hi = splat(5.6f);
  vf c = x < lo ? lo : x;
  c = c > hi ? hi : c;
  const vf u = c * c;
  vf p = splat(2.214531846789214e-08f);
  p = p * u + 6.3565385062247515e-06f;
  p = p * u + 0.0001738510763971135f;
  p = p * u + 0.0047072614543139935f;
  p = p * u + 0.03437613695859909f;
  p = p * u + 0.398942232131958f;
  vf q = splat(1.1802126209659036e-06f);
  q = q * u + 7.510205614380538e-05f;
  q = q * u + 0.0019129801075905561f;
  q = q * u + 0.02894010581076145f;
  q = q * u + 0.25283390283584595f;
  q = q * u + 1.0f;
  return x * (0.5f + c * (p / q));
}

// The tanh form: (1 + tanh y) / 2 = 1 / (1 + e^(-2y)) with y = sqrt(2/pi) (x + 0.044715 x^3).
KV_INLINE vf vgelu_tanh(vf x) {
  const vf y = x * (0.044715f * (x * x) + 1.0f);
  return x / (1.0f + vexp(y * -1.5957691216f));
}

KV_INLINE vf vrelu(vf x) { return x < 0.0f ? vf{} : x; }

template <class F>
KV_INLINE void map_rows(float* x, long ld, int rows, long cols, F f) {
  for (int r = 0; r < rows; r++)
    for (long i = 0; i < cols; i += W) store(x + r * ld + i, f(load<vf>(x + r * ld + i)));
}

// x[rows, cols] in place; cols a multiple of W.
static void activate(int32_t kind, float* x, long ld, int rows, long cols) {
  switch (kind) {
    case kGelu: map_rows(x, ld, rows, cols, [](vf v) { return vgelu(v); }); break;
    case kGeluTanh: map_rows(x, ld, rows, cols, [](vf v) { return vgelu_tanh(v); }); break;
    case kRelu: map_rows(x, ld, rows, cols, [](vf v) { return vrelu(v); }); break;
    default: map_rows(x, ld, rows, cols, [](vf v) { return vsilu(v); }); break;
  }
}

KV_INLINE float lanes_sum(const vf parts[4]) {
  const vf total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  float sum = 0;
  for (int j = 0; j < W; j++) sum += total[j];
  return sum;
}

// out may be x. With a residual x becomes x + residual first.
static void layer_norm(float* x, const float* residual, const float* gamma, const float* beta, float* out, long n,
                       float eps) {
  vf parts[4] = {};
  long i = 0;
  if (residual != nullptr) {
    for (; i + W <= n; i += W) store(x + i, load<vf>(x + i) + load<vf>(residual + i));
    for (; i < n; i++) x[i] += residual[i];
  }
  for (i = 0; i + 4 * W <= n; i += 4 * W) KV_UNROLL for (int j = 0; j < 4; j++) parts[j] += load<vf>(x + i + j * W);
  float sum = lanes_sum(parts);
  for (; i < n; i++) sum += x[i];
  const float mean = sum / (float)n;
  vf squares[4] = {};
  for (i = 0; i + 4 * W <= n; i += 4 * W)
    KV_UNROLL for (int j = 0; j < 4; j++) {
      const vf v = load<vf>(x + i + j * W) - mean;
      squares[j] += v * v;
    }
  sum = lanes_sum(squares);
  for (; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(sum / (float)n + eps);
  for (i = 0; i + W <= n; i += W) store(out + i, (load<vf>(x + i) - mean) * scale * load<vf>(gamma + i) + load<vf>(beta + i));
  for (; i < n; i++) out[i] = (x[i] - mean) * scale * gamma[i] + beta[i];
}

}  // namespace kv
