#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace nanoworks {
namespace {

constexpr int ROWS = 6;         // queries whose scores are in registers at once, with those of
constexpr int TILE = 8;         // blocks,
constexpr int KEYS = TILE * BLOCK;   // or so many keys: a mask of them is 64 bits
constexpr int REGS = KEYS / LANES;   // of each query
constexpr int MAX_ROWS = 48;    // queries that share a tile while it is in the first cache
constexpr int MAX_D = 512;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// ------------------------------------------------------------------------------------------ queries, keys, values

inline void normalize(float* x, const float* weight, float eps, int D) {
  __m512 squares = _mm512_setzero_ps();
  for (int d = 0; d < D; d += LANES) {
    __m512 v = load(x + d, first(D - d));
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps));
  for (int d = 0; d < D; d += LANES) {
    __m512 v = _mm512_mul_ps(load(x + d, first(D - d)), inverse);
    if (weight != nullptr) v = _mm512_mul_ps(v, load(weight + d, first(D - d)));
    store(x + d, v, first(D - d));
  }
}

// One head of one token as floats, normalised and rotated.
template <typename T>
void prepare(const T* from, const float* weight, const Options& o, const float* cos, const float* sin, int D, float* x) {
  for (int d = 0; d < D; d += LANES) store(x + d, load(from + d, first(D - d)), first(D - d));
  if (o.norm == 1) normalize(x, weight, o.eps, D);
  if (cos != nullptr) {
    const int half = D / 2;
    for (int d = 0; d < half; d += LANES) {
      const __mmask16 mask = first(half - d);
      __m512 a = load(x + d, mask), b = load(x + half + d, mask), c = load(cos + d, mask), s = load(sin + d, mask);
      store(x + d, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), mask);
      store(x + half + d, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), mask);
    }
  }
  if (o.norm == 2) normalize(x, weight, o.eps, D);
}

// Whether one of D numbers is NaN or infinite. Of such a token the key is NaN and the value zero: scores of keys that are
// not seen are dropped, but a value is multiplied by a weight of zero all the same, and NaN would reach who must not see it.
template <typename T>
bool broken(const T* x, int D) {
  __mmask16 wrong = 0;
  for (int d = 0; d < D; d += LANES) wrong |= _mm512_fpclass_ps_mask(load(x + d, first(D - d)), 0x01 | 0x08 | 0x10 | 0x80);
  return wrong;
}

template <typename T>
T* head_of(void* base, const Cache& c, int64_t block, int head) {
  return (T*)base + (block * c.heads + head) * BLOCK * c.D;
}

// Returns the scale; NaN where a number is not finite, which bytes could not tell.
float quantize(const float* x, int D, int8_t* values) {
  __m512 most = _mm512_setzero_ps(), wrong = _mm512_setzero_ps();
  for (int d = 0; d < D; d += LANES) {
    __m512 v = load(x + d, first(D - d));
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    wrong = _mm512_fmadd_ps(v, _mm512_setzero_ps(), wrong);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  for (int d = 0; d < D; d += LANES) {
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + d, first(D - d)), inverse));
    _mm_mask_storeu_epi8(values + d, first(D - d), _mm512_cvtsepi32_epi8(v));
  }
  return largest / 127.0f + _mm512_reduce_add_ps(wrong);
}

void write_key(const Cache& c, int slot, int head, const float* x) {
  const int block = slot / BLOCK, t = slot % BLOCK;
  if (c.kind == F32) {
    float* to = head_of<float>(c.keys, c, block, head) + t;
    for (int d = 0; d < c.D; d++) to[d * BLOCK] = x[d];
  } else if (c.kind == BF16) {
    bf16 rounded[MAX_D];
    for (int d = 0; d < c.D; d += LANES) store(rounded + d, load(x + d, first(c.D - d)), first(c.D - d));
    bf16* to = head_of<bf16>(c.keys, c, block, head) + 2 * t;
    for (int d = 0; d < c.D; d += 2) std::memcpy(to + d * BLOCK, rounded + d, 4);
  } else {
    int8_t values[MAX_D];
    c.key_scales[(int64_t(block) * c.heads + head) * BLOCK + t] = quantize(x, c.D, values);
    uint8_t* to = head_of<uint8_t>(c.keys, c, block, head) + 4 * t;
    for (int d = 0; d < c.D; d++) to[(d / 4) * 4 * BLOCK + d % 4] = uint8_t(values[d] + 128);
  }
}

