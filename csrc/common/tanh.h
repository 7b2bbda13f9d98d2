// tanh of a register, for the files that are compiled once per instruction set.

#pragma once

#include "common/lanes.h"

namespace clipflow {
namespace {

// Below 0.625 a polynomial that is exact to 1e-9, else 1 - 2 / (exp(2 |x|) + 1): within 2 ulp.
CLIPFLOW_INLINE Floats hyperbolic_tangent(Floats x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: the sum's lowest bits are the integer
  const Bits32 sign = (Bits32)x & 0x80000000u;
  const Floats size = (Floats)((Bits32)x & 0x7fffffffu);
  const Floats z = x * x;
  Floats small = 0.00229274f * z - 0.00834395f;
  small = small * z + 0.02176892f;
  small = small * z - 0.05395926f;
  small = small * z + 0.13333304f;
  small = small * z - 0.33333333f;
  small = size + size * z * small;

  const Floats twice = size > 10.f ? (Floats{} + 20.f) : 2 * size;  // NaN stays NaN
  const Floats shifted = twice * kLog2E + kRounder;
  const Floats whole = shifted - kRounder;
  const Floats rest = twice - whole * kLn2High - whole * kLn2Low;
  Floats power = rest * (1.f / 5040) + (1.f / 720);
  power = power * rest + (1.f / 120);
  power = power * rest + (1.f / 24);
  power = power * rest + (1.f / 6);
  power = power * rest + 0.5f;
  power = power * rest * rest + rest + 1;
  power *= (Floats)(((Bits32)shifted + 127u) << 23);
  const Floats large = 1 - 2 / (power + 1);
  return (Floats)((Bits32)(size < 0.625f ? small : large) | sign);
}

CLIPFLOW_INLINE Doubles hyperbolic_tangent(Doubles x) {
  for (int64_t lane = 0; lane < kLanes<Doubles>; ++lane) x[lane] = __builtin_tanh(x[lane]);
  return x;
}

}  // namespace
}  // namespace clipflow
