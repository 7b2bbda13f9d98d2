// Normalization and rotation of single tokens' heads on the CPU, compiled per instruction set.
//
//   n = (x - mean) * rstd * weight + bias,   y_i = n_i cos - n_j sin,   y_j = n_j cos + n_i sin
//
// A group, which is a head or all heads of a token, stays in the L1 cache between its sums and its
// rotation. It is summed in one order, whatever the batch and the threads.

#include "cpu/qk_norm_rope_rows.h"

#include "common/lanes.h"
#include "common/stream.h"

namespace clipflow {
namespace {

template <typename T, bool kStreamed>
CLIPFLOW_INLINE void put(T* to, typename Wide<T>::Lanes value, int64_t count) {
  if (kStreamed && count == kLanes<typename Wide<T>::Lanes>)
    stream(to, value);
  else
    store_first(to, value, count);
}

// Values of a float32 table in the type that is computed in.
CLIPFLOW_INLINE Floats table(const float* from, int64_t count, Floats) {
  return load_first(from, count);
}
CLIPFLOW_INLINE Doubles table(const float* from, int64_t count, Doubles) {
  Doubles value = {};
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
}

CLIPFLOW_INLINE Floats swap_neighbors(Floats x) {
  Bits32 order;
  for (uint32_t lane = 0; lane < kLanes<Floats>; ++lane) order[lane] = lane ^ 1;
  return __builtin_shuffle(x, order);
}
CLIPFLOW_INLINE Doubles swap_neighbors(Doubles x) {
  for (int64_t lane = 0; lane < kLanes<Doubles>; lane += 2) {
    const double first = x[lane];
    x[lane] = x[lane + 1];
    x[lane + 1] = first;
  }
  return x;
}

template <typename T>
struct Moments {
  typename Wide<T>::One mean, rstd;
};

template <typename T>
CLIPFLOW_INLINE Moments<T> moments(const T* x, int64_t count, QKNorm norm, double eps) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  if (norm == QKNorm::kNone) return {0, 1};
  One mean = 0;
  if (norm == QKNorm::kLayer)
    mean = sum_over<Lanes>(count, [&](int64_t d, int64_t lanes) {
             return load_first(x + d, lanes);
           }) / count;
  const One square = sum_over<Lanes>(count, [&](int64_t d, int64_t lanes) {
                       const Lanes centered = load_first(x + d, lanes) - mean;
                       return centered * centered;
                     }) / count;
  return {mean, 1 / square_root(square + static_cast<One>(eps))};
}

// What heads of all tokens share, in the type that is computed in.
template <typename T>
struct Affine {
  using One = typename Wide<T>::One;
  One *weight, *bias;  // [group]

