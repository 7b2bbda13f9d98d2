// The gated residual norm on CUDA, forward and backward; the op is defined in
// clipflow/ops/gated_residual_norm.py.
//
//   h = x + (gate + gate_table) * y
//   normed = norm(h) * (1 + scale + table[1]) + shift + table[0],   h as it is stored
//
// Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN.
// Bytes moved: forward reads x and y and writes h and normed; backward reads d_h, d_normed, h and y
// and writes d_x and d_y. Statistics and sums are float32, taken in a fixed order, without atomics.

#include <tuple>

#include "common/cuda_launch.h"
#include "common/norm.cuh"

namespace clipflow {
namespace {

constexpr const char* kOp = "gated_residual_norm";
constexpr const char* kBackwardOp = "gated_residual_norm_backward";

// Shape suffixes: R = tokens of all samples, D = channels, S = rows of modulation.
template <typename T>
struct Forward {
  static constexpr int kHeld = kVectorChannels, kScalars = 8;
  const T *x, *y, *gate, *gate_table;  // gate and its table may be null
  T *h, *normed;
  Modulation<T> modulation;
  int64_t gate_stride;
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
  const int64_t sample = token / a.group, begin = token * a.channels;
  const auto x = row.load(a.x + begin), y = row.load(a.y + begin);
  const bool gated = a.gate != nullptr;
  const auto gate = row.load_optional(gated ? a.gate + sample * a.gate_stride : nullptr);
  const auto gate_table = row.load_optional(a.gate_table);
  const auto scale = row.load(a.modulation.scale_row(sample));
  const auto shift = row.load_optional(a.modulation.shift_row(sample));
  const auto h = row.keep_stored(a.h + begin, [=](Place at) {
    return rounded<T>(x(at) + (gated ? (gate(at) + gate_table(at)) * y(at) : y(at)));
  });
  const Statistics of = statistics(row, h, a.rms, a.eps, sums);
  const auto modulate = modulator(a.modulation, row, shift, scale);
  row.store(a.normed + begin,
            [&](Place at) { return modulate(at, (h(at) - of.mean) * of.rstd); });
}

// A team that shares its block with others is one warp, and meets no barrier. The 1 of the launch
// bounds: without it ptxas aims at two blocks a multiprocessor and spills.
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) gated_residual_norm_fwd_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token < a.tokens) forward_token(a, HeldRow<N, V>(a.channels), token, {buffers});
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) gated_residual_norm_fwd_long_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  forward_token(a, StreamedRow(a.channels), blockIdx.x, {buffers});
}

template <typename T>
template <int N, int V>
void Forward<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  gated_residual_norm_fwd_kernel<T, N, V>
      <<<row_grid(tokens, block.y), block, 0, stream>>>(*this);
}

template <typename T>
void Forward<T>::long_rows() const {
  gated_residual_norm_fwd_long_kernel<T>
      <<<row_grid(tokens, 1), kMaxThreads, 0, stream>>>(*this);
}

