// One sampler step on the CPU, compiled once per instruction set; the formulas are in
// clipflow/ops/flow_step.py.
//
// Every operation is rounded for itself, as in eager PyTorch: no multiplication and addition are
// contracted into one instruction, which the pragma says before anything is defined.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

#include "cpu/flow_step_rows.h"

#include "common/lanes.h"
#include "common/stream_first.h"

namespace clipflow {
namespace {

// The values [begin, end) of all latents, which belong to one sample.
template <typename V, typename M, FlowForm form, bool guided>
CLIPFLOW_INLINE void run(const FlowStep& a, int64_t begin, int64_t end, double sample_guidance) {
  using One = typename Wide<V>::One;
  using Lanes = typename Wide<V>::Lanes;
  const int64_t total = a.samples * a.values;
  const One step = static_cast<One>(a.step), gain = static_cast<One>(a.gain);
  const One keep = static_cast<One>(a.keep), rest = static_cast<One>(a.rest);
  const One guidance = static_cast<One>(sample_guidance);
  const One* latents = static_cast<const One*>(a.latents) + begin;
  const One* previous = static_cast<const One*>(a.previous) + begin;
  const V* velocity = static_cast<const V*>(a.velocity) + begin;
  One* out = static_cast<One*>(a.out) + begin;
  One* kept = a.kept ? static_cast<One*>(a.kept) + begin : nullptr;
  M* model_input = a.model_input ? static_cast<M*>(a.model_input) + begin : nullptr;
  const bool streamed = a.streamed && can_stream(out) && can_stream(kept) &&
                        can_stream(model_input) && can_stream(model_input + total);

  for_lanes<Lanes>(end - begin, [&](int64_t d, int64_t count) {
    const Lanes x = load_first(latents + d, count);
    Lanes v = load_first(velocity + d, count);
    if constexpr (guided) v = v + guidance * (load_first(velocity + total + d, count) - v);
    Lanes y, keeps = v;
    if constexpr (form == FlowForm::kMove) {
      y = x + step * v;
    } else if constexpr (form == FlowForm::kHeunSecond) {
      y = x + step * (load_first(previous + d, count) + v);
    } else {
      Lanes target = keeps = x + step * v;
      if constexpr (form == FlowForm::kSecondOrder)
        target = keeps + gain * (keeps - load_first(previous + d, count));
      y = keep * x + rest * target;
    }
    if (kept) stream_first(kept + d, keeps, count, streamed);
    stream_first(out + d, y, count, streamed);
    if (model_input) {
      stream_first(model_input + d, y, count, streamed);
      if constexpr (guided) stream_first(model_input + total + d, y, count, streamed);
    }
  });
}

template <typename V, typename M, FlowForm form, bool guided>
void blocks(const FlowStep& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / a.blocks, first = block % a.blocks * kFlowBlock;
    const int64_t last = first + kFlowBlock < a.values ? first + kFlowBlock : a.values;
    const int64_t start = sample * a.values;
    run<V, M, form, guided>(a, start + first, start + last,
                            a.guidances ? a.guidances[sample] : a.guidance);
  }
  if (a.streamed) stream_end();
}

#define CLIPFLOW_FORM(V, M, form) {blocks<V, M, form, false>, blocks<V, M, form, true>}
#define CLIPFLOW_FORMS(V, M)                                                             \
  {                                                                                      \
    CLIPFLOW_FORM(V, M, FlowForm::kMove), CLIPFLOW_FORM(V, M, FlowForm::kHeunSecond),    \
        CLIPFLOW_FORM(V, M, FlowForm::kFirstOrder),                                      \
        CLIPFLOW_FORM(V, M, FlowForm::kSecondOrder)                                      \
  }
#define CLIPFLOW_VELOCITY(V) \
  { CLIPFLOW_FORMS(V, float), CLIPFLOW_FORMS(V, BFloat16), CLIPFLOW_FORMS(V, Float16) }

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const FlowStepRows flow_step_rows = {
    {CLIPFLOW_VELOCITY(float), CLIPFLOW_VELOCITY(BFloat16), CLIPFLOW_VELOCITY(Float16)},
    CLIPFLOW_FORMS(double, double),
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
