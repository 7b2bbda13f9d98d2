// Normalization of CLIP features on CUDA, forward and backward; the op is defined in
// clipflow/ops/clip_normalize.py.
//
//   p = mean of pool x pool neighboring tokens of x
//   l2:           n = max(|p|, eps),  y = p / n,  d_p = (g - y * sum(g * y)) / n, below eps g / n
//   layer:        y = (p - mean(p)) * r,  d_p = r * (g - mean(g) - y * mean(g * y))
//   standardize:  y = (p - mean[c]) / max(std[c], eps), or its inverse;  d_p = g / s, or g * s
//   d_x = d_p / pool^2 for each of the pooled tokens
//
// Source: BLIP3-o (2025), section 3, diffuses pooled CLIP features; UniLIP (2025) standardizes
// them. Bytes moved: forward reads x and writes y; backward reads grad and x (not for standardize)
// and writes d_x. A token is summed in one order, whatever the batch.

#include <cmath>
#include <optional>

#include "common/cuda_launch.h"
#include "common/dispatch.cuh"
#include "common/row_forms.cuh"
#include "common/tensor.h"

namespace clipflow {
namespace {

enum Mode { kL2, kLayer, kStandardize };

template <typename T>
struct Call {
  static constexpr int kHeld = kVectorChannels, kScalars = 8;
  const T *x, *grad;  // grad: of the backward only
  const float *mean, *std;
  T* out;          // y, or d_x
  int64_t tokens;  // pooled ones
  int64_t side;    // of the grid of x
  int64_t channels;
  int pool, mode;
  float eps;
  bool inverse;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const;
  void long_rows() const;
};

// The token of x where the square of pooled token `token` begins.
template <typename T>
__device__ __forceinline__ int64_t first_token(const Call<T>& a, int64_t token) {
  if (a.pool == 1) return token;
  const int64_t pooled_side = a.side / a.pool, pooled_tokens = pooled_side * pooled_side;
  const int64_t sample = token / pooled_tokens, place = token % pooled_tokens;
  return (sample * a.side + place / pooled_side * a.pool) * a.side + place % pooled_side * a.pool;
}

// Elements from the first token of a square to its token number k.
template <typename T>
__device__ __forceinline__ int64_t neighbor(const Call<T>& a, int k) {
  return (k / a.pool * a.side + k % a.pool) * a.channels;
}

struct Affine {
  float center, factor;  // y = (p - center) * factor
  bool clamped;          // l2 shorter than eps: the length is a constant
};

template <typename T, typename Row, typename P>
__device__ __forceinline__ Affine statistics(const Call<T>& a, const Row& row, const P& p,
                                             TeamSums& sums) {
  if (a.mode == kL2) {
    const float length = sqrtf(row_sum(row, sums, [&](Place at) { return p(at) * p(at); }));
    const bool clamped = length < a.eps;  // false for NaN, which must come out
    return {0.f, 1.f / (clamped ? a.eps : length), clamped};
  }
  const float mean = row_sum(row, sums, [&](Place at) { return p(at); }) / a.channels;
  const float squares = row_sum(row, sums, [&](Place at) {
    const float centered = p(at) - mean;
    return centered * centered;
  });
  return {mean, rsqrtf(squares / a.channels + a.eps), false};
}

// max(std, eps); NaN stays NaN.
__device__ __forceinline__ float spread(float std, float eps) { return std < eps ? eps : std; }

template <typename T, typename Row>
__device__ __forceinline__ void forward_token(const Call<T>& a, const Row& row, int64_t token,
                                              TeamSums& sums) {
  const T* x = a.x + first_token(a, token) * a.channels;
  T* y = a.out + token * a.channels;
  const int count = a.pool * a.pool;
  const auto p = row.sum_of_rows(count, 1.f / count, [&](int k) { return x + neighbor(a, k); });
  if (a.mode == kStandardize) {
    const auto mean = row.load(a.mean), std = row.load(a.std);
    row.store(y, [&](Place at) {
      const float s = spread(std(at), a.eps);
      return a.inverse ? p(at) * s + mean(at) : __fdividef(p(at) - mean(at), s);
    });
  } else {
    const Affine map = statistics(a, row, p, sums);
    row.store(y, [&](Place at) { return (p(at) - map.center) * map.factor; });
  }
}

template <typename T, typename Row>
__device__ __forceinline__ void backward_token(const Call<T>& a, const Row& row, int64_t token,
                                               TeamSums& sums) {
  const int64_t first = first_token(a, token) * a.channels;
  const T* x = a.x + first;
  T* d_x = a.out + first;
  const int count = a.pool * a.pool;
  const float share = 1.f / count;
  const auto g = row.load(a.grad + token * a.channels);
  const auto store = [&](auto d_p) {
    for (int k = 0; k < count; ++k) row.store(d_x + neighbor(a, k), d_p);
  };
  if (a.mode == kStandardize) {
    const auto std = row.load(a.std);
    return store([&](Place at) {
      const float s = spread(std(at), a.eps);
      return (a.inverse ? g(at) * s : __fdividef(g(at), s)) * share;
    });
  }
  const auto p = row.sum_of_rows(count, share, [&](int k) { return x + neighbor(a, k); });
  const Affine map = statistics(a, row, p, sums);
  float2 total = row_sums(row, sums, [&](Place at) {
    return float2{g(at), g(at) * ((p(at) - map.center) * map.factor)};
  });
  if (a.mode == kLayer) {
    total.x /= a.channels;
    total.y /= a.channels;
  } else {
    total.x = 0.f;
  }
  const float scale = map.factor * share;
  store([&](Place at) {
    const float y = (p(at) - map.center) * map.factor;
    return (map.clamped ? g(at) : g(at) - total.x - y * total.y) * scale;
  });
}

// A team a pooled token; a team that shares its block with others has one warp and no barrier.
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads) clip_normalize_fwd_kernel(Call<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  TeamSums sums{buffers};
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token < a.tokens) forward_token(a, HeldRow<N, V>(a.channels), token, sums);
}

