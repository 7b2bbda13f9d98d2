// SwiGLU on CUDA, forward and backward; the op is defined in clipflow/ops/swiglu.py.
//
//   y = a / (1 + exp(-a)) * b
//   d_b = grad * a * s,   d_a = grad * b * s * (1 + a * (1 - s)),   s = 1 / (1 + exp(-a))
//
// Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
// Bytes moved: forward reads a and b and writes y; backward reads grad, a and b and writes d_a and
// d_b. Computed in float32 and rounded once; in float32, y takes the roundings of PyTorch's own.

#include <algorithm>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/dispatch.cuh"
#include "common/row_stride.h"
#include "common/rows.cuh"
#include "common/tensor.h"

namespace clipflow {
namespace {

constexpr int kThreads = 256;

struct Shape {
  int64_t rows, width;  // of all tensors
  int64_t a_stride, b_stride, grad_stride;  // elements from one row to the next
  unsigned blocks;  // of a row
};

// Where a thread's pack lies; false past the row's end.
template <int N>
__device__ inline bool place(const Shape& shape, int64_t& row, int64_t& column) {
  row = blockIdx.x / shape.blocks;
  const unsigned block = blockIdx.x % shape.blocks;
  column = (static_cast<int64_t>(block) * blockDim.x + threadIdx.x) * N;
  return column < shape.width;
}

// As store() of common/rows.cuh, whose 16 bytes nvcc takes apart here.
template <typename T, int N>
__device__ inline void store_whole(T* to, const float* values) {
  if constexpr (sizeof(T) * N == 16) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = from_float<T>(values[i]);
    __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&pack));
  } else {
    store<T, N>(to, values);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_fwd_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y,
                      Shape shape) {
  int64_t row, column;
  if (!place<N>(shape, row, column)) return;
  const Pack<T, N> gate = load<T, N>(a + row * shape.a_stride + column);
  const Pack<T, N> other = load<T, N>(b + row * shape.b_stride + column);
  float values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = to_float(gate.at[i]);
    values[i] = __fmul_rn(__fdiv_rn(x, 1.f + expf(-x)), to_float(other.at[i]));
  }
  store_whole<T, N>(y + row * shape.width + column, values);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ a,
                      const T* __restrict__ b, T* __restrict__ d_a, T* __restrict__ d_b,
                      Shape shape) {
  int64_t row, column;
  if (!place<N>(shape, row, column)) return;
  const Pack<T, N> seed = load<T, N>(grad + row * shape.grad_stride + column);
  const Pack<T, N> gate = load<T, N>(a + row * shape.a_stride + column);
  const Pack<T, N> other = load<T, N>(b + row * shape.b_stride + column);
  float to_a[N], to_b[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = to_float(gate.at[i]), g = to_float(seed.at[i]);
    const float sigmoid = __fdividef(1.f, 1.f + expf(-x));  // has no slow path to branch to
    to_a[i] = g * to_float(other.at[i]) * (sigmoid * (1.f + x * (1.f - sigmoid)));
    to_b[i] = g * (x * sigmoid);
  }
  store_whole<T, N>(d_a + row * shape.width + column, to_a);
  store_whole<T, N>(d_b + row * shape.width + column, to_b);
}

void check_like(const char* op, const char* name, const Tensor& a, const Tensor& tensor) {
  const auto wanted = a.sizes(), found = tensor.sizes();
  STD_TORCH_CHECK(std::equal(wanted.begin(), wanted.end(), found.begin(), found.end()), op, ": ",
                  name, " must have the shape of a");
  STD_TORCH_CHECK(tensor.scalar_type() == a.scalar_type(), op, ": ", name,
                  " must have the dtype of a");
  STD_TORCH_CHECK(tensor.is_cpu() == a.is_cpu(), op, ": ", name, " must be on the device of a");
}

// Rows as they lie in memory; where nothing has gaps, everything is one row.
Shape shape_of(const Tensor& a, int64_t a_stride, int64_t b_stride, int64_t grad_stride) {
  const int64_t width = a.size(a.dim() - 1);
  if (a_stride == width && b_stride == width && grad_stride == width)
    return {1, a.numel(), a.numel(), a.numel(), a.numel(), 0};
  return {a.numel() / width, width, a_stride, b_stride, grad_stride, 0};
}

bool packs(const Shape& shape, int pack, std::initializer_list<const void*> pointers) {
  return aligned16(pointers) && shape.width % pack == 0 && shape.a_stride % pack == 0 &&
         shape.b_stride % pack == 0 && shape.grad_stride % pack == 0;
}

