// Linear layer in int8 for rows and panels of 16 output channels on the CPU, compiled once per
// instruction set.
//
//   y[m, n] = sum over k of q[m, k] * w[n, k], exactly, * row scale * channel scale + bias
//
// With VNNI, four products are added to a 32-bit sum in one instruction, which takes w + 128 (0 to
// 255) and q; 128 * sum(q) is subtracted at the end.
//
// Without, the instruction is maddubs: w0 * q0 + w1 * q1 in 16 bits, saturated. Widening each sum
// to 32 bits costs as much as the product, so four of them are added in 16 bits first, modulo 2^16:
// per group of 16 input channels and per half (channels 0, 1 and 2, 3 of each four). This is exact
// where two things hold:
//   - no product saturates: |q0 + q1| <= 128, for w + 128 <= 255 and 255 * 128 < 2^15;
//   - the true sum of w * q over the eight channels fits into 16 bits, as follows from Cauchy and
//     Schwarz: sum of q^2 <= limits = 32767^2 / max over n of the sum of w^2.
// The sums start from -128 * sum(q), so that they end as sums of w * q. Fours of a row that break a
// rule are split into parts that keep it, one in place, the others in a list of remainders, which
// are multiplied on their own. In a row with too many of them, every product is widened instead. In
// normally distributed rows about 3 of 100 fours have a remainder.

#include "cpu/quantized_linear_rows.h"

#include "common/lanes.h"
#include "cpu/quantized_linear_prepare.h"

namespace clipflow {
namespace {

constexpr int64_t kBlockGroups = 64;  // groups of one panel that stay in the L1 cache: 16 KiB

template <typename T>
void prepare(const QuantizedLinear& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + (a.first + row) * a.K;
    header(a, row)->scale = scale_of(x, a.K);
    prepare_row(a, x, header(a, row));
  }
}

void prepare_quantized(const QuantizedLinear& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    header(a, row)->scale = a.x_scales[a.first + row];
    prepare_row(a, static_cast<const int8_t*>(a.x) + (a.first + row) * a.K, header(a, row));
  }
}

// Sums of one panel for the rows of a block, in 32 bits.
struct Sums {
  alignas(64) int32_t of[kBlockRows][kPanel];
};

#if defined(__AVX2__)

