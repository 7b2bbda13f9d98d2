// Adaptive layer norm of single tokens on the CPU, compiled once per instruction set. The formulas
// are in common/norm_rows.h.

#include "cpu/adaln_norm_rows.h"

#include "common/norm_backward_rows.h"
#include "common/norm_rows.h"

namespace clipflow {
namespace {

template <typename T, bool kStream>
void forward_tokens(const AdaLNForward& a, int64_t begin, int64_t end, void* scratch) {
  using One = OneOf<T>;
  const int64_t channels = a.shape.channels;
  const Prepared<One> rows = {static_cast<One*>(scratch),
                              static_cast<One*>(scratch) + padded(channels)};
  for_tokens(
      a.shape.tokens, begin, end,
      [&](int64_t row) { prepare<T>(a.modulation, row, channels, rows); },
      [&](int64_t token) {
        const T* x = static_cast<const T*>(a.x) + token * channels;
        T* y = static_cast<T*>(a.y) + token * channels;
        modulate<kStream>(x, moments(x, a.shape), rows, y, channels);
      });
  if (kStream) stream_end();
}

template <typename T>
void forward(const AdaLNForward& a, int64_t begin, int64_t end, void* scratch) {
  if (a.shape.stream)
    forward_tokens<T, true>(a, begin, end, scratch);
  else
    forward_tokens<T, false>(a, begin, end, scratch);
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

constexpr NormKind kKind = NormKind::kNorm;

const AdaLNNormRows adaln_norm_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
    {backward<float, kKind>, backward<BFloat16, kKind>, backward<Float16, kKind>,
     backward<double, kKind>},
    {reduce<float, kKind>, reduce<BFloat16, kKind>, reduce<Float16, kKind>, reduce<double, kKind>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
