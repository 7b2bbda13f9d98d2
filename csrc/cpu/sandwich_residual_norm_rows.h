// What csrc/cpu/sandwich_residual_norm.cpp asks of sandwich_residual_norm_rows.cpp, which is
// compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"
#include "common/norm_call.h"

namespace clipflow {

struct SandwichResidualForward {
  const void* x;       // [B, L, D]
  const void* y;       // [B, L, D]
  const void* gate;    // [B, D], rows `gate_stride` values apart
  const void* weight;  // [D], of the norm of y; may be null
  void* h;             // [B, L, D]
  void* normed;        // [B, L, D]
  int64_t gate_stride;
  Modulation modulation;
  NormShape shape;
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct SandwichResidualNormRows {
  // h and normed of the tokens [begin, end) of B * L.
  void (*forward[4])(const SandwichResidualForward&, int64_t begin, int64_t end, void* scratch);
  NormBackwardRows backward[4];
  NormReduceRows reduce[4];
};

CLIPFLOW_DECLARE_TABLE(SandwichResidualNormRows, sandwich_residual_norm_rows)

}  // namespace clipflow
