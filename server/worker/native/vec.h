// Portable vectors: GCC/clang vector extensions, width chosen by macro; no intrinsics.
//
// Determinism: every function is elementwise or reduces in one fixed order, and is compiled without
// -ffast-math, so a value depends on its inputs alone and NaN stays NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(KV_W)
// The build chose (tests run every width on one machine; compilers lower what the processor lacks).
#elif defined(__AVX512F__)
#define KV_W 16   // floats per vector
#define KV_NV 2   // vectors per weight panel row
#define KV_MR 12  // rows per register tile: MR * NV accumulators
#elif defined(__AVX__)
#define KV_W 8
#define KV_NV 2
#define KV_MR 6
#elif defined(__aarch64__)
#define KV_W 4
#define KV_NV 4
#define KV_MR 6
#else
#define KV_W 4
#define KV_NV 2
#define KV_MR 6
#endif

namespace kv {

constexpr int W = KV_W;
constexpr int NV = KV_NV;
constexpr int NR = W * NV;
constexpr int MR = KV_MR;

#define KV_INLINE inline __attribute__((always_inline))
#define KV_UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
// Eight lanes on every machine, for transposes and horizontal reductions of 16-position tiles.
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8x __attribute__((vector_size(32)));

template <class V, class T>
KV_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
KV_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
KV_INLINE vf splat(float x) { return x - vf{}; }

// Keep a loaded vector in a register: compilers otherwise load it again for each multiply-add that uses it, and the
// load ports become the limit.
#if KV_W == 16 && defined(__AVX512F__)
#define KV_KEEP(v) asm("" : "+v"(v))
#elif (KV_W == 8 && defined(__AVX__)) || (KV_W == 4 && defined(__SSE__))
#define KV_KEEP(v) asm("" : "+x"(v))
#elif KV_W == 4 && defined(__aarch64__)
#define KV_KEEP(v) asm("" : "+w"(v))
#else
#define KV_KEEP(v) (void)(v)
#endif

KV_INLINE vf as_f(vu v) { return (vf)v; }
KV_INLINE vu as_u(vf v) { return (vu)v; }

KV_INLINE float from_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// Round to nearest even; NaN stays NaN.
KV_INLINE uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

KV_INLINE vf load_elems(const float* p) { return load<vf>(p); }
KV_INLINE vf load_elems(const uint16_t* p) { return as_f(__builtin_convertvector(load<vh>(p), vu) << 16); }
KV_INLINE void store_elems(float* p, vf v) { store(p, v); }
KV_INLINE void store_elems(uint16_t* p, vf v) {
  vu u = as_u(v);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu nan = (u >> 16) | 0x40;
  store(p, __builtin_convertvector((v == v) ? rounded : nan, vh));
}
KV_INLINE float load_elem(const float* p) { return *p; }
KV_INLINE float load_elem(const uint16_t* p) { return from_bf16(*p); }
KV_INLINE void store_elem(float* p, float v) { *p = v; }
KV_INLINE void store_elem(uint16_t* p, float v) { *p = to_bf16(v); }

// e^x, about 1 ulp: n = round(x / ln 2), a degree-6 polynomial of the rest, 2^n by its exponent bits.
// Below -87.3 the result is 0 (so masked scores of -inf weigh nothing); above 88.7 it is +inf.
KV_INLINE vf vexp(vf x) {
  const vf lo = splat(-87.33654f), hi = splat(88.72283f);
  vf c = x < lo ? lo : x;
  c = c > hi ? hi : c;
  vf t = c * 1.44269504f + 12582912.0f;
  vf n = t - 12582912.0f;
  vf r = c - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Two factors, because n may be 128.
  vi bits = (vi)t - 0x4B400000;
  vi half = bits >> 1;
  vf s1 = (vf)((half + 127) << 23), s2 = (vf)((bits - half + 127) << 23);
  vf y = p * s1 * s2;
  y = x < lo ? vf{} : y;
  y = x > hi ? splat(INFINITY) : y;
  return x == x ? y : x;
}
KV_INLINE float exp1(float x) { return vexp(splat(x))[0]; }
KV_INLINE vf vtanh(vf x) {
  vf e = vexp(x * 2.0f);
  return 1.0f - 2.0f / (e + 1.0f);
}
KV_INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }

#if defined(__clang__)
#define KV_SHUF(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KV_SHUF(a, b, ...) __builtin_shuffle(a, b, (::kv::i8){__VA_ARGS__})
#endif

KV_INLINE f8 max8(f8 a, f8 b) { return a > b ? a : b; }
KV_INLINE float hmax(f8 v) {
  v = max8(v, KV_SHUF(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = max8(v, KV_SHUF(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = max8(v, KV_SHUF(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  return v[0];
}
KV_INLINE float hsum(f8 v) {
  v = v + KV_SHUF(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v = v + KV_SHUF(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}

// Transpose an 8 x 8 matrix of 32-bit words held in eight vectors.
KV_INLINE void transpose8(u8x r[8]) {
  u8x t[8], s[8];
  KV_UNROLL for (int i = 0; i < 4; i++) {
    t[2 * i] = KV_SHUF(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[2 * i + 1] = KV_SHUF(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  KV_UNROLL for (int i = 0; i < 2; i++) {
    s[4 * i] = KV_SHUF(t[4 * i], t[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    s[4 * i + 1] = KV_SHUF(t[4 * i], t[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    s[4 * i + 2] = KV_SHUF(t[4 * i + 1], t[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    s[4 * i + 3] = KV_SHUF(t[4 * i + 1], t[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  KV_UNROLL for (int i = 0; i < 4; i++) {
    r[i] = KV_SHUF(s[i], s[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = KV_SHUF(s[i], s[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// A float array on cache-line boundaries.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
typedef std::vector<float, LineAllocator<float>> Floats;

KV_INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
KV_INLINE long round_up(long a, long b) { return ceil_div(a, b) * b; }

}  // namespace kv
