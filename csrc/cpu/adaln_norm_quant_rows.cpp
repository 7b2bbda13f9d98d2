// Adaptive layer norm to 8 bits of single tokens on the CPU, compiled once per instruction set.
//
//   y = xhat * gain + offset, as common/norm_rows.h
//   scale = max |y| / 127,   value = round(y / scale), half to even

#include "cpu/adaln_norm_quant_rows.h"

#include "common/norm_rows.h"

namespace clipflow {
namespace {

using Bits8 = uint8_t __attribute__((vector_size(kRegisterBytes / 4)));
using Signed32 = int32_t __attribute__((vector_size(kRegisterBytes)));

constexpr float kMost = 127;
constexpr float kLeastScale = 0x1p-126f;
constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: the sum's lowest bits are the integer

// Stores `value` and returns the bits of |value|, as integers: they are in the order of the values,
// NaN after infinity.
CLIPFLOW_INLINE Signed32 keep_row(float* to, Floats value) {
  store(to, value);
  return (Signed32)value & 0x7fffffff;
}
CLIPFLOW_INLINE Signed32 keep_row(float* to, Doubles value) {
  Floats narrow = {};
  for (int64_t lane = 0; lane < kLanes<Doubles>; ++lane)
    to[lane] = narrow[lane] = static_cast<float>(value[lane]);
  return (Signed32)narrow & 0x7fffffff;
}

// The scale of a row whose largest |value| has the bits `largest`.
CLIPFLOW_INLINE float scale_of(Signed32 bits) {
  int32_t largest = 0;
  for (int64_t lane = 0; lane < kLanes<Floats>; ++lane)
    largest = bits[lane] > largest ? bits[lane] : largest;
  if (largest >= 0x7f800000) return __builtin_nanf("");
  float size;
  __builtin_memcpy(&size, &largest, sizeof size);
  const float scale = size / kMost;
  return scale > kLeastScale ? scale : kLeastScale;
}

// GCC 12 makes many instructions of this conversion.
CLIPFLOW_INLINE Bits8 narrow_bits(Signed32 value) {
#if defined(__AVX512F__)
  return (Bits8)_mm512_cvtepi32_epi8((__m512i)value);
#elif defined(__AVX2__)
  const __m256i whole = (__m256i)value;
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                       _mm256_extracti128_si256(whole, 1));
  const __m128i bytes = _mm_packs_epi16(half, half);
  return load_raw<Bits8>(&bytes);
#else
  return __builtin_convertvector(value, Bits8);
#endif
}

CLIPFLOW_INLINE void store_rounded(int8_t* to, Floats value, int64_t count) {
  const Floats shifted = value + kRounder;
  const Bits8 bits = narrow_bits((Signed32)shifted - 0x4b400000);
  if (count == kLanes<Floats>) {
    __builtin_memcpy(to, &bits, sizeof bits);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = static_cast<int8_t>(bits[lane]);
  }
}

template <typename T>
void forward(const AdaLNQuant& a, int64_t begin, int64_t end, void* scratch) {
  using One = OneOf<T>;
  const int64_t channels = a.shape.channels, row_size = padded(channels);
  One* const gain = static_cast<One*>(scratch);
  const Prepared<One> rows = {gain, gain + row_size};
  float* const row = reinterpret_cast<float*>(gain + 2 * row_size);
  for_tokens(
      a.shape.tokens, begin, end,
      [&](int64_t sample) { prepare<T>(a.modulation, sample, channels, rows); },
      [&](int64_t token) {
        const T* x = static_cast<const T*>(a.x) + token * channels;
        int8_t* values = a.values + token * channels;
        const auto [mean, rstd] = moments(x, a.shape);
        Signed32 largest = {};
        for_lanes<LanesOf<T>>(channels, [&, mean = mean, rstd = rstd](int64_t d, int64_t count) {
          const auto xhat = (load_first(x + d, count) - mean) * rstd;
          const auto y = xhat * load(rows.gain + d) + load(rows.offset + d);
          const Signed32 bits = keep_row(row + d, keep_first(y, count));
          largest = bits > largest ? bits : largest;
        });
        const float scale = scale_of(largest), inverse = 1 / scale;
        for_lanes<Floats>(channels, [&](int64_t d, int64_t count) {
          store_rounded(values + d, load_first(row + d, count) * inverse, count);
        });
        a.scales[token] = scale;
      });
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const AdaLNNormQuantRows adaln_norm_quant_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