#if defined(__AVX512F__)
using Vector = __m512i;
CLIPFLOW_INLINE Vector products(Vector w, Vector q) { return _mm512_maddubs_epi16(w, q); }
CLIPFLOW_INLINE Vector add_16(Vector a, Vector b) { return _mm512_add_epi16(a, b); }
CLIPFLOW_INLINE Vector add_32(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
CLIPFLOW_INLINE Vector add_pairs(Vector a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
CLIPFLOW_INLINE Vector magnitude(Vector a) { return _mm512_abs_epi8(a); }
CLIPFLOW_INLINE Vector flip_top_bit(Vector a) {
  return _mm512_xor_si512(a, _mm512_set1_epi8(-128));
}
// a * sign(b); b may be 0 only where the result does not matter.
CLIPFLOW_INLINE Vector with_sign(Vector a, Vector b) {
  return _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(b), _mm512_setzero_si512(), a);
}
CLIPFLOW_INLINE Vector broadcast(const void* four) {
  return _mm512_set1_epi32(load_raw<int32_t>(four));
}
#else
using Vector = __m256i;
CLIPFLOW_INLINE Vector products(Vector w, Vector q) { return _mm256_maddubs_epi16(w, q); }
CLIPFLOW_INLINE Vector add_16(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
CLIPFLOW_INLINE Vector add_32(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
CLIPFLOW_INLINE Vector add_pairs(Vector a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
CLIPFLOW_INLINE Vector magnitude(Vector a) { return _mm256_abs_epi8(a); }
CLIPFLOW_INLINE Vector flip_top_bit(Vector a) {
  return _mm256_xor_si256(a, _mm256_set1_epi8(-128));
}
CLIPFLOW_INLINE Vector with_sign(Vector a, Vector b) { return _mm256_sign_epi8(a, b); }
CLIPFLOW_INLINE Vector broadcast(const void* four) {
  return _mm256_set1_epi32(load_raw<int32_t>(four));
}
#endif

constexpr int64_t kVectors = kPanel * 4 / sizeof(Vector);  // that hold four k of a panel
constexpr int64_t kVectorSums = sizeof(Vector) / 4;

CLIPFLOW_INLINE Vector weight_at(const uint8_t* weight, int64_t four, int64_t v) {
  return load_raw<Vector>(weight + four * kPanel * 4 + v * sizeof(Vector));
}

CLIPFLOW_INLINE void add_to(int32_t* sums, Vector value) {
  value = add_32(load_raw<Vector>(sums), value);
  __builtin_memcpy(sums, &value, sizeof value);
}

// GCC would turn sums into trees that need more registers than there are.
CLIPFLOW_INLINE void keep_order(Vector& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#else
  asm("" : "+x"(value));
#endif
}

// Groups [begin, end) of rows that keep the rules.
template <int64_t kRows>
void multiply_grouped(const uint8_t* weight, const uint8_t* x, int64_t row_bytes, int64_t begin,
                      int64_t end, int32_t* sums) {
  for (int64_t g = begin; g < end; ++g) {
    Vector w[4][kVectors];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t v = 0; v < kVectors; ++v) w[i][v] = weight_at(weight, 4 * g + i, v);
    const uint8_t* from = x + g * kPreparedGroup;
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r, from += row_bytes) {
      Vector sum[kVectors];
      const Vector start = broadcast(from);
      for (int64_t v = 0; v < kVectors; ++v) sum[v] = start;
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const Vector q = broadcast(from + 4 + 4 * i);
        for (int64_t v = 0; v < kVectors; ++v) {
          sum[v] = add_16(sum[v], products(w[i][v], q));
          keep_order(sum[v]);
        }
      }
      for (int64_t v = 0; v < kVectors; ++v)
        add_to(sums + r * kPanel + v * kVectorSums, add_pairs(sum[v]));
    }
  }
}

// All groups of rows of any values: |q| * (w * sign(q)), two of which fit into 16 bits.
template <int64_t kRows>
void multiply_any(const uint8_t* weight, const uint8_t* x, int64_t row_bytes, int64_t groups,
                  int32_t* sums) {
  Vector sum[kRows][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g, x += kPreparedGroup) {
    for (int64_t i = 0; i < 4; ++i) {
      Vector w[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) w[v] = flip_top_bit(weight_at(weight, 4 * g + i, v));
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        const Vector q = broadcast(x + r * row_bytes + 4 + 4 * i), size = magnitude(q);
        for (int64_t v = 0; v < kVectors; ++v)
          sum[r][v] = add_32(sum[r][v], add_pairs(products(size, with_sign(w[v], q))));
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) __builtin_memcpy(sums + r * kPanel, sum[r], sizeof sum[r]);
}

void multiply_remainders(const Remainder* remainders, int64_t count, const uint8_t* weight,
                         int32_t* sums) {
  if (count == 0) return;
  Vector sum[kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vector q = broadcast(remainders[i].values);
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vector w = weight_at(weight, remainders[i].four, v);
      sum[v] = add_32(sum[v], add_pairs(products(w, q)));
    }
  }
  for (int64_t v = 0; v < kVectors; ++v) add_to(sums + v * kVectorSums, sum[v]);
}

// How many rows from `row` on, of `left`, are as plain as it is: 8, 4 or 1.
CLIPFLOW_INLINE int64_t alike(const QuantizedLinear& a, int64_t row, int64_t left) {
  const int32_t plain = header(a, row)->plain;
  int64_t count = 1;
  while (count < kTileRows && count < left && header(a, row + count)->plain == plain) ++count;
  return count == kTileRows ? count : count >= 4 ? 4 : 1;
}

// Without VNNI.
void multiply_panel(const QuantizedLinear& a, const uint8_t* weight, int64_t first, int64_t rows,
                    Sums& sums) {
  __builtin_memset(sums.of, 0, rows * sizeof sums.of[0]);
  for (int64_t begin = 0; begin < a.groups; begin += kBlockGroups) {
    const int64_t end = begin + kBlockGroups < a.groups ? begin + kBlockGroups : a.groups;
    for (int64_t r = 0, count; r < rows; r += count) {
      count = alike(a, first + r, rows - r);
      PreparedRow* row = header(a, first + r);
      if (row->plain) continue;
      const auto kernel = count == kTileRows ? multiply_grouped<kTileRows>
                          : count == 4       ? multiply_grouped<4>
                                             : multiply_grouped<1>;
      kernel(weight, groups_of(row), a.row_bytes, begin, end, sums.of[r]);
    }
  }
  for (int64_t r = 0; r < rows;) {
    PreparedRow* row = header(a, first + r);
    if (!row->plain) {
      multiply_remainders(remainders_of(a, row), row->remainders, weight, sums.of[r]);
      ++r;
    } else if (alike(a, first + r, rows - r) >= 4) {
      multiply_any<4>(weight, groups_of(row), a.row_bytes, a.groups, sums.of[r]);
      r += 4;
    } else {
      multiply_any<1>(weight, groups_of(row), a.row_bytes, a.groups, sums.of[r]);
      ++r;
    }
  }
}

#if defined(__AVX512F__)
#define CLIPFLOW_VNNI __attribute__((target("avx512vnni")))
#define CLIPFLOW_DOT _mm512_dpbusd_epi32
constexpr int64_t kDotRows = 12;
#else
#define CLIPFLOW_VNNI __attribute__((target("avxvnni")))
#define CLIPFLOW_DOT _mm256_dpbusd_avx_epi32
constexpr int64_t kDotRows = 6;
#endif

// All groups of kRows rows, with VNNI.
template <int64_t kRows>
CLIPFLOW_VNNI void multiply_dot(const uint8_t* weight, const uint8_t* x, int64_t row_bytes,
                                int64_t groups, int32_t* sums) {
  Vector sum[kRows][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g, x += kPreparedGroup) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      Vector w[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) w[v] = weight_at(weight, 4 * g + i, v);
#pragma GCC unroll 12
      for (int64_t r = 0; r < kRows; ++r) {
        const Vector q = broadcast(x + r * row_bytes + 4 + 4 * i);
        for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = CLIPFLOW_DOT(sum[r][v], w[v], q);
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) __builtin_memcpy(sums + r * kPanel, sum[r], sizeof sum[r]);
}

CLIPFLOW_VNNI void multiply_panel_dot(const QuantizedLinear& a, const uint8_t* weight,
                                      int64_t first, int64_t rows, Sums& sums) {
  for (int64_t r = 0; r < rows;) {
    const uint8_t* x = groups_of(header(a, first + r));
    const int64_t left = rows - r;
    if (left >= kDotRows) {
      multiply_dot<kDotRows>(weight, x, a.row_bytes, a.groups, sums.of[r]);
      r += kDotRows;
    } else if (left >= 4) {
      multiply_dot<4>(weight, x, a.row_bytes, a.groups, sums.of[r]);
      r += 4;
    } else {
      multiply_dot<1>(weight, x, a.row_bytes, a.groups, sums.of[r]);
      r += 1;
    }
  }
}

#else

// Any processor: the compiler's own vectors.
void multiply_panel(const QuantizedLinear& a, const uint8_t* weight, int64_t first, int64_t rows,
                    Sums& sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* x = groups_of(header(a, first + r));
    int32_t sum[kPanel] = {};
    for (int64_t four = 0; four < a.groups * 4; ++four) {
      const auto* q =
          reinterpret_cast<const int8_t*>(x + four / 4 * kPreparedGroup + 4 + four % 4 * 4);
      const uint8_t* w = weight + four * kPanel * 4;
      for (int64_t n = 0; n < kPanel; ++n)
        for (int64_t i = 0; i < 4; ++i) sum[n] += w[4 * n + i] * q[i];
    }
    __builtin_memcpy(sums.of[r], sum, sizeof sum);
  }
}