void write_value(const Cache& c, int slot, int head, const float* x) {
  const int block = slot / BLOCK, t = slot % BLOCK;
  if (c.kind == F32) {
    std::memcpy(head_of<float>(c.values, c, block, head) + t * c.D, x, 4 * c.D);
  } else if (c.kind == BF16) {
    bf16* to = head_of<bf16>(c.values, c, block, head) + (t / 2) * 2 * c.D + t % 2;
    for (int d = 0; d < c.D; d++) store_one(to + 2 * d, x[d]);
  } else {
    c.value_scales[(int64_t(block) * c.heads + head) * BLOCK + t] =
        quantize(x, c.D, head_of<int8_t>(c.values, c, block, head) + t * c.D);
  }
}

// ------------------------------------------------------------------------------------------ queries as keys want them

struct Query {
  const void* values;  // D floats, bf16s or bytes
  float scale;         // of the scores
  int32_t sum;         // INT8: of the bytes
};

size_t query_bytes(Kind kind, int D) { return kind == F32 ? 4 * D : kind == BF16 ? 2 * D : D; }

// Of all queries of a step: (N, heads).
struct Queries {
  char* values;
  float* scales;   // INT8
  int32_t* sums;   // INT8
};

void write_query(const Cache& c, const Queries& q, int64_t index, const float* x) {
  char* to = q.values + index * query_bytes(c.kind, c.D);
  if (c.kind == F32) {
    std::memcpy(to, x, 4 * c.D);
  } else if (c.kind == BF16) {
    for (int d = 0; d < c.D; d += LANES) store((bf16*)to + d, load(x + d, first(c.D - d)), first(c.D - d));
  } else {
    q.scales[index] = quantize(x, c.D, (int8_t*)to);
    int32_t sum = 0;
    for (int d = 0; d < c.D; d++) sum += ((int8_t*)to)[d];
    q.sums[index] = sum;
  }
}

inline int32_t pair(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// The same features of the keys of two blocks.
inline __m512i keys_of(const void* a, const void* b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)), _mm256_loadu_si256((const __m256i*)b), 1);
}

// Scores (R, KEYS) of R queries and the keys of TILE blocks.
template <Kind KIND, int R>
void scores(const Cache& c, const Query* q, const int32_t* blocks, int head, float (*out)[KEYS]) {
  constexpr int size = KIND == F32 ? 4 : KIND == BF16 ? 2 : 1, packed = 4 / size;  // features in a lane
  const char* k[TILE];
  for (int b = 0; b < TILE; b++) k[b] = (const char*)c.keys + (int64_t(blocks[b]) * c.heads + head) * BLOCK * c.D * size;
  constexpr int stride = 4 * BLOCK;
  const int steps = c.D / packed;
  if constexpr (KIND == INT8) {
    __m512i sum[R][REGS];
    for (int r = 0; r < R; r++)
      for (int b = 0; b < REGS; b++) sum[r][b] = _mm512_set1_epi32(-128 * q[r].sum);
    for (int d = 0; d < steps; d++)
      for (int b = 0; b < REGS; b++) {
        const __m512i key = keys_of(k[2 * b] + d * stride, k[2 * b + 1] + d * stride);
        for (int r = 0; r < R; r++)
          sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], key, _mm512_set1_epi32(pair((const char*)q[r].values + 4 * d)));
      }
    for (int b = 0; b < REGS; b++) {
      const float* scales[2];
      for (int i = 0; i < 2; i++) scales[i] = c.key_scales + (int64_t(blocks[2 * b + i]) * c.heads + head) * BLOCK;
      const __m512 scale = _mm512_castsi512_ps(keys_of(scales[0], scales[1]));
      for (int r = 0; r < R; r++)
        store(out[r] + b * LANES, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][b]), _mm512_mul_ps(scale, _mm512_set1_ps(q[r].scale))));
    }
    return;
  }
  __m512 sum[R][REGS] = {};
  if constexpr (KIND == F32) {
    for (int d = 0; d < steps; d++)
      for (int b = 0; b < REGS; b++) {
        const __m512 key = _mm512_castsi512_ps(keys_of(k[2 * b] + d * stride, k[2 * b + 1] + d * stride));
        for (int r = 0; r < R; r++)
          sum[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(((const float*)q[r].values)[d]), key, sum[r][b]);
      }
  } else {
    for (int d = 0; d < steps; d++)
      for (int b = 0; b < REGS; b++) {
        const __m512bh key = (__m512bh)keys_of(k[2 * b] + d * stride, k[2 * b + 1] + d * stride);
        for (int r = 0; r < R; r++)
          sum[r][b] = _mm512_dpbf16_ps(sum[r][b], (__m512bh)_mm512_set1_epi32(pair((const char*)q[r].values + 4 * d)), key);
      }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < REGS; b++) store(out[r] + b * LANES, _mm512_mul_ps(sum[r][b], _mm512_set1_ps(q[r].scale)));
}

