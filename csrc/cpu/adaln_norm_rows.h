// What csrc/cpu/adaln_norm.cpp asks of adaln_norm_rows.cpp, which is compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"
#include "common/norm_call.h"

namespace clipflow {

struct AdaLNForward {
  const void* x;  // [B, L, D]
  void* y;        // [B, L, D]
  Modulation modulation;
  NormShape shape;
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct AdaLNNormRows {
  // y of the tokens [begin, end) of B * L.
  void (*forward[4])(const AdaLNForward&, int64_t begin, int64_t end, void* scratch);
  NormBackwardRows backward[4];
  NormReduceRows reduce[4];
};

CLIPFLOW_DECLARE_TABLE(AdaLNNormRows, adaln_norm_rows)

}  // namespace clipflow
