// One sampler step on CUDA; the op and its formulas are defined in clipflow/ops/flow_step.py.
//
// Bytes moved: reads latents, velocity and, where there is one, previous; writes the new latents,
// the model's input and what is kept. Every product and sum is rounded for itself, as in eager
// PyTorch: the intrinsics are never contracted.

#include <algorithm>
#include <optional>

#include "common/cuda_launch.h"
#include "common/dispatch.cuh"
#include "common/flow_step_call.h"
#include "common/rows.cuh"
#include "common/tensor.h"

namespace clipflow {
namespace {

constexpr int kThreads = 256;

// Numbers of a call: from the host, or from four float64 on the device.
struct Coefficients {
  float step, gain, keep, rest;
};

struct Step {
  const float* latents;  // [samples, values]
  const float* previous;       // as latents, or null
  const double* coefficients;  // [4], or null: `given`
  const float* guidances;      // [samples], or null: `guidance`
  float* out;                  // as latents
  float* kept;                 // as latents, or null
  Coefficients given;
  float guidance;
  int64_t total, values;  // of all samples and of each
  bool guided, dpmpp_2m;
};

__device__ inline float plus_product(float a, float b, float c) {
  return __fadd_rn(a, __fmul_rn(b, c));
}

// N values as floats: N fills 16 bytes of the element type, so up to two 16-byte words of float.
template <typename T, int N>
__device__ inline void read(const T* from, float* values) {
  constexpr int kPart = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int part = 0; part < N; part += kPart) {
    const Pack<T, kPart> pack = load<T, kPart>(from + part);
#pragma unroll
    for (int i = 0; i < kPart; ++i) values[part + i] = to_float(pack.at[i]);
  }
}

template <typename T, int N>
__device__ inline void write(T* to, const float* values) {
  constexpr int kPart = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int part = 0; part < N; part += kPart) store<T, kPart>(to + part, values + part);
}

template <typename V, int N, typename M>
__global__ void __launch_bounds__(kThreads)
    flow_step_fwd_kernel(const V* __restrict__ velocity, M* __restrict__ model_input, Step a) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (at >= a.total) return;
  Coefficients c = a.given;
  if (a.coefficients != nullptr)
    c = {static_cast<float>(a.coefficients[0]), static_cast<float>(a.coefficients[1]),
         static_cast<float>(a.coefficients[2]), static_cast<float>(a.coefficients[3])};

  float x[N], v[N], other[N];
  read<float, N>(a.latents + at, x);
  read<V, N>(velocity + at, v);
  if (a.guided) {
    const float guidance = a.guidances != nullptr ? a.guidances[at / a.values] : a.guidance;
    read<V, N>(velocity + a.total + at, other);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = plus_product(v[i], guidance, __fsub_rn(other[i], v[i]));
  }
  const bool second = a.previous != nullptr;
  if (second) read<float, N>(a.previous + at, other);

  if (a.dpmpp_2m) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = plus_product(x[i], c.step, v[i]);
      const float target =
          second ? plus_product(v[i], c.gain, __fsub_rn(v[i], other[i])) : v[i];
      x[i] = __fadd_rn(__fmul_rn(c.keep, x[i]), __fmul_rn(c.rest, target));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      x[i] = plus_product(x[i], c.step, second ? __fadd_rn(other[i], v[i]) : v[i]);
  }

  write<float, N>(a.out + at, x);
  if (a.kept != nullptr) write<float, N>(a.kept + at, v);
  if (model_input == nullptr) return;
  write<M, N>(model_input + at, x);
  if (a.guided) write<M, N>(model_input + a.total + at, x);
}

template <typename V, typename M>
void launch(const V* velocity, M* model_input, const Step& a, cudaStream_t stream) {
  constexpr int kPack = 16 / static_cast<int>(std::min(sizeof(V), sizeof(M)));
  // The parts of a doubled tensor and the samples begin at whole packs.
  const bool packed = a.values % kPack == 0 &&
                      aligned16({velocity, model_input, a.latents, a.previous, a.out, a.kept});
  const int64_t threads = packed ? a.total / kPack : a.total;
  const auto grid = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  if (packed)
    flow_step_fwd_kernel<V, kPack, M><<<grid, kThreads, 0, stream>>>(velocity, model_input, a);
  else
    flow_step_fwd_kernel<V, 1, M><<<grid, kThreads, 0, stream>>>(velocity, model_input, a);
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

Step step_of(const FlowCall& call) {
  const int64_t total = call.latents.numel();
  return {
      .latents = static_cast<const float*>(call.latents.data_ptr()),
      .previous = static_cast<const float*>(data_of(call.previous)),
      .coefficients = static_cast<const double*>(data_of(call.coefficients)),
      .guidances = static_cast<const float*>(data_of(call.guidances)),
      .out = static_cast<float*>(call.new_latents.data_ptr()),
      .kept = static_cast<float*>(const_cast<void*>(data_of(call.kept))),
      .given = {static_cast<float>(call.step), static_cast<float>(call.gain),
                static_cast<float>(call.keep), static_cast<float>(call.rest)},
      .guidance = static_cast<float>(call.guidance),
      .total = total,
      .values = total / call.latents.size(0),
      .guided = call.guided,
      .dpmpp_2m = call.dpmpp_2m,
  };
}

void flow_step_cuda(const Tensor& latents, const Tensor& velocity,
                    const std::optional<Tensor>& previous,
                    const std::optional<Tensor>& coefficients,
                    const std::optional<Tensor>& guidances, double step, double gain, double keep,
                    double rest, double guidance, bool dpmpp_2m, Tensor new_latents,
                    std::optional<Tensor> model_input, std::optional<Tensor> kept) {
  const FlowCall call =
      flow_call(latents, velocity, previous, coefficients, guidances, step, gain, keep, rest,
                guidance, dpmpp_2m, new_latents, model_input, kept);
  STD_TORCH_CHECK(latents.scalar_type() == torch::headeronly::ScalarType::Float,
                  "flow_step: latents must be float32 on CUDA");
  if (latents.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(latents.get_device_index());
  const Step work = step_of(call);
  const cudaStream_t stream = current_stream(latents);
  with_element("flow_step", call.velocity, [&]<typename V>(V*) {
    with_element("flow_step", model_input ? *model_input : call.velocity, [&]<typename M>(M*) {
      launch<V, M>(static_cast<const V*>(call.velocity.data_ptr()),
                   static_cast<M*>(const_cast<void*>(data_of(call.model_input))), work, stream);
    });
  });
  check_launch("flow_step");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) { m.impl("flow_step", TORCH_BOX(&flow_step_cuda)); }

}  // namespace clipflow
