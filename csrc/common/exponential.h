// e^x of a register of values.
//
// For files that are compiled once per instruction set, as common/lanes.h says.

#pragma once

#include "common/lanes.h"

namespace clipflow {
namespace {

// e^x within 1 ulp, with the steps of Sleef's expf (u10), which is what PyTorch's vector kernels
// call: with fused multiply-adds, 1 + exp(x) and all that follows have PyTorch's bits. Below
// x = -86 the result is e^-86: use it where that is as good as 0.
//
//   x = n ln 2 + s,  e^x = 2^n (1 + s + s^2 p(s))
CLIPFLOW_INLINE Floats exp_above_minus_86(Floats x) {
  x = x < -86.f ? Floats{} - 86.f : x;
  x = x > 89.f ? Floats{} + 89.f : x;  // e^89 is infinite
  const Floats shifter = Floats{} + 0x1.8p23f;  // floats near it are whole numbers
  const Floats shifted = x * 1.442695040888963407f + shifter;
  const Floats n = shifted - shifter;
  const Floats s = (x - n * 0.693145751953125f) - n * 1.428606765330187045e-06f;
  Floats p = s * 0.000198527617612853646278381f + 0.00139304355252534151077271f;
  p = p * s + 0.00833336077630519866943359f;
  p = p * s + 0.0416664853692054748535156f;
  p = p * s + 0.166666671633720397949219f;
  p = p * s + 0.5f;
  const Floats mantissa = (s * s) * p + s + 1.f;
  // n - 1 in the exponent: for n = 128, 2^n does not exist. NaN keeps its mantissa.
  const Floats half_power = (Floats)(((Bits32)shifted + 126u) << 23);
  return (mantissa + mantissa) * half_power;
}

CLIPFLOW_INLINE Doubles exp_above_minus_86(Doubles x) {
  for (int64_t lane = 0; lane < kLanes<Doubles>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

}  // namespace
}  // namespace clipflow
