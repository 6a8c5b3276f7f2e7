// The ragged batch of one step, checked once, and cut into the query tiles that attention hands to threads.
//
//   sequences  | s0 | s1 | s2 | s3 | s4 |        groups: [1, 4) blocks [0, 3), inside it [2, 4) blocks [3, 5)
//   tiles      | t0 | t1      | t2 | t3, t4, t5  |        a tile stays inside one outermost group or one sequence
//
// How a batch is cut decides who computes what, never what comes out.
#pragma once

#include <algorithm>
#include <vector>

#include "vec.h"

namespace kv {

constexpr int kTile = 16;          // KV positions per attention tile
constexpr int kTV = kTile / W;     // vectors per tile row
constexpr int kAttnRows = MR * NV / kTV > 12 ? 12 : MR * NV / kTV;
constexpr int kTaskRows = 96;      // rows whose state one task keeps in cache

struct AttnShape {
  int heads, kv_heads, dim;
  int group() const { return heads / kv_heads; }
  int padded() const { return (int)round_up(dim, kTile); }
};

struct Group {
  int32_t start, stop, first_block, last_block;
};

// The ragged batch, as in PackedBatch.
struct BatchView {
  int64_t num_tokens, num_sequences, num_logit_rows, max_blocks, num_groups;
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slots;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int64_t* logit_rows;
  const Group* groups;
};

// Tokens [t0, t1) of sequences [s0, s1): all of one sequence, or of one outermost group.
struct QueryTile {
  int t0, t1, s0, s1;
  int64_t cost;
};

struct AttnPlan {
  BatchView batch;
  int block_size;
  std::vector<Group> groups;  // outer before inner, left before right
  std::vector<QueryTile> tiles;
  std::vector<int> sequence_of;

  // Check the batch and cut it into tiles. Return null, or what is wrong.
  const char* prepare(const BatchView& b, const AttnShape& shape, int block_size_, int64_t num_blocks, int threads) {
    batch = b;
    block_size = block_size_;
    const int T = (int)b.num_tokens, S = (int)b.num_sequences;
    if (S == 0 || T == 0) return "empty batch";
    if (b.query_starts[0] != 0 || b.query_starts[S] != T) return "query_starts do not cover the tokens";
    sequence_of.resize(T);
    for (int s = 0; s < S; s++) {
      const int t0 = b.query_starts[s], t1 = b.query_starts[s + 1];
      if (t1 <= t0) return "a sequence without tokens";
      const int64_t last = b.positions[t1 - 1];
      for (int t = t0; t < t1; t++) {
        sequence_of[t] = s;
        if (b.positions[t] < 0 || b.positions[t] > last) return "positions out of order";
      }
      if (last + 1 > b.max_blocks * block_size) return "a block table too short for its positions";
      for (int64_t i = 0; i <= last / block_size; i++) {
        const int32_t block = b.block_tables[s * b.max_blocks + i];
        if (block < 0 || block >= num_blocks) return "a block id out of range";
      }
    }
    groups.assign(b.groups, b.groups + b.num_groups);
    std::sort(groups.begin(), groups.end(), [](const Group& x, const Group& y) {
      if (x.start != y.start) return x.start < y.start;
      if (x.stop != y.stop) return x.stop > y.stop;
      return x.first_block < y.first_block;
    });
    std::vector<const Group*> open;
    for (const Group& g : groups) {
      if (g.start < 0 || g.stop > S || g.start >= g.stop || g.last_block > b.max_blocks) return "a group out of range";
      while (!open.empty() && open.back()->stop <= g.start) open.pop_back();
      if (!open.empty() && g.stop > open.back()->stop) return "groups that overlap without nesting";
      if (g.first_block < (open.empty() ? 0 : open.back()->last_block) || g.last_block < g.first_block)
        return "a group that starts before its parent ends";
      for (int s = g.start; s < g.stop; s++) {
        if (std::memcmp(b.block_tables + s * b.max_blocks + g.first_block,
                        b.block_tables + g.start * b.max_blocks + g.first_block,
                        sizeof(int32_t) * (g.last_block - g.first_block)) != 0)
          return "a group whose block tables differ";
      }
      open.push_back(&g);
    }
    cut(shape, threads);
    return nullptr;
  }

 private:
  void cut(const AttnShape& shape, int threads) {
    const int G = shape.group(), S = (int)batch.num_sequences;
    // Small enough that every thread finds work, large enough that converted tiles are used several times.
    int64_t want = ceil_div(batch.num_tokens * shape.kv_heads, 3 * threads);
    const int64_t least = std::max<int64_t>(1, ceil_div(2 * kAttnRows, G)), most = std::max(1, kTaskRows / G);
    want = std::min(std::max(want, least), most);
    tiles.clear();
    size_t g = 0;
    for (int s = 0; s < S;) {
      while (g < groups.size() && groups[g].stop <= s) g++;
      const int stop = g < groups.size() && groups[g].start <= s ? groups[g].stop : s + 1;
      const int t0 = batch.query_starts[s], t1 = batch.query_starts[stop];
      const int pieces = (int)ceil_div(t1 - t0, want);
      for (int i = 0; i < pieces; i++) {
        QueryTile tile;
        tile.t0 = t0 + (int)((int64_t)(t1 - t0) * i / pieces);
        tile.t1 = t0 + (int)((int64_t)(t1 - t0) * (i + 1) / pieces);
        tile.s0 = sequence_of[tile.t0];
        tile.s1 = sequence_of[tile.t1 - 1] + 1;
        tile.cost = 0;
        for (int t = tile.t0; t < tile.t1; t++) tile.cost += batch.positions[t] + 1;
        tiles.push_back(tile);
      }
      s = stop;
    }
    std::stable_sort(tiles.begin(), tiles.end(),
                     [](const QueryTile& x, const QueryTile& y) { return x.cost > y.cost; });
  }
};

}  // namespace kv
