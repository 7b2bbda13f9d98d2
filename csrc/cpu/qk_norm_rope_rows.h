// What csrc/cpu/qk_norm_rope.cpp asks of qk_norm_rope_rows.cpp, compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

// In the order of NORMS in clipflow/ops/qk_norm_rope.py.
enum class QKNorm : int64_t { kNone, kRms, kLayer };

// Queries or keys.
struct QKSide {
  const void* x;       // [B, L, H, K], K contiguous, the other dimensions as far apart as they say
  const void* weight;  // [group], or null for 1
  const void* bias;    // [group], or null for 0
  const float* cos;    // [L, K / 2], or null
  const float* sin;
  void* y;             // [B, L, H, K]
  int64_t samples, tokens, heads;
  int64_t sample_stride, token_stride, head_stride;
};

struct QKNormRope {
  QKSide sides[2];
  int64_t width;  // K
  QKNorm norm;
  bool across_heads;  // heads are contiguous then
  bool interleaved;
  bool streamed;  // store past the caches; halves of heads must be 64-byte aligned
  double eps;
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct QKNormRopeRows {
  // The tokens [begin, end) of B * L of one side. `scratch` holds 2 * (H + 1) * K values of the
  // wide type.
  void (*forward[4])(const QKNormRope&, int side, int64_t begin, int64_t end, void* scratch);
};

CLIPFLOW_DECLARE_TABLE(QKNormRopeRows, qk_norm_rope_rows)

}  // namespace clipflow
