// The exponential function of one register of values, in two steps.
//
//   e^x = 2^n e^r,   n = round(x / ln 2),   |r| <= ln(2) / 2,   e^r = 1 + r + r^2 P(r)
//
// P is the polynomial of least largest relative error: 3e-9 in float32, whose half ulp is 6e-8.
// The result is within 1.5 ulp; below the second smallest exponent it is 0; infinities and NaN are
// those of exp(). Who needs many calls each step in a loop of its own: the chain of operations is
// long, and a processor looks ahead over too few of them to work on more than three chains.

#pragma once

#include "common/lanes.h"

#if defined(CLIPFLOW_X86)
#include <immintrin.h>
#endif

namespace clipflow {
namespace {

// x between `least` and `most`; NaN stays NaN. GCC 12 makes two instructions of each comparison.
CLIPFLOW_INLINE Floats between(Floats least, Floats x, Floats most) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)least, _mm512_min_ps((__m512)most, (__m512)x));
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)least, _mm256_min_ps((__m256)most, (__m256)x));
#elif defined(CLIPFLOW_X86)
  return (Floats)_mm_max_ps((__m128)least, _mm_min_ps((__m128)most, (__m128)x));
#else
  x = x > most ? most : x;
  return x < least ? least : x;
#endif
}

CLIPFLOW_INLINE Doubles between(Doubles least, Doubles x, Doubles most) {
  x = x > most ? most : x;
  return x < least ? least : x;
}

template <typename V>
struct Power {
  V r;
  V half_scale;  // 2^(n - 1): 2^n could be too large for a result that is not
};

CLIPFLOW_INLINE Power<Floats> power_of(Floats x) {
  // e^89 is infinite; e^-87.4 is 0 here, as are all results below 2^-125.5.
  x = between(Floats{} - 87.4f, x, Floats{} + 89.0f);
  // A sum this large has no bits for a fraction: it is rounded, and its last bits are n + 126.
  const Floats shifted = x * 0x1.715476p+0f + (0x1.8p23f + 126);
  const Floats n = shifted - (0x1.8p23f + 126);
  // ln 2 in two parts, the first so short that its product with n is exact.
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  return {r, (Floats)((Bits32)shifted << 23)};
}

CLIPFLOW_INLINE Floats exponential(Power<Floats> power) {
  const Floats r = power.r, r2 = r * r;
  const Floats low = 0x1.fffffcp-1f + r * 0x1.555492p-2f;
  const Floats high = (0x1.5558b0p-4f + r * 0x1.12398ap-6f) + r2 * 0x1.6a4d14p-9f;
  return ((2.0f + 2.0f * r) + r2 * (low + r2 * high)) * power.half_scale;
}

CLIPFLOW_INLINE Power<Doubles> power_of(Doubles x) {
  using Bits64 = uint64_t __attribute__((vector_size(kRegisterBytes)));
  x = between(Doubles{} - 708.5, x, Doubles{} + 710.0);
  const Doubles shifted = x * 0x1.71547652b82fep+0 + (0x1.8p52 + 1022);
  const Doubles n = shifted - (0x1.8p52 + 1022);
  const Doubles r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  return {r, (Doubles)((Bits64)shifted << 52)};
}

CLIPFLOW_INLINE Doubles exponential(Power<Doubles> power) {
  // 2 / k!: the first term left out is 4e-18 of the result.
  constexpr double kTerms[] = {2.0 / 6227020800, 2.0 / 479001600, 2.0 / 39916800, 2.0 / 3628800,
                               2.0 / 362880,     2.0 / 40320,     2.0 / 5040,     2.0 / 720,
                               2.0 / 120,        2.0 / 24,        2.0 / 6,        1.0};
  const Doubles r = power.r;
  Doubles sum = {};
  for (const double term : kTerms) sum = term + r * sum;
  return (2.0 + (2.0 * r + r * r * sum)) * power.half_scale;
}

}  // namespace
}  // namespace clipflow