template <typename T>
struct Backward {
  static constexpr int kHeld = 8, kScalars = 4;  // three running sums for each beside
  const T *d_h, *d_normed, *h, *y;
  const float *gate, *gain;  // gate, and y with it, may be null
  T *d_x, *d_y;
  Parts parts;  // d_offset, d_gain, d_gate
  Groups groups;
  int64_t channels;  // D
  bool rms;
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
  const bool gated = a.gate != nullptr;
  float* const offset_part = a.parts.chunks[0] + team * a.channels;
  float* const gain_part = a.parts.chunks[1] + team * a.channels;
  float* const gate_part = gated ? a.parts.chunks[2] + team * a.channels : offset_part;
  const float* const gains = a.gain + chunk.sample * a.channels;
  const float* const gates = a.gate + (gated ? chunk.sample * a.channels : 0);
  auto d_gate = row.running(gate_part), d_offset = row.running(offset_part);
  auto d_gain = row.running(gain_part);
#pragma unroll 1
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const int64_t begin = (chunk.first + r) * a.channels;
    const auto h = row.load(a.h + begin), d_out = row.load(a.d_normed + begin);
    const auto d_h = row.load(a.d_h + begin);
    const auto gain = row.load(gains);  // each time: it is close, and registers are few
    const auto d_normed = [=](Place at) { return d_out(at) * gain(at); };
    const NormGradient norm = norm_gradient(row, h, d_normed, a.rms, a.eps, sums);
    row.each([&](Place at) {
      d_offset.add(at, d_out(at));
      d_gain.add(at, d_out(at) * norm.normed(h(at)));
    });
    const auto total =
        row.keep([=](Place at) { return d_h(at) + norm(h(at), d_normed(at)); });
    row.store(a.d_x + begin, total);
    if (gated) {
      const auto y = row.load(a.y + begin);
      const auto gate = row.load(gates);
      row.store(a.d_y + begin, [&](Place at) { return total(at) * gate(at); });
      row.each([&](Place at) { d_gate.add(at, total(at) * y(at)); });
    }
  }
  if (gated) row.finish(d_gate, gate_part);
  row.finish(d_offset, offset_part);
  row.finish(d_gain, gain_part);
}

template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) gated_residual_norm_bwd_kernel(Backward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  const int64_t team = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (team < a.groups.teams()) backward_chunk(a, HeldRow<N, V>(a.channels), team, {buffers});
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) gated_residual_norm_bwd_long_kernel(Backward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  backward_chunk(a, StreamedRow(a.channels), blockIdx.x, {buffers});
}

template <typename T>
template <int N, int V>
void Backward<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  gated_residual_norm_bwd_kernel<T, N, V>
      <<<row_grid(groups.teams(), block.y), block, 0, stream>>>(*this);
}

template <typename T>
void Backward<T>::long_rows() const {
  gated_residual_norm_bwd_long_kernel<T>
      <<<row_grid(groups.teams(), 1), kMaxThreads, 0, stream>>>(*this);
}

using Optional = std::optional<Tensor>;

// Writes h and normed, which are contiguous and like x; h may be x, and normed may be y.
void write_gated_residual_norm(const Tensor& x, const Tensor& y, const Optional& gate,
                               const Optional& shift, const Tensor& scale,
                               const Optional& gate_table, const Optional& table, bool rms,
                               double eps, const Tensor& h, const Tensor& normed) {
  check_rows_like(kOp, "x", x, x);
  check_rows_like(kOp, "y", x, y);
  STD_TORCH_CHECK(gate.has_value() || !gate_table.has_value(), kOp,
                  ": gate_table must be None without a gate");
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_element(kOp, x, [&]<typename T>(T*) {
    const int64_t D = x.size(x.dim() - 1), R = x.numel() / D, S = scale.size(0);
    const Forward<T> call{.x = static_cast<const T*>(x.const_data_ptr()),
                          .y = static_cast<const T*>(y.const_data_ptr()),
                          .gate = modulation_rows<T>(kOp, "gate", x, gate, S),
                          .gate_table = channel_vector<T>(kOp, "gate_table", x, gate_table),
                          .h = static_cast<T*>(h.mutable_data_ptr()),
                          .normed = static_cast<T*>(normed.mutable_data_ptr()),
                          .modulation = modulation_of<T>(kOp, x, shift, scale, {}, table),
                          .gate_stride = row_stride(gate),
                          .tokens = R,
                          .group = R / S,
                          .channels = D,
                          .rms = rms,
                          .eps = static_cast<float>(eps),
                          .stream = current_stream(x)};
    const bool fits = aligned(call.modulation) && strides16<T>({call.gate_stride}) &&
                      aligned16({call.x, call.y, call.gate, call.gate_table, call.h, call.normed});
    launch_rows<T>(call, D, fits);
  });
  check_launch(kOp);
}

