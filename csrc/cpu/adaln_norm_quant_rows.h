// What csrc/cpu/adaln_norm_quant.cpp asks of adaln_norm_quant_rows.cpp, which is compiled per
// instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"
#include "common/norm_call.h"

namespace clipflow {

struct AdaLNQuant {
  const void* x;   // [B, L, D]
  int8_t* values;  // [B, L, D]
  float* scales;   // [B, L]
  Modulation modulation;
  NormShape shape;
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct AdaLNNormQuantRows {
  // Values and scales of the tokens [begin, end) of B * L.
  void (*forward[4])(const AdaLNQuant&, int64_t begin, int64_t end, void* scratch);
};

CLIPFLOW_DECLARE_TABLE(AdaLNNormQuantRows, adaln_norm_quant_rows)

}  // namespace clipflow
