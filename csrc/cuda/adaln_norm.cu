// Adaptive layer norm on CUDA, forward and backward; the op is defined in
// clipflow/ops/adaln_norm.py.
//
//   y = norm(x) * weight * (1 + scale + table[1]) + shift + table[0]
//
// Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN.
// Bytes moved: forward reads x and writes y; backward reads grad and x and writes d_x. Statistics
// and sums are float32, taken in a fixed order and without atomics.

#include <tuple>

#include "common/cuda_launch.h"
#include "common/norm.cuh"

namespace clipflow {
namespace {

// Shape suffixes: R = tokens of all samples, D = channels, S = rows of modulation.
template <typename T>
struct Forward {
  static constexpr int kHeld = kVectorChannels, kScalars = 8;
  const T* x;
  T* y;
  Modulation<T> modulation;
  int64_t tokens;    // R
  int64_t group;     // R / S
  int64_t channels;  // D
  bool rms;
  float eps;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const;
  void long_rows() const;
};

template <typename T, typename Row>
__device__ __forceinline__ void forward_token(const Forward<T>& a, const Row& row, int64_t token,
                                              TeamSums sums) {
  const int64_t sample = token / a.group;
  const auto x = row.load(a.x + token * a.channels);
  const auto scale = row.load(a.modulation.scale_row(sample));
  const auto shift = row.load_optional(a.modulation.shift_row(sample));
  const Statistics of = statistics(row, x, a.rms, a.eps, sums);
  const auto modulate = modulator(a.modulation, row, shift, scale);
  row.store(a.y + token * a.channels,
            [&](Place at) { return modulate(at, (x(at) - of.mean) * of.rstd); });
}

// A team that shares its block with others is one warp, and meets no barrier. The 1 of the launch
// bounds: without it ptxas aims at two blocks a multiprocessor and spills.
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) adaln_norm_fwd_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token < a.tokens) forward_token(a, HeldRow<N, V>(a.channels), token, {buffers});
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) adaln_norm_fwd_long_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  forward_token(a, StreamedRow(a.channels), blockIdx.x, {buffers});
}

template <typename T>
template <int N, int V>
void Forward<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  adaln_norm_fwd_kernel<T, N, V><<<row_grid(tokens, block.y), block, 0, stream>>>(*this);
}

template <typename T>
void Forward<T>::long_rows() const {
  adaln_norm_fwd_long_kernel<T><<<row_grid(tokens, 1), kMaxThreads, 0, stream>>>(*this);
}

template <typename T>
struct Backward {
  static constexpr int kHeld = 8, kScalars = 8;  // two running sums for each beside: 16 would spill
  const T *grad, *x;
  const float* gain;
  T* d_x;
  Parts parts;  // d_offset, d_gain
  Groups groups;
  int64_t channels;  // D
  bool rms;
  float eps;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const;
  void long_rows() const;
};

// A team walks the rows of one chunk: d_x row by row, and the chunk's part of d_offset and d_gain.
template <typename T, typename Row>
__device__ __forceinline__ void backward_chunk(const Backward<T>& a, const Row& row, int64_t team,
                                               TeamSums sums) {
  const Chunk chunk(a.groups, team);
  float* const offset_part = a.parts.chunks[0] + team * a.channels;
  float* const gain_part = a.parts.chunks[1] + team * a.channels;
  const auto gain = row.load(a.gain + chunk.sample * a.channels);
  auto d_offset = row.running(offset_part), d_gain = row.running(gain_part);
#pragma unroll 1
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const int64_t begin = (chunk.first + r) * a.channels;
    const auto x = row.load(a.x + begin), grad = row.load(a.grad + begin);
    const auto d_normed = [&](Place at) { return grad(at) * gain(at); };
    const NormGradient norm = norm_gradient(row, x, d_normed, a.rms, a.eps, sums);
    row.store(a.d_x + begin, [&](Place at) { return norm(x(at), d_normed(at)); });
    row.each([&](Place at) {
      d_offset.add(at, grad(at));
      d_gain.add(at, grad(at) * norm.normed(x(at)));
    });
  }
  row.finish(d_offset, offset_part);
  row.finish(d_gain, gain_part);
}

template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) adaln_norm_bwd_kernel(Backward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  const int64_t team = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (team < a.groups.teams()) backward_chunk(a, HeldRow<N, V>(a.channels), team, {buffers});
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) adaln_norm_bwd_long_kernel(Backward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  backward_chunk(a, StreamedRow(a.channels), blockIdx.x, {buffers});
}

