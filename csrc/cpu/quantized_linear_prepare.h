// Rows of quantized_linear_rows.cpp: quantize them, and make them keep the rules that its products
// in 16 bits need; the rules are written there. Compiled once per instruction set.

#pragma once

#include "common/lanes.h"
#include "cpu/quantized_linear_rows.h"

namespace clipflow {
namespace {

using Ints = int32_t __attribute__((vector_size(kRegisterBytes)));
using Bytes = int8_t __attribute__((vector_size(kRegisterBytes / 4)));

struct Remainder {
  int32_t four;
  int8_t values[4];
};

CLIPFLOW_INLINE PreparedRow* header(const QuantizedLinear& a, int64_t row) {
  return reinterpret_cast<PreparedRow*>(a.prepared + row * a.row_bytes);
}
CLIPFLOW_INLINE uint8_t* groups_of(PreparedRow* row) {
  return reinterpret_cast<uint8_t*>(row + 1);
}
CLIPFLOW_INLINE Remainder* remainders_of(const QuantizedLinear& a, PreparedRow* row) {
  return reinterpret_cast<Remainder*>(groups_of(row) + a.groups * kPreparedGroup);
}

// Largest |x| over 127; NaN if a value is not finite.
template <typename T>
CLIPFLOW_INLINE float scale_of(const T* x, int64_t count) {
  Floats most = {}, finite = {};
  for_lanes<Floats>(count, [&](int64_t d, int64_t in_use) {
    const Floats value = load_first(x + d, in_use);
    const Floats size = value < 0.0f ? -value : value;
    most = size > most ? size : most;
    finite += value - value;  // NaN for NaN and infinity
  });
  float largest = add_lanes(finite);
  if (largest != largest) return largest;
  for (int64_t lane = 0; lane < kLanes<Floats>; ++lane)
    largest = most[lane] > largest ? most[lane] : largest;
  const float scale = largest / 127.0f;
  return scale > 0x1p-126f ? scale : 0x1p-126f;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// GCC 12 narrows to bytes one value at a time.
CLIPFLOW_INLINE void store_bytes(Ints low, Ints high, int8_t* to) {
  __m256i both = _mm256_packs_epi32((__m256i)low, (__m256i)high);
  both = _mm256_permute4x64_epi64(both, 0b11011000);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  __builtin_memcpy(to, &bytes, sizeof bytes);
}
#endif

// Values [d, d + 16) of a row, quantized, half to even; 0 past its end.
template <typename T>
CLIPFLOW_INLINE void quantize_group(const T* x, int64_t d, int64_t count, float scale, int8_t* q) {
  constexpr int64_t kParts = kGroup / kLanes<Floats>;
  Ints parts[kParts];
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t first = d + part * kLanes<Floats>, left = count - first;
    const int64_t in_use = left < 0 ? 0 : left < kLanes<Floats> ? left : kLanes<Floats>;
    // The last bits of the sum are the rounded quotient.
    const Floats sum = load_first(x + first, in_use) / scale + 0x1.8p23f;
    parts[part] = (Ints)sum - 0x4b400000;
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  store_bytes(parts[0], parts[1], q);
#else
  for (int64_t part = 0; part < kParts; ++part) {
    const Bytes bytes = __builtin_convertvector(parts[part], Bytes);
    __builtin_memcpy(q + part * kLanes<Floats>, &bytes, sizeof bytes);
  }
#endif
}

CLIPFLOW_INLINE void quantize_group(const int8_t* x, int64_t d, int64_t count, float, int8_t* q) {
  const int64_t in_use = count - d;
  if (in_use >= kGroup) {
    __builtin_memcpy(q, x + d, kGroup);
    return;
  }
  for (int64_t i = 0; i < kGroup; ++i) q[i] = i < in_use ? x[d + i] : 0;
}

CLIPFLOW_INLINE int32_t sum_of(const int8_t* values, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

template <typename T>
void prepare_plain(const QuantizedLinear& a, const T* x, PreparedRow* row) {
  uint8_t* to = groups_of(row);
  int32_t sum = 0;
  for (int64_t g = 0; g < a.groups; ++g, to += kPreparedGroup) {
    int8_t q[kGroup];
    quantize_group(x, g * kGroup, a.K, row->scale, q);
    sum += sum_of(q, kGroup);
    __builtin_memcpy(to + 4, q, kGroup);
  }
  row->correction = -128 * sum;
  row->remainders = 0;
  row->plain = 1;
}

#if defined(__AVX2__)

CLIPFLOW_INLINE void add_remainder(const QuantizedLinear& a, PreparedRow* row, int64_t four,
                                   const int8_t* values) {
  if (row->remainders == most_remainders(a.groups)) {
    row->plain = 1;
    return;
  }
  Remainder* to = remainders_of(a, row) + row->remainders++;
  to->four = static_cast<int32_t>(four);
  __builtin_memcpy(to->values, values, 4);
  row->correction -= 128 * sum_of(values, 4);
}

// Take out of a group what breaks the rules.
void split_group(const QuantizedLinear& a, PreparedRow* row, int64_t group, int8_t* q) {
  for (int64_t i = 0; i < 4; ++i) {
    int8_t* four = q + 4 * i;
    const int32_t sums[2] = {four[0] + four[1], four[2] + four[3]};
    if (sums[0] * sums[0] <= 128 * 128 && sums[1] * sums[1] <= 128 * 128) continue;
    int8_t rest[4];
    for (int64_t j = 0; j < 4; ++j) {
      const int8_t half = static_cast<int8_t>(four[j] >> 1);
      rest[j] = static_cast<int8_t>(four[j] - half);
      four[j] = half;
    }
    add_remainder(a, row, 4 * group + i, rest);
  }
  for (int64_t half = 0; half < 2; ++half) {
    while (true) {
      int32_t total = 0, most = 0;
      int64_t largest = 0;
      for (int64_t i = 0; i < 4; ++i) {
        const int8_t* pair = q + 4 * i + 2 * half;
        const int32_t squares = pair[0] * pair[0] + pair[1] * pair[1];
        total += squares;
        if (squares > most) {
          most = squares;
          largest = i;
        }
      }
      if (total <= a.limits[2 * group + half]) break;
      add_remainder(a, row, 4 * group + largest, q + 4 * largest);
      for (int64_t j = 0; j < 4; ++j) q[4 * largest + j] = 0;
    }
  }
}

// Sums of neighbors, in 16 bits: [four][half].
CLIPFLOW_INLINE __m128i pair_sums(__m128i values) {
  return _mm_maddubs_epi16(_mm_set1_epi8(1), values);
}

CLIPFLOW_INLINE bool keeps_rules(const int8_t* q, const int32_t* limits) {
  const __m128i values = load_raw<__m128i>(q);
  const __m128i sums = _mm_abs_epi16(pair_sums(values));
  const __m256i wide = _mm256_cvtepi8_epi16(values);
  const __m256i squares = _mm256_madd_epi16(wide, wide);
  __m128i total =
      _mm_add_epi32(_mm256_castsi256_si128(squares), _mm256_extracti128_si256(squares, 1));
  total = _mm_add_epi32(total, _mm_unpackhi_epi64(total, total));
  const __m128i most = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(limits));
  const __m128i broken = _mm_or_si128(_mm_cmpgt_epi16(sums, _mm_set1_epi16(128)),
                                      _mm_move_epi64(_mm_cmpgt_epi32(total, most)));
  return _mm_testz_si128(broken, broken);
}

template <typename T>
CLIPFLOW_INLINE void prepare_grouped(const QuantizedLinear& a, const T* x, PreparedRow* row) {
  row->correction = row->remainders = row->plain = 0;
  uint8_t* to = groups_of(row);
  for (int64_t g = 0; g < a.groups; ++g, to += kPreparedGroup) {
    alignas(16) int8_t q[kGroup];
    quantize_group(x, g * kGroup, a.K, row->scale, q);
    if (__builtin_expect(!keeps_rules(q, a.limits + 2 * g), 0)) split_group(a, row, g, q);
    __m128i sums = pair_sums(load_raw<__m128i>(q));
    sums = _mm_add_epi16(sums, _mm_srli_si128(sums, 8));
    sums = _mm_add_epi16(sums, _mm_srli_si128(sums, 4));
    const int32_t start =
        _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(sums, 7)));
    __builtin_memcpy(to, &start, 4);
    __builtin_memcpy(to + 4, q, kGroup);
  }
  if (!row->plain) return;
  prepare_plain(a, x, row);
  row->correction = 0;  // multiply_any takes w, not w + 128
}

#endif

template <typename T>
CLIPFLOW_INLINE void prepare_row(const QuantizedLinear& a, const T* x, PreparedRow* row) {
#if defined(__AVX2__)
  if (!a.dot_products) return prepare_grouped(a, x, row);
#endif
  prepare_plain(a, x, row);
}

}  // namespace
}  // namespace clipflow
