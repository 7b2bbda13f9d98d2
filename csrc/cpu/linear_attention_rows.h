// What csrc/cpu/linear_attention.cpp asks of linear_attention_rows.cpp, which is compiled per
// instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

// One of q, k, v: [B, N, H, K] with contiguous heads; values from one sample, token, head to the
// next.
struct HeadView {
  const void* data;
  int64_t sample, token, head;
};

struct LinearAttention {
  HeadView q, k, v;
  void* y;  // [B, N, H, K], contiguous
  int64_t tokens, heads, width;
  double eps;
};

// Tokens that are summed in registers before they are added to the state. The order of all sums
// follows from it alone.
constexpr int64_t kAttentionChunk = 64;

// `width` filled up to whole registers of every instruction set.
static inline int64_t attention_padded(int64_t width) { return (width + 15) / 16 * 16; }

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct LinearAttentionRows {
  // y of the heads [begin, end) of B * H. `scratch` holds, in the wide type, the state, the sum of
  // the keys and two chunks of tokens: width + 1 + 2 * kAttentionChunk rows of
  // attention_padded(width) values.
  void (*forward[4])(const LinearAttention&, int64_t begin, int64_t end, void* scratch);
};

CLIPFLOW_DECLARE_TABLE(LinearAttentionRows, linear_attention_rows)

}  // namespace clipflow