// out (R, D), rows `stride` apart, += p (R, KEYS) times the values of TILE blocks; `p` is float, or bf16 for BF16.
template <Kind KIND, int R>
void weigh(const Cache& c, const void* p, const int32_t* blocks, int head, float* out, int stride) {
  for (int d = 0; d < c.D; d += 4 * LANES) {
    __m512 acc[R][4];
    __mmask16 masks[4];
    for (int j = 0; j < 4; j++) masks[j] = first(std::max(0, c.D - d - LANES * j));
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) acc[r][j] = load(out + r * stride + d + LANES * j, masks[j]);
    for (int b = 0; b < TILE; b++) {
      if constexpr (KIND == BF16) {
        const bf16* v = head_of<bf16>(c.values, c, blocks[b], head) + 2 * d;
        const bf16* weights = (const bf16*)p + b * BLOCK;
        for (int t = 0; t < BLOCK; t += 2) {
          __m512bh value[4];
          for (int j = 0; j < 4; j++)
            value[j] = (__m512bh)_mm512_maskz_loadu_epi32(masks[j], v + t * c.D + 2 * LANES * j);
          for (int r = 0; r < R; r++) {
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair(weights + r * KEYS + t));
            for (int j = 0; j < 4; j++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], weight, value[j]);
          }
        }
      } else {
        const float* weights = (const float*)p + b * BLOCK;
        const float* scales = c.value_scales + (int64_t(blocks[b]) * c.heads + head) * BLOCK;
        for (int t = 0; t < BLOCK; t++) {
          __m512 value[4];
          for (int j = 0; j < 4; j++) {
            const int64_t at = int64_t(t) * c.D + d + LANES * j;
            if constexpr (KIND == F32)
              value[j] = load(head_of<float>(c.values, c, blocks[b], head) + at, masks[j]);
            else
              value[j] = _mm512_mul_ps(load(head_of<int8_t>(c.values, c, blocks[b], head) + at, masks[j]), _mm512_set1_ps(scales[t]));
          }
          for (int r = 0; r < R; r++) {
            const __m512 weight = _mm512_set1_ps(weights[r * KEYS + t]);
            for (int j = 0; j < 4; j++) acc[r][j] = _mm512_fmadd_ps(weight, value[j], acc[r][j]);
          }
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) store(out + r * stride + d + LANES * j, acc[r][j], masks[j]);
  }
}

// ------------------------------------------------------------------------------------------ who sees whom

// A stretch of a sequence, KEYS long, of which some blocks are in the cache.
struct Tile {
  int base;                 // the place of its first key
  uint64_t present;         // its keys that are in the cache
  int32_t blocks[TILE];     // the block of zeros where there is none
};

