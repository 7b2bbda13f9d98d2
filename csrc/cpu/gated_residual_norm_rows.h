// What csrc/cpu/gated_residual_norm.cpp asks of gated_residual_norm_rows.cpp, which is compiled per
// instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"
#include "common/norm_call.h"

namespace clipflow {

struct GatedResidualForward {
  const void* x;           // [B, L, D]
  const void* y;           // [B, L, D]
  const void* gate;        // [S, D], rows `gate_stride` values apart; may be null
  const void* gate_table;  // [D]; may be null
  void* h;                 // [B, L, D]
  void* normed;            // [B, L, D]
  int64_t gate_stride;
  Modulation modulation;
  NormShape shape;
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct GatedResidualNormRows {
  // h and normed of the tokens [begin, end) of B * L.
  void (*forward[4])(const GatedResidualForward&, int64_t begin, int64_t end, void* scratch);
  NormBackwardRows backward[4];
  NormReduceRows reduce[4];
};

CLIPFLOW_DECLARE_TABLE(GatedResidualNormRows, gated_residual_norm_rows)

}  // namespace clipflow
