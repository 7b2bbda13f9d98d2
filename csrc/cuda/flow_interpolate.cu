// Noisy data and target velocity on CUDA; the op is defined in clipflow/ops/flow_interpolate.py.
//
//   noisy = (1 - s) * data + s * noise,   target = noise - data
//
// Bytes moved: reads data and noise, writes noisy and target. Every product and sum is rounded for
// itself, as in eager PyTorch: the intrinsics are never contracted.

#include "common/cuda_launch.h"
#include "common/dispatch.cuh"
#include "common/flow_interpolate_call.h"
#include "common/rows.cuh"
#include "common/tensor.h"

namespace clipflow {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    flow_interpolate_fwd_kernel(const T* __restrict__ data, const T* __restrict__ noise,
                                const float* __restrict__ sigmas, T* __restrict__ noisy,
                                T* __restrict__ target, int64_t total, int64_t values) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (at >= total) return;
  const float sigma = sigmas[at / values], rest = __fsub_rn(1.f, sigma);
  const Pack<T, N> data_pack = load<T, N>(data + at), noise_pack = load<T, N>(noise + at);
  float mixed[N], difference[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = to_float(data_pack.at[i]), z = to_float(noise_pack.at[i]);
    mixed[i] = __fadd_rn(__fmul_rn(rest, x), __fmul_rn(sigma, z));
    difference[i] = __fsub_rn(z, x);
  }
  store<T, N>(noisy + at, mixed);
  store<T, N>(target + at, difference);
}

template <typename T>
void launch(const Tensor& data, const Tensor& noise, const Tensor& sigmas, Tensor& noisy,
            Tensor& target) {
  constexpr int kPack = 16 / sizeof(T);
  const T* x = static_cast<const T*>(data.data_ptr());
  const T* z = static_cast<const T*>(noise.data_ptr());
  const float* s = static_cast<const float*>(sigmas.data_ptr());
  T* y = static_cast<T*>(noisy.data_ptr());
  T* v = static_cast<T*>(target.data_ptr());
  const int64_t total = data.numel(), values = total / data.size(0);
  const bool packed = values % kPack == 0 && aligned16({x, z, y, v});
  const int64_t threads = packed ? total / kPack : total;
  const auto grid = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  const cudaStream_t stream = current_stream(data);
  if (packed)
    flow_interpolate_fwd_kernel<T, kPack>
        <<<grid, kThreads, 0, stream>>>(x, z, s, y, v, total, values);
  else
    flow_interpolate_fwd_kernel<T, 1><<<grid, kThreads, 0, stream>>>(x, z, s, y, v, total, values);
}

void flow_interpolate_cuda(const Tensor& data, const Tensor& noise, const Tensor& sigmas,
                           Tensor noisy, Tensor target) {
  check_flow_interpolate(data, noise, sigmas, noisy, target);
  if (data.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(data.get_device_index());
  with_element("flow_interpolate", data,
               [&]<typename T>(T*) { launch<T>(data, noise, sigmas, noisy, target); });
  check_launch("flow_interpolate");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("flow_interpolate", TORCH_BOX(&flow_interpolate_cuda));
}

}  // namespace clipflow
