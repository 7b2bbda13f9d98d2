// Adaptive layer norm on CUDA, forward and backward; the op is defined in
// clipflow/ops/adaln_norm.py.
//
//   y[b, l, :] = normed * (1 + scale[b, :]) + shift[b, :],   normed = layer_norm(x[b, l, :])
//
// Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN.
// Bytes moved: forward reads x and writes y; backward reads grad and x and writes d_x. Statistics
// and sums are float32. The modulation's gradients are summed in two stages, over chunks of rows
// and then over chunks, in a fixed order and without atomics.

#include <algorithm>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/dispatch.cuh"
#include "common/rows.cuh"
#include "common/tensor.h"

namespace clipflow {
namespace {

// Channels a thread holds where it loads them one by one. The backward keeps five rows at a time
// and an address for each load: with 16, ptxas spills.
constexpr int kForwardScalars = 16;
constexpr int kBackwardScalars = 8;

// Shape suffixes: B = batch, L = tokens of a sample, D = channels.
struct Shape {
  int64_t samples;      // B
  int64_t tokens;       // L
  int64_t channels;     // D
  int64_t shift_stride;  // elements from one sample's shift to the next
  int64_t scale_stride;
  int64_t chunk_rows;  // rows that one team of the backward sums
  int64_t chunks;      // ... and how many such teams a sample has
  float eps;
};

template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads)
    adaln_norm_fwd_kernel(const T* __restrict__ x, const T* __restrict__ shift,
                          const T* __restrict__ scale, T* __restrict__ y, Shape shape) {
  __shared__ float2 sums[2][kMaxThreads / kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= shape.samples * shape.tokens) return;  // only ever a team of one warp: no barrier
  const int64_t sample = row / shape.tokens;
  const int channels = static_cast<int>(shape.channels);

  // The modulation is asked for before the sums, so that it arrives while they are taken.
  RowPacks<T, N, V> x_packs, scale_packs, shift_packs;
  x_packs.read(x + row * channels, channels);
  scale_packs.read(scale + sample * shape.scale_stride, channels);
  shift_packs.read(shift + sample * shape.shift_stride, channels);

  float total = 0.f;
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int i = 0; i < N; ++i) total += x_packs(v, i);
  const float mean = team_sum({total, 0.f}, sums[0]).x / channels;

  float squares = 0.f;
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (pack_channel<N>(v) < channels)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float centered = x_packs(v, i) - mean;
        squares += centered * centered;
      }
  const float variance = team_sum({squares, 0.f}, sums[1]).x / channels;
  const float rstd = rsqrtf(variance + shape.eps);

#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int channel = pack_channel<N>(v);
    if (channel >= channels) continue;
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      values[i] = (x_packs(v, i) - mean) * rstd * (1.f + scale_packs(v, i)) + shift_packs(v, i);
    store<T, N>(y + row * channels + channel, values);
  }
}

// A thread's running sums: in registers, or, for 16 of them, each in a place of its own in shared
// memory, as registers would spill.
template <int Count, bool InRegisters = Count <= 8>
struct Sums {
  float values[Count] = {};
  __device__ inline float& at(int i) { return values[i]; }
};
template <int Count>
struct Sums<Count, false> {
  float* values;
  __device__ inline Sums() {
    __shared__ float places[Count * kMaxThreads];
    values = places + threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < Count; ++i) at(i) = 0.f;
  }
  __device__ inline float& at(int i) { return values[i * kMaxThreads]; }
};

