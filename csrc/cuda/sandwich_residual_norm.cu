// The sandwich norm on CUDA, forward and backward; the op is defined in
// clipflow/ops/sandwich_residual_norm.py.
//
//   h = x + tanh(gate) * rms(y) * weight
//   normed = rms(h) * next_weight * (1 + scale),   h as it is stored
//
// Source: Zhuo et al., "Lumina-Next" (2024), section 2.1, sandwich normalization.
// Bytes moved: forward reads x and y and writes h and normed; backward reads d_h, d_normed, h and y
// and writes d_x and d_y. Statistics and sums are float32, taken in a fixed order, without atomics.

#include <tuple>

#include "common/cuda_launch.h"
#include "common/norm.cuh"

namespace clipflow {
namespace {

constexpr const char* kOp = "sandwich_residual_norm";
constexpr const char* kBackwardOp = "sandwich_residual_norm_backward";

// Shape suffixes: R = tokens of all samples, D = channels, B = batch.
template <typename T>
struct Forward {
  static constexpr int kHeld = kVectorChannels, kScalars = 8;
  const T *x, *y, *gate, *weight;  // weight may be null
  T *h, *normed;
  Modulation<T> modulation;
  int64_t gate_stride;
  int64_t tokens;    // R
  int64_t group;     // R / B
  int64_t channels;  // D
  float eps;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const;
  void long_rows() const;
};

template <typename T, typename Row>
__device__ __forceinline__ void forward_token(const Forward<T>& a, const Row& row, int64_t token,
                                              TeamSums sums) {
  const int64_t sample = token / a.group, begin = token * a.channels;
  const auto y = row.load(a.y + begin), x = row.load(a.x + begin);
  const auto gate = row.load(a.gate + sample * a.gate_stride);
  const auto weight = row.load_optional(a.weight);
  const bool weighted = a.weight != nullptr;
  const float branch_rstd = statistics(row, y, true, a.eps, sums).rstd;
  const auto h = row.keep_stored(a.h + begin, [=](Place at) {
    const float branch = y(at) * branch_rstd * (weighted ? weight(at) : 1.f);
    return rounded<T>(x(at) + tanhf(gate(at)) * branch);
  });
  const auto scale = row.load(a.modulation.scale_row(sample));
  const auto next_weight = row.load_optional(a.modulation.weight);
  const bool next_weighted = a.modulation.weight != nullptr;
  const float rstd = statistics(row, h, true, a.eps, sums).rstd;
  row.store(a.normed + begin, [&](Place at) {
    return h(at) * rstd * (next_weighted ? next_weight(at) : 1.f) * (1.f + scale(at));
  });
}

// A team that shares its block with others is one warp, and meets no barrier. The 1 of the launch
// bounds: without it ptxas aims at two blocks a multiprocessor and spills.
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) sandwich_residual_norm_fwd_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token < a.tokens) forward_token(a, HeldRow<N, V>(a.channels), token, {buffers});
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    sandwich_residual_norm_fwd_long_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  forward_token(a, StreamedRow(a.channels), blockIdx.x, {buffers});
}

template <typename T>
template <int N, int V>
void Forward<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  sandwich_residual_norm_fwd_kernel<T, N, V>
      <<<row_grid(tokens, block.y), block, 0, stream>>>(*this);
}

template <typename T>
void Forward<T>::long_rows() const {
  sandwich_residual_norm_fwd_long_kernel<T>
      <<<row_grid(tokens, 1), kMaxThreads, 0, stream>>>(*this);
}

template <typename T>
struct Backward {
  static constexpr int kHeld = 8, kScalars = 4;  // two running sums for each beside
  const T *d_h, *d_normed, *h, *y;
  const float *gate, *gain;  // gate is tanh(gate) * weight
  T *d_x, *d_y;
  Parts parts;  // d_gate, d_gain
  Groups groups;
  int64_t channels;  // D
  float eps;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const;
  void long_rows() const;
};