std::tuple<Tensor, Tensor> gated_residual_norm_cuda(const Tensor& x, const Tensor& y,
                                                    const Optional& gate, const Optional& shift,
                                                    const Tensor& scale, const Optional& gate_table,
                                                    const Optional& table, bool rms, double eps) {
  Tensor h = torch::stable::empty_like(x), normed = torch::stable::empty_like(x);
  write_gated_residual_norm(x, y, gate, shift, scale, gate_table, table, rms, eps, h, normed);
  return {h, normed};
}

void gated_residual_norm_out_cuda(const Tensor& x, const Tensor& y, const Optional& gate,
                                  const Optional& shift, const Tensor& scale,
                                  const Optional& gate_table, const Optional& table, bool rms,
                                  double eps, Tensor h, Tensor normed) {
  check_rows_like(kOp, "h", x, h);
  check_rows_like(kOp, "normed", x, normed);
  write_gated_residual_norm(x, y, gate, shift, scale, gate_table, table, rms, eps, h, normed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward_cuda(
    const Tensor& d_h, const Tensor& d_normed, const Tensor& h, const std::optional<Tensor>& y,
    const std::optional<Tensor>& gate, const Tensor& gain, bool rms, double eps) {
  check_rows_like(kBackwardOp, "h", h, h);
  check_rows_like(kBackwardOp, "d_h", h, d_h);
  check_rows_like(kBackwardOp, "d_normed", h, d_normed);
  check_gain(kBackwardOp, "gain", h, gain);
  STD_TORCH_CHECK(gate.has_value() == y.has_value(), kBackwardOp,
                  ": y must be given with a gate, and only then");
  if (gate.has_value()) {
    check_rows_like(kBackwardOp, "y", h, *y);
    check_gain(kBackwardOp, "gate", h, *gate);
    STD_TORCH_CHECK(gate->size(0) == gain.size(0), kBackwardOp, ": gate must have gain's shape");
  }
  const bool gated = gate.has_value();
  const int64_t D = h.size(h.dim() - 1), S = gain.size(0);
  Tensor d_x = torch::stable::empty_like(h);
  Tensor d_y = gated ? torch::stable::empty_like(h) : torch::stable::new_empty(h, {0});
  if (h.numel() == 0) {
    const auto zeros = [&] { return torch::stable::new_zeros(gain, {S, D}); };
    return {d_x, d_y, gated ? zeros() : torch::stable::new_empty(gain, {0}), zeros(), zeros()};
  }
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const Groups groups(h.numel() / D, S);
  const PartTensors sums(gain, gated ? 3 : 2, groups);
  with_element(kOp, h, [&]<typename T>(T*) {
    const Backward<T> call{
        .d_h = static_cast<const T*>(d_h.const_data_ptr()),
        .d_normed = static_cast<const T*>(d_normed.const_data_ptr()),
        .h = static_cast<const T*>(h.const_data_ptr()),
        .y = gated ? static_cast<const T*>(y->const_data_ptr()) : nullptr,
        .gate = gated ? static_cast<const float*>(gate->const_data_ptr()) : nullptr,
        .gain = static_cast<const float*>(gain.const_data_ptr()),
        .d_x = static_cast<T*>(d_x.mutable_data_ptr()),
        .d_y = static_cast<T*>(d_y.mutable_data_ptr()),
        .parts = sums.parts,
        .groups = groups,
        .channels = D,
        .rms = rms,
        .eps = static_cast<float>(eps),
        .stream = current_stream(h)};
    launch_rows<T>(call, D,
                   aligned16({call.d_h, call.d_normed, call.h, call.y, call.gate, call.gain,
                              call.d_x, call.d_y}));
    sum_groups(sums.parts, gated ? 3 : 2, groups, D, call.stream);
  });
  check_launch(kBackwardOp);
  return {d_x, d_y, sums.sums[2], sums.sums[0], sums.sums[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("gated_residual_norm", TORCH_BOX(&gated_residual_norm_cuda));
  m.impl("gated_residual_norm_out", TORCH_BOX(&gated_residual_norm_out_cuda));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&gated_residual_norm_backward_cuda));
}

}  // namespace clipflow
