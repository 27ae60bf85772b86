#include "layers.h"

#include <cmath>
#include <memory>

namespace nanoworks {
namespace {

constexpr int FEW_ROWS = 2;  // so few that every thread quantizes all of them rather than wait for the others

// Memory that a thread keeps from call to call.
struct Scratch {
  std::unique_ptr<char[]> memory;
  size_t size = 0;
  char* take(size_t bytes) {
    if (bytes + 64 > size) memory.reset(new char[size = bytes + bytes / 2 + 64]);
    return (char*)((uintptr_t(memory.get()) + 63) / 64 * 64);
  }
};

size_t round_up(size_t n) { return (n + 63) / 64 * 64; }

size_t quantized_bytes(const Weight& w, int M) {
  return w.kind < INT8 ? 0 : round_up(size_t(M) * w.K) + 2 * round_up(size_t(M) * groups_of(w) * 4);
}

QuantizedRows quantized_rows(const Weight& w, int M, char* memory) {
  if (w.kind < INT8) return {};
  char* scales = memory + round_up(size_t(M) * w.K);
  return {(int8_t*)memory, (float*)scales, (int32_t*)(scales + round_up(size_t(M) * groups_of(w) * 4))};
}

// One thread's part of a product inside a parallel region. `shared` holds quantized rows for all threads.
template <typename T, typename Out>
void product(const Weight& w, const T* x, int K, int M, Epilogue epilogue, Out* y, int64_t ldy, const Out* residual,
             char* shared, int thread, int threads) {
  QuantizedRows q{};
  if (w.kind >= INT8) {
    if (M <= FEW_ROWS) {
      thread_local Scratch own;
      q = quantized_rows(w, M, own.take(quantized_bytes(w, M)));
      for (int m = 0; m < M; m++) quantize_row(x + int64_t(m) * K, K, w, q, m);
    } else {
      q = quantized_rows(w, M, shared);
      const Share rows(M, thread, threads);
      for (int m = rows.begin; m < rows.end; m++) quantize_row(x + int64_t(m) * K, K, w, q, m);
#pragma omp barrier
    }
  }
  const Share mine(panels(w), thread, threads);
  multiply(w, mine.begin, mine.end, x, K, q, M, epilogue, y, ldy, residual);
}

}  // namespace

template <typename T, typename Out>
void linear(const Weight& w, const T* x, int K, int M, Epilogue epilogue, Out* y, const Out* residual, int threads) {
  static thread_local Scratch scratch;
  char* shared = scratch.take(quantized_bytes(w, M));
  const int64_t ldy = epilogue == GLU_SILU ? w.N / 2 : w.N;
#pragma omp parallel num_threads(threads)
  product(w, x, K, M, epilogue, y, ldy, residual, shared, omp_get_thread_num(), omp_get_num_threads());
}

template <typename T>
void feed_forward(const Weight& in, const Weight& out, const T* x, int K, int M, Epilogue epilogue, T* y, int threads) {
  static thread_local Scratch scratch;
  const int inner = epilogue == GLU_SILU ? in.N / 2 : in.N;
  const size_t first = round_up(quantized_bytes(in, M)), second = round_up(quantized_bytes(out, M));
  char* memory = scratch.take(first + second + size_t(M) * inner * sizeof(T));
  T* h = (T*)(memory + first + second);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    product<T, T>(in, x, K, M, epilogue, h, inner, nullptr, memory, thread, team);
#pragma omp barrier
    product<T, T>(out, h, inner, M, PLAIN, y, out.N, nullptr, memory + first, thread, team);
  }
}

template <typename T>
void rms_norm(const T* x, const float* weight, float eps, int M, int K, T* y, int threads) {
#pragma omp parallel for num_threads(M < 8 ? 1 : threads)
  for (int m = 0; m < M; m++) {
    const T* row = x + int64_t(m) * K;
    T* out = y + int64_t(m) * K;
    __m512 squares = _mm512_setzero_ps();
    for (int k = 0; k < K; k += LANES) {
      __m512 v = load(row + k, first(K - k));
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / K + eps));
    for (int k = 0; k < K; k += LANES) {
      const __mmask16 mask = first(K - k);
      __m512 v = _mm512_mul_ps(load(row + k, mask), inverse);
      if (weight != nullptr) v = _mm512_mul_ps(v, load(weight + k, mask));
      store(out + k, v, mask);
    }
  }
}

#define INSTANCES(T)                                                                                          \
  template void linear<T, T>(const Weight&, const T*, int, int, Epilogue, T*, const T*, int);                 \
  template void feed_forward<T>(const Weight&, const Weight&, const T*, int, int, Epilogue, T*, int);         \
  template void rms_norm<T>(const T*, const float*, float, int, int, T*, int);
INSTANCES(float)
INSTANCES(bf16)
template void linear<bf16, float>(const Weight&, const bf16*, int, int, Epilogue, float*, const float*, int);

}  // namespace nanoworks
