// Whole layers, and their parts, for M rows at once. Each call is one parallel region.
#pragma once
#include "attention.h"
#include "gemm.h"

namespace nanoworks {

struct Norm {
  bool used = false;
  const float* weight = nullptr;  // or null
  float eps = 0;
};

// y (M, N) = x (M, K) W^T, plus residual (M, N) when not null.
template <typename T, typename Out>
void linear(const Weight& w, const T* x, int K, int M, Epilogue epilogue, Out* y, int threads);

// y (M, out) = f(x in^T) out^T, f by the epilogue of `in`.
template <typename T>
void feed_forward(const Weight& in, const Weight& out, const T* x, int K, int M, Epilogue epilogue, T* y, int threads);

// y = x / sqrt(mean(x^2) + eps) * weight.
template <typename T>
void rms_norm(const T* x, const Norm& norm, int M, int K, T* y, int threads);

// x + attention(norm(x)), then x + feed_forward(norm(x)).
struct Layer {
  Norm first, second;
  Weight qkv, o, in, out;
  Options heads;
  bool rotate;
  Epilogue epilogue;  // of `in`
};

// Pass x (M, C), which is changed, through `count` layers, whose caches and steps (windows differ) are given one by one.
template <typename T>
void run_layers(const Layer* layers, const Cache* caches, const Step* const* steps, int count, T* x, int M, int C, int q_heads,
                const float* cos, const float* sin, int threads);

// y[n] = sum over j of weights[n][j] * block(x[n]), the block being that of expert chosen[n][j], or nothing where this is E.
// E feed-forward blocks of one shape, x (N, K), chosen and weights (N, choices). A row does not depend on the others.
template <typename T>
void mixture(const Weight* in, const Weight* out, int E, const T* x, int N, int K, const int64_t* chosen, const float* weights,
             int choices, Epilogue epilogue, T* y, int threads);

// Of each row of logits (M, V): the first of the largest among the first `choices`, and log(sum(exp)) of all V, which is
// NaN when one of them is NaN or infinite.
void row_stats(const float* logits, int M, int V, int choices, int64_t* best, float* log_total, int threads);

}  // namespace nanoworks
