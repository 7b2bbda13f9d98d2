// Adaptive layer norm of single tokens on the CPU, compiled once per instruction set.
//
//   xhat = (x - mean(x)) / sqrt(var(x) + eps),   y = xhat * (1 + scale) + shift
//   g = grad * (1 + scale),   d_x = rstd * (g - mean(g) - xhat * mean(g * xhat))
//   d_shift = sum over tokens of grad,   d_scale = sum over tokens of grad * xhat
//
// Two passes over a row that stays in the L1 cache: mean, then centered squares. A row is summed in
// one order, whatever the batch and the threads.

#include "cpu/adaln_norm_rows.h"

#include "common/lanes.h"

namespace clipflow {
namespace {

template <typename T>
struct Moments {
  typename Wide<T>::One mean, rstd;
};

template <typename T>
CLIPFLOW_INLINE Moments<T> moments(const T* x, int64_t channels, double eps) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  const One mean = sum_over<Lanes>(channels, [&](int64_t d, int64_t count) {
                     return load_first(x + d, count);
                   }) / channels;
  const One variance = sum_over<Lanes>(channels, [&](int64_t d, int64_t count) {
                         const Lanes centered = load_first(x + d, count) - mean;
                         return centered * centered;
                       }) / channels;
  return {mean, 1 / square_root(variance + static_cast<One>(eps))};
}

template <typename T>
void forward(const AdaLNForward& a, int64_t begin, int64_t end) {
  using Lanes = typename Wide<T>::Lanes;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t sample = token / a.tokens;
    const T* x = static_cast<const T*>(a.x) + token * a.channels;
    const T* shift = static_cast<const T*>(a.shift) + sample * a.shift_stride;
    const T* scale = static_cast<const T*>(a.scale) + sample * a.scale_stride;
    T* y = static_cast<T*>(a.y) + token * a.channels;
    const auto [mean, rstd] = moments(x, a.channels, a.eps);
    for_lanes<Lanes>(a.channels, [&, mean = mean, rstd = rstd](int64_t d, int64_t count) {
      const Lanes xhat = (load_first(x + d, count) - mean) * rstd;
      const Lanes gain = load_first(scale + d, count) + 1;
      store_first(y + d, xhat * gain + load_first(shift + d, count), count);
    });
  }
}

template <typename T>
void backward(const AdaLNBackward& a, int64_t begin, int64_t end) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / a.chunks;
    const int64_t first = chunk % a.chunks * a.tokens_per_chunk;
    const int64_t left = a.tokens - first;
    const int64_t last = first + (left < a.tokens_per_chunk ? left : a.tokens_per_chunk);
    const T* scale = static_cast<const T*>(a.scale) + sample * a.scale_stride;
    One* d_shift = static_cast<One*>(a.partial) + chunk * 2 * a.padded_channels;
    One* d_scale = d_shift + a.padded_channels;
    for (int64_t token = sample * a.tokens + first; token < sample * a.tokens + last; ++token) {
      const T* x = static_cast<const T*>(a.x) + token * a.channels;
      const T* grad = static_cast<const T*>(a.grad) + token * a.channels;
      T* d_x = static_cast<T*>(a.d_x) + token * a.channels;
      const auto moment = moments(x, a.channels, a.eps);
      const One mean = moment.mean, rstd = moment.rstd;
      Lanes sum_g = {}, sum_g_xhat = {};
      for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
        // Lanes past the end hold 0 in dy and g, but not in xhat, which may be NaN.
        const Lanes dy = load_first(grad + d, count);
        const Lanes xhat = (load_first(x + d, count) - mean) * rstd;
        const Lanes g = dy * (load_first(scale + d, count) + 1);
        sum_g += keep_first(g, count);
        sum_g_xhat += keep_first(g * xhat, count);
        store(d_shift + d, load(d_shift + d) + dy);
        store(d_scale + d, load(d_scale + d) + dy * xhat);
      });
      const One mean_g = add_lanes(sum_g) / a.channels;
      const One mean_g_xhat = add_lanes(sum_g_xhat) / a.channels;
      for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
        const Lanes xhat = (load_first(x + d, count) - mean) * rstd;
        const Lanes g = load_first(grad + d, count) * (load_first(scale + d, count) + 1);
        store_first(d_x + d, (g - mean_g - xhat * mean_g_xhat) * rstd, count);
      });
    }
  }
}

template <typename T>
void reduce(const AdaLNBackward& a, int64_t begin, int64_t end) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  for (int64_t sample = begin; sample < end; ++sample) {
    const One* partial = static_cast<One*>(a.partial) + sample * a.chunks * 2 * a.padded_channels;
    T* d_shift = static_cast<T*>(a.d_shift) + sample * a.channels;
    T* d_scale = static_cast<T*>(a.d_scale) + sample * a.channels;
    for_lanes<Lanes>(a.channels, [&](int64_t d, int64_t count) {
      Lanes sum_shift = {}, sum_scale = {};
      for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
        const One* row = partial + chunk * 2 * a.padded_channels + d;
        sum_shift += load(row);
        sum_scale += load(row + a.padded_channels);
      }
      store_first(d_shift + d, sum_shift, count);
      store_first(d_scale + d, sum_scale, count);
    });
  }
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const AdaLNNormRows adaln_norm_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
    {backward<float>, backward<BFloat16>, backward<Float16>, backward<double>},
    {reduce<float>, reduce<BFloat16>, reduce<Float16>, reduce<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
