// What csrc/cpu/swiglu.cpp asks of swiglu_rows.cpp, which is compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

struct SwiGLU {
  const void* a;     // [rows, width], rows `a_stride` values apart
  const void* b;     // [rows, width], rows `b_stride` values apart
  const void* grad;  // [rows, width], rows `grad_stride` values apart; backward only
  void* y;           // [rows, width]; forward only
  void* d_a;         // [rows, width]; backward only
  void* d_b;         // [rows, width]; backward only
  int64_t width, a_stride, b_stride, grad_stride;
  int64_t blocks;  // of a row, kSwiGLUBlock values each but for the last
  bool streamed;   // store past the caches; rows of the outputs must be 64-byte aligned
};

// Values that a thread takes at a time, a multiple of every register's.
constexpr int64_t kSwiGLUBlock = 8192;

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct SwiGLURows {
  // The blocks [begin, end) of rows * blocks.
  void (*forward[4])(const SwiGLU&, int64_t begin, int64_t end);
  void (*backward[4])(const SwiGLU&, int64_t begin, int64_t end);
};

CLIPFLOW_DECLARE_TABLE(SwiGLURows, swiglu_rows)

}  // namespace clipflow
