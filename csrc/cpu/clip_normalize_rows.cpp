// Normalization of single CLIP tokens on the CPU, compiled once per instruction set.
//
//   p = mean of pool x pool neighboring tokens of x
//   l2:           n = max(|p|, eps),  y = p / n,  d_p = (g - y * sum(g * y)) / n, below eps g / n
//   layer:        y = (p - mean(p)) * r,  d_p = r * (g - mean(g) - y * mean(g * y))
//   standardize:  y = (p - mean[c]) / max(std[c], eps), or its inverse;  d_p = g / s, or g * s
//   d_x = d_p / pool^2 for each of the pooled tokens
//
// A token is summed in one order, whatever the batch and the threads.

#include "cpu/clip_normalize_rows.h"

#include "common/lanes.h"
#include "common/stream_first.h"

namespace clipflow {
namespace {

// Offset in x of the first token of pooled token `token`, and its neighbors row by row.
CLIPFLOW_INLINE int64_t first_token(const ClipNormalize& a, int64_t token) {
  if (a.pool == 1) return token;
  const int64_t pooled_side = a.side / a.pool, pooled_tokens = pooled_side * pooled_side;
  const int64_t sample = token / pooled_tokens, place = token % pooled_tokens;
  return (sample * a.side + place / pooled_side * a.pool) * a.side + place % pooled_side * a.pool;
}

template <typename T, typename One>
CLIPFLOW_INLINE void pool_token(const ClipNormalize& a, int64_t token, One* pooled) {
  using Lanes = typename Wide<T>::Lanes;
  const T* x = static_cast<const T*>(a.x) + first_token(a, token) * a.channels;
  const One neighbors = static_cast<One>(a.pool * a.pool);
  for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
    if (a.pool == 1) return store(pooled + d, load_first(x + d, count));
    Lanes sum = {};
    for (int64_t row = 0; row < a.pool; ++row)
      for (int64_t column = 0; column < a.pool; ++column)
        sum += load_first(x + (row * a.side + column) * a.channels + d, count);
    store(pooled + d, sum / neighbors);
  });
}

template <typename One>
struct Affine {
  One center, factor;  // y = (p - center) * factor
  bool clamped;        // l2 shorter than eps: the length is a constant
};

template <typename Lanes, typename One, typename From>
CLIPFLOW_INLINE Affine<One> statistics(const ClipNormalize& a, const From* p) {
  const One eps = static_cast<One>(a.eps);
  if (a.mode == ClipMode::kL2) {
    const One length = square_root(sum_over<Lanes>(a.channels, [&](int64_t d, int64_t count) {
      const Lanes value = load_first(p + d, count);
      return value * value;
    }));
    const bool clamped = length < eps;  // false for NaN, which must come out
    return {0, 1 / (clamped ? eps : length), clamped};
  }
  const One mean = sum_over<Lanes>(a.channels, [&](int64_t d, int64_t count) {
                     return load_first(p + d, count);
                   }) / a.channels;
  const One variance = sum_over<Lanes>(a.channels, [&](int64_t d, int64_t count) {
                         const Lanes centered = load_first(p + d, count) - mean;
                         return centered * centered;
                       }) / a.channels;
  return {mean, 1 / square_root(variance + eps), false};
}

// max(std, eps); NaN stays NaN.
template <typename Lanes, typename One>
CLIPFLOW_INLINE Lanes spread(const ClipNormalize& a, int64_t d, int64_t count) {
  const Lanes std = load_first(static_cast<const One*>(a.std) + d, count);
  const Lanes least = std - std + static_cast<One>(a.eps);
  return std < least ? least : std;
}

// Below this, dividing by `spread` is not multiplying by its reciprocal, which may be infinite.
constexpr double kLeastSpread = 1e-30;

// max(std, eps), or its reciprocal where that is what is multiplied with.
template <typename Lanes, typename One>
CLIPFLOW_INLINE void fill_factors(const ClipNormalize& a, One* factors) {
  const bool reciprocal = !a.inverse && a.eps >= kLeastSpread;
  for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
    const Lanes value = spread<Lanes, One>(a, d, count);
    store(factors + d, reciprocal ? 1 / value : value);
  });
}

// Calls body(p, mean, factor) for the token `p`, register by register, and stores what it returns.
template <typename T, typename From, typename One, typename F>
CLIPFLOW_INLINE void map_token(const ClipNormalize& a, const From* p, const One* factors, T* y,
                               F body) {
  using Lanes = typename Wide<T>::Lanes;
  const One* mean = static_cast<const One*>(a.mean);
  const bool streamed = a.streamed && can_stream(y);
  for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
    const Lanes value =
        body(load_first(p + d, count), load_first(mean + d, count), load(factors + d));
    stream_first(y + d, value, count, streamed);
  });
}

