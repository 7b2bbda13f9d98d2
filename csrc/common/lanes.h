// One register of values at a time, in the instruction set that a file is compiled for.
//
// Files that include this are compiled once per instruction set (CMakeLists.txt). Everything here
// and in them therefore has internal linkage: a function with external linkage, such as an inline
// one of the standard library, could be merged by the linker into its AVX-512 version and then be
// called on a machine without AVX-512.

#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace clipflow {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

// Vectors no wider than a register: GCC keeps wider ones in memory, which was 4x slower on AVX2.
using Bits16 = uint16_t __attribute__((vector_size(kRegisterBytes / 2)));
using Bits32 = uint32_t __attribute__((vector_size(kRegisterBytes)));
using Floats = float __attribute__((vector_size(kRegisterBytes)));
using Doubles = double __attribute__((vector_size(kRegisterBytes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type a dtype is computed in: one value, and as many as a register holds.
template <typename T>
struct Wide {
  using One = float;
  using Lanes = Floats;
};
template <>
struct Wide<double> {
  using One = double;
  using Lanes = Doubles;
};

template <typename V>
constexpr int64_t kLanes = sizeof(V) / sizeof(V{}[0]);

#define CLIPFLOW_INLINE static inline __attribute__((always_inline))

// GCC 12 makes five instructions of this conversion where AVX2 has one.
CLIPFLOW_INLINE Bits32 widen_bits(Bits16 half) {
#if defined(__AVX512F__)
  return (Bits32)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(__AVX2__)
  return (Bits32)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Bits32);
#endif
}

// A bf16 value is the upper half of a float32.
CLIPFLOW_INLINE Floats widen_bfloat16(Bits16 half) { return (Floats)(widen_bits(half) << 16); }

// Round to nearest, ties to even, as PyTorch does.
CLIPFLOW_INLINE Bits16 narrow_bfloat16(Floats value) {
  const Bits32 bits = (Bits32)value;
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 quiet_nan = (bits >> 16 & 0x8000u) | 0x7fc0u;
  return __builtin_convertvector(value != value ? quiet_nan : rounded, Bits16);
}

#if defined(__AVX512F__)
CLIPFLOW_INLINE Floats widen_float16(Bits16 half) { return (Floats)_mm512_cvtph_ps((__m256i)half); }
CLIPFLOW_INLINE Bits16 narrow_float16(Floats value) {
  return (Bits16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
CLIPFLOW_INLINE Floats widen_float16(Bits16 half) { return (Floats)_mm256_cvtph_ps((__m128i)half); }
CLIPFLOW_INLINE Bits16 narrow_float16(Floats value) {
  return (Bits16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Shift the exponent into place; infinities and NaNs take the largest exponent, and subnormals are
// made normal by a subtraction.
CLIPFLOW_INLINE Floats widen_float16(Bits16 half) {
  const Bits32 bits = widen_bits(half);
  const Bits32 magnitude = (bits & 0x7fffu) << 13;
  const Bits32 exponent = magnitude & (0x7c00u << 13);
  const Bits32 normal = magnitude + (112u << 23);
  const Bits32 special = normal + (112u << 23);
  const Bits32 subnormal = (Bits32)((Floats)(normal + (1u << 23)) - 0x1p-14f);
  const Bits32 finite = exponent == 0u ? subnormal : normal;
  return (Floats)((exponent == (0x7c00u << 13) ? special : finite) | ((bits & 0x8000u) << 16));
}

// Round to nearest, ties to even, as PyTorch does. Adding 0.5 lets the adder round subnormals.
CLIPFLOW_INLINE Bits16 narrow_float16(Floats value) {
  const Bits32 bits = (Bits32)value;
  const Bits32 magnitude = bits & 0x7fffffffu;
  const Bits32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits32 subnormal = (Bits32)((Floats)magnitude + 0.5f) - (126u << 23);
  const Bits32 finite = magnitude < (113u << 23) ? subnormal : normal;
  const Bits32 infinity = magnitude - magnitude + 0x7c00u;
  const Bits32 special = magnitude > 0x7f800000u ? infinity + 0x200u : infinity;
  const Bits32 result = magnitude >= (143u << 23) ? special : finite;
  return __builtin_convertvector(result | (bits >> 16 & 0x8000u), Bits16);
}
#endif

template <typename V>
CLIPFLOW_INLINE V load_raw(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

CLIPFLOW_INLINE Floats load(const float* from) { return load_raw<Floats>(from); }
CLIPFLOW_INLINE Doubles load(const double* from) { return load_raw<Doubles>(from); }
CLIPFLOW_INLINE Floats load(const BFloat16* from) {
  return widen_bfloat16(load_raw<Bits16>(from));
}
CLIPFLOW_INLINE Floats load(const Float16* from) { return widen_float16(load_raw<Bits16>(from)); }

CLIPFLOW_INLINE void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }
CLIPFLOW_INLINE void store(double* to, Doubles value) {
  __builtin_memcpy(to, &value, sizeof value);
}
CLIPFLOW_INLINE void store(BFloat16* to, Floats value) {
  const Bits16 bits = narrow_bfloat16(value);
  __builtin_memcpy(to, &bits, sizeof bits);
}
CLIPFLOW_INLINE void store(Float16* to, Floats value) {
  const Bits16 bits = narrow_float16(value);
  __builtin_memcpy(to, &bits, sizeof bits);
}

// The first `count` values, fewer than a register holds; the other lanes are 0.
template <typename T>
CLIPFLOW_INLINE typename Wide<T>::Lanes load_part(const T* from, int64_t count) {
  T padded[kLanes<typename Wide<T>::Lanes>] = {};
  for (int64_t lane = 0; lane < count; ++lane) padded[lane] = from[lane];
  return load(padded);
}

template <typename T>
CLIPFLOW_INLINE void store_part(T* to, typename Wide<T>::Lanes value, int64_t count) {
  T padded[kLanes<typename Wide<T>::Lanes>];
  store(padded, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = padded[lane];
}

// The first `count` values; where `count` is the constant kLanes, the test is compiled out.
template <typename T>
CLIPFLOW_INLINE typename Wide<T>::Lanes load_first(const T* from, int64_t count) {
  return count == kLanes<typename Wide<T>::Lanes> ? load(from) : load_part(from, count);
}

template <typename T>
CLIPFLOW_INLINE void store_first(T* to, typename Wide<T>::Lanes value, int64_t count) {
  if (count == kLanes<typename Wide<T>::Lanes>)
    store(to, value);
  else
    store_part(to, value, count);
}

// `value` in the first `count` lanes, 0 in the others.
template <typename V>
CLIPFLOW_INLINE V keep_first(V value, int64_t count) {
  for (int64_t lane = count; lane < kLanes<V>; ++lane) value[lane] = 0;
  return value;
}

template <typename V>
CLIPFLOW_INLINE auto add_lanes(V value) {
  for (int64_t half = kLanes<V> / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) value[lane] += value[lane + half];
  return value[0];
}

// Calls body(d, lanes in use) for d = 0, kLanes, 2 * kLanes, ... below `count`.
template <typename V, typename F>
CLIPFLOW_INLINE void for_lanes(int64_t count, F body) {
  int64_t d = 0;
  for (; d + kLanes<V> <= count; d += kLanes<V>) body(d, kLanes<V>);
  if (d < count) body(d, count - d);
}

// Sum over d in [0, count) of term(d, lanes in use), in one fixed order: four registers of running
// sums, short chains whose rounding error stays near that of a pairwise sum.
template <typename V, typename F>
CLIPFLOW_INLINE auto sum_over(int64_t count, F term) {
  constexpr int64_t kStep = kLanes<V>;
  V sum_0 = {}, sum_1 = {}, sum_2 = {}, sum_3 = {};
  int64_t d = 0;
  for (; d + 4 * kStep <= count; d += 4 * kStep) {
    sum_0 += term(d, kStep);
    sum_1 += term(d + kStep, kStep);
    sum_2 += term(d + 2 * kStep, kStep);
    sum_3 += term(d + 3 * kStep, kStep);
  }
  for (; d + kStep <= count; d += kStep) sum_0 += term(d, kStep);
  if (d < count) sum_1 += keep_first<V>(term(d, count - d), count - d);
  return add_lanes<V>((sum_0 + sum_1) + (sum_2 + sum_3));
}

CLIPFLOW_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
CLIPFLOW_INLINE double square_root(double value) { return __builtin_sqrt(value); }

}  // namespace
}  // namespace clipflow