#endif

// y = sum * row scale * channel scale + bias, of one row and one panel.
template <typename T>
CLIPFLOW_INLINE void finish(const QuantizedLinear& a, const PreparedRow* row, const int32_t* sums,
                            int64_t first_channel, T* y) {
  const int64_t channels = a.N - first_channel < kPanel ? a.N - first_channel : kPanel;
  for_lanes<Floats>(channels, [&](int64_t n, int64_t in_use) {
    const Ints sum = load_raw<Ints>(sums + n) + row->correction;
    Floats value = __builtin_convertvector(sum, Floats) * row->scale;
    value *= load_first(a.scales + first_channel + n, in_use);
    if (a.bias != nullptr) value += load_first(a.bias + first_channel + n, in_use);
    store_first(y + first_channel + n, value, in_use);
  });
}

template <typename T>
void multiply(const QuantizedLinear& a, int64_t begin, int64_t end) {
  Sums sums;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / a.panels * a.block_rows, panel = item % a.panels;
    const int64_t rows = a.rows - first < a.block_rows ? a.rows - first : a.block_rows;
    const uint8_t* weight = a.weight + panel * a.groups * kGroup * kPanel;
#if defined(__AVX2__)
    if (a.dot_products)
      multiply_panel_dot(a, weight, first, rows, sums);
    else
#endif
      multiply_panel(a, weight, first, rows, sums);
    for (int64_t r = 0; r < rows; ++r) {
      T* y = static_cast<T*>(a.y) + (a.first + first + r) * a.N;
      finish(a, header(a, first + r), sums.of[r], panel * kPanel, y);
    }
  }
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const QuantizedLinearRows quantized_linear_rows = {
    {prepare<float>, prepare<BFloat16>, prepare<Float16>, prepare_quantized},
    {multiply<float>, multiply<BFloat16>, multiply<Float16>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
