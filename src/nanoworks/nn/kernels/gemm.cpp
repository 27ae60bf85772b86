#include "gemm.h"

#include <cmath>

namespace nanoworks {
namespace {

constexpr int ROWS = 6;  // most rows of one register block: 6 x 4 accumulators and 4 weights fill the 32 registers

// Reads ahead: `per_step` cache lines a step of the inner loop, so that what comes is in the second-level cache when its
// turn does.
struct Ahead {
  const char* at;
  const char* end;
  template <int per_step>
  void step() {
    if constexpr (per_step > 0) {
      if (at < end) {
        for (int i = 0; i < per_step; i++) _mm_prefetch(at + 64 * i, _MM_HINT_T1);
        at += 64 * per_step;
      }
    }
  }
};

template <int R, int PF>
void dot(const float* x, int64_t ldx, const char* w, int K, Ahead& ahead, __m512 (&out)[R][4]) {
  __m512 acc[R][4] = {};  // of its own: stores to `out` inside the loop could not be told from the loads of w
  for (int k = 0; k < K; k++, w += 256) {
    ahead.step<PF>();
    __m512 b[4];
    for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_ps(w + 64 * j);
    for (int r = 0; r < R; r++) {
      __m512 a = _mm512_set1_ps(x[r * ldx + k]);
      for (int j = 0; j < 4; j++) acc[r][j] = _mm512_fmadd_ps(a, b[j], acc[r][j]);
    }
  }
  std::memcpy(out, acc, sizeof(out));
}

inline int32_t pair(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

template <int R, int PF>
void dot(const bf16* x, int64_t ldx, const char* w, int K, Ahead& ahead, __m512 (&out)[R][4]) {
  __m512 acc[R][4] = {};
  for (int k = 0; k < K; k += 2, w += 256) {
    ahead.step<PF>();
    __m512bh b[4];
    for (int j = 0; j < 4; j++) b[j] = (__m512bh)_mm512_loadu_si512(w + 64 * j);
    for (int r = 0; r < R; r++) {
      __m512bh a = (__m512bh)_mm512_set1_epi32(pair(x + r * ldx + k));
      for (int j = 0; j < 4; j++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], a, b[j]);
    }
  }
  std::memcpy(out, acc, sizeof(out));
}

template <int R, int PF>
void dot_int8(const QuantizedRows& q, int m, const char* w, int K, const float* scales, Ahead& ahead, __m512 (&acc)[R][4]) {
  __m512i sum[R][4];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_set1_epi32(-128 * q.sums[m + r]);
  const int8_t* x = q.values + int64_t(m) * K;
  for (int k = 0; k < K; k += 4, w += 256) {
    ahead.step<PF>();
    __m512i b[4];
    for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(w + 64 * j);
    for (int r = 0; r < R; r++) {
      __m512i a = _mm512_set1_epi32(pair(x + int64_t(r) * K + k));
      for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], b[j], a);
    }
  }
  for (int j = 0; j < 4; j++) {
    __m512 scale = _mm512_loadu_ps(scales + LANES * j);
    for (int r = 0; r < R; r++)
      acc[r][j] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][j]), _mm512_mul_ps(scale, _mm512_set1_ps(q.scales[m + r])));
  }
}

