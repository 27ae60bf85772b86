#include "layers.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

namespace nanoworks {
namespace {

constexpr int FEW_ROWS = 2;  // so few that every thread prepares all of them rather than wait for the others

struct Team {
  int thread, threads;
};

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

template <typename T>
void norm_row(const T* x, const Norm& norm, int K, T* y) {
  __m512 squares = _mm512_setzero_ps();
  for (int k = 0; k < K; k += LANES) {
    __m512 v = load(x + k, first(K - k));
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / K + norm.eps));
  for (int k = 0; k < K; k += LANES) {
    const __mmask16 mask = first(K - k);
    __m512 v = _mm512_mul_ps(load(x + k, mask), inverse);
    if (norm.weight != nullptr) v = _mm512_mul_ps(v, load(norm.weight + k, mask));
    store(y + k, v, mask);
  }
}

// Where rows go on their way into a product: normalised, then in bytes.
template <typename T>
struct Prepared {
  T* normed = nullptr;
  QuantizedRows quantized{};

  static size_t bytes(const Weight& w, const Norm& norm, int K, int M) {
    size_t total = norm.used ? round_up(size_t(M) * K * sizeof(T)) : 0;
    if (w.kind >= INT8) total += round_up(size_t(M) * w.K) + 2 * round_up(size_t(M) * groups_of(w) * 4);
    return total;
  }

  Prepared(const Weight& w, const Norm& norm, int K, int M, char* memory) {
    if (norm.used) {
      normed = (T*)memory;
      memory += round_up(size_t(M) * K * sizeof(T));
    }
    if (w.kind >= INT8) {
      char* scales = memory + round_up(size_t(M) * w.K);
      quantized = {(int8_t*)memory, (float*)scales, (int32_t*)(scales + round_up(size_t(M) * groups_of(w) * 4))};
    }
  }

  void row(const Weight& w, const Norm& norm, const T* x, int K, int m) {
    x += int64_t(m) * K;
    if (norm.used) {
      norm_row(x, norm, K, normed + int64_t(m) * K);
      x = normed + int64_t(m) * K;
    }
    if (w.kind >= INT8) quantize_row(x, K, w, quantized, m);
  }
};

// One thread's part of a product of norm(x); `shared` is memory for all of them. y is complete after a barrier.
template <typename T, typename Out>
void product(const Weight& w, const Norm& norm, const T* x, int K, int M, Epilogue epilogue, Out* y, const Out* residual,
             char* shared, Team team) {
  static thread_local Scratch own;
  const bool alone = M <= FEW_ROWS;
  Prepared<T> rows(w, norm, K, M, alone ? own.take(Prepared<T>::bytes(w, norm, K, M)) : shared);
  if (norm.used || w.kind >= INT8) {
    const Share mine = alone ? Share(M, 0, 1) : Share(M, team.thread, team.threads);
    for (int m = mine.begin; m < mine.end; m++) rows.row(w, norm, x, K, m);
    if (!alone) {
#pragma omp barrier
    }
  }
  const Share mine(panels(w), team.thread, team.threads);
  const int64_t ldy = epilogue == GLU_SILU ? w.N / 2 : w.N;
  multiply(w, mine.begin, mine.end, norm.used ? (const T*)rows.normed : x, K, rows.quantized, M, epilogue, y, ldy, residual);
}

Team team() { return {omp_get_thread_num(), omp_get_num_threads()}; }

int inner_size(const Weight& in, Epilogue epilogue) { return epilogue == GLU_SILU ? in.N / 2 : in.N; }

}  // namespace

template <typename T, typename Out>
void linear(const Weight& w, const T* x, int K, int M, Epilogue epilogue, Out* y, int threads) {
  static thread_local Scratch scratch;
  char* shared = scratch.take(Prepared<T>::bytes(w, {}, K, M));
#pragma omp parallel num_threads(threads)
  product<T, Out>(w, {}, x, K, M, epilogue, y, nullptr, shared, team());
}

template <typename T>
void feed_forward(const Weight& in, const Weight& out, const T* x, int K, int M, Epilogue epilogue, T* y, int threads) {
  static thread_local Scratch scratch;
  const int inner = inner_size(in, epilogue);
  const size_t first = Prepared<T>::bytes(in, {}, K, M), second = Prepared<T>::bytes(out, {}, inner, M);
  char* memory = scratch.take(first + second + size_t(M) * inner * sizeof(T));
  T* h = (T*)(memory + first + second);
#pragma omp parallel num_threads(threads)
  {
    product<T, T>(in, {}, x, K, M, epilogue, h, nullptr, memory, team());
#pragma omp barrier
    product<T, T>(out, {}, h, inner, M, PLAIN, y, nullptr, memory + first, team());
  }
}