// A team walks the rows of one chunk: d_x and d_y row by row, and the chunk's part of the sums.
template <typename T, typename Row>
__device__ __forceinline__ void backward_chunk(const Backward<T>& a, const Row& row, int64_t team,
                                               TeamSums sums) {
  const Chunk chunk(a.groups, team);
  float* const gate_part = a.parts.chunks[0] + team * a.channels;
  float* const gain_part = a.parts.chunks[1] + team * a.channels;
  auto d_gate = row.running(gate_part), d_gain = row.running(gain_part);
#pragma unroll 1
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const int64_t begin = (chunk.first + r) * a.channels;
    const auto h = row.load(a.h + begin), d_out = row.load(a.d_normed + begin);
    const auto d_h = row.load(a.d_h + begin), y = row.load(a.y + begin);
    // Loaded each time: they are close, and registers are few.
    const auto gain = row.load(a.gain + chunk.sample * a.channels);
    const auto d_normed = [=](Place at) { return d_out(at) * gain(at); };
    const NormGradient norm = norm_gradient(row, h, d_normed, true, a.eps, sums);
    row.each([&](Place at) { d_gain.add(at, d_out(at) * norm.normed(h(at))); });
    const auto total =
        row.keep([=](Place at) { return d_h(at) + norm(h(at), d_normed(at)); });
    row.store(a.d_x + begin, total);

    const auto gate = row.load(a.gate + chunk.sample * a.channels);
    const auto d_branch = [=](Place at) { return total(at) * gate(at); };
    const NormGradient branch = norm_gradient(row, y, d_branch, true, a.eps, sums);
    row.each([&](Place at) { d_gate.add(at, total(at) * branch.normed(y(at))); });
    row.store(a.d_y + begin, [&](Place at) { return branch(y(at), d_branch(at)); });
  }
  row.finish(d_gate, gate_part);
  row.finish(d_gain, gain_part);
}

template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sandwich_residual_norm_bwd_kernel(Backward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  const int64_t team = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (team < a.groups.teams()) backward_chunk(a, HeldRow<N, V>(a.channels), team, {buffers});
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    sandwich_residual_norm_bwd_long_kernel(Backward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  backward_chunk(a, StreamedRow(a.channels), blockIdx.x, {buffers});
}

template <typename T>
template <int N, int V>
void Backward<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  sandwich_residual_norm_bwd_kernel<T, N, V>
      <<<row_grid(groups.teams(), block.y), block, 0, stream>>>(*this);
}

template <typename T>
void Backward<T>::long_rows() const {
  sandwich_residual_norm_bwd_long_kernel<T>
      <<<row_grid(groups.teams(), 1), kMaxThreads, 0, stream>>>(*this);
}

using Optional = std::optional<Tensor>;

// Writes h and normed, which are contiguous and like x; h may be x, and normed may be y.
void write_sandwich_residual_norm(const Tensor& x, const Tensor& y, const Tensor& gate,
                                  const Tensor& scale, const Optional& weight,
                                  const Optional& next_weight, double eps, const Tensor& h,
                                  const Tensor& normed) {
  check_rows_like(kOp, "x", x, x);
  check_rows_like(kOp, "y", x, y);
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_element(kOp, x, [&]<typename T>(T*) {
    const int64_t D = x.size(x.dim() - 1), R = x.numel() / D, B = scale.size(0);
    const Forward<T> call{.x = static_cast<const T*>(x.const_data_ptr()),
                          .y = static_cast<const T*>(y.const_data_ptr()),
                          .gate = modulation_rows<T>(kOp, "gate", x, gate, B),
                          .weight = channel_vector<T>(kOp, "weight", x, weight),
                          .h = static_cast<T*>(h.mutable_data_ptr()),
                          .normed = static_cast<T*>(normed.mutable_data_ptr()),
                          .modulation = modulation_of<T>(kOp, x, {}, scale, next_weight, {}),
                          .gate_stride = gate.stride(0),
                          .tokens = R,
                          .group = R / B,
                          .channels = D,
                          .eps = static_cast<float>(eps),
                          .stream = current_stream(x)};
    const bool fits = aligned(call.modulation) && strides16<T>({call.gate_stride}) &&
                      aligned16({call.x, call.y, call.gate, call.weight, call.h, call.normed});
    launch_rows<T>(call, D, fits);
  });
  check_launch(kOp);
}

