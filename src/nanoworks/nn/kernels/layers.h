// What a layer does besides attention, for M rows at once. Each call is one parallel region.
#pragma once
#include "gemm.h"

namespace nanoworks {

// y (M, N) = x (M, K) W^T, plus residual (M, N) when not null.
template <typename T, typename Out>
void linear(const Weight& w, const T* x, int K, int M, Epilogue epilogue, Out* y, const Out* residual, int threads);

// y (M, out) = f(x in^T) out^T, f by the epilogue of `in`.
template <typename T>
void feed_forward(const Weight& in, const Weight& out, const T* x, int K, int M, Epilogue epilogue, T* y, int threads);

// y = x / sqrt(mean(x^2) + eps) * weight; weight float or null.
template <typename T>
void rms_norm(const T* x, const float* weight, float eps, int M, int K, T* y, int threads);

}  // namespace nanoworks