template <typename T>
void rms_norm(const T* x, const Norm& norm, int M, int K, T* y, int threads) {
#pragma omp parallel for num_threads(M < 8 ? 1 : threads)
  for (int m = 0; m < M; m++) norm_row(x + int64_t(m) * K, norm, K, y + int64_t(m) * K);
}

template <typename T>
void run_layers(const Layer* layers, const Cache* caches, const Step* const* steps, int count, T* x, int M, int C, int q_heads,
                const float* cos, const float* sin, int threads) {
  static thread_local Scratch scratch;
  size_t prepared = 0;
  int widest = 0;
  for (int i = 0; i < count; i++) {
    const Layer& l = layers[i];
    const int inner = inner_size(l.in, l.epilogue);
    prepared = std::max({prepared, Prepared<T>::bytes(l.qkv, l.first, C, M), Prepared<T>::bytes(l.in, l.second, C, M),
                         Prepared<T>::bytes(l.o, {}, q_heads * caches[i].D, M), Prepared<T>::bytes(l.out, {}, inner, M)});
    widest = std::max({widest, l.qkv.N, inner});
  }
  // Two places for rows in preparation: one is filled while another thread may still read the other.
  const size_t attended = round_up(size_t(M) * q_heads * caches[0].D * sizeof(T));
  char* memory = scratch.take(2 * prepared + attended + size_t(M) * widest * sizeof(T));
  char* places[] = {memory, memory + prepared};
  T* y = (T*)(memory + 2 * prepared);
  T* h = (T*)(memory + 2 * prepared + attended);
  const AttentionPlan plan(*steps[0], caches[0], q_heads, threads);
#pragma omp parallel num_threads(threads)
  for (int i = 0; i < count; i++) {
    const Layer& l = layers[i];
    const Cache& cache = caches[i];
    const int width = l.qkv.N, inner = inner_size(l.in, l.epilogue), D = cache.D;
    product<T, T>(l.qkv, l.first, x, C, M, PLAIN, h, nullptr, places[0], team());
#pragma omp barrier
    const T* k = h + q_heads * D;
    attend_in_team<T>(h, k, k + cache.heads * D, width, width, width, q_heads, l.rotate ? cos : nullptr, l.rotate ? sin : nullptr,
                      *steps[i], cache, l.heads, plan, y);
    product<T, T>(l.o, {}, y, q_heads * D, M, PLAIN, x, x, places[1], team());
#pragma omp barrier
    product<T, T>(l.in, l.second, x, C, M, l.epilogue, h, nullptr, places[0], team());
#pragma omp barrier
    product<T, T>(l.out, {}, h, inner, M, PLAIN, x, x, places[1], team());
#pragma omp barrier
  }
}

namespace {

// One thread's part of the products of all experts: the panels of those that have rows, dealt out in order.
template <typename T>
void products(const Weight* weights, const int64_t* ends, int E, const T* x, int K, Epilogue epilogue, T* y, char* memory,
              Team team) {
  const Weight& w = weights[0];
  const int M = int(ends[E - 1]), groups = groups_of(w), each = panels(w);
  Prepared<T> rows(w, {}, K, M, memory);
  if (w.kind >= INT8) {
    const Share mine(M, team.thread, team.threads);
    for (int m = mine.begin; m < mine.end; m++) rows.row(w, {}, x, K, m);
#pragma omp barrier
  }
  int busy = 0;
  for (int e = 0; e < E; e++) busy += ends[e] > (e ? ends[e - 1] : 0);
  const Share mine(busy * each, team.thread, team.threads);
  const int64_t ldy = inner_size(w, epilogue);
  for (int e = 0, first = 0; e < E; e++) {
    const int64_t from = e ? ends[e - 1] : 0;
    const int count = int(ends[e] - from);
    if (count == 0) continue;
    const int begin = std::max(mine.begin - first, 0), end = std::min(mine.end - first, each);
    first += each;
    if (begin >= end) continue;
    const QuantizedRows& all = rows.quantized;
    const QuantizedRows q = w.kind < INT8 ? all
                                          : QuantizedRows{all.values + from * w.K, all.scales + from * groups, all.sums + from * groups};
    multiply(weights[e], begin, end, x + from * K, K, q, count, epilogue, y + from * ldy, ldy, (const T*)nullptr);
  }
}

}  // namespace

// The choices (N, k) in the order of their experts.
struct Dispatch {
  std::vector<int64_t> ends;   // (E) behind the last row of each expert
  std::vector<int32_t> token;  // (M) of each row
  std::vector<int32_t> row;    // (N * k) of each choice, -1 for one that is left out

  Dispatch(const int64_t* chosen, int count, int k, int E) : ends(E + 1), row(count, -1) {
    for (int i = 0; i < count; i++) ends[chosen[i]]++;
    int64_t begin = 0;
    for (int e = 0; e < E; e++) begin += std::exchange(ends[e], begin);
    token.resize(begin);
    for (int i = 0; i < count; i++)
      if (chosen[i] < E) {
        row[i] = int32_t(ends[chosen[i]]++);
        token[row[i]] = i / k;
      }
  }
};

