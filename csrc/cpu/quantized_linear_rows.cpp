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
// are multiplied on their own. A row with too many remainders is computed the slow way. In normally
// distributed rows about 3 of 100 fours have a remainder.

#include "cpu/quantized_linear_rows.h"

#include "common/lanes.h"

namespace clipflow {
namespace {

constexpr int64_t kBlockRows = 64;     // rows whose prepared form stays in the L2 cache
constexpr int64_t kBlockGroups = 64;   // groups of one panel that stay in the L1 cache: 16 KiB

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

// ---- Rows: quantize, and make them keep the rules ------------------------------------------

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
  if (row->remainders == a.groups) {
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
  if (row->plain) prepare_plain(a, x, row);
}

#endif

template <typename T>
CLIPFLOW_INLINE void prepare_row(const QuantizedLinear& a, const T* x, PreparedRow* row) {
#if defined(__AVX2__)
  if (!a.dot_products) return prepare_grouped(a, x, row);
#endif
  prepare_plain(a, x, row);
}

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

// ---- Panels: the products ---------------------------------------------------------------------

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
CLIPFLOW_INLINE Vector subtract_8(Vector a, Vector b) { return _mm512_sub_epi8(a, b); }
CLIPFLOW_INLINE Vector halve_8(Vector a) {  // rounds down
  const Vector shifted = _mm512_srli_epi16(_mm512_xor_si512(a, _mm512_set1_epi8(-128)), 1);
  return _mm512_sub_epi8(_mm512_and_si512(shifted, _mm512_set1_epi8(127)), _mm512_set1_epi8(64));
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
CLIPFLOW_INLINE Vector subtract_8(Vector a, Vector b) { return _mm256_sub_epi8(a, b); }
CLIPFLOW_INLINE Vector halve_8(Vector a) {  // rounds down
  const Vector shifted = _mm256_srli_epi16(_mm256_xor_si256(a, _mm256_set1_epi8(-128)), 1);
  return _mm256_sub_epi8(_mm256_and_si256(shifted, _mm256_set1_epi8(127)), _mm256_set1_epi8(64));
}
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
CLIPFLOW_INLINE void multiply_grouped(const uint8_t* weight, const uint8_t* x, int64_t row_bytes,
                                      int64_t begin, int64_t end, int32_t* sums) {
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

// A row of any values: each is halved, so that no product saturates.
void multiply_any(const QuantizedLinear& a, const uint8_t* weight, const uint8_t* x,
                  int32_t* sums) {
  for (int64_t four = 0; four < a.groups * 4; ++four) {
    const Vector q = broadcast(x + four / 4 * kPreparedGroup + 4 + four % 4 * 4);
    const Vector half = halve_8(q), rest = subtract_8(q, half);
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vector w = weight_at(weight, four, v);
      add_to(sums + v * kVectorSums,
             add_32(add_pairs(products(w, half)), add_pairs(products(w, rest))));
    }
  }
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

// Without VNNI. Rows beside each other that keep the rules go through the groups together.
void multiply_panel(const QuantizedLinear& a, const uint8_t* weight, int64_t first, int64_t rows,
                    Sums& sums) {
  __builtin_memset(sums.of, 0, rows * sizeof sums.of[0]);
  for (int64_t begin = 0; begin < a.groups; begin += kBlockGroups) {
    const int64_t end = begin + kBlockGroups < a.groups ? begin + kBlockGroups : a.groups;
    for (int64_t r = 0; r < rows;) {
      int64_t together = 0;
      while (together < kTileRows && r + together < rows && !header(a, first + r + together)->plain)
        ++together;
      const uint8_t* x = groups_of(header(a, first + r));
      if (together == kTileRows) {
        multiply_grouped<kTileRows>(weight, x, a.row_bytes, begin, end, sums.of[r]);
      } else if (together >= 4) {
        multiply_grouped<4>(weight, x, a.row_bytes, begin, end, sums.of[r]);
        together = 4;
      } else if (together >= 1) {
        multiply_grouped<1>(weight, x, a.row_bytes, begin, end, sums.of[r]);
        together = 1;
      }
      r += together > 0 ? together : 1;  // a row that breaks them comes below
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    PreparedRow* row = header(a, first + r);
    if (row->plain)
      multiply_any(a, weight, groups_of(row), sums.of[r]);
    else
      multiply_remainders(remainders_of(a, row), row->remainders, weight, sums.of[r]);
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
  const int64_t block = even_share(a.rows, kBlockRows);
  for (int64_t first = 0; first < a.rows; first += block) {
    const int64_t rows = a.rows - first < block ? a.rows - first : block;
    for (int64_t panel = begin; panel < end; ++panel) {
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
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const QuantizedLinearRows quantized_linear_rows = {
    {prepare<float>, prepare<BFloat16>, prepare<Float16>, prepare_quantized},
    {multiply<float>, multiply<BFloat16>, multiply<Float16>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