// A team walks the rows of one chunk of one sample: d_x row by row, and the chunk's part of d_shift
// and d_scale, which stay in registers until the end. The 1 of the launch bounds: without it ptxas
// aims at two blocks a multiprocessor and spills.
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    adaln_norm_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                          const T* __restrict__ scale, T* __restrict__ d_x,
                          float* __restrict__ partial, Shape shape) {
  __shared__ float2 sums[2][kMaxThreads / kWarp];
  const int64_t teams = shape.samples * shape.chunks;
  const int64_t team = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (team >= teams) return;
  const int64_t sample = team / shape.chunks;
  const int64_t first = (team - sample * shape.chunks) * shape.chunk_rows;
  const int rows = static_cast<int>(min(shape.chunk_rows, shape.tokens - first));
  const int channels = static_cast<int>(shape.channels);
  int64_t row = (sample * shape.tokens + first) * channels;

  RowPacks<T, N, V> scale_packs;
  scale_packs.read(scale + sample * shape.scale_stride, channels);
  Sums<V * N> d_shift;
  float d_scale[V * N] = {};

#pragma unroll 1
  for (int r = 0; r < rows; ++r, row += channels) {
    RowPacks<T, N, V> x_packs, grad_packs;
    x_packs.read(x + row, channels);
    grad_packs.read(grad + row, channels);

    float2 total = {0.f, 0.f};  // of x, and of the gradient of `normed`
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total.x += x_packs(v, i);
        total.y += grad_packs(v, i) * (1.f + scale_packs(v, i));
      }
    total = team_sum(total, sums[0]);
    const float mean = total.x / channels, mean_grad = total.y / channels;

    float2 products = {0.f, 0.f};  // of x - mean with itself, and with the gradient of `normed`
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (pack_channel<N>(v) < channels)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float centered = x_packs(v, i) - mean;
          products.x += centered * centered;
          products.y += centered * grad_packs(v, i) * (1.f + scale_packs(v, i));
        }
    products = team_sum(products, sums[1]);
    const float rstd = rsqrtf(products.x / channels + shape.eps);
    const float mean_product = products.y / channels * rstd;

#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int channel = pack_channel<N>(v);
      if (channel >= channels) continue;
      float values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float normed = (x_packs(v, i) - mean) * rstd, g = grad_packs(v, i);
        values[i] = (g * (1.f + scale_packs(v, i)) - mean_grad - normed * mean_product) * rstd;
        d_shift.at(v * N + i) += g;
        d_scale[v * N + i] += g * normed;
      }
      store<T, N>(d_x + row + channel, values);
    }
  }

#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int channel = pack_channel<N>(v);
    if (channel >= channels) continue;
    float* to = partial + team * channels + channel;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = d_shift.at(v * N + i);
      to[teams * channels + i] = d_scale[v * N + i];
    }
  }
}

// Rows that do not fit a team's registers: one block a row, which it reads three times.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    adaln_norm_fwd_long_kernel(const T* __restrict__ x, const T* __restrict__ shift,
                               const T* __restrict__ scale, T* __restrict__ y, Shape shape) {
  __shared__ float2 sums[2][kMaxThreads / kWarp];
  const int64_t row = blockIdx.x, sample = row / shape.tokens, channels = shape.channels;
  x += row * channels;
  y += row * channels;
  scale += sample * shape.scale_stride;
  shift += sample * shape.shift_stride;

  float total = 0.f, squares = 0.f;
  for (int64_t d = threadIdx.x; d < channels; d += blockDim.x) total += to_float(x[d]);
  const float mean = team_sum({total, 0.f}, sums[0]).x / channels;
  for (int64_t d = threadIdx.x; d < channels; d += blockDim.x) {
    const float centered = to_float(x[d]) - mean;
    squares += centered * centered;
  }
  const float rstd = rsqrtf(team_sum({squares, 0.f}, sums[1]).x / channels + shape.eps);
  for (int64_t d = threadIdx.x; d < channels; d += blockDim.x)
    y[d] = from_float<T>((to_float(x[d]) - mean) * rstd * (1.f + to_float(scale[d])) +
                         to_float(shift[d]));
}

// As adaln_norm_bwd_kernel; the chunk's sums grow in memory, each element by one thread only.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    adaln_norm_bwd_long_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                               const T* __restrict__ scale, T* __restrict__ d_x,
                               float* __restrict__ partial, Shape shape) {
  __shared__ float2 sums[2][kMaxThreads / kWarp];
  const int64_t channels = shape.channels, team = blockIdx.x, sample = team / shape.chunks;
  const int64_t first = (team - sample * shape.chunks) * shape.chunk_rows;
  const int64_t rows = min(shape.chunk_rows, shape.tokens - first);
  const int64_t offset = (sample * shape.tokens + first) * channels;
  scale += sample * shape.scale_stride;
  float* d_shift = partial + team * channels;
  float* d_scale = d_shift + shape.samples * shape.chunks * channels;

  for (int64_t r = 0; r < rows; ++r) {
    const T* x_row = x + offset + r * channels;
    const T* grad_row = grad + offset + r * channels;
    float2 total = {0.f, 0.f}, products = {0.f, 0.f};
    for (int64_t d = threadIdx.x; d < channels; d += blockDim.x) {
      total.x += to_float(x_row[d]);
      total.y += to_float(grad_row[d]) * (1.f + to_float(scale[d]));
    }
    total = team_sum(total, sums[0]);
    const float mean = total.x / channels, mean_grad = total.y / channels;
    for (int64_t d = threadIdx.x; d < channels; d += blockDim.x) {
      const float centered = to_float(x_row[d]) - mean;
      products.x += centered * centered;
      products.y += centered * to_float(grad_row[d]) * (1.f + to_float(scale[d]));
    }
    products = team_sum(products, sums[1]);
    const float rstd = rsqrtf(products.x / channels + shape.eps);
    const float mean_product = products.y / channels * rstd;
    for (int64_t d = threadIdx.x; d < channels; d += blockDim.x) {
      const float normed = (to_float(x_row[d]) - mean) * rstd, g = to_float(grad_row[d]);
      d_x[offset + r * channels + d] = from_float<T>(
          (g * (1.f + to_float(scale[d])) - mean_grad - normed * mean_product) * rstd);
      d_shift[d] = (r == 0 ? 0.f : d_shift[d]) + g;
      d_scale[d] = (r == 0 ? 0.f : d_scale[d]) + g * normed;
    }
  }
}

