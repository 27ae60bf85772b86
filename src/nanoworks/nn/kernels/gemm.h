// y = x W^T for a weight that was packed once: the linear layers of the engine on a CPU.
//
// Outputs are cut into panels (64 wide, 32 for INT4); inside a panel the weights lie in the order in which the inner loop
// reads them, so that one thread streams one panel from memory once, whatever the number of rows. Four kinds of weight:
//   F32   [K][64] floats
//   BF16  [K/2][64][2], for the dot-product instruction on pairs
//   INT8  [K/4][64][4] unsigned (value + 128), one scale an output; rows are quantized to signed bytes, one scale a row
//   INT4  [K/8][32][4] bytes of two (value + 8), the low nibbles for k..k+3 and the high ones for k+4..k+7; one scale for
//         each output and group of inputs; rows are quantized likewise, one scale for each row and group
#pragma once
#include "simd.h"

namespace nanoworks {

enum Kind { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum Epilogue { PLAIN = 0, GLU_SILU = 1, SQUARED_RELU = 2 };

struct Weight {
  Kind kind;
  int N, K;            // outputs and inputs; K padded to what the kind needs
  int group;           // INT4: inputs that share a scale
  const void* data;
  const void* scales;  // INT8: float[N padded to the panel]; INT4: IEEE half [panel][K / group][32]
  const float* bias;   // or null
};

inline int panel_width(Kind kind) { return kind == INT4 ? 32 : 64; }
inline int panels(const Weight& w) { return (w.N + panel_width(w.kind) - 1) / panel_width(w.kind); }

// Rows as INT8 and INT4 weights want them.
struct QuantizedRows {
  int8_t* values;  // (M, K)
  float* scales;   // (M, groups)
  int32_t* sums;   // (M, groups) of the values
};

int groups_of(const Weight& w);

// Quantize row `m` of x (stride `ldx`, `K` real inputs).
template <typename T>
void quantize_row(const T* x, int K, const Weight& w, const QuantizedRows& out, int m);

// Panels [begin, end) of W for all M rows of x. GLU_SILU expects panels half gate, half up and writes N / 2 columns.
// y gets residual added when that is not null (same stride).
template <typename T, typename Out>
void multiply(const Weight& w, int begin, int end, const T* x, int64_t ldx, const QuantizedRows& q, int M, Epilogue epilogue,
              Out* y, int64_t ldy, const Out* residual);

}  // namespace nanoworks
