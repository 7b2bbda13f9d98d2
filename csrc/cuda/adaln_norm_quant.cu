// The quantizing norm on CUDA; the op is defined in clipflow/ops/adaln_norm_quant.py.
//
//   y = norm(x) * weight * (1 + scale + table[1]) + shift + table[0], as adaln_norm
//   scales = max |y| / most,   values = round(y / scales), half to even
//
// Source: per-token symmetric quantization of Dettmers et al., "LLM.int8()" (2022), section 2.1,
// and Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
// Bytes moved: reads x and writes a byte a value. Where the GPU has no instruction for
// float8_e4m3fn (before compute capability 8.9), cuda_fp8.h converts by integer arithmetic.

#include <cuda_fp8.h>

#include <cfloat>
#include <tuple>
#include <vector>

#include "common/cuda_launch.h"
#include "common/norm.cuh"

namespace clipflow {

// The 8-bit types are stored by a thread's packs as the other types are: 4 or 8 values a store.
template <>
__device__ inline int8_t from_float<int8_t>(float value) {
  return static_cast<int8_t>(__float2int_rn(value));
}
template <>
__device__ inline __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float value) {
  return __nv_fp8_e4m3(value);
}

namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "adaln_norm_quant";
constexpr float kMostInt8 = 127.f, kMostFloat8 = 448.f;

// Shape suffixes: R = tokens of all samples, D = channels, S = rows of modulation.
template <typename T>
struct Forward {
  static constexpr int kHeld = kVectorChannels, kScalars = 8;
  const T* x;
  void* values;
  float* scales;
  Modulation<T> modulation;
  int64_t tokens;    // R
  int64_t group;     // R / S
  int64_t channels;  // D
  bool float8;       // not int8
  bool rms;
  float eps;
  cudaStream_t stream;

  template <int N, int V>
  void rows() const;
  void long_rows() const;
};

// The largest value of the team's row, in every thread.
__device__ __forceinline__ float team_max(float value, float2* buffer) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  if (blockDim.x == kWarp) return value;
  if (threadIdx.x % kWarp == 0) buffer[threadIdx.x / kWarp].x = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) value = fmaxf(value, buffer[warp].x);
  return value;
}

template <typename T, typename Row>
__device__ __forceinline__ void forward_token(const Forward<T>& a, const Row& row, int64_t token,
                                              TeamSums sums) {
  const int64_t sample = token / a.group;
  const auto x = row.load(a.x + token * a.channels);
  const auto scale = row.load(a.modulation.scale_row(sample));
  const auto shift = row.load_optional(a.modulation.shift_row(sample));
  const Statistics of = statistics(row, x, a.rms, a.eps, sums);
  const auto modulate = modulator(a.modulation, row, shift, scale);
  const auto y =
      row.keep([=](Place at) { return modulate(at, (x(at) - of.mean) * of.rstd); });

  float largest = 0.f;
  row.each([&](Place at) {
    const float magnitude = fabsf(y(at));
    // fmaxf leaves NaN out: it counts as infinity, and both give the scale NaN.
    largest = fmaxf(largest, magnitude <= FLT_MAX ? magnitude : INFINITY);
  });
  largest = team_max(largest, sums.next());
  const float quotient = fmaxf(largest / (a.float8 ? kMostFloat8 : kMostInt8), FLT_MIN);
  const float token_scale = largest == INFINITY ? NAN : quotient;
  if (threadIdx.x == 0) a.scales[token] = token_scale;
  const float factor = 1.f / token_scale;
  const auto value = [&](Place at) { return y(at) * factor; };
  if (a.float8) {
    row.store(static_cast<__nv_fp8_e4m3*>(a.values) + token * a.channels, value);
  } else {
    row.store(static_cast<int8_t*>(a.values) + token * a.channels, value);
  }
}