// Adds up the chunks' sums: a column of kSumLanes threads a channel, each a strided share of them.
constexpr int kSumLanes = 8;

template <typename T>
__global__ void __launch_bounds__(kWarp* kSumLanes)
    adaln_norm_bwd_sum_kernel(const float* __restrict__ partial, T* __restrict__ d_shift,
                              T* __restrict__ d_scale, Shape shape) {
  __shared__ float2 lanes[kSumLanes][kWarp];
  const int64_t blocks = (shape.channels + kWarp - 1) / kWarp;
  const int64_t sample = blockIdx.x / blocks;
  const int64_t channel = (blockIdx.x - sample * blocks) * kWarp + threadIdx.x;
  const int64_t size = shape.samples * shape.chunks * shape.channels;
  const bool inside = channel < shape.channels;

  float2 total = {0.f, 0.f};
  for (int64_t chunk = threadIdx.y; inside && chunk < shape.chunks; chunk += kSumLanes) {
    const float* from = partial + (sample * shape.chunks + chunk) * shape.channels + channel;
    total.x += from[0];
    total.y += from[size];
  }
  lanes[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
  for (int lane = 1; lane < kSumLanes; ++lane) {
    total.x += lanes[lane][threadIdx.x].x;
    total.y += lanes[lane][threadIdx.x].y;
  }
  d_shift[sample * shape.channels + channel] = from_float<T>(total.x);
  d_scale[sample * shape.channels + channel] = from_float<T>(total.y);
}

template <typename T>
struct Forward {
  static constexpr int kScalars = kForwardScalars;
  const T *x, *shift, *scale;
  T* y;
  Shape shape;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const {
    const dim3 block = team_block(static_cast<int>((shape.channels + N - 1) / N), V);
    const int64_t grid = (shape.samples * shape.tokens + block.y - 1) / block.y;
    adaln_norm_fwd_kernel<T, N, V>
        <<<static_cast<unsigned>(grid), block, 0, stream>>>(x, shift, scale, y, shape);
  }

  void long_rows() const {
    const auto grid = static_cast<unsigned>(shape.samples * shape.tokens);
    adaln_norm_fwd_long_kernel<T><<<grid, kMaxThreads, 0, stream>>>(x, shift, scale, y, shape);
  }
};

template <typename T>
struct Backward {
  static constexpr int kScalars = kBackwardScalars;
  const T *grad, *x, *scale;
  T *d_x, *d_shift, *d_scale;
  float* partial;
  Shape shape;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const {
    const dim3 block = team_block(static_cast<int>((shape.channels + N - 1) / N), V);
    const int64_t grid = (shape.samples * shape.chunks + block.y - 1) / block.y;
    adaln_norm_bwd_kernel<T, N, V>
        <<<static_cast<unsigned>(grid), block, 0, stream>>>(grad, x, scale, d_x, partial, shape);
    sum();
  }

  void long_rows() const {
    const auto grid = static_cast<unsigned>(shape.samples * shape.chunks);
    adaln_norm_bwd_long_kernel<T>
        <<<grid, kMaxThreads, 0, stream>>>(grad, x, scale, d_x, partial, shape);
    sum();
  }

  void sum() const {
    const int64_t grid = shape.samples * ((shape.channels + kWarp - 1) / kWarp);
    const dim3 block(kWarp, kSumLanes);
    adaln_norm_bwd_sum_kernel<T>
        <<<static_cast<unsigned>(grid), block, 0, stream>>>(partial, d_shift, d_scale, shape);
  }
};

// Picks the kernel by D and alignment alone.
template <typename T, typename Call>
void launch(const Call& call, bool aligned) {
  constexpr int kPack = 16 / sizeof(T);
  constexpr int kMost = kVectorChannels / kPack;
  const int64_t channels = call.shape.channels;
  if (aligned && channels % kPack == 0 && channels <= kMaxThreads * kVectorChannels) {
    const int per_thread = packs_per_thread(channels / kPack, kPack);
    if (per_thread == 1) return call.template rows<kPack, 1>();
    if (per_thread == 2) return call.template rows<kPack, 2>();
    if constexpr (kMost > 2) return call.template rows<kPack, kMost>();
  }
  if (channels <= kMaxThreads * Call::kScalars) return call.template rows<1, Call::kScalars>();
  call.long_rows();
}

Shape shape_of(const Tensor& x, int64_t shift_stride, int64_t scale_stride, double eps) {
  Shape shape{x.size(0), x.size(1), x.size(2), shift_stride, scale_stride, 0, 0,
              static_cast<float>(eps)};
  // About 16 chunks a sample, of 4 to 64 rows: by L alone, so that sums do not depend on the batch.
  shape.chunk_rows = std::clamp<int64_t>(next_power_of_2(shape.tokens) / 16, 4, 64);
  shape.chunks = (shape.tokens + shape.chunk_rows - 1) / shape.chunk_rows;
  return shape;
}

Tensor adaln_norm_cuda(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  check_contiguous("adaln_norm", "x", x, x);
  check_rows("adaln_norm", "shift", x, shift);
  check_rows("adaln_norm", "scale", x, scale);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape shape = shape_of(x, shift.stride(0), scale.stride(0), eps);
  with_element("adaln_norm", x, [&]<typename T>(T*) {
    const Forward<T> call{static_cast<const T*>(x.data_ptr()),
                          static_cast<const T*>(shift.data_ptr()),
                          static_cast<const T*>(scale.data_ptr()),
                          static_cast<T*>(y.data_ptr()),
                          shape,
                          current_stream(x)};
    const bool strides = shape.shift_stride * sizeof(T) % 16 == 0 &&
                         shape.scale_stride * sizeof(T) % 16 == 0;
    launch<T>(call, strides && aligned16({call.x, call.shift, call.scale, call.y}));
  });
  check_launch("adaln_norm");
  return y;
}

std::tuple<Tensor, Tensor, Tensor> adaln_norm_backward_cuda(const Tensor& grad, const Tensor& x,
                                                            const Tensor& scale, double eps) {
  check_contiguous("adaln_norm_backward", "x", x, x);
  check_contiguous("adaln_norm_backward", "grad", x, grad);
  check_rows("adaln_norm_backward", "scale", x, scale);
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(grad.size(i) == x.size(i),
                    "adaln_norm_backward: grad must have the shape of x");
  const int64_t B = x.size(0), D = x.size(2);
  Tensor d_x = torch::stable::empty_like(x);
  if (x.numel() == 0)
    return {d_x, torch::stable::new_zeros(x, {B, D}), torch::stable::new_zeros(x, {B, D})};

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape shape = shape_of(x, 0, scale.stride(0), eps);
  Tensor d_shift = torch::stable::new_empty(x, {B, D});
  Tensor d_scale = torch::stable::new_empty(x, {B, D});
  Tensor partial = torch::stable::new_empty(x, {2, B, shape.chunks, D},
                                            torch::headeronly::ScalarType::Float);
  with_element("adaln_norm", x, [&]<typename T>(T*) {
    const Backward<T> call{static_cast<const T*>(grad.data_ptr()),
                           static_cast<const T*>(x.data_ptr()),
                           static_cast<const T*>(scale.data_ptr()),
                           static_cast<T*>(d_x.data_ptr()),
                           static_cast<T*>(d_shift.data_ptr()),
                           static_cast<T*>(d_scale.data_ptr()),
                           static_cast<float*>(partial.data_ptr()),
                           shape,
                           current_stream(x)};
    const bool stride = shape.scale_stride * sizeof(T) % 16 == 0;
    launch<T>(call, stride && aligned16({call.grad, call.x, call.scale, call.d_x}));
  });
  check_launch("adaln_norm_backward");
  return {d_x, d_shift, d_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("adaln_norm", TORCH_BOX(&adaln_norm_cuda));
  m.impl("adaln_norm_backward", TORCH_BOX(&adaln_norm_backward_cuda));
}

}  // namespace clipflow
