// What csrc/cpu/clip_normalize.cpp asks of clip_normalize_rows.cpp, compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

// In the order of MODES in clipflow/ops/clip_normalize.py.
enum class ClipMode : int64_t { kL2, kLayer, kStandardize };

struct ClipNormalize {
  const void* x;     // [B, N, C]
  const void* grad;  // [B, N / pool^2, C]; backward only
  const void* mean;  // [C] in the wide type; standardize only, forward only
  const void* std;   // [C] in the wide type; standardize only
  void* out;         // forward: y [B, N / pool^2, C]; backward: d_x [B, N, C]
  int64_t side;      // tokens of x on a side of the grid; N where pool is 1
  int64_t pool, channels;
  ClipMode mode;
  double eps;
  bool inverse;
  bool streamed;  // the output goes past the caches; forward only
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct ClipNormalizeRows {
  // The pooled tokens [begin, end). `scratch` holds 2 * channels values of the wide type, padded.
  void (*forward[4])(const ClipNormalize&, int64_t begin, int64_t end, void* scratch);
  void (*backward[4])(const ClipNormalize&, int64_t begin, int64_t end, void* scratch);
};

CLIPFLOW_DECLARE_TABLE(ClipNormalizeRows, clip_normalize_rows)

}  // namespace clipflow
