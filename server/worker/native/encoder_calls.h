// The encoder's part of the C interface; predict/native.py mirrors the structs. Included by kernels.cpp.
#pragma once

#include <new>

#include "encoder.h"

extern "C" {

kv::Workspace* kvn_workspace_new(int threads) {
  try {
    return new kv::Workspace(threads);
  } catch (...) {
    return nullptr;
  }
}
void kvn_workspace_free(kv::Workspace* space) { delete space; }
int64_t kvn_workspace_bytes(kv::Workspace* space) {
  std::lock_guard<std::mutex> lock(space->pool.caller_mutex());
  return (int64_t)space->bytes();
}
// Seconds of all threads per part in the last call, in order of kv::Part.
void kvn_workspace_seconds(kv::Workspace* space, double* parts) {
  std::lock_guard<std::mutex> lock(space->pool.caller_mutex());
  space->pool.quiesce();
  std::fill(parts, parts + kv::kNumParts, 0.0);
  for (const kv::Worker& w : space->workers)
    for (int i = 0; i < kv::kNumParts; i++) parts[i] += w.seconds[i];
}

kv::EncoderBase* kvn_encoder_new(const kv::EncoderConfig* config) {
  kv::EncoderBase* encoder = nullptr;
  try {
    if (config->weight_dtype == kv::kBfloat16)
      encoder = new kv::Encoder<uint16_t>(*config);
    else
      encoder = new kv::Encoder<float>(*config);
    if (encoder->allocate()) return encoder;
  } catch (...) {
  }
  delete encoder;
  return nullptr;
}
// `space` is where the encoder computed: its threads may still be walking the end of the last job.
// Without `space`: it was freed before, and its threads with it.
void kvn_encoder_free(kv::EncoderBase* encoder, kv::Workspace* space) {
  if (space != nullptr) {
    std::lock_guard<std::mutex> lock(space->pool.caller_mutex());
    space->pool.quiesce();
  }
  delete encoder;
}
int64_t kvn_encoder_bytes(kv::EncoderBase* encoder) { return (int64_t)encoder->bytes(); }
const char* kvn_encoder_pack(kv::EncoderBase* encoder, kv::Workspace* space, int layer, int matrix, const void* src,
                             int64_t rows, int64_t cols, int64_t stride) {
  return encoder->pack(*space, layer, matrix, src, rows, cols, stride);
}
const char* kvn_encoder_set_vector(kv::EncoderBase* encoder, int layer, int which, const float* src, int64_t count) {
  return encoder->set_vector(layer, which, src, count);
}
void kvn_encoder_set_tables(kv::EncoderBase* encoder, const void* words, const void* positions, const void* types) {
  encoder->set_tables(words, positions, types);
}
void kvn_encoder_set_distance_bias(kv::EncoderBase* encoder, const float* src, int64_t max_length) {
  encoder->set_distance_bias(src, max_length);
}
const char* kvn_encoder_forward(kv::EncoderBase* encoder, kv::Workspace* space, const kv::EncoderBatch* batch,
                                float* out) {
  try {
    return encoder->forward(*space, *batch, out);
  } catch (const std::bad_alloc&) {
    return "a batch too large for this machine's memory";
  }
}
double kvn_encoder_time_products(kv::EncoderBase* encoder, kv::Workspace* space, int64_t tokens) {
  try {
    return encoder->time_products(*space, tokens);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

}  // extern "C"