template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads) clip_normalize_bwd_kernel(Call<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  TeamSums sums{buffers};
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token < a.tokens) backward_token(a, HeldRow<N, V>(a.channels), token, sums);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) clip_normalize_fwd_long_kernel(Call<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  TeamSums sums{buffers};
  forward_token(a, StreamedRow(a.channels), blockIdx.x, sums);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) clip_normalize_bwd_long_kernel(Call<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  TeamSums sums{buffers};
  backward_token(a, StreamedRow(a.channels), blockIdx.x, sums);
}

template <typename T>
template <int N, int V>
void Call<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  const unsigned grid = row_grid(tokens, block.y);
  if (grad == nullptr) {
    clip_normalize_fwd_kernel<T, N, V><<<grid, block, 0, stream>>>(*this);
  } else {
    clip_normalize_bwd_kernel<T, N, V><<<grid, block, 0, stream>>>(*this);
  }
}

template <typename T>
void Call<T>::long_rows() const {
  const auto grid = static_cast<unsigned>(tokens);
  if (grad == nullptr) {
    clip_normalize_fwd_long_kernel<T><<<grid, kMaxThreads, 0, stream>>>(*this);
  } else {
    clip_normalize_bwd_long_kernel<T><<<grid, kMaxThreads, 0, stream>>>(*this);
  }
}

// The data of a per-channel statistic [C].
const float* statistic(const char* name, const std::optional<Tensor>& values, const Tensor& x) {
  if (!values.has_value()) return nullptr;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == x.size(2), "clip_normalize: ", name,
                  " must be [", x.size(2), "]");
  STD_TORCH_CHECK(values->is_contiguous() && !values->is_cpu() &&
                      values->scalar_type() == torch::headeronly::ScalarType::Float,
                  "clip_normalize: ", name, " must be contiguous float32 on the device of x");
  return static_cast<const float*>(values->const_data_ptr());
}

// Launches the forward, or the backward if there is a gradient, and fills `out`.
void run(const Tensor* grad, const Tensor& x, const std::optional<Tensor>& mean,
         const std::optional<Tensor>& std, int64_t mode, int64_t pool, double eps, bool inverse,
         const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_element("clip_normalize", x, [&]<typename T>(T*) {
    const Call<T> call{.x = static_cast<const T*>(x.data_ptr()),
                       .grad = grad ? static_cast<const T*>(grad->data_ptr()) : nullptr,
                       .mean = statistic("mean", mean, x),
                       .std = statistic("std", std, x),
                       .out = static_cast<T*>(out.data_ptr()),
                       .tokens = x.size(0) * (x.size(1) / (pool * pool)),
                       .side = std::llround(std::sqrt(static_cast<double>(x.size(1)))),
                       .channels = x.size(2),
                       .pool = static_cast<int>(pool),
                       .mode = static_cast<int>(mode),
                       .eps = static_cast<float>(eps),
                       .inverse = inverse,
                       .stream = current_stream(x)};
    const bool aligned = aligned16({call.x, call.grad, call.mean, call.std, call.out});
    launch_rows<T>(call, call.channels, aligned);
  });
  check_launch("clip_normalize");
}

void check(const Tensor& x, const std::optional<Tensor>& std, int64_t mode, int64_t pool) {
  check_contiguous("clip_normalize", "x", x, x);
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "clip_normalize: mode must be 0, 1 or 2, got ", mode);
  STD_TORCH_CHECK(mode != kStandardize || std.has_value(),
                  "clip_normalize: std must be given in mode 2");
  const int64_t side = std::llround(std::sqrt(static_cast<double>(x.size(1))));
  STD_TORCH_CHECK(pool == 1 || (pool > 1 && side * side == x.size(1) && side % pool == 0),
                  "clip_normalize: x must have side * side tokens, side a multiple of pool ", pool,
                  ", got ", x.size(1));
}

Tensor clip_normalize_cuda(const Tensor& x, const std::optional<Tensor>& mean,
                           const std::optional<Tensor>& std, int64_t mode, int64_t pool, double eps,
                           bool inverse) {
  check(x, std, mode, pool);
  STD_TORCH_CHECK(mode != kStandardize || mean.has_value(),
                  "clip_normalize: mean must be given in mode 2");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1) / (pool * pool), x.size(2)});
  if (y.numel() != 0) run(nullptr, x, mean, std, mode, pool, eps, inverse, y);
  return y;
}

Tensor clip_normalize_backward_cuda(const Tensor& grad, const Tensor& x,
                                    const std::optional<Tensor>& std, int64_t mode, int64_t pool,
                                    double eps, bool inverse) {
  check(x, std, mode, pool);
  check_contiguous("clip_normalize_backward", "grad", x, grad);
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == x.size(1) / (pool * pool) &&
                      grad.size(2) == x.size(2),
                  "clip_normalize_backward: grad must be [", x.size(0), ", ",
                  x.size(1) / (pool * pool), ", ", x.size(2), "]");
  Tensor d_x = torch::stable::empty_like(x);
  if (d_x.numel() != 0) run(&grad, x, std::nullopt, std, mode, pool, eps, inverse, d_x);
  return d_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("clip_normalize", TORCH_BOX(&clip_normalize_cuda));
  m.impl("clip_normalize_backward", TORCH_BOX(&clip_normalize_backward_cuda));
}

}  // namespace clipflow