template <typename T>
void mixture(const Weight* in, const Weight* out, int E, const T* x, int N, int K, const int64_t* chosen, const float* weights,
             int choices, Epilogue epilogue, T* y, int threads) {
  static thread_local Scratch scratch;
  const Dispatch to(chosen, N * choices, choices, E);
  const int64_t* ends = to.ends.data();
  const int M = int(to.token.size()), inner = inner_size(in[0], epilogue), C = out[0].N;
  const size_t first = Prepared<T>::bytes(in[0], {}, K, M), second = Prepared<T>::bytes(out[0], {}, inner, M);
  const size_t wide = round_up(size_t(M) * std::max(K, C) * sizeof(T));
  char* memory = scratch.take(first + second + wide + size_t(M) * inner * sizeof(T));
  T* rows = (T*)(memory + first + second);  // of the inputs, then of the outputs
  T* h = (T*)(memory + first + second + wide);
#pragma omp parallel num_threads(threads)
  {
    const Share mine(M, team().thread, team().threads), tokens(N, team().thread, team().threads);
    for (int m = mine.begin; m < mine.end; m++) std::memcpy(rows + int64_t(m) * K, x + int64_t(to.token[m]) * K, K * sizeof(T));
#pragma omp barrier
    products<T>(in, ends, E, rows, K, epilogue, h, memory, team());
#pragma omp barrier
    products<T>(out, ends, E, h, inner, PLAIN, rows, memory + first, team());
#pragma omp barrier
    for (int n = tokens.begin; n < tokens.end; n++)
      for (int c = 0; c < C; c += LANES) {
        const __mmask16 mask = nanoworks::first(C - c);
        __m512 sum = _mm512_setzero_ps();
        for (int i = n * choices; i < (n + 1) * choices; i++)
          if (to.row[i] >= 0)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[i]), load(rows + int64_t(to.row[i]) * C + c, mask), sum);
        store(y + int64_t(n) * C + c, sum, mask);
      }
  }
}

void row_stats(const float* logits, int M, int V, int choices, int64_t* best, float* log_total, int threads) {
#pragma omp parallel for num_threads(M < 4 ? 1 : threads)
  for (int m = 0; m < M; m++) {
    const float* row = logits + int64_t(m) * V;
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 most = none, rest = none;
    for (int v = 0; v < V; v += LANES) {
      __m512 x = _mm512_mask_loadu_ps(none, first(V - v), row + v);
      __mmask16 open = first(std::max(0, choices - v));
      most = _mm512_mask_max_ps(most, open, most, x);
      rest = _mm512_max_ps(rest, x);
    }
    const float highest = _mm512_reduce_max_ps(most), top = std::max(highest, _mm512_reduce_max_ps(rest));
    int64_t at = 0;
    for (int v = 0; v < choices; v += LANES) {
      const __mmask16 same = _mm512_mask_cmp_ps_mask(first(choices - v), _mm512_maskz_loadu_ps(first(V - v), row + v),
                                                    _mm512_set1_ps(highest), _CMP_EQ_OQ);
      if (same) {
        at = v + __builtin_ctz(same);
        break;
      }
    }
    __m512 sum = _mm512_setzero_ps();
    __mmask16 wrong = 0;  // NaN or infinite
    for (int v = 0; v < V; v += LANES) {
      const __mmask16 mask = first(V - v);
      __m512 x = _mm512_maskz_loadu_ps(mask, row + v);
      wrong |= _mm512_mask_fpclass_ps_mask(mask, x, 0x01 | 0x08 | 0x80);  // quiet NaN, +infinity, signalling NaN
      sum = _mm512_mask_add_ps(sum, mask, sum, exp(_mm512_sub_ps(x, _mm512_set1_ps(top))));
    }
    best[m] = at;
    log_total[m] = wrong ? NAN : top + std::log(_mm512_reduce_add_ps(sum));
  }
}

#define INSTANCES(T)                                                                                                        \
  template void linear<T, T>(const Weight&, const T*, int, int, Epilogue, T*, int);                                         \
  template void feed_forward<T>(const Weight&, const Weight&, const T*, int, int, Epilogue, T*, int);                       \
  template void rms_norm<T>(const T*, const Norm&, int, int, T*, int);                                                      \
  template void mixture<T>(const Weight*, const Weight*, int, const T*, int, int, const int64_t*, const float*, int,        \
                           Epilogue, T*, int);                                                                              \
  template void run_layers<T>(const Layer*, const Cache*, const Step* const*, int, T*, int, int, int, const float*,         \
                              const float*, int);
INSTANCES(float)
INSTANCES(bf16)
template void linear<bf16, float>(const Weight&, const bf16*, int, int, Epilogue, float*, int);

}  // namespace nanoworks