inline uint64_t up_to(int n) { return n >= KEYS ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

// Bit i: whether token `n` of sequence `s` sees key i of the tile.
inline uint64_t visible(const Step& step, const Options& o, int s, int n, const Tile& tile) {
  uint64_t seen = up_to(step.limits[n] - tile.base);
  if (o.window > 0) {
    uint64_t near = ~up_to(step.positions[n] - o.window + 1 - tile.base) | up_to(o.first - tile.base);
    if (step.global != nullptr)
      for (int b = 0; b < TILE; b++) {
        const __m128i marks = _mm_loadl_epi64((const __m128i*)(step.global + int64_t(tile.blocks[b]) * BLOCK));
        near |= uint64_t(uint8_t(_mm_test_epi8_mask(marks, _mm_set1_epi8(-1)))) << (b * BLOCK);
      }
    seen &= near;
  }
  if (step.tree != nullptr) {
    const int shift = tile.base - step.drafts[s];
    const uint64_t bits = uint64_t(step.tree[n]);
    if (shift > -KEYS && shift < 64) seen |= shift >= 0 ? bits >> shift : bits << -shift;
  }
  return seen & tile.present;
}

inline __m512 soft_cap(__m512 x, float cap) {
  // cap * tanh(x / cap), tanh(z) = 1 - 2 / (e^2z + 1)
  __m512 e = exp(_mm512_mul_ps(x, _mm512_set1_ps(2.0f / cap))), one = _mm512_set1_ps(1.0f);
  __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
  return _mm512_mul_ps(tanh, _mm512_set1_ps(cap));
}

// Have the keys and values of one head of a tile brought near: they lie in pieces too short for the processor to see what
// comes.
inline void read_ahead(const Cache& c, const int32_t* blocks, int count, int head) {
  const int64_t bytes = int64_t(BLOCK) * query_bytes(c.kind, c.D);
  for (int i = 0; i < count; i++) {
    const int64_t from = (int64_t(blocks[i]) * c.heads + head) * bytes;
    for (int64_t at = from; at < from + bytes; at += 64) _mm_prefetch((const char*)c.keys + at, _MM_HINT_T0);
    for (int64_t at = from; at < from + bytes; at += 64) _mm_prefetch((const char*)c.values + at, _MM_HINT_T0);
  }
}

// Queries of one sequence and key head on their way through the tiles (online softmax, https://arxiv.org/abs/1805.02867).
struct Rows {
  Query query[MAX_ROWS];
  int token[MAX_ROWS], head[MAX_ROWS];
  float most[MAX_ROWS];         // the largest score so far
  __m512 total[MAX_ROWS];       // lane by lane, of exp(score - most)
  __m512 wrong[MAX_ROWS];       // NaN in some lane if a score was NaN or infinite, else zeros
  std::vector<float> values;    // (MAX_ROWS, stride) weighted sums of values
  int stride;
};

// The tiles of sequence `s` that one of the tokens first .. last sees. They begin at every eighth place, whatever is in
// sight: so a query's sums do not depend on the others here.
void find_tiles(const Step& step, const Options& o, int s, int first, int last, std::vector<Tile>& tiles) {
  tiles.clear();
  const int32_t* table = step.tables + int64_t(s) * step.width;
  const auto close = [&] {
    if (tiles.empty()) return;
    for (int n = last; n >= first; n--)
      if (visible(step, o, s, n, tiles.back())) return;
    tiles.pop_back();
  };
  for (int i = 0; i < step.counts[s]; i++) {
    const int place = step.places ? step.places[int64_t(s) * step.width + i] : i, base = place / TILE * KEYS, b = place % TILE;
    if (tiles.empty() || tiles.back().base != base) {
      close();
      tiles.push_back({base, 0, {}});
    }
    tiles.back().blocks[b] = table[i];
    tiles.back().present |= 0xFFull << (b * BLOCK);
  }
  close();
}

// Let R queries from the `begin`-th on see a tile.
template <Kind KIND, int R>
void see(const Step& step, const Cache& c, const Options& o, int s, int head, const Tile& tile, Rows& rows, int begin) {
  uint64_t seen[R], any = 0;
  for (int r = 0; r < R; r++) {
    const int n = rows.token[begin + r];
    seen[r] = r && n == rows.token[begin + r - 1] ? seen[r - 1] : visible(step, o, s, n, tile);
    any |= seen[r];
  }
  if (any == 0) return;
  alignas(64) float score[R][KEYS];
  alignas(64) bf16 rounded[R][KEYS];
  scores<KIND, R>(c, rows.query + begin, tile.blocks, head, score);
  alignas(64) float change[LANES] = {};
  const __m512 nothing = _mm512_set1_ps(LOWEST);
  for (int r = 0; r < R; r++) {
    __m512 highest = nothing, wrong = rows.wrong[begin + r];
    for (int b = 0; b < REGS; b++) {
      __m512 x = load(score[r] + b * LANES);
      if (o.softcap > 0) x = soft_cap(x, o.softcap);
      const __mmask16 mask = __mmask16(seen[r] >> (b * LANES));
      wrong = _mm512_mask3_fmadd_ps(x, _mm512_setzero_ps(), wrong, mask);
      x = _mm512_mask_blend_ps(mask, nothing, x);
      highest = _mm512_max_ps(highest, x);
      store(score[r] + b * LANES, x);
    }
    rows.wrong[begin + r] = wrong;
    float& most = rows.most[begin + r];
    const float before = most;
    most = std::max(before, _mm512_reduce_max_ps(highest));
    change[r] = before == most ? 0.0f : before - most;
  }
  alignas(64) float fade[LANES];
  store(fade, exp(load(change)));
  for (int r = 0; r < R; r++) {
    const float most = rows.most[begin + r] == LOWEST ? 0.0f : rows.most[begin + r];  // it sees nothing yet
    __m512 sum = _mm512_setzero_ps();
    for (int b = 0; b < REGS; b++) {
      __m512 p = exp(_mm512_sub_ps(load(score[r] + b * LANES), _mm512_set1_ps(most)));
      p = _mm512_maskz_mov_ps(__mmask16(seen[r] >> (b * LANES)), p);
      sum = _mm512_add_ps(sum, p);
      if constexpr (KIND == BF16)
        store(rounded[r] + b * LANES, p);
      else
        store(score[r] + b * LANES, p);
    }
    __m512& total = rows.total[begin + r];
    if (change[r] == 0.0f) {
      total = _mm512_add_ps(total, sum);
      continue;
    }
    const __m512 factor = _mm512_set1_ps(fade[r]);
    total = _mm512_fmadd_ps(total, factor, sum);
    float* values = rows.values.data() + (begin + r) * rows.stride;
    for (int d = 0; d < rows.stride; d += LANES) store(values + d, _mm512_mul_ps(load(values + d), factor));
  }
  const void* p = KIND == BF16 ? (const void*)rounded : (const void*)score;
  weigh<KIND, R>(c, p, tile.blocks, head, rows.values.data() + begin * rows.stride, rows.stride);
}

template <Kind KIND>
void see(const Step& step, const Cache& c, const Options& o, int s, int head, const Tile& tile, Rows& rows, int begin, int count) {
  switch (count) {
    case 1: return see<KIND, 1>(step, c, o, s, head, tile, rows, begin);
    case 2: return see<KIND, 2>(step, c, o, s, head, tile, rows, begin);
    case 3: return see<KIND, 3>(step, c, o, s, head, tile, rows, begin);
    case 4: return see<KIND, 4>(step, c, o, s, head, tile, rows, begin);
    case 5: return see<KIND, 5>(step, c, o, s, head, tile, rows, begin);
    default: return see<KIND, ROWS>(step, c, o, s, head, tile, rows, begin);
  }
}

template <typename T>
void attend_unit(const Step& step, const Cache& c, const Options& o, const Queries& queries, int q_heads,
                 const AttentionPlan::Unit& unit, const AttentionPlan::Unit* next, T* y) {
  thread_local std::vector<Tile> tiles;
  thread_local Rows rows;
  const int group = q_heads / c.heads, each = unit.end - unit.begin, count = each * unit.heads, s = unit.sequence;
  rows.stride = (c.D + LANES - 1) / LANES * LANES;
  rows.values.assign(size_t(count) * rows.stride, 0.0f);
  for (int r = 0; r < count; r++) {
    const int j = unit.begin + r % each, n = step.starts[s] + j / group, h = (unit.head + r / each) * group + j % group;
    const int64_t index = int64_t(n) * q_heads + h;
    Query& q = rows.query[r];
    q = {queries.values + index * query_bytes(c.kind, c.D), o.scale, 0};
    if (c.kind == INT8) q.scale *= queries.scales[index], q.sum = queries.sums[index];
    rows.token[r] = n;
    rows.head[r] = h;
    rows.most[r] = o.sinks ? o.sinks[h] : LOWEST;
    rows.total[r] = _mm512_zextps128_ps512(_mm_set_ss(o.sinks ? 1.0f : 0.0f));
    rows.wrong[r] = _mm512_setzero_ps();
  }
  find_tiles(step, o, s, rows.token[0], rows.token[count - 1], tiles);
  const int parts = (each + ROWS - 1) / ROWS;
  for (size_t i = 0; i < tiles.size(); i++)
    for (int h = 0; h < unit.heads; h++) {
      if (h + 1 < unit.heads)
        read_ahead(c, tiles[i].blocks, TILE, unit.head + h + 1);
      else if (i + 1 < tiles.size())
        read_ahead(c, tiles[i + 1].blocks, TILE, unit.head);
      else if (next != nullptr)
        read_ahead(c, step.tables + int64_t(next->sequence) * step.width, std::min(step.counts[next->sequence], TILE), next->head);
      for (int part = 0; part < parts; part++) {
        const Share mine(each, part, parts);
        const int head = unit.head + h, begin = h * each + mine.begin, size = mine.end - mine.begin;
        switch (c.kind) {
          case F32: see<F32>(step, c, o, s, head, tiles[i], rows, begin, size); break;
          case BF16: see<BF16>(step, c, o, s, head, tiles[i], rows, begin, size); break;
          default: see<INT8>(step, c, o, s, head, tiles[i], rows, begin, size);
        }
      }
    }
  for (int r = 0; r < count; r++) {
    T* to = y + (int64_t(rows.token[r]) * q_heads + rows.head[r]) * c.D;
    const float* values = rows.values.data() + r * rows.stride;
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(rows.total[r]) + _mm512_reduce_add_ps(rows.wrong[r]));
    for (int d = 0; d < c.D; d += LANES) store(to + d, _mm512_mul_ps(load(values + d), inverse), first(c.D - d));
  }
}

}  // namespace

