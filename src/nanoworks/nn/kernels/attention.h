// Attention of packed tokens over a paged cache of keys and values.
//
// A block holds 8 tokens. Of one block and head, keys lie transposed, so that one register holds the same features of
// the 16 keys of two blocks and scores need no sum across lanes; values lie so that one register holds 16 features.
//   F32   keys [D][8], values [8][D]
//   BF16  keys [D/2][8][2], values [4][D][2]: pairs, for the dot-product instruction
//   INT8  keys [D/4][8][4] (value + 128), values [8][D]; a float scale for each token and head
// A cache of one layer is (block, head, these).
#pragma once
#include <vector>

#include "gemm.h"

namespace nanoworks {

constexpr int BLOCK = 8;  // tokens

struct Cache {
  Kind kind;
  int heads, D;            // key/value heads and features of each
  void *keys, *values;     // of one layer
  float *key_scales, *value_scales;  // INT8: (block, head, 8)
};

// The tokens of one step: N of them, of S sequences one after the other.
struct Step {
  int N, S, width;         // width of a table
  const int32_t* starts;   // (S + 1) first token of each sequence
  const int32_t* tables;   // (S, width) blocks
  const int32_t* places;   // (S, width) which of its sequence's blocks each one is; null: 0, 1, ...
  const int32_t* counts;   // (S) blocks in each table
  const int32_t* slots;    // (N) block * 8 + offset, where the token's key and value go
  const int32_t* positions;  // (N)
  const int32_t* limits;   // (N) the token sees the keys before this place of its sequence,
  const int64_t* tree;     // (N) or null: and of the 64 keys from `drafts` on those whose bit is set
  const int32_t* drafts;   // (S) or null
  const uint8_t* global;   // (slots) or null: tokens that no window hides
};

struct Options {
  int norm = 0;            // of each head of q and k: 0 none, 1 before the rotation, 2 after it
  const float *q_norm = nullptr, *k_norm = nullptr;  // (D) or null
  float eps = 0, scale = 0;
  int window = 0, first = 0;  // as in nn.context.Window; window 0 shows everything
  float softcap = 0;       // 0: none
  const float* sinks = nullptr;  // (query heads) or null
};

// q, k, v: token n at n * stride; cos and sin (N, D / 2) or null for no rotation. Writes k and v into the cache, and
// y (N, query heads, D).
template <typename T>
void attend(const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int q_heads,
            const float* cos, const float* sin, const Step& step, const Cache& cache, const Options& options, T* y, int threads);

// How the queries of a step are dealt out, and where they lie while they wait; the same for all layers.
struct AttentionPlan {
  struct Unit {
    int sequence, head, heads;  // key heads from `head` on
    int begin, end;             // queries of each, counted (token, query head of the group)
  };
  std::vector<Unit> units;
  char* queries;

  AttentionPlan(const Step& step, const Cache& cache, int q_heads, int threads);
};

// `attend` for every thread of a parallel region; ends with a barrier.
template <typename T>
void attend_in_team(const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int q_heads,
                    const float* cos, const float* sin, const Step& step, const Cache& cache, const Options& options,
                    const AttentionPlan& plan, T* y);

// Move the keys and values of `n` tokens from slot to slot, one after the other.
void move_slots(const Cache& cache, const int32_t* sources, const int32_t* targets, int n);

}  // namespace nanoworks
