// e^x of a register of values.
//
// For files that are compiled once per instruction set, as common/lanes.h says.

#pragma once

#include "common/lanes.h"

namespace clipflow {
namespace {

// `low` where x is below it. One instruction, which GCC does not make of a comparison and a choice.
CLIPFLOW_INLINE Floats at_least(Floats low, Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)low, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)low, (__m256)x);
#else
  return x < low ? low : x;
#endif
}

CLIPFLOW_INLINE Floats at_most(Floats high, Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)high, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)high, (__m256)x);
#else
  return x > high ? high : x;
#endif
}

// e^x within 1 ulp, with the steps of Sleef's expf (u10), which is what PyTorch's vector kernels
// call: with fused multiply-adds, 1 + exp(x) and all that follows have PyTorch's bits. Below
// x = -86 the result is e^-86: use it where that is as good as 0.
//
//   x = n ln 2 + s,  e^x = 2^n (1 + s + s^2 p(s))
CLIPFLOW_INLINE Floats exp_above_minus_86(Floats x) {
  x = at_most(Floats{} + 89.f, at_least(Floats{} - 86.f, x));  // e^89 is infinite; NaN stays NaN
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