template <typename T, typename From, typename One>
CLIPFLOW_INLINE void standardize(const ClipNormalize& a, const From* p, const One* factors, T* y) {
  using Lanes = typename Wide<T>::Lanes;
  if (a.inverse)
    map_token(a, p, factors, y, [](Lanes x, Lanes mean, Lanes std) { return x * std + mean; });
  else if (a.eps >= kLeastSpread)
    map_token(a, p, factors, y, [](Lanes x, Lanes mean, Lanes rstd) { return (x - mean) * rstd; });
  else
    map_token(a, p, factors, y, [](Lanes x, Lanes mean, Lanes std) { return (x - mean) / std; });
}

template <typename T, typename From, typename One>
CLIPFLOW_INLINE void normalize(const ClipNormalize& a, const From* p, const One* factors, T* y) {
  using Lanes = typename Wide<T>::Lanes;
  if (a.mode == ClipMode::kStandardize) return standardize(a, p, factors, y);
  const Affine<One> map = statistics<Lanes, One>(a, p);
  const bool streamed = a.streamed && can_stream(y);
  for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
    stream_first(y + d, (load_first(p + d, count) - map.center) * map.factor, count, streamed);
  });
}

template <typename T>
void forward(const ClipNormalize& a, int64_t begin, int64_t end, void* scratch) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  One* p = static_cast<One*>(scratch);
  One* factors = p + (a.channels + 15) / 16 * 16;
  if (a.mode == ClipMode::kStandardize) fill_factors<Lanes>(a, factors);
  for (int64_t token = begin; token < end; ++token) {
    T* y = static_cast<T*>(a.out) + token * a.channels;
    if (a.pool == 1) {
      normalize(a, static_cast<const T*>(a.x) + token * a.channels, factors, y);
    } else {
      pool_token<T>(a, token, p);
      normalize(a, p, factors, y);
    }
  }
  if (a.streamed) stream_end();
}

// The gradient of the pooled token, into `p`, which holds the pooled token itself.
template <typename T, typename One>
CLIPFLOW_INLINE void token_gradient(const ClipNormalize& a, const T* grad, One* p) {
  using Lanes = typename Wide<T>::Lanes;
  if (a.mode == ClipMode::kStandardize) {
    return for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
      const Lanes std = spread<Lanes, One>(a, d, count);
      const Lanes g = load_first(grad + d, count);
      store(p + d, a.inverse ? g * std : g / std);
    });
  }
  const Affine<One> map = statistics<Lanes, One>(a, p);
  const bool layer = a.mode == ClipMode::kLayer;
  const One sum_g = sum_over<Lanes>(a.channels, [&](int64_t d, int64_t count) {
    return load_first(grad + d, count);
  });
  const One sum_g_y = sum_over<Lanes>(a.channels, [&](int64_t d, int64_t count) {
    return load_first(grad + d, count) * ((load_first(p + d, count) - map.center) * map.factor);
  });
  const One mean_g = layer ? sum_g / a.channels : 0;
  const One along = layer ? sum_g_y / a.channels : sum_g_y;
  for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
    const Lanes g = load_first(grad + d, count);
    const Lanes y = (load(p + d) - map.center) * map.factor;
    store(p + d, (map.clamped ? g : g - mean_g - y * along) * map.factor);
  });
}

template <typename T>
void backward(const ClipNormalize& a, int64_t begin, int64_t end, void* scratch) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  One* p = static_cast<One*>(scratch);
  const One neighbors = static_cast<One>(a.pool * a.pool);
  for (int64_t token = begin; token < end; ++token) {
    if (a.mode != ClipMode::kStandardize) pool_token<T>(a, token, p);
    token_gradient(a, static_cast<const T*>(a.grad) + token * a.channels, p);
    T* d_x = static_cast<T*>(a.out) + first_token(a, token) * a.channels;
    for (int64_t row = 0; row < a.pool; ++row)
      for (int64_t column = 0; column < a.pool; ++column) {
        T* to = d_x + (row * a.side + column) * a.channels;
        for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
          store_first(to + d, load(p + d) / neighbors, count);
        });
      }
  }
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const ClipNormalizeRows clip_normalize_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
    {backward<float>, backward<BFloat16>, backward<Float16>, backward<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