namespace {

// The units of this thread: consecutive ones, of about as many scores as every other thread has.
std::pair<int, int> fair_share(const AttentionPlan& plan, const Step& step, const Options& o, int group) {
  const int count = plan.units.size(), thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const auto cost = [&](int i) {
    const AttentionPlan::Unit& u = plan.units[i];
    const int seen = step.limits[step.starts[u.sequence] + (u.end - 1) / group];
    return int64_t((u.end - u.begin) * u.heads + 2) * ((o.window > 0 ? std::min(seen, o.window) : seen) + KEYS);
  };
  int64_t total = 0, seen = 0;
  for (int i = 0; i < count; i++) total += cost(i);
  int bounds[2] = {count, count};
  for (int i = 0; i < count; i++) {
    for (int side = 0; side < 2; side++)
      if (bounds[side] == count && seen >= total * (thread + side) / threads) bounds[side] = i;
    seen += cost(i);
  }
  return {bounds[0], bounds[1]};
}

}  // namespace

AttentionPlan::AttentionPlan(const Step& step, const Cache& c, int q_heads, int threads) {
  static thread_local std::vector<char> memory;
  const size_t bytes = size_t(step.N) * q_heads * (query_bytes(c.kind, c.D) + 8);
  if (memory.size() < bytes) memory.resize(bytes);
  queries = memory.data();
  const int group = q_heads / c.heads;
  // As many queries as fit into the first cache beside a tile; fewer where there would not be work for every thread.
  const int most = step.S * c.heads < threads ? ROWS : std::max(ROWS, MAX_ROWS * 64 / std::max(c.D, 64));
  for (int s = 0; s < step.S; s++) {
    const int rows = (step.starts[s + 1] - step.starts[s]) * group, parts = (rows + most - 1) / most;
    // The heads of a block lie side by side in memory, and are best read so.
    const int heads = rows * c.heads <= most && step.S >= 2 * threads ? c.heads : 1;
    for (int h = 0; h < c.heads; h += heads)
      for (int part = 0; part < parts; part++) {
        const Share share(rows, part, parts);
        units.push_back({s, h, heads, share.begin, share.end});
      }
  }
}