// Threads of a block: as many as share a row's packs evenly.
template <typename Launch>
void launch(Shape shape, int pack, Launch run) {
  const int64_t items = (shape.width + pack - 1) / pack;
  shape.blocks = static_cast<unsigned>((items + kThreads - 1) / kThreads);
  const int64_t share = (items + shape.blocks - 1) / shape.blocks;
  const auto threads = static_cast<unsigned>((share + kWarp - 1) / kWarp * kWarp);
  run(shape, static_cast<unsigned>(shape.rows * shape.blocks), threads);
}

// Writes y, which is contiguous and like a.
void write_swiglu(const Tensor& a_given, const Tensor& b_given, const Tensor& y) {
  STD_TORCH_CHECK(a_given.dim() > 0, "swiglu: a must have a dimension");
  check_like("swiglu", "b", a_given, b_given);
  if (y.numel() == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(a_given.get_device_index());
  const Tensor a = with_equal_rows(a_given), b = with_equal_rows(b_given);
  const int64_t a_stride = row_stride(a);
  const Shape whole = shape_of(a, a_stride, row_stride(b), a_stride);
  const cudaStream_t stream = current_stream(a);
  with_element("swiglu", a, [&]<typename T>(T*) {
    const T* gate = static_cast<const T*>(a.data_ptr());
    const T* other = static_cast<const T*>(b.data_ptr());
    T* to = static_cast<T*>(y.data_ptr());
    constexpr int kPack = 16 / sizeof(T);
    const bool vector = packs(whole, kPack, {gate, other, to});
    launch(whole, vector ? kPack : 1, [&](const Shape& shape, unsigned grid, unsigned threads) {
      if (vector)
        swiglu_fwd_kernel<T, kPack><<<grid, threads, 0, stream>>>(gate, other, to, shape);
      else
        swiglu_fwd_kernel<T, 1><<<grid, threads, 0, stream>>>(gate, other, to, shape);
    });
  });
  check_launch("swiglu");
}

Tensor swiglu_cuda(const Tensor& a, const Tensor& b) {
  Tensor y = torch::stable::new_empty(a, a.sizes());
  write_swiglu(a, b, y);
  return y;
}

void swiglu_out_cuda(const Tensor& a, const Tensor& b, Tensor y) {
  check_like("swiglu", "out", a, y);
  STD_TORCH_CHECK(y.is_contiguous(), "swiglu: out must be contiguous");
  write_swiglu(a, b, y);
}

std::tuple<Tensor, Tensor> swiglu_backward_cuda(const Tensor& grad_given, const Tensor& a_given,
                                                const Tensor& b_given) {
  STD_TORCH_CHECK(a_given.dim() > 0, "swiglu_backward: a must have a dimension");
  check_like("swiglu_backward", "b", a_given, b_given);
  check_like("swiglu_backward", "grad", a_given, grad_given);
  Tensor d_a = torch::stable::new_empty(a_given, a_given.sizes());
  Tensor d_b = torch::stable::new_empty(a_given, a_given.sizes());
  if (d_a.numel() == 0) return {d_a, d_b};

  const torch::stable::accelerator::DeviceGuard guard(a_given.get_device_index());
  const Tensor a = with_equal_rows(a_given), b = with_equal_rows(b_given);
  const Tensor grad = with_equal_rows(grad_given);
  const Shape whole = shape_of(a, row_stride(a), row_stride(b), row_stride(grad));
  const cudaStream_t stream = current_stream(a);
  with_element("swiglu_backward", a, [&]<typename T>(T*) {
    const T* seed = static_cast<const T*>(grad.data_ptr());
    const T* gate = static_cast<const T*>(a.data_ptr());
    const T* other = static_cast<const T*>(b.data_ptr());
    T* to_a = static_cast<T*>(d_a.data_ptr());
    T* to_b = static_cast<T*>(d_b.data_ptr());
    constexpr int kPack = 16 / sizeof(T);
    const bool vector = packs(whole, kPack, {seed, gate, other, to_a, to_b});
    launch(whole, vector ? kPack : 1, [&](const Shape& shape, unsigned grid, unsigned threads) {
      if (vector)
        swiglu_bwd_kernel<T, kPack>
            <<<grid, threads, 0, stream>>>(seed, gate, other, to_a, to_b, shape);
      else
        swiglu_bwd_kernel<T, 1>
            <<<grid, threads, 0, stream>>>(seed, gate, other, to_a, to_b, shape);
    });
  });
  check_launch("swiglu_backward");
  return {d_a, d_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cuda));
  m.impl("swiglu_out", TORCH_BOX(&swiglu_out_cuda));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cuda));
}

}  // namespace clipflow
