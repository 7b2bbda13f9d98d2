// Norms of single tokens, for the files that are compiled once per instruction set.
//
//   xhat = (x - mean) * rstd; LayerNorm: rstd = 1 / sqrt(var(x) + eps); RMSNorm: mean = 0 and
//   rstd = 1 / sqrt(mean(x * x) + eps);   y = xhat * gain + offset
//   g = d_y * gain,   d_x = rstd * (g - mean(g) - xhat * mean(g * xhat)), RMSNorm without mean(g)
//   d_offset = sum over tokens of d_y,   d_gain = sum over tokens of d_y * xhat
//
// Passes over a row that stays in the L1 cache: mean, then centered squares, then the result. A row
// is summed in one order, whatever the batch and the threads.

#pragma once

#include "common/lanes.h"
#include "common/norm_call.h"
#include "common/stream.h"

namespace clipflow {
namespace {

template <typename One>
struct Moments {
  One mean, rstd;
};

template <typename T>
using OneOf = typename Wide<T>::One;
template <typename T>
using LanesOf = typename Wide<T>::Lanes;

// The rows of a sample, in the wide type and padded.
template <typename One>
struct Prepared {
  One* gain;
  One* offset;
};

// Meanwhile asks for the rows that come next: their first pass would wait for memory.
template <typename T, typename... Next>
CLIPFLOW_INLINE Moments<OneOf<T>> moments_about(const T* x, int64_t channels, double eps,
                                                OneOf<T> mean, const Next*... next) {
  using One = OneOf<T>;
  const One variance = sum_over<LanesOf<T>>(channels, [&](int64_t d, int64_t count) {
                         (__builtin_prefetch(next + d), ...);
                         const LanesOf<T> centered = load_first(x + d, count) - mean;
                         return centered * centered;
                       }) / channels;
  return {mean, 1 / square_root(variance + static_cast<One>(eps))};
}

template <typename T>
CLIPFLOW_INLINE Moments<OneOf<T>> moments(const T* x, const NormShape& shape) {
  OneOf<T> mean = 0;
  if (!shape.rms)
    mean = sum_over<LanesOf<T>>(shape.channels, [&](int64_t d, int64_t count) {
             return load_first(x + d, count);
           }) / shape.channels;
  return moments_about(x, shape.channels, shape.eps, mean, x + shape.channels);
}

// Gain and offset of one row of modulation.
template <typename T>
void prepare(const Modulation& m, int64_t row, int64_t channels, Prepared<OneOf<T>> to) {
  using Lanes = LanesOf<T>;
  const T* scale = static_cast<const T*>(m.scale) + row * m.scale_stride;
  const T* shift = m.shift ? static_cast<const T*>(m.shift) + row * m.shift_stride : nullptr;
  const T* weight = static_cast<const T*>(m.weight);
  const T* table = static_cast<const T*>(m.table);
  for_lanes<Lanes>(channels, [&](int64_t d, int64_t count) {
    Lanes gain = load_first(scale + d, count) + 1, offset = {};
    if (shift) offset = load_first(shift + d, count);
    if (table) {
      offset += load_first(table + d, count);
      gain += load_first(table + m.table_stride + d, count);
    }
    if (weight) gain *= load_first(weight + d, count);
    store(to.gain + d, gain);
    store(to.offset + d, offset);
  });
}

// Calls body(token) for tokens in [begin, end), after prepare(row) for each row of modulation.
template <typename P, typename F>
CLIPFLOW_INLINE void for_tokens(int64_t tokens, int64_t begin, int64_t end, P prepare_row, F body) {
  for (int64_t token = begin; token < end;) {
    const int64_t row = token / tokens;
    prepare_row(row);
    const int64_t last = (row + 1) * tokens < end ? (row + 1) * tokens : end;
    for (; token < last; ++token) body(token);
  }
}

template <bool kStream, typename T>
CLIPFLOW_INLINE void put(T* to, LanesOf<T> value, int64_t count) {
  if (kStream)
    stream(to, value);  // rows that are streamed are whole registers
  else
    store_first(to, value, count);
}

// `value` as a T holds it.
CLIPFLOW_INLINE Floats rounded(const float*, Floats value) { return value; }
CLIPFLOW_INLINE Doubles rounded(const double*, Doubles value) { return value; }
CLIPFLOW_INLINE Floats rounded(const BFloat16*, Floats value) {
  return widen_bfloat16(narrow_bfloat16(value));
}
CLIPFLOW_INLINE Floats rounded(const Float16*, Floats value) {
  return widen_float16(narrow_float16(value));
}

// Where a row of the stream is kept for the norm: in `h` itself, if it can be read back from there.
template <bool kStream, typename T>
CLIPFLOW_INLINE OneOf<T>* kept_row(T* h, OneOf<T>* scratch) {
  if constexpr (sizeof(T) == sizeof(OneOf<T>) && !kStream)
    return h;
  else
    return scratch;
}

// Stores a row's `value` at `d` of `h`, and of `kept` if that is another row.
template <bool kStream, typename T>
CLIPFLOW_INLINE void keep(T* h, OneOf<T>* kept, int64_t d, LanesOf<T> value, int64_t count) {
  put<kStream>(h + d, value, count);
  if constexpr (sizeof(T) != sizeof(OneOf<T>) || kStream) store(kept + d, value);
}

template <bool kStream, typename From, typename T>
CLIPFLOW_INLINE void modulate(const From* x, Moments<OneOf<T>> moment, Prepared<OneOf<T>> to, T* y,
                              int64_t channels) {
  for_lanes<LanesOf<T>>(channels, [&](int64_t d, int64_t count) {
    const auto xhat = (load_first(x + d, count) - moment.mean) * moment.rstd;
    put<kStream>(y + d, xhat * load(to.gain + d) + load(to.offset + d), count);
  });
}

}  // namespace
}  // namespace clipflow