template <int R, int PF>
void dot_int4(const QuantizedRows& q, int m, const char* w, int K, int group, const char* scales, Ahead& ahead,
              __m512 (&out)[R][2]) {
  __m512 acc[R][2] = {};
  const int groups = K / group;
  const int8_t* x = q.values + int64_t(m) * K;
  const __m512i low = _mm512_set1_epi8(0x0F);
  for (int g = 0; g < groups; g++, x += group) {
    __m512i sum[R][2];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 2; j++) sum[r][j] = _mm512_set1_epi32(-8 * q.sums[(m + r) * groups + g]);
    for (int k = 0; k < group; k += 8, w += 128) {
      ahead.step<PF>();
      __m512i lo[2], hi[2];
      for (int j = 0; j < 2; j++) {
        __m512i both = _mm512_loadu_si512(w + 64 * j);
        lo[j] = _mm512_and_si512(both, low);
        hi[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      }
      for (int r = 0; r < R; r++) {
        __m512i a = _mm512_set1_epi32(pair(x + int64_t(r) * K + k));
        __m512i b = _mm512_set1_epi32(pair(x + int64_t(r) * K + k + 4));
        for (int j = 0; j < 2; j++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], lo[j], a);
        for (int j = 0; j < 2; j++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], hi[j], b);
      }
    }
    for (int j = 0; j < 2; j++) {
      __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + 64 * g + 32 * j)));
      for (int r = 0; r < R; r++) {
        __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(q.scales[(m + r) * groups + g]));
        acc[r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][j]), both, acc[r][j]);
      }
    }
  }
  std::memcpy(out, acc, sizeof(out));
}

inline __m512 squared_relu(__m512 x) {
  x = _mm512_max_ps(x, _mm512_setzero_ps());
  return _mm512_mul_ps(x, x);
}

template <int R, int S, typename Out>
void finish(__m512 (&acc)[R][S], const Weight& w, int panel, Epilogue epilogue, Out* y, int64_t ldy, const Out* residual) {
  const int from = panel * S * LANES;
  if (w.bias != nullptr)
    for (int j = 0; j < S; j++) {
      __m512 bias = load(w.bias + from + LANES * j, first(w.N - from - LANES * j > 0 ? w.N - from - LANES * j : 0));
      for (int r = 0; r < R; r++) acc[r][j] = _mm512_add_ps(acc[r][j], bias);
    }
  if (epilogue == GLU_SILU) {
    const int at = from / 2;
    for (int j = 0; j < S / 2; j++) {
      const int left = w.N / 2 - at - LANES * j;
      if (left <= 0) break;
      for (int r = 0; r < R; r++)
        store(y + r * ldy + at + LANES * j, _mm512_mul_ps(silu(acc[r][j]), acc[r][j + S / 2]), first(left));
    }
    return;
  }
  for (int j = 0; j < S; j++) {
    const int at = from + LANES * j, left = w.N - at;
    if (left <= 0) break;
    for (int r = 0; r < R; r++) {
      __m512 v = epilogue == SQUARED_RELU ? squared_relu(acc[r][j]) : acc[r][j];
      if (residual != nullptr) v = _mm512_add_ps(v, load(residual + r * ldy + at, first(left)));
      store(y + r * ldy + at, v, first(left));
    }
  }
}

template <int R, int PF, typename T, typename Out>
void block(const Weight& w, int panel, const T* x, int64_t ldx, const QuantizedRows& q, int m, Epilogue epilogue, Out* y,
           int64_t ldy, const Out* residual, Ahead& ahead) {
  const char* data = (const char*)w.data;
  y += m * ldy;
  if (residual != nullptr) residual += m * ldy;
  if (w.kind == INT4) {
    __m512 acc[R][2];
    const int groups = w.K / w.group;
    dot_int4<R, PF>(q, m, data + int64_t(panel) * w.K * 16, w.K, w.group,
                    (const char*)w.scales + int64_t(panel) * groups * 64, ahead, acc);
    finish(acc, w, panel, epilogue, y, ldy, residual);
    return;
  }
  __m512 acc[R][4];
  if (w.kind == INT8)
    dot_int8<R, PF>(q, m, data + int64_t(panel) * w.K * 64, w.K, (const float*)w.scales + panel * 64, ahead, acc);
  else
    dot<R, PF>(x + m * ldx, ldx, data + int64_t(panel) * w.K * 64 * sizeof(T), w.K, ahead, acc);
  finish(acc, w, panel, epilogue, y, ldy, residual);
}

