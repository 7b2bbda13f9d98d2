// What csrc/cpu/adaln_norm.cpp asks of adaln_norm_rows.cpp, which is compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

struct AdaLNForward {
  const void* x;      // [B, L, D]
  const void* shift;  // [B, D], rows `shift_stride` values apart
  const void* scale;  // [B, D], rows `scale_stride` values apart
  void* y;            // [B, L, D]
  int64_t tokens, channels, shift_stride, scale_stride;
  double eps;
};

struct AdaLNBackward {
  const void* grad;   // [B, L, D]
  const void* x;      // [B, L, D]
  const void* scale;  // [B, D], rows `scale_stride` values apart
  void* d_x;          // [B, L, D]
  void* d_shift;      // [B, D]
  void* d_scale;      // [B, D]
  // Sums over the tokens of one chunk: [B, chunks, 2, padded_channels], in the wide type, zeroed.
  void* partial;
  int64_t tokens, channels, scale_stride, chunks, tokens_per_chunk, padded_channels;
  double eps;
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct AdaLNNormRows {
  // y of the tokens [begin, end) of B * L.
  void (*forward[4])(const AdaLNForward&, int64_t begin, int64_t end);
  // d_x and `partial` of the chunks [begin, end) of B * chunks.
  void (*backward[4])(const AdaLNBackward&, int64_t begin, int64_t end);
  // d_shift and d_scale of the samples [begin, end), from `partial`, chunk after chunk.
  void (*reduce[4])(const AdaLNBackward&, int64_t begin, int64_t end);
};

CLIPFLOW_DECLARE_TABLE(AdaLNNormRows, adaln_norm_rows)

}  // namespace clipflow