template <typename T>
void attend_in_team(const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int q_heads,
                    const float* cos, const float* sin, const Step& step, const Cache& c, const Options& o,
                    const AttentionPlan& plan, T* y) {
  const int group = q_heads / c.heads, D = c.D, half = D / 2;
  const size_t all = size_t(step.N) * q_heads;
  const Queries queries{plan.queries + 8 * all, (float*)plan.queries, (int32_t*)(plan.queries + 4 * all)};
  const int heads = q_heads + 2 * c.heads, items = step.N * heads;
  const Share mine(items, omp_get_thread_num(), omp_get_num_threads());
  alignas(64) float x[MAX_D];
  for (int item = mine.begin; item < mine.end; item++) {
    const int n = item / heads, h = item % heads;
    const float* co = cos ? cos + int64_t(n) * half : nullptr;
    const float* si = sin ? sin + int64_t(n) * half : nullptr;
    if (h < q_heads) {
      prepare(q + n * q_stride + h * D, o.q_norm, o, co, si, D, x);
      write_query(c, queries, int64_t(n) * q_heads + h, x);
    } else if (h < q_heads + c.heads) {
      prepare(k + n * k_stride + (h - q_heads) * D, o.k_norm, o, co, si, D, x);
      if (broken(x, D) || broken(v + n * v_stride + (h - q_heads) * D, D)) std::fill(x, x + D, NAN);
      write_key(c, step.slots[n], h - q_heads, x);
    } else {
      const T* from = v + n * v_stride + (h - q_heads - c.heads) * D;
      for (int d = 0; d < D; d += LANES) store(x + d, load(from + d, first(D - d)), first(D - d));
      if (broken(x, D)) std::fill(x, x + D, 0.0f);
      write_value(c, step.slots[n], h - q_heads - c.heads, x);
    }
  }
#pragma omp barrier
  const auto [begin, end] = fair_share(plan, step, o, group);
  for (int i = begin; i < end; i++)
    attend_unit(step, c, o, queries, q_heads, plan.units[i], i + 1 < end ? &plan.units[i + 1] : nullptr, y);
#pragma omp barrier
}