  CLIPFLOW_INLINE Affine make(const QKSide& side, int64_t group, One* scratch) {
    const Affine affine = {scratch, scratch + group};
    const T* weight = static_cast<const T*>(side.weight);
    const T* bias = static_cast<const T*>(side.bias);
    using Lanes = typename Wide<T>::Lanes;
    for_lanes<Lanes>(group, [&](int64_t d, int64_t count) {
      store_first(affine.weight + d, weight ? load_first(weight + d, count) : Lanes{} + 1, count);
      store_first(affine.bias + d, bias ? load_first(bias + d, count) : Lanes{}, count);
    });
    return affine;
  }
};

enum class Turn { kNone, kHalves, kNeighbors };

// One head. `cos` and `sin` are of its token: [K] where neighbors turn, with each angle twice and
// the first sine of a pair negated.
template <typename T, Turn kTurn, bool kStreamed>
CLIPFLOW_INLINE void head(const T* x, T* y, Moments<T> moment, const typename Wide<T>::One* weight,
                          const typename Wide<T>::One* bias, const float* cos, const float* sin,
                          const typename Wide<T>::One* both_cos,
                          const typename Wide<T>::One* both_sin, int64_t width) {
  using Lanes = typename Wide<T>::Lanes;
  const auto mean = moment.mean, rstd = moment.rstd;
  const auto normed = [&](int64_t d, int64_t count) {
    const Lanes xhat = (load_first(x + d, count) - mean) * rstd;
    return xhat * load_first(weight + d, count) + load_first(bias + d, count);
  };
  if (kTurn == Turn::kHalves) {
    const int64_t half = width / 2;
    for_lanes<Lanes>(half, [&](int64_t d, int64_t count) {
      const Lanes i = normed(d, count), j = normed(d + half, count);
      const Lanes c = table(cos + d, count, Lanes{}), s = table(sin + d, count, Lanes{});
      put<T, kStreamed>(y + d, i * c - j * s, count);
      put<T, kStreamed>(y + d + half, j * c + i * s, count);
    });
  } else {
    for_lanes<Lanes>(width, [&](int64_t d, int64_t count) {
      Lanes value = normed(d, count);
      if (kTurn == Turn::kNeighbors)
        value = value * load_first(both_cos + d, count) +
                swap_neighbors(value) * load_first(both_sin + d, count);
      put<T, kStreamed>(y + d, value, count);
    });
  }
}

template <typename T, Turn kTurn, bool kStreamed>
CLIPFLOW_INLINE void tokens(const QKNormRope& call, const QKSide& side, int64_t begin, int64_t end,
                            typename Wide<T>::One* scratch) {
  using One = typename Wide<T>::One;
  const int64_t width = call.width, half = width / 2;
  const int64_t group = call.across_heads ? side.heads * width : width;
  const Affine<T> affine = Affine<T>::make(side, group, scratch);
  One* both_cos = scratch + 2 * group;
  One* both_sin = both_cos + width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / side.tokens, token = row - sample * side.tokens;
    const T* x = static_cast<const T*>(side.x) + sample * side.sample_stride +
                 token * side.token_stride;
    T* y = static_cast<T*>(side.y) + row * side.heads * width;
    const float* cos = side.cos + token * half;
    const float* sin = side.sin + token * half;
    if (kTurn == Turn::kNeighbors)
      for (int64_t m = 0; m < half; ++m) {
        both_cos[2 * m] = both_cos[2 * m + 1] = cos[m];
        both_sin[2 * m] = -static_cast<One>(sin[m]);
        both_sin[2 * m + 1] = sin[m];
      }
    Moments<T> moment = {0, 1};
    if (call.across_heads) moment = moments(x, group, call.norm, call.eps);
    for (int64_t h = 0; h < side.heads; ++h, x += side.head_stride, y += width) {
      if (!call.across_heads) moment = moments(x, width, call.norm, call.eps);
      const int64_t at = call.across_heads ? h * width : 0;
      head<T, kTurn, kStreamed>(x, y, moment, affine.weight + at, affine.bias + at, cos, sin,
                                both_cos, both_sin, width);
    }
  }
}

template <typename T, bool kStreamed>
void turned(const QKNormRope& call, int which, int64_t begin, int64_t end, void* scratch) {
  const QKSide& side = call.sides[which];
  auto* wide = static_cast<typename Wide<T>::One*>(scratch);
  if (side.cos == nullptr)
    tokens<T, Turn::kNone, kStreamed>(call, side, begin, end, wide);
  else if (call.interleaved)
    tokens<T, Turn::kNeighbors, kStreamed>(call, side, begin, end, wide);
  else
    tokens<T, Turn::kHalves, kStreamed>(call, side, begin, end, wide);
  if (kStreamed) stream_end();
}

template <typename T>
void forward(const QKNormRope& call, int which, int64_t begin, int64_t end, void* scratch) {
  if (call.streamed)
    turned<T, true>(call, which, begin, end, scratch);
  else
    turned<T, false>(call, which, begin, end, scratch);
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const QKNormRopeRows qk_norm_rope_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
