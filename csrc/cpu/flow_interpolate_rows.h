// What csrc/cpu/flow_interpolate.cpp asks of flow_interpolate_rows.cpp, compiled per instruction
// set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

struct FlowInterpolate {
  const void* data;    // [samples, values]
  const void* noise;   // as data
  const void* sigmas;  // [samples] in the wide type
  void* noisy;         // as data
  void* target;        // as data
  int64_t values;
  int64_t blocks;  // of each sample
  bool streamed;   // past the caches
};

// Values of a sample that one thread takes at a time.
constexpr int64_t kInterpolateBlock = 4096;

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct FlowInterpolateRows {
  void (*blocks[4])(const FlowInterpolate&, int64_t begin, int64_t end);
};

CLIPFLOW_DECLARE_TABLE(FlowInterpolateRows, flow_interpolate_rows)

}  // namespace clipflow
