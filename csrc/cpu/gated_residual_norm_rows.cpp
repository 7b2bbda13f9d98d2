// Gated residual and norm of single tokens on the CPU, compiled once per instruction set.
//
//   h = x + (gate + gate_table) * y,   normed = xhat(h) * gain + offset, as common/norm_rows.h

#include "cpu/gated_residual_norm_rows.h"

#include "common/norm_backward_rows.h"
#include "common/norm_rows.h"

namespace clipflow {
namespace {

template <typename T>
void prepare_gate(const GatedResidualForward& a, int64_t row, OneOf<T>* to) {
  using Lanes = LanesOf<T>;
  const T* gate = a.gate ? static_cast<const T*>(a.gate) + row * a.gate_stride : nullptr;
  const T* table = static_cast<const T*>(a.gate_table);
  for_lanes<Lanes>(a.shape.channels, [&](int64_t d, int64_t count) {
    Lanes factor = Lanes{} + 1;
    if (gate) factor = load_first(gate + d, count);
    if (table) factor += load_first(table + d, count);
    store(to + d, factor);
  });
}

template <typename T, bool kStream>
void forward_tokens(const GatedResidualForward& a, int64_t begin, int64_t end, void* scratch) {
  using One = OneOf<T>;
  using Lanes = LanesOf<T>;
  const int64_t channels = a.shape.channels, row_size = padded(channels);
  One* const gain = static_cast<One*>(scratch);
  One* const gate = gain + 2 * row_size;
  One* const spare = gain + 3 * row_size;
  const Prepared<One> rows = {gain, gain + row_size};
  for_tokens(
      a.shape.tokens, begin, end,
      [&](int64_t row) {
        prepare<T>(a.modulation, row, channels, rows);
        prepare_gate<T>(a, row, gate);
      },
      [&](int64_t token) {
        const T* x = static_cast<const T*>(a.x) + token * channels;
        const T* y = static_cast<const T*>(a.y) + token * channels;
        T* h = static_cast<T*>(a.h) + token * channels;
        T* normed = static_cast<T*>(a.normed) + token * channels;
        One* const kept = kept_row<kStream>(h, spare);
        const One sum = sum_over<Lanes>(channels, [&](int64_t d, int64_t count) {
          const Lanes branch = load(gate + d) * load_first(y + d, count);
          const Lanes value = rounded(h, load_first(x + d, count) + branch);
          keep<kStream>(h, kept, d, value, count);
          return value;
        });
        const One mean = a.shape.rms ? 0 : sum / channels;
        const auto moment =
            moments_about(kept, channels, a.shape.eps, mean, x + channels, y + channels);
        modulate<kStream>(kept, moment, rows, normed, channels);
      });
  if (kStream) stream_end();
}

template <typename T>
void forward(const GatedResidualForward& a, int64_t begin, int64_t end, void* scratch) {
  if (a.shape.stream)
    forward_tokens<T, true>(a, begin, end, scratch);
  else
    forward_tokens<T, false>(a, begin, end, scratch);
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

constexpr NormKind kKind = NormKind::kGated;

const GatedResidualNormRows gated_residual_norm_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
    {backward<float, kKind>, backward<BFloat16, kKind>, backward<Float16, kKind>,
     backward<double, kKind>},
    {reduce<float, kKind>, reduce<BFloat16, kKind>, reduce<Float16, kKind>, reduce<double, kKind>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