template <typename T>
void attend(const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int q_heads,
            const float* cos, const float* sin, const Step& step, const Cache& c, const Options& o, T* y, int threads) {
  const AttentionPlan plan(step, c, q_heads, threads);
#pragma omp parallel num_threads(threads)
  attend_in_team(q, k, v, q_stride, k_stride, v_stride, q_heads, cos, sin, step, c, o, plan, y);
}

namespace {

// Copy the `count` elements of `size` bytes of one token: they lie `step` bytes apart.
void move(char* base, int64_t from, int64_t to, int count, int size, int64_t step) {
  for (int i = 0; i < count; i++) std::memcpy(base + to + i * step, base + from + i * step, size);
}

}  // namespace

void move_slots(const Cache& c, const int32_t* sources, const int32_t* targets, int n) {
  const int size = c.kind == F32 ? 4 : c.kind == BF16 ? 2 : 1, pack = 4 / size;
  for (int i = 0; i < n; i++)
    for (int h = 0; h < c.heads; h++) {
      int64_t head[2], t[2];
      const int32_t slots[2] = {sources[i], targets[i]};
      for (int j = 0; j < 2; j++) {
        head[j] = (int64_t(slots[j] / BLOCK) * c.heads + h) * BLOCK * c.D * size;
        t[j] = slots[j] % BLOCK;
      }
      move((char*)c.keys, head[0] + t[0] * 4, head[1] + t[1] * 4, c.D / pack, 4, 4 * BLOCK);
      if (c.kind == BF16)
        move((char*)c.values, head[0] + t[0] / 2 * 4 * c.D + t[0] % 2 * 2, head[1] + t[1] / 2 * 4 * c.D + t[1] % 2 * 2, c.D, 2, 4);
      else
        move((char*)c.values, head[0] + t[0] * c.D * size, head[1] + t[1] * c.D * size, 1, c.D * size, 0);
      if (c.kind == INT8)
        for (float* scales : {c.key_scales, c.value_scales}) {
          const int64_t from = (int64_t(slots[0] / BLOCK) * c.heads + h) * BLOCK + t[0];
          scales[(int64_t(slots[1] / BLOCK) * c.heads + h) * BLOCK + t[1]] = scales[from];
        }
    }
}

#define INSTANCES(T)                                                                                                      \
  template void attend_in_team<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, int, const float*, const float*, \
                                  const Step&, const Cache&, const Options&, const AttentionPlan&, T*);                   \
  template void attend<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, int, const float*, const float*,       \
                          const Step&, const Cache&, const Options&, T*, int);
INSTANCES(float)
INSTANCES(bf16)

}  // namespace nanoworks
