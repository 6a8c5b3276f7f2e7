// The C interface. Everything else lies in the headers, one idea each; library.py mirrors the structs.
//
// Functions return null, or a static string saying what is wrong with the arguments.
#include <algorithm>
#include <chrono>
#include <new>

#include "encoder_calls.h"
#include "model.h"

using namespace kv;

namespace {

// Jobs that belong to no model: attention alone, argmax, measurements.
struct Tools {
  explicit Tools(int threads) : pool(threads) {
    pool.reserve_phases(1);
    scratch.resize(threads);
  }
  ~Tools() { pool.quiesce(); }

  template <class F>
  void run(long total, F f) {
    pool.run_units(total, f);
  }

  Pool pool;
  AttnPlan plan;
  std::vector<AttnScratch> scratch;
};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

const char* kvn_describe() {
#define KV_STR2(x) #x
#define KV_STR(x) KV_STR2(x)
  return "vector " KV_STR(KV_W) " x float32, tile " KV_STR(KV_MR) " rows";
}

ModelBase* kvn_model_new(const ModelConfig* config) {
  ModelBase* model = nullptr;
  try {
    if (config->weight_dtype == kBfloat16)
      model = new Model<uint16_t>(*config);
    else
      model = new Model<float>(*config);
    if (model->allocate()) return model;
  } catch (...) {
  }
  delete model;
  return nullptr;
}
void kvn_model_free(ModelBase* model) { delete model; }

const char* kvn_model_pack(ModelBase* model, int layer, int matrix, const void* src, int64_t rows, int64_t cols,
                           int64_t stride) {
  return model->pack(layer, matrix, src, rows, cols, stride);
}

// Copy a float32 vector. Names in order of library.py's `Vector`.
const char* kvn_model_set_vector(ModelBase* model, int layer, int which, const float* src, int64_t count) {
  std::vector<float> v(src, src + count);
  const ModelConfig& c = model->config;
  if (which == 8) {
    if (count != c.hidden) return "a vector of the wrong length";
    model->final_norm = std::move(v);
    return nullptr;
  }
  if (which == 9) {
    if (count != c.head_dim / 2) return "a vector of the wrong length";
    model->inv_freq = std::move(v);
    return nullptr;
  }
  if (layer < 0 || layer >= c.num_layers) return "no such layer";
  Layer& l = model->layers[layer];
  std::vector<float>* const at[] = {&l.input_norm, &l.post_norm, &l.q_norm,       &l.k_norm,
                                    &l.qkv_bias,   &l.o_bias,    &l.gate_up_bias, &l.down_bias};
  const int64_t want[] = {c.hidden, c.hidden, c.head_dim, c.head_dim, (c.heads + 2 * c.kv_heads) * c.head_dim,
                          c.hidden, 2 * c.intermediate, c.hidden};
  if (which < 0 || which > 7) return "no such vector";
  if (count != want[which]) return "a vector of the wrong length";
  *at[which] = std::move(v);
  return nullptr;
}
void kvn_model_set_embedding(ModelBase* model, const void* embedding) { model->embedding = embedding; }
const char* kvn_model_set_kv(ModelBase* model, int layer, const KvView* kv, int64_t num_blocks, int64_t window) {
  if (layer < 0 || layer >= model->config.num_layers) return "no such layer";
  model->layers[layer].kv = *kv;
  model->layers[layer].window = window;
  model->num_blocks = num_blocks;
  return nullptr;
}
const char* kvn_model_reserve(ModelBase* model, int64_t tokens, int64_t logit_rows) {
  std::lock_guard<std::mutex> lock(model->pool.caller_mutex());
  try {
    model->reserve(tokens, logit_rows);
  } catch (const std::bad_alloc&) {
    return "a step too large for this machine's memory";
  }
  return nullptr;
}
const char* kvn_model_forward(ModelBase* model, const BatchView* batch, float* logits) {
  try {
    return model->forward(*batch, logits);
  } catch (const std::bad_alloc&) {
    return "a step too large for this machine's memory";
  }
}

Tools* kvn_tools_new(int threads) {
  try {
    return new Tools(threads);
  } catch (...) {
    return nullptr;
  }
}
void kvn_tools_free(Tools* tools) { delete tools; }

const char* kvn_attend(Tools* tools, const BatchView* batch, const QueryView* io, const KvView* kv, int64_t num_blocks,
                       int heads, int kv_heads, int dim, const AttnParams* params) {
  std::lock_guard<std::mutex> lock(tools->pool.caller_mutex());
  const AttnShape shape{heads, kv_heads, dim};
  const char* error = tools->plan.prepare(*batch, shape, kv->block_size, num_blocks, tools->pool.num_threads());
  if (error != nullptr) return error;
  for (AttnScratch& s : tools->scratch) s.reserve(shape);
  tools->run((long)tools->plan.tiles.size() * kv_heads, [&](long i, int thread) {
    attention_unit(tools->plan, shape, *params, *kv, *io, tools->scratch[thread], i);
  });
  return nullptr;
}

// The first largest logit of each row, and the row's log-sum-exp (either may be null). NaN gives id -1 and NaN.
void kvn_argmax(Tools* tools, const float* logits, int64_t rows, int64_t cols, int64_t stride, int64_t* ids,
                float* log_sum_exp) {
  std::lock_guard<std::mutex> lock(tools->pool.caller_mutex());
  tools->run(rows, [&](long r, int) {
    const float* x = logits + r * stride;
    vf best = splat(-INFINITY);
    vi bad = {};
    int64_t i = 0;
    for (; i + W <= cols; i += W) {
      vf v = load<vf>(x + i);
      bad |= v != v;
      best = v > best ? v : best;
    }
    float top = -INFINITY;
    bool nan = false;
    for (int j = 0; j < W; j++) top = best[j] > top ? best[j] : top, nan |= bad[j] != 0;
    for (int64_t j = i; j < cols; j++) top = x[j] > top ? x[j] : top, nan |= x[j] != x[j];
    if (ids != nullptr) {
      int64_t at = 0;
      while (!nan && at < cols && x[at] != top) at++;
      ids[r] = nan ? -1 : at;
    }
    if (log_sum_exp == nullptr) return;
    const float shift = top == -INFINITY ? 0.0f : top;
    vf sums = {};
    for (i = 0; i + W <= cols; i += W) sums += vexp(load<vf>(x + i) - shift);
    double sum = 0;
    for (int j = 0; j < W; j++) sum += sums[j];
    for (; i < cols; i++) sum += exp1(x[i] - shift);
    log_sum_exp[r] = nan ? NAN : (float)(std::log(sum) + shift);
  });
}

// Seconds to read `bytes` (a multiple of 1 MiB) once with all threads, four streams each.
double kvn_time_read(Tools* tools, const char* data, int64_t bytes) {
  std::lock_guard<std::mutex> lock(tools->pool.caller_mutex());
  const long chunk = 1 << 18, quarter = chunk / 4;
  std::vector<float> sink(tools->scratch.size() * 16);
  const double start = seconds();
  tools->run(bytes / chunk, [&](long i, int thread) {
    const char* p = data + i * chunk;
    vf s[8] = {};
    for (long k = 0; k < quarter; k += 2 * W * 4)
      KV_UNROLL for (int z = 0; z < 4; z++) {
        s[2 * z] += load<vf>(p + z * quarter + k);
        s[2 * z + 1] += load<vf>(p + z * quarter + k + W * 4);
        __builtin_prefetch(p + z * quarter + k + 1024);
      }
    for (int z = 1; z < 8; z++) s[0] += s[z];
    sink[thread * 16] += s[0][0];
  });
  return seconds() - start;
}

// Seconds of `units` * 1.2 million multiply-adds of W lanes each, on all threads.
double kvn_time_multiply(Tools* tools, int64_t units) {
  std::lock_guard<std::mutex> lock(tools->pool.caller_mutex());
  std::vector<float> sink(tools->scratch.size() * 16);
  const double start = seconds();
  tools->run(units, [&](long, int thread) {
    vf a[12];
    for (int z = 0; z < 12; z++) a[z] = splat((float)z);
    volatile float x0 = 1.0000001f, y0 = 1e-9f;
    const vf x = splat(x0), y = splat(y0);
    for (int k = 0; k < 100000; k++) KV_UNROLL for (int z = 0; z < 12; z++) a[z] = a[z] * x + y;
    for (int z = 1; z < 12; z++) a[0] += a[z];
    sink[thread * 16] += a[0][0];
  });
  return seconds() - start;
}
int kvn_vector_floats() { return W; }

}  // extern "C"