// A team that shares its block with others is one warp, and meets no barrier. The 1 of the launch
// bounds: without it ptxas aims at two blocks a multiprocessor and spills.
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) adaln_norm_quant_fwd_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token < a.tokens) forward_token(a, HeldRow<N, V>(a.channels), token, {buffers});
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) adaln_norm_quant_fwd_long_kernel(Forward<T> a) {
  __shared__ float2 buffers[2][kMaxThreads / kWarp];
  forward_token(a, StreamedRow(a.channels), blockIdx.x, {buffers});
}

template <typename T>
template <int N, int V>
void Forward<T>::rows() const {
  const dim3 block = row_block<N, V>(channels);
  adaln_norm_quant_fwd_kernel<T, N, V><<<row_grid(tokens, block.y), block, 0, stream>>>(*this);
}

template <typename T>
void Forward<T>::long_rows() const {
  adaln_norm_quant_fwd_long_kernel<T><<<row_grid(tokens, 1), kMaxThreads, 0, stream>>>(*this);
}

using Optional = std::optional<Tensor>;

// Writes values, in `dtype` and the shape of x, and scales, float32, one a token; both contiguous.
void write_adaln_norm_quant(const Tensor& x, const Optional& shift, const Tensor& scale,
                            const Optional& weight, const Optional& table, bool rms, double eps,
                            ScalarType dtype, const Tensor& values, const Tensor& scales) {
  check_rows_like(kOp, "x", x, x);
  STD_TORCH_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn, kOp,
                  ": dtype must be int8 or float8_e4m3fn");
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_element(kOp, x, [&]<typename T>(T*) {
    const int64_t D = x.size(x.dim() - 1), R = x.numel() / D;
    const Forward<T> call{.x = static_cast<const T*>(x.const_data_ptr()),
                          .values = values.mutable_data_ptr(),
                          .scales = static_cast<float*>(scales.mutable_data_ptr()),
                          .modulation = modulation_of<T>(kOp, x, shift, scale, weight, table),
                          .tokens = R,
                          .group = R / scale.size(0),
                          .channels = D,
                          .float8 = dtype == ScalarType::Float8_e4m3fn,
                          .rms = rms,
                          .eps = static_cast<float>(eps),
                          .stream = current_stream(x)};
    launch_rows<T>(call, D, aligned(call.modulation) && aligned16({call.x, call.values}));
  });
  check_launch(kOp);
}

std::tuple<Tensor, Tensor> adaln_norm_quant_cuda(const Tensor& x, const Optional& shift,
                                                 const Tensor& scale, const Optional& weight,
                                                 const Optional& table, bool rms, double eps,
                                                 ScalarType dtype) {
  check_rows_like(kOp, "x", x, x);
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor values = torch::stable::new_empty(x, sizes, dtype);
  Tensor scales =
      torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, ScalarType::Float);
  write_adaln_norm_quant(x, shift, scale, weight, table, rms, eps, dtype, values, scales);
  return {values, scales};
}

void adaln_norm_quant_out_cuda(const Tensor& x, const Optional& shift, const Tensor& scale,
                               const Optional& weight, const Optional& table, bool rms, double eps,
                               ScalarType dtype, Tensor values, Tensor scales) {
  STD_TORCH_CHECK(values.scalar_type() == dtype && values.numel() == x.numel() &&
                      values.is_contiguous() && values.is_cuda(),
                  kOp, ": values must be contiguous, in dtype and the shape of x");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                      scales.is_cuda() && scales.numel() * x.size(x.dim() - 1) == x.numel(),
                  kOp, ": scales must be contiguous float32, one for each token of x");
  write_adaln_norm_quant(x, shift, scale, weight, table, rms, eps, dtype, values, scales);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("adaln_norm_quant", TORCH_BOX(&adaln_norm_quant_cuda));
  m.impl("adaln_norm_quant_out", TORCH_BOX(&adaln_norm_quant_out_cuda));
}

}  // namespace clipflow