template <typename T>
template <int N, int V>
void Backward<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  const unsigned grid = row_grid(groups.teams(), block.y);
  adaln_norm_bwd_kernel<T, N, V><<<grid, block, 0, stream>>>(*this);
}

template <typename T>
void Backward<T>::long_rows() const {
  const unsigned grid = row_grid(groups.teams(), 1);
  adaln_norm_bwd_long_kernel<T><<<grid, kMaxThreads, 0, stream>>>(*this);
}

using Optional = std::optional<Tensor>;

// Writes y, which is contiguous and like x.
void write_adaln_norm(const Tensor& x, const Optional& shift, const Tensor& scale,
                      const Optional& weight, const Optional& table, bool rms, double eps,
                      const Tensor& y) {
  check_rows_like("adaln_norm", "x", x, x);
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_element("adaln_norm", x, [&]<typename T>(T*) {
    const int64_t D = x.size(x.dim() - 1), R = x.numel() / D;
    const Forward<T> call{.x = static_cast<const T*>(x.const_data_ptr()),
                          .y = static_cast<T*>(y.mutable_data_ptr()),
                          .modulation =
                              modulation_of<T>("adaln_norm", x, shift, scale, weight, table),
                          .tokens = R,
                          .group = R / scale.size(0),
                          .channels = D,
                          .rms = rms,
                          .eps = static_cast<float>(eps),
                          .stream = current_stream(x)};
    launch_rows<T>(call, D, aligned(call.modulation) && aligned16({call.x, call.y}));
  });
  check_launch("adaln_norm");
}

Tensor adaln_norm_cuda(const Tensor& x, const Optional& shift, const Tensor& scale,
                       const Optional& weight, const Optional& table, bool rms, double eps) {
  Tensor y = torch::stable::empty_like(x);
  write_adaln_norm(x, shift, scale, weight, table, rms, eps, y);
  return y;
}

void adaln_norm_out_cuda(const Tensor& x, const Optional& shift, const Tensor& scale,
                         const Optional& weight, const Optional& table, bool rms, double eps,
                         Tensor y) {
  check_rows_like("adaln_norm", "out", x, y);
  write_adaln_norm(x, shift, scale, weight, table, rms, eps, y);
}

std::tuple<Tensor, Tensor, Tensor> adaln_norm_backward_cuda(const Tensor& grad, const Tensor& x,
                                                            const Tensor& gain, bool rms,
                                                            double eps) {
  check_rows_like("adaln_norm_backward", "x", x, x);
  check_rows_like("adaln_norm_backward", "grad", x, grad);
  check_gain("adaln_norm_backward", "gain", x, gain);
  Tensor d_x = torch::stable::empty_like(x);
  const int64_t D = x.size(x.dim() - 1), S = gain.size(0);
  if (x.numel() == 0)
    return {d_x, torch::stable::new_zeros(gain, {S, D}), torch::stable::new_zeros(gain, {S, D})};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Groups groups(x.numel() / D, S);
  const PartTensors sums(gain, 2, groups);
  with_element("adaln_norm", x, [&]<typename T>(T*) {
    const Backward<T> call{.grad = static_cast<const T*>(grad.const_data_ptr()),
                           .x = static_cast<const T*>(x.const_data_ptr()),
                           .gain = static_cast<const float*>(gain.const_data_ptr()),
                           .d_x = static_cast<T*>(d_x.mutable_data_ptr()),
                           .parts = sums.parts,
                           .groups = groups,
                           .channels = D,
                           .rms = rms,
                           .eps = static_cast<float>(eps),
                           .stream = current_stream(x)};
    launch_rows<T>(call, D, aligned16({call.grad, call.x, call.gain, call.d_x}));
    sum_groups(sums.parts, 2, groups, D, call.stream);
  });
  check_launch("adaln_norm_backward");
  return {d_x, sums.sums[0], sums.sums[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("adaln_norm", TORCH_BOX(&adaln_norm_cuda));
  m.impl("adaln_norm_out", TORCH_BOX(&adaln_norm_out_cuda));
  m.impl("adaln_norm_backward", TORCH_BOX(&adaln_norm_backward_cuda));
}

}  // namespace clipflow
