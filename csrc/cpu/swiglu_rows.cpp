// SwiGLU of single values on the CPU, compiled once per instruction set.
//
//   silu = a / (1 + e^-a),   y = silu * b
//   d_b = grad * silu,   d_a = grad * b * s * (1 + a * (1 - s)),   s = 1 / (1 + e^-a)
//
// Every value takes the same steps, wherever it lies: tails go through a padded register.

#include "cpu/swiglu_rows.h"

#include "common/exponential.h"
#include "common/lanes.h"
#include "common/stream.h"

namespace clipflow {
namespace {

// Calls body(row, first column, columns) for each of the blocks [begin, end).
template <typename F>
CLIPFLOW_INLINE void for_blocks(const SwiGLU& call, int64_t begin, int64_t end, F body) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / call.blocks;
    const int64_t column = (block - row * call.blocks) * kSwiGLUBlock;
    const int64_t left = call.width - column;
    body(row, column, left < kSwiGLUBlock ? left : kSwiGLUBlock);
  }
}

template <typename T, bool kStreamed>
CLIPFLOW_INLINE void put(T* to, typename Wide<T>::Lanes value, int64_t count) {
  if (kStreamed && count == kLanes<typename Wide<T>::Lanes>)
    stream(to, value);
  else
    store_first(to, value, count);
}

template <typename T, bool kStreamed>
CLIPFLOW_INLINE void forward_blocks(const SwiGLU& call, int64_t begin, int64_t end) {
  using Lanes = typename Wide<T>::Lanes;
  for_blocks(call, begin, end, [&](int64_t row, int64_t column, int64_t columns) {
    const T* a = static_cast<const T*>(call.a) + row * call.a_stride + column;
    const T* b = static_cast<const T*>(call.b) + row * call.b_stride + column;
    T* y = static_cast<T*>(call.y) + row * call.width + column;
    for_lanes<Lanes>(columns, [&](int64_t d, int64_t count) {
      const Lanes x = load_first(a + d, count);
      const Lanes silu = x / (exp_above_minus_86(-x) + 1);
      put<T, kStreamed>(y + d, silu * load_first(b + d, count), count);
    });
  });
  if (kStreamed) stream_end();
}

template <typename T, bool kStreamed>
CLIPFLOW_INLINE void backward_blocks(const SwiGLU& call, int64_t begin, int64_t end) {
  using Lanes = typename Wide<T>::Lanes;
  for_blocks(call, begin, end, [&](int64_t row, int64_t column, int64_t columns) {
    const T* a = static_cast<const T*>(call.a) + row * call.a_stride + column;
    const T* b = static_cast<const T*>(call.b) + row * call.b_stride + column;
    const T* grad = static_cast<const T*>(call.grad) + row * call.grad_stride + column;
    T* d_a = static_cast<T*>(call.d_a) + row * call.width + column;
    T* d_b = static_cast<T*>(call.d_b) + row * call.width + column;
    for_lanes<Lanes>(columns, [&](int64_t d, int64_t count) {
      const Lanes x = load_first(a + d, count);
      const Lanes g = load_first(grad + d, count);
      const Lanes sigmoid = 1 / (exp_above_minus_86(-x) + 1);
      const Lanes slope = sigmoid * (x * (1 - sigmoid) + 1);
      put<T, kStreamed>(d_a + d, g * load_first(b + d, count) * slope, count);
      put<T, kStreamed>(d_b + d, g * (x * sigmoid), count);
    });
  });
  if (kStreamed) stream_end();
}

template <typename T>
void forward(const SwiGLU& call, int64_t begin, int64_t end) {
  if (call.streamed)
    forward_blocks<T, true>(call, begin, end);
  else
    forward_blocks<T, false>(call, begin, end);
}

template <typename T>
void backward(const SwiGLU& call, int64_t begin, int64_t end) {
  if (call.streamed)
    backward_blocks<T, true>(call, begin, end);
  else
    backward_blocks<T, false>(call, begin, end);
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const SwiGLURows swiglu_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
    {backward<float>, backward<BFloat16>, backward<Float16>, backward<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
