// Gradients of the norms at single tokens, for the files that are compiled once per instruction
// set: of a norm, of one behind a gated residual, h = x + gate * y, and of one behind a normalized
// and gated residual, h = x + gate * yhat. The formulas of the norm are in common/norm_rows.h.
//
//   d_x = d_h + (gradient of the norm),   d_y = d_x * gate, or through the norm of y
//   d_gate = sum over tokens of d_x * y, or d_x * yhat

#pragma once

#include "common/norm_rows.h"

namespace clipflow {
namespace {

enum class NormKind { kNorm, kGated, kSandwich };

template <NormKind kKind>
constexpr int kSums = kKind == NormKind::kNorm ? 2 : 3;

// Tokens whose sums are added one by one, before they go to the sum over the chunk: short chains,
// whose rounding error stays near that of a pairwise sum.
constexpr int64_t kTokensPerSum = 32;

// Rows of scratch: the three sums over some tokens, and what becomes d_x of one token.
template <typename One>
struct BackwardRows {
  One* d_offset;
  One* d_gain;
  One* d_gate;
  One* d_x;
};

template <typename T, NormKind kKind>
CLIPFLOW_INLINE void backward_token(const NormBackward& a, int64_t token, int64_t row,
                                    BackwardRows<OneOf<T>> to) {
  using One = OneOf<T>;
  using Lanes = LanesOf<T>;
  const int64_t channels = a.shape.channels, at = token * channels;
  const T* h = static_cast<const T*>(a.h) + at;
  const T* d_normed = static_cast<const T*>(a.d_normed) + at;
  const T* d_h = a.d_h ? static_cast<const T*>(a.d_h) + at : nullptr;
  const T* y = a.y ? static_cast<const T*>(a.y) + at : nullptr;
  const One* gain = static_cast<const One*>(a.gain) + row * channels;
  const One* gate = a.gate ? static_cast<const One*>(a.gate) + row * channels : nullptr;
  T* d_x = static_cast<T*>(a.d_x) + at;
  T* d_y = a.d_y ? static_cast<T*>(a.d_y) + at : nullptr;

  const auto [mean, rstd] = moments(h, a.shape);
  Lanes sum_g = {}, sum_g_xhat = {};
  for_lanes<Lanes>(channels, [&, mean = mean, rstd = rstd](int64_t d, int64_t count) {
    // Lanes past the end hold 0 in dy and g, but not in xhat, which may be NaN.
    const Lanes dy = load_first(d_normed + d, count);
    const Lanes xhat = (load_first(h + d, count) - mean) * rstd;
    const Lanes g = dy * load_first(gain + d, count);
    store(to.d_x + d, g);  // once, so that rows of one value have a gradient of exactly 0
    sum_g += keep_first(g, count);
    sum_g_xhat += keep_first(g * xhat, count);
    store(to.d_offset + d, load(to.d_offset + d) + dy);
    store(to.d_gain + d, load(to.d_gain + d) + dy * xhat);
  });
  const One mean_g = a.shape.rms ? 0 : add_lanes(sum_g) / channels;
  const One mean_g_xhat = add_lanes(sum_g_xhat) / channels;

  const bool gated = kKind == NormKind::kGated && a.y != nullptr;
  const One rstd_y = kKind == NormKind::kSandwich
                         ? moments_about(y, channels, a.shape.eps, One{0}).rstd : One{1};
  Lanes sum_product = {};
  for_lanes<Lanes>(channels, [&, mean = mean, rstd = rstd](int64_t d, int64_t count) {
    const Lanes xhat = (load_first(h + d, count) - mean) * rstd;
    Lanes d_hidden = (load(to.d_x + d) - mean_g - xhat * mean_g_xhat) * rstd;
    if (kKind != NormKind::kNorm) d_hidden += load_first(d_h + d, count);
    store_first(d_x + d, d_hidden, count);
    if (kKind == NormKind::kSandwich || gated) {
      const Lanes branch = load_first(y + d, count) * rstd_y;
      const Lanes d_branch = d_hidden * load_first(gate + d, count);
      store(to.d_gate + d, load(to.d_gate + d) + d_hidden * branch);
      if (gated) store_first(d_y + d, d_branch, count);
      if (kKind == NormKind::kSandwich) {
        store(to.d_x + d, d_branch);
        sum_product += keep_first(d_branch * branch, count);
      }
    }
  });
  if (kKind != NormKind::kSandwich) return;
  const One mean_product = add_lanes(sum_product) / channels;
  for_lanes<Lanes>(channels, [&](int64_t d, int64_t count) {
    const Lanes branch = load_first(y + d, count) * rstd_y;
    store_first(d_y + d, (load(to.d_x + d) - branch * mean_product) * rstd_y, count);
  });
}

// `sums` of the tokens [begin, end) of chunks.
template <typename T, NormKind kKind>
void backward(const NormBackward& a, int64_t begin, int64_t end, void* scratch) {
  using One = OneOf<T>;
  using Lanes = LanesOf<T>;
  const int64_t channels = a.shape.channels, row_size = padded(channels);
  One* const sums = static_cast<One*>(scratch);
  One* const totals = sums + 4 * row_size;
  const BackwardRows<One> to = {sums, sums + row_size, sums + 2 * row_size, sums + 3 * row_size};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t row = chunk / a.chunks, first = chunk % a.chunks * a.tokens_per_chunk;
    const int64_t left = a.shape.tokens - first;
    const int64_t count = left < a.tokens_per_chunk ? left : a.tokens_per_chunk;
    for (int64_t d = 0; d < 3 * row_size; ++d) sums[d] = totals[d] = 0;
    for (int64_t token = row * a.shape.tokens + first, i = 0; i < count; ++i, ++token) {
      backward_token<T, kKind>(a, token, row, to);
      if ((i + 1) % kTokensPerSum != 0 && i + 1 < count) continue;
      for (int64_t d = 0; d < 3 * row_size; ++d) {
        totals[d] += sums[d];
        sums[d] = 0;
      }
    }
    for (int i = 0; i < kSums<kKind>; ++i) {
      if (a.sums[i] == nullptr) continue;
      const One* from = totals + i * row_size;
      One* whole = static_cast<One*>(a.sums[i]) + row * channels;
      One* part = a.partial ? static_cast<One*>(a.partial) + (chunk * 3 + i) * row_size : nullptr;
      for_lanes<Lanes>(channels, [&](int64_t d, int64_t count) {
        if (part)
          store(part + d, load(from + d));
        else
          store_first(whole + d, load(from + d), count);
      });
    }
  }
}

template <typename T, NormKind kKind>
void reduce(const NormBackward& a, int64_t begin, int64_t end) {
  using One = OneOf<T>;
  using Lanes = LanesOf<T>;
  const int64_t channels = a.shape.channels, row_size = padded(channels);
  for (int64_t row = begin; row < end; ++row) {
    for (int i = 0; i < kSums<kKind>; ++i) {
      if (a.sums[i] == nullptr) continue;
      const One* from = static_cast<const One*>(a.partial) + (row * a.chunks * 3 + i) * row_size;
      One* to = static_cast<One*>(a.sums[i]) + row * channels;
      for_lanes<Lanes>(channels, [&](int64_t d, int64_t count) {
        Lanes sum = {};
        for (int64_t chunk = 0; chunk < a.chunks; ++chunk)
          sum += load(from + chunk * 3 * row_size + d);
        store_first(to + d, sum, count);
      });
    }
  }
}

}  // namespace
}  // namespace clipflow
