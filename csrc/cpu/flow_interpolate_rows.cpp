// Noisy data and target velocity on the CPU, compiled once per instruction set.
//
//   noisy = (1 - s) * data + s * noise,   target = noise - data
//
// Every operation is rounded for itself, as in eager PyTorch: no multiplication and addition are
// contracted into one instruction, which the pragma says before anything is defined.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

#include "cpu/flow_interpolate_rows.h"

#include "common/lanes.h"
#include "common/stream_first.h"

namespace clipflow {
namespace {

template <typename T>
CLIPFLOW_INLINE void run(const FlowInterpolate& a, int64_t begin, int64_t end,
                         typename Wide<T>::One sigma) {
  using Lanes = typename Wide<T>::Lanes;
  const T* data = static_cast<const T*>(a.data) + begin;
  const T* noise = static_cast<const T*>(a.noise) + begin;
  T* noisy = static_cast<T*>(a.noisy) + begin;
  T* target = static_cast<T*>(a.target) + begin;
  const typename Wide<T>::One rest = 1 - sigma;
  const bool streamed = a.streamed && can_stream(noisy) && can_stream(target);
  for_lanes<Lanes>(end - begin, [&](int64_t d, int64_t count) {
    const Lanes x = load_first(data + d, count), z = load_first(noise + d, count);
    stream_first(noisy + d, rest * x + sigma * z, count, streamed);
    stream_first(target + d, z - x, count, streamed);
  });
}

template <typename T>
void blocks(const FlowInterpolate& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sample = block / a.blocks, first = block % a.blocks * kInterpolateBlock;
    const int64_t last = first + kInterpolateBlock < a.values ? first + kInterpolateBlock
                                                              : a.values;
    const int64_t start = sample * a.values;
    run<T>(a, start + first, start + last,
           static_cast<const typename Wide<T>::One*>(a.sigmas)[sample]);
  }
  if (a.streamed) stream_end();
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const FlowInterpolateRows flow_interpolate_rows = {
    {blocks<float>, blocks<BFloat16>, blocks<Float16>, blocks<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
