// Small helpers over AVX-512: conversions, exp, sums. Included by every kernel; nothing here knows of torch.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace nanoworks {

struct bf16 {
  uint16_t bits;
};

constexpr int LANES = 16;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline __mmask16 first(int n) { return n >= LANES ? __mmask16(0xFFFF) : __mmask16((1u << n) - 1); }

inline __m512 load(const float* p, __mmask16 mask = 0xFFFF) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load(const bf16* p, __mmask16 mask = 0xFFFF) {
  __m256i bits = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load(const int8_t* p, __mmask16 mask = 0xFFFF) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}

inline __m256i round_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store(float* p, __m512 x, __mmask16 mask = 0xFFFF) { _mm512_mask_storeu_ps(p, mask, x); }
inline void store(bf16* p, __m512 x, __mmask16 mask = 0xFFFF) { _mm256_mask_storeu_epi16(p, mask, round_to_bf16(x)); }

inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) { p->bits = _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0); }

// e^x to 2 units in the last place of float: 2^n by the exponent field, the rest by a polynomial (Cephes' coefficients).
inline __m512 exp(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.7f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Items [begin, end) of thread `t` of `n` when `total` items are dealt out evenly.
struct Share {
  int begin, end;
  Share(int total, int t, int n) : begin(int(int64_t(total) * t / n)), end(int(int64_t(total) * (t + 1) / n)) {}
};

}  // namespace nanoworks