template <int PF, typename... Args>
void block_of(int rows, Args&&... args) {
  switch (rows) {
    case 1: return block<1, PF>(args...);
    case 2: return block<2, PF>(args...);
    case 3: return block<3, PF>(args...);
    case 4: return block<4, PF>(args...);
    case 5: return block<5, PF>(args...);
    default: return block<6, PF>(args...);
  }
}

int64_t panel_bytes(const Weight& w) {
  switch (w.kind) {
    case F32: return int64_t(w.K) * 256;
    case BF16: return int64_t(w.K) * 128;
    case INT8: return int64_t(w.K) * 64;
    default: return int64_t(w.K) * 16;
  }
}

}  // namespace

int groups_of(const Weight& w) { return w.kind == INT4 ? w.K / w.group : 1; }

template <typename T>
void quantize_row(const T* x, int K, const Weight& w, const QuantizedRows& out, int m) {
  const int groups = groups_of(w), size = w.K / groups;
  int8_t* values = out.values + int64_t(m) * w.K;
  for (int g = 0; g < groups; g++) {
    const int from = g * size, to = from + size < K ? from + size : K;
    __m512 most = _mm512_setzero_ps();
    for (int k = from; k < to; k += LANES) most = _mm512_max_ps(most, _mm512_abs_ps(load(x + k, first(to - k))));
    const float scale = _mm512_reduce_max_ps(most) / 127.0f;
    const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int k = from; k < from + size; k += LANES) {
      __mmask16 real = first(to - k > 0 ? to - k : 0), room = first(from + size - k);
      __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + k, real), inverse));
      sum = _mm512_add_epi32(sum, v);
      _mm_mask_storeu_epi8(values + k, room, _mm512_cvtsepi32_epi8(v));
    }
    out.scales[m * groups + g] = scale;
    out.sums[m * groups + g] = _mm512_reduce_add_epi32(sum);
  }
}

template <typename T, typename Out>
void multiply(const Weight& w, int begin, int end, const T* x, int64_t ldx, const QuantizedRows& q, int M, Epilogue epilogue,
              Out* y, int64_t ldy, const Out* residual) {
  const int tiles = (M + ROWS - 1) / ROWS;
  const int64_t bytes = panel_bytes(w);
  for (int panel = begin; panel < end; panel++) {
    const char* next = (const char*)w.data + (panel + 1) * bytes;
    Ahead ahead{next, panel + 1 < end && tiles > 1 ? next + bytes : next};
    for (int t = 0; t < tiles; t++) {
      const Share rows(M, t, tiles);
      if (tiles == 1) {  // every weight is used once: read some way ahead in this panel and into the next
        Ahead near{next - bytes + (w.kind == INT4 ? 8192 : 4096), panel + 1 < end ? next + bytes : next};
        if (w.kind == INT4)
          block_of<2>(rows.end - rows.begin, w, panel, x, ldx, q, rows.begin, epilogue, y, ldy, residual, near);
        else
          block_of<4>(rows.end - rows.begin, w, panel, x, ldx, q, rows.begin, epilogue, y, ldy, residual, near);
      } else if (tiles == 2 || (tiles == 3 && t == 0))  // the next panel, in even portions: a step reads four lines itself
        block_of<2>(rows.end - rows.begin, w, panel, x, ldx, q, rows.begin, epilogue, y, ldy, residual, ahead);
      else
        block_of<1>(rows.end - rows.begin, w, panel, x, ldx, q, rows.begin, epilogue, y, ldy, residual, ahead);
    }
  }
}

#define INSTANCES(T)                                                                                                          \
  template void quantize_row<T>(const T*, int, const Weight&, const QuantizedRows&, int);                                     \
  template void multiply<T, T>(const Weight&, int, int, const T*, int64_t, const QuantizedRows&, int, Epilogue, T*, int64_t, \
                               const T*);
INSTANCES(float)
INSTANCES(bf16)
template void multiply<bf16, float>(const Weight&, int, int, const bf16*, int64_t, const QuantizedRows&, int, Epilogue, float*,
                                    int64_t, const float*);

}  // namespace nanoworks
