// The exponential function of one register of values.
//
//   e^x = 2^n e^r,   n = round(x / ln 2),   |r| <= ln(2) / 2,   e^r = 1 + r + r^2 P(r)
//
// P is a polynomial for the least largest relative error: 3e-9 in float32, whose half ulp is 6e-8.
// The result is within 1 ulp; subnormals are rounded once, infinities and NaN are those of exp().

#pragma once

#include "common/lanes.h"

namespace clipflow {
namespace {

CLIPFLOW_INLINE Floats exponential(Floats x) {
  using Ints = int32_t __attribute__((vector_size(kRegisterBytes)));
  // Beyond these the result is infinity or 0; comparisons with NaN are false and let it through.
  const Floats most = Floats{} + 89.0f, least = Floats{} - 104.0f;
  x = x > most ? most : x;
  x = x < least ? least : x;
  // Adding 1.5 * 2^23 leaves no bits for the fraction: the sum is rounded, its last bits are n.
  const Floats shifted = x * 0x1.715476p+0f + 0x1.8p23f;
  const Floats n = shifted - 0x1.8p23f;
  // ln 2 in two parts, the first so short that its product with n is exact.
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Floats tail = 0x1.12398ap-7f + r * 0x1.6a4d14p-10f;
  tail = 0x1.5558b0p-5f + r * tail;
  tail = 0x1.555492p-3f + r * tail;
  tail = 0x1.fffffcp-2f + r * tail;
  const Floats power = 1.0f + (r + r * r * tail);
  // 2^n in two factors: n reaches from -150 to 128, beyond the exponents that a factor can have.
  const Ints exponent = (Ints)shifted - 0x4b400000;
  const Ints half = exponent >> 1;
  return power * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
}

CLIPFLOW_INLINE Doubles exponential(Doubles x) {
  using Ints = int64_t __attribute__((vector_size(kRegisterBytes)));
  const Doubles most = Doubles{} + 710.0, least = Doubles{} - 746.0;
  x = x > most ? most : x;
  x = x < least ? least : x;
  const Doubles shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  const Doubles n = shifted - 0x1.8p52;
  const Doubles r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  // 1 / k!: the first term left out is 4e-18 of the result.
  Doubles tail = 1.0 / 479001600 + r * (1.0 / 6227020800);
  tail = 1.0 / 39916800 + r * tail;
  tail = 1.0 / 3628800 + r * tail;
  tail = 1.0 / 362880 + r * tail;
  tail = 1.0 / 40320 + r * tail;
  tail = 1.0 / 5040 + r * tail;
  tail = 1.0 / 720 + r * tail;
  tail = 1.0 / 120 + r * tail;
  tail = 1.0 / 24 + r * tail;
  tail = 1.0 / 6 + r * tail;
  tail = 0.5 + r * tail;
  const Doubles power = 1.0 + (r + r * r * tail);
  const Ints exponent = (Ints)shifted - 0x4338000000000000;
  const Ints half = exponent >> 1;
  return power * (Doubles)((half + 1023) << 52) * (Doubles)((exponent - half + 1023) << 52);
}

}  // namespace
}  // namespace clipflow
