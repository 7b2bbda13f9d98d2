// Stores past the caches, for outputs that are too large to be found there later: a plain store
// first reads the line that it overwrites.
//
// For files that are compiled once per instruction set, as common/lanes.h says.

#pragma once

#include "common/lanes.h"

#if defined(CLIPFLOW_X86)
#include <emmintrin.h>
#endif

namespace clipflow {
namespace {

// As `store`, of a whole register; `to` must be aligned to as many bytes as are written.
CLIPFLOW_INLINE void stream(float* to, Floats value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)value);
#elif defined(CLIPFLOW_X86)
  _mm_stream_ps(to, (__m128)value);
#else
  store(to, value);
#endif
}

CLIPFLOW_INLINE void stream(double* to, Doubles value) {
#if defined(__AVX512F__)
  _mm512_stream_pd(to, (__m512d)value);
#elif defined(__AVX2__)
  _mm256_stream_pd(to, (__m256d)value);
#elif defined(CLIPFLOW_X86)
  _mm_stream_pd(to, (__m128d)value);
#else
  store(to, value);
#endif
}

CLIPFLOW_INLINE void stream_bits(uint16_t* to, Bits16 bits) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)to, (__m256i)bits);
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)to, (__m128i)bits);
#else
  __builtin_memcpy(to, &bits, sizeof bits);
#endif
}

CLIPFLOW_INLINE void stream(BFloat16* to, Floats value) {
  stream_bits(&to->bits, narrow_bfloat16(value));
}
CLIPFLOW_INLINE void stream(Float16* to, Floats value) {
  stream_bits(&to->bits, narrow_float16(value));
}

// What was streamed is seen by other threads, as what was stored is. To be called by each thread.
CLIPFLOW_INLINE void stream_end() {
#if defined(CLIPFLOW_X86)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace clipflow
