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
#include "common/stream.h"

namespace clipflow {
namespace {

// Where the results of one stretch of values go; `kept`, `model_input` and `doubled` may be null.
template <typename One, typename M>
struct Results {
  One *out, *kept;
  M *model_input, *doubled;
};

// `count` values from `begin` on, counted over all latents, which belong to one sample.
template <typename V, typename M, FlowForm form, bool guided>
CLIPFLOW_INLINE void run(const FlowStep& a, int64_t begin, int64_t count, double sample_guidance,
                         Results<typename Wide<V>::One, M> to) {
  using One = typename Wide<V>::One;
  using Lanes = typename Wide<V>::Lanes;
  const int64_t total = a.samples * a.values;
  const One step = static_cast<One>(a.step), gain = static_cast<One>(a.gain);
  const One keep = static_cast<One>(a.keep), rest = static_cast<One>(a.rest);
  const One guidance = static_cast<One>(sample_guidance);
  const One* latents = static_cast<const One*>(a.latents) + begin;
  const One* previous = static_cast<const One*>(a.previous) + begin;
  const V* velocity = static_cast<const V*>(a.velocity) + begin;

  for_lanes<Lanes>(count, [&](int64_t d, int64_t part) {
    const Lanes x = load_first(latents + d, part);
    Lanes v = load_first(velocity + d, part);
    if constexpr (guided) v = v + guidance * (load_first(velocity + total + d, part) - v);
    Lanes y, keeps = v;
    if constexpr (form == FlowForm::kMove) {
      y = x + step * v;
    } else if constexpr (form == FlowForm::kHeunSecond) {
      y = x + step * (load_first(previous + d, part) + v);
    } else {
      Lanes target = keeps = x + step * v;
      if constexpr (form == FlowForm::kSecondOrder)
        target = keeps + gain * (keeps - load_first(previous + d, part));
      y = keep * x + rest * target;
    }
    if (to.kept) store_first(to.kept + d, keeps, part);
    store_first(to.out + d, y, part);
    if (to.model_input) store_first(to.model_input + d, y, part);
    if (guided && to.doubled) store_first(to.doubled + d, y, part);
  });
}

// Values that are computed in the caches, then streamed from there, one tensor after another:
// streaming four at a time, register by register, took 4x as long.
constexpr int64_t kTile = 1024;

template <typename T>
CLIPFLOW_INLINE void stream_tile(T* to, const T* from, int64_t count) {
  if (!to) return;
  constexpr int64_t kStep = kRegisterBytes / sizeof(T);
  int64_t d = 0;
  if (reinterpret_cast<uint64_t>(to) % kRegisterBytes == 0)
    for (; d + kStep <= count; d += kStep)
      stream(reinterpret_cast<float*>(to + d), load_raw<Floats>(from + d));
  for (; d < count; ++d) to[d] = from[d];
}

template <typename V, typename M, FlowForm form, bool guided>
void blocks(const FlowStep& a, int64_t begin, int64_t end) {
  using One = typename Wide<V>::One;
  const int64_t total = a.samples * a.values;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / a.blocks, first = block % a.blocks * kFlowBlock;
    const int64_t last = first + kFlowBlock < a.values ? first + kFlowBlock : a.values;
    const int64_t start = sample * a.values + first, count = last - first;
    const double guidance = a.guidances ? a.guidances[sample] : a.guidance;
    M* model_input = a.model_input ? static_cast<M*>(a.model_input) + start : nullptr;
    const Results<One, M> to = {static_cast<One*>(a.out) + start,
                                a.kept ? static_cast<One*>(a.kept) + start : nullptr, model_input,
                                guided && model_input ? model_input + total : nullptr};
    if (!a.streamed) {
      run<V, M, form, guided>(a, start, count, guidance, to);
      continue;
    }
    alignas(64) One out[kTile], kept[kTile];
    alignas(64) M input[kTile];
    for (int64_t d = 0; d < count; d += kTile) {
      const int64_t part = d + kTile < count ? kTile : count - d;
      run<V, M, form, guided>(
          a, start + d, part, guidance,
          {out, to.kept ? kept : nullptr, model_input ? input : nullptr, nullptr});
      stream_tile(to.out + d, out, part);
      stream_tile(to.kept ? to.kept + d : nullptr, kept, part);
      stream_tile(model_input ? model_input + d : nullptr, input, part);
      stream_tile(to.doubled ? to.doubled + d : nullptr, input, part);
    }
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
