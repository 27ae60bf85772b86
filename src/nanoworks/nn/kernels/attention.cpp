#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace nanoworks {
namespace {

constexpr int ROWS = 6;         // queries that share the reading of keys and values
constexpr int TILE = 8;         // blocks whose scores are in registers at once,
constexpr int REGS = TILE * BLOCK / LANES;  // so many for each query
constexpr int MAX_D = 512;
constexpr int NOWHERE = -1;     // the place of a block that fills a tile

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

// Scores (R, TILE * BLOCK) of R queries and the keys of TILE blocks.
template <int R>
void scores(const Cache& c, const Query* q, const int32_t* blocks, int head, float (*out)[TILE * BLOCK]) {
  const int size = c.kind == F32 ? 4 : c.kind == BF16 ? 2 : 1, packed = 4 / size;  // features in a lane
  const char* k[TILE];
  for (int b = 0; b < TILE; b++) k[b] = (const char*)c.keys + (int64_t(blocks[b]) * c.heads + head) * BLOCK * c.D * size;
  constexpr int stride = 4 * BLOCK;
  const int steps = c.D / packed;
  if (c.kind == INT8) {
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
  if (c.kind == F32) {
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

// out (R, D) += p (R, TILE * BLOCK) times the values of TILE blocks; `p` is float, or bf16 for BF16.
template <int R>
void weigh(const Cache& c, const void* p, const int32_t* blocks, int head, float (*out)[MAX_D]) {
  for (int d = 0; d < c.D; d += 4 * LANES) {
    const int S = std::min(4, (c.D - d + LANES - 1) / LANES);
    __m512 acc[R][4];
    __mmask16 masks[4];
    for (int j = 0; j < 4; j++) masks[j] = first(std::max(0, c.D - d - LANES * j));
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) acc[r][j] = load(out[r] + d + LANES * j, masks[j]);
    for (int b = 0; b < TILE; b++) {
      if (c.kind == BF16) {
        const bf16* v = head_of<bf16>(c.values, c, blocks[b], head) + 2 * d;
        const bf16* weights = (const bf16*)p + b * BLOCK;
        for (int t = 0; t < BLOCK; t += 2) {
          __m512bh value[4];
          for (int j = 0; j < 4; j++)
            value[j] = (__m512bh)_mm512_maskz_loadu_epi32(masks[j], v + t * c.D + 2 * LANES * j);
          for (int r = 0; r < R; r++) {
            __m512bh weight = (__m512bh)_mm512_set1_epi32(pair(weights + r * TILE * BLOCK + t));
            for (int j = 0; j < 4; j++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], weight, value[j]);
          }
        }
      } else {
        const float* weights = (const float*)p + b * BLOCK;
        const float* scales =
            c.kind == INT8 ? c.value_scales + (int64_t(blocks[b]) * c.heads + head) * BLOCK : nullptr;
        for (int t = 0; t < BLOCK; t++) {
          __m512 value[4];
          for (int j = 0; j < S; j++) {
            const int64_t at = int64_t(t) * c.D + d + LANES * j;
            if (c.kind == F32)
              value[j] = load(head_of<float>(c.values, c, blocks[b], head) + at, masks[j]);
            else
              value[j] = _mm512_mul_ps(load(head_of<int8_t>(c.values, c, blocks[b], head) + at, masks[j]), _mm512_set1_ps(scales[t]));
          }
          for (int j = S; j < 4; j++) value[j] = _mm512_setzero_ps();
          for (int r = 0; r < R; r++) {
            __m512 weight = _mm512_set1_ps(weights[r * TILE * BLOCK + t]);
            for (int j = 0; j < 4; j++) acc[r][j] = _mm512_fmadd_ps(weight, value[j], acc[r][j]);
          }
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < S; j++) store(out[r] + d + LANES * j, acc[r][j], masks[j]);
  }
}

// ------------------------------------------------------------------------------------------ who sees whom

constexpr uint32_t ALL = (1u << BLOCK) - 1;

inline uint32_t up_to(int n) { return n >= BLOCK ? ALL : n <= 0 ? 0 : (1u << n) - 1; }

// Bit i: whether token `n` of sequence `s` sees the i-th key of the block at `place`.
inline uint32_t visible(const Step& step, const Options& o, int s, int n, int place, int block) {
  const int base = place * BLOCK;
  uint32_t seen = up_to(step.limits[n] - base);
  if (o.window > 0) {
    uint32_t near = ~up_to(step.positions[n] - o.window + 1 - base) | up_to(o.first - base);
    if (step.global != nullptr)
      near |= _mm_test_epi8_mask(_mm_loadl_epi64((const __m128i*)(step.global + int64_t(block) * BLOCK)), _mm_set1_epi8(-1)) & ALL;
    seen &= near;
  }
  if (step.tree != nullptr) {
    const int shift = base - step.drafts[s];
    const uint64_t bits = uint64_t(step.tree[n]);
    if (shift > -BLOCK && shift < 64) seen |= uint32_t(shift >= 0 ? bits >> shift : bits << -shift) & ALL;
  }
  return seen;
}

inline __m512 soft_cap(__m512 x, float cap) {
  // cap * tanh(x / cap), tanh(z) = 1 - 2 / (e^2z + 1)
  __m512 e = exp(_mm512_mul_ps(x, _mm512_set1_ps(2.0f / cap))), one = _mm512_set1_ps(1.0f);
  __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
  return _mm512_mul_ps(tanh, _mm512_set1_ps(cap));
}

// Have the keys and values of one head of some blocks brought near: they lie in pieces too short for the processor to
// see what comes.
inline void read_ahead(const Cache& c, const int32_t* blocks, int count, int head) {
  const int64_t bytes = int64_t(BLOCK) * query_bytes(c.kind, c.D);
  for (int i = 0; i < count; i++) {
    const int64_t from = (int64_t(blocks[i]) * c.heads + head) * bytes;
    for (int64_t at = from; at < from + bytes; at += 64) _mm_prefetch((const char*)c.keys + at, _MM_HINT_T0);
    for (int64_t at = from; at < from + bytes; at += 64) _mm_prefetch((const char*)c.values + at, _MM_HINT_T0);
  }
}

// R queries of one key head: rows[r] is the token, heads[r] the query head.
template <int R, typename T>
void attend_rows(const Step& step, const Cache& c, const Options& o, const Queries& queries, int q_heads, int s, int head,
                 const int* rows, const int* heads, const AttentionPlan::Unit* next, T* y) {
  thread_local std::vector<int32_t> blocks, places;
  blocks.clear();
  places.clear();
  const auto fill = [](size_t size) {
    blocks.resize(size, 0);  // the block of zeros,
    places.resize(size, NOWHERE);  // seen by nobody
  };
  const int32_t* table = step.tables + int64_t(s) * step.width;
  int tile = NOWHERE;
  for (int i = 0; i < step.counts[s]; i++) {
    const int place = step.places ? step.places[int64_t(s) * step.width + i] : i;
    uint32_t any = 0;
    for (int r = 0; r < R && !any; r++) any = visible(step, o, s, rows[r], place, table[i]);
    if (any) {
      // Tiles begin at every eighth place, whatever is in sight: so a query's sums do not depend on the others here.
      const size_t at = place / TILE == tile ? blocks.size() / TILE * TILE : (blocks.size() + TILE - 1) / TILE * TILE;
      tile = place / TILE;
      fill(at + place % TILE);
      blocks.push_back(table[i]);
      places.push_back(place);
    }
  }
  fill((blocks.size() + TILE - 1) / TILE * TILE);
  const int n = blocks.size();

  Query q[R];
  alignas(64) float out[R][MAX_D];
  float most[R], total[R];
  __mmask16 wrong[R] = {};  // scores that are NaN or infinite
  for (int r = 0; r < R; r++) {
    const int64_t index = int64_t(rows[r]) * q_heads + heads[r];
    q[r] = {queries.values + index * query_bytes(c.kind, c.D), o.scale, 0};
    if (c.kind == INT8) q[r].scale *= queries.scales[index], q[r].sum = queries.sums[index];
    std::memset(out[r], 0, 4 * c.D);
    most[r] = o.sinks ? o.sinks[heads[r]] : -std::numeric_limits<float>::infinity();
    total[r] = o.sinks ? 1.0f : 0.0f;
  }
  alignas(64) float score[R][TILE * BLOCK];
  alignas(64) bf16 rounded[R][TILE * BLOCK];
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < n; i += TILE) {
    if (i + TILE < n)
      read_ahead(c, blocks.data() + i + TILE, TILE, head);
    else if (next != nullptr)
      read_ahead(c, step.tables + int64_t(next->sequence) * step.width, std::min(step.counts[next->sequence], TILE), next->head);
    scores<R>(c, q, blocks.data() + i, head, score);
    for (int r = 0; r < R; r++) {
      __m512 x[REGS], highest = nothing;
      for (int b = 0; b < REGS; b++) {
        x[b] = load(score[r] + b * LANES);
        if (o.softcap > 0) x[b] = soft_cap(x[b], o.softcap);
        uint32_t seen = 0;
        for (int half = 0; half < 2; half++) {
          const int at = i + 2 * b + half;
          if (places[at] != NOWHERE) seen |= visible(step, o, s, rows[r], places[at], blocks[at]) << (half * BLOCK);
        }
        x[b] = _mm512_mask_blend_ps(__mmask16(seen), nothing, x[b]);
        wrong[r] |= _mm512_fpclass_ps_mask(x[b], 0x01 | 0x08 | 0x80);
        highest = _mm512_max_ps(highest, x[b]);
      }
      const float before = most[r];
      most[r] = std::max(before, _mm512_reduce_max_ps(highest));
      if (most[r] == -std::numeric_limits<float>::infinity()) {  // sees nothing yet
        std::memset(score[r], 0, sizeof(score[r]));
        std::memset(rounded[r], 0, sizeof(rounded[r]));
        continue;
      }
      __m512 sum = _mm512_setzero_ps();
      for (int b = 0; b < REGS; b++) {
        const __mmask16 seen = _mm512_cmp_ps_mask(x[b], nothing, _CMP_NEQ_UQ);
        __m512 p = _mm512_maskz_mov_ps(seen, exp(_mm512_sub_ps(x[b], _mm512_set1_ps(most[r]))));
        sum = _mm512_add_ps(sum, p);
        store(score[r] + b * LANES, p);
        store(rounded[r] + b * LANES, p);
      }
      const float fade = std::exp(before - most[r]);
      total[r] = total[r] * fade + _mm512_reduce_add_ps(sum);
      if (fade != 1.0f)
        for (int d = 0; d < c.D; d += LANES)
          store(out[r] + d, _mm512_mul_ps(load(out[r] + d), _mm512_set1_ps(fade)));
    }
    weigh<R>(c, c.kind == BF16 ? (const void*)rounded : (const void*)score, blocks.data() + i, head, out);
  }
  for (int r = 0; r < R; r++) {
    T* to = y + (int64_t(rows[r]) * q_heads + heads[r]) * c.D;
    const __m512 inverse = _mm512_set1_ps(wrong[r] ? NAN : 1.0f / total[r]);
    for (int d = 0; d < c.D; d += LANES) {
      const __mmask16 mask = first(c.D - d);
      store(to + d, _mm512_mul_ps(load(out[r] + d, mask), inverse), mask);
    }
  }
}

}  // namespace

namespace {

// The units of this thread: consecutive ones, of about as many keys as every other thread has.
std::pair<int, int> fair_share(const AttentionPlan& plan, const Step& step) {
  const int count = plan.units.size(), thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const auto cost = [&](int i) { return step.counts[plan.units[i].sequence] + 1; };
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

AttentionPlan::AttentionPlan(const Step& step, const Cache& c, int q_heads) {
  static thread_local std::vector<char> memory;
  const size_t bytes = size_t(step.N) * q_heads * (query_bytes(c.kind, c.D) + 8);
  if (memory.size() < bytes) memory.resize(bytes);
  queries = memory.data();
  const int group = q_heads / c.heads;
  for (int s = 0; s < step.S; s++) {
    const int rows = (step.starts[s + 1] - step.starts[s]) * group, tiles = (rows + ROWS - 1) / ROWS;
    for (int h = 0; h < c.heads; h++)
      for (int t = 0; t < tiles; t++) {
        const Share share(rows, t, tiles);
        units.push_back({s, h, share.begin, share.end});
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
  const auto [begin, end] = fair_share(plan, step);
  for (int i = begin; i < end; i++) {
    const AttentionPlan::Unit& u = plan.units[i];
    const AttentionPlan::Unit* next = i + 1 < end ? &plan.units[i + 1] : nullptr;
    int rows[ROWS], query_heads[ROWS];
    for (int j = u.begin; j < u.end; j++) {
      rows[j - u.begin] = step.starts[u.sequence] + j / group;
      query_heads[j - u.begin] = u.head * group + j % group;
    }
    switch (u.end - u.begin) {
      case 1: attend_rows<1>(step, c, o, queries, q_heads, u.sequence, u.head, rows, query_heads, next, y); break;
      case 2: attend_rows<2>(step, c, o, queries, q_heads, u.sequence, u.head, rows, query_heads, next, y); break;
      case 3: attend_rows<3>(step, c, o, queries, q_heads, u.sequence, u.head, rows, query_heads, next, y); break;
      case 4: attend_rows<4>(step, c, o, queries, q_heads, u.sequence, u.head, rows, query_heads, next, y); break;
      case 5: attend_rows<5>(step, c, o, queries, q_heads, u.sequence, u.head, rows, query_heads, next, y); break;
      default: attend_rows<6>(step, c, o, queries, q_heads, u.sequence, u.head, rows, query_heads, next, y);
    }
  }
#pragma omp barrier
}

template <typename T>
void attend(const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int q_heads,
            const float* cos, const float* sin, const Step& step, const Cache& c, const Options& o, T* y, int threads) {
  const AttentionPlan plan(step, c, q_heads);
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