std::tuple<Tensor, Tensor> sandwich_residual_norm_cuda(const Tensor& x, const Tensor& y,
                                                       const Tensor& gate, const Tensor& scale,
                                                       const Optional& weight,
                                                       const Optional& next_weight, double eps) {
  Tensor h = torch::stable::empty_like(x), normed = torch::stable::empty_like(x);
  write_sandwich_residual_norm(x, y, gate, scale, weight, next_weight, eps, h, normed);
  return {h, normed};
}

void sandwich_residual_norm_out_cuda(const Tensor& x, const Tensor& y, const Tensor& gate,
                                     const Tensor& scale, const Optional& weight,
                                     const Optional& next_weight, double eps, Tensor h,
                                     Tensor normed) {
  check_rows_like(kOp, "h", x, h);
  check_rows_like(kOp, "normed", x, normed);
  write_sandwich_residual_norm(x, y, gate, scale, weight, next_weight, eps, h, normed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sandwich_residual_norm_backward_cuda(
    const Tensor& d_h, const Tensor& d_normed, const Tensor& h, const Tensor& y,
    const Tensor& gate, const Tensor& gain, double eps) {
  check_rows_like(kBackwardOp, "h", h, h);
  check_rows_like(kBackwardOp, "d_h", h, d_h);
  check_rows_like(kBackwardOp, "d_normed", h, d_normed);
  check_rows_like(kBackwardOp, "y", h, y);
  check_gain(kBackwardOp, "gain", h, gain);
  check_gain(kBackwardOp, "gate", h, gate);
  STD_TORCH_CHECK(gate.size(0) == gain.size(0), kBackwardOp, ": gate must have gain's shape");
  Tensor d_x = torch::stable::empty_like(h), d_y = torch::stable::empty_like(h);
  const int64_t D = h.size(h.dim() - 1), B = gain.size(0);
  if (h.numel() == 0) {
    const auto zeros = [&] { return torch::stable::new_zeros(gain, {B, D}); };
    return {d_x, d_y, zeros(), zeros()};
  }
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const Groups groups(h.numel() / D, B);
  const PartTensors sums(gain, 2, groups);
  with_element(kOp, h, [&]<typename T>(T*) {
    const Backward<T> call{.d_h = static_cast<const T*>(d_h.const_data_ptr()),
                           .d_normed = static_cast<const T*>(d_normed.const_data_ptr()),
                           .h = static_cast<const T*>(h.const_data_ptr()),
                           .y = static_cast<const T*>(y.const_data_ptr()),
                           .gate = static_cast<const float*>(gate.const_data_ptr()),
                           .gain = static_cast<const float*>(gain.const_data_ptr()),
                           .d_x = static_cast<T*>(d_x.mutable_data_ptr()),
                           .d_y = static_cast<T*>(d_y.mutable_data_ptr()),
                           .parts = sums.parts,
                           .groups = groups,
                           .channels = D,
                           .eps = static_cast<float>(eps),
                           .stream = current_stream(h)};
    launch_rows<T>(call, D,
                   aligned16({call.d_h, call.d_normed, call.h, call.y, call.gate, call.gain,
                              call.d_x, call.d_y}));
    sum_groups(sums.parts, 2, groups, D, call.stream);
  });
  check_launch(kBackwardOp);
  return {d_x, d_y, sums.sums[0], sums.sums[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("sandwich_residual_norm", TORCH_BOX(&sandwich_residual_norm_cuda));
  m.impl("sandwich_residual_norm_out", TORCH_BOX(&sandwich_residual_norm_out_cuda));
  m.impl("sandwich_residual_norm_backward", TORCH_BOX(&sandwich_residual_norm_backward_cuda));
}

}  // namespace clipflow
