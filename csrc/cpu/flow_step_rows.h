// What csrc/cpu/flow_step.cpp asks of flow_step_rows.cpp, compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

enum class FlowForm : int64_t { kMove, kHeunSecond, kFirstOrder, kSecondOrder };

struct FlowStep {
  const void* latents;      // [samples, values]
  const void* velocity;     // as latents, or, guided, the null rows and then the others
  const void* previous;     // as latents; kHeunSecond and kSecondOrder only
  const float* guidances;   // [samples], or null: `guidance` for all
  void* out;                // as latents
  void* model_input;        // as velocity, or null
  void* kept;               // as latents, or null
  int64_t samples, values;  // one sample of all values where guidances is null
  int64_t blocks;           // of each sample
  double step, gain, keep, rest, guidance;
  bool streamed;  // past the caches
};

// Values of a sample that one thread takes at a time.
constexpr int64_t kFlowBlock = 4096;

using FlowStepBlocks = void (*)(const FlowStep&, int64_t begin, int64_t end);

struct FlowStepRows {
  // The blocks [begin, end) of all samples. Latents are float32: [velocity][model input] by
  // dtype_index of common/tensor.h, then [form][guided].
  FlowStepBlocks step[3][3][4][2];
  FlowStepBlocks step_double[4][2];  // all tensors are float64
};

CLIPFLOW_DECLARE_TABLE(FlowStepRows, flow_step_rows)

}  // namespace clipflow
