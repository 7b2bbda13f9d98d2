// Stores that go past the caches, for outputs too large to stay there: memory is then written
// without having been read first. For files that are compiled once per instruction set.

#pragma once

#include <cstdint>

#include "common/lanes.h"

#if defined(CLIPFLOW_X86)
#include <immintrin.h>
#endif

namespace clipflow {
namespace {

// Whether `to` is a place that stream() can write to.
template <typename T>
CLIPFLOW_INLINE bool can_stream(const T* to) {
  constexpr uint64_t kBytes = kLanes<typename Wide<T>::Lanes> * sizeof(T);
  return reinterpret_cast<uint64_t>(to) % kBytes == 0;
}

CLIPFLOW_INLINE void stream_raw(void* to, const void* from, int64_t bytes) {
#if defined(__AVX512F__)
  if (bytes == 64) return _mm512_stream_si512((__m512i*)to, load_raw<__m512i>(from));
#endif
#if defined(__AVX__)
  if (bytes == 32) return _mm256_stream_si256((__m256i*)to, load_raw<__m256i>(from));
#endif
#if defined(CLIPFLOW_X86)
  if (bytes == 16) return _mm_stream_si128((__m128i*)to, load_raw<__m128i>(from));
  if (bytes == 8) return _mm_stream_si64((long long*)to, load_raw<long long>(from));
#endif
  __builtin_memcpy(to, from, bytes);
}

CLIPFLOW_INLINE void stream(float* to, Floats value) { stream_raw(to, &value, sizeof value); }
CLIPFLOW_INLINE void stream(double* to, Doubles value) { stream_raw(to, &value, sizeof value); }
CLIPFLOW_INLINE void stream(BFloat16* to, Floats value) {
  const Bits16 bits = narrow_bfloat16(value);
  stream_raw(to, &bits, sizeof bits);
}
CLIPFLOW_INLINE void stream(Float16* to, Floats value) {
  const Bits16 bits = narrow_float16(value);
  stream_raw(to, &bits, sizeof bits);
}

// The first `count` values, as store_first().
template <typename T>
CLIPFLOW_INLINE void store_or_stream(T* to, typename Wide<T>::Lanes value, int64_t count,
                                     bool streamed) {
  if (streamed && count == kLanes<typename Wide<T>::Lanes>)
    stream(to, value);
  else
    store_first(to, value, count);
}

// Streamed values are seen by other threads after this.
CLIPFLOW_INLINE void finish_streams() {
#if defined(CLIPFLOW_X86)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace clipflow
