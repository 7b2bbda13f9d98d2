// SwiGLU on the CPU; the op is defined in clipflow/ops/swiglu.py, the arithmetic in
// swiglu_rows.cpp. This file checks, allocates and shares the work among threads.

#include "cpu/swiglu_rows.h"

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "common/parallel.h"
#include "common/row_stride.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

// Outputs of so many bytes go past the caches.
constexpr int64_t kStreamedBytes = 16 << 20;

const SwiGLURows& rows() { return CLIPFLOW_CHOOSE(swiglu_rows); }

void check_like(const char* op, const char* name, const Tensor& a, const Tensor& tensor) {
  const auto wanted = a.sizes(), found = tensor.sizes();
  STD_TORCH_CHECK(std::equal(wanted.begin(), wanted.end(), found.begin(), found.end()), op, ": ",
                  name, " must have the shape of a");
  STD_TORCH_CHECK(tensor.scalar_type() == a.scalar_type(), op, ": ", name,
                  " must have the dtype of a");
  STD_TORCH_CHECK(tensor.is_cpu() == a.is_cpu(), op, ": ", name, " must be on the device of a");
}

bool worth_streaming(const Tensor& y, int64_t width) {
  const int64_t item = y.element_size();
  return y.numel() * item >= kStreamedBytes && width * item % 64 == 0 &&
         reinterpret_cast<std::uintptr_t>(y.const_data_ptr()) % 64 == 0;
}

// Where nothing has gaps, everything is one row.
int64_t width_of(const Tensor& a, std::initializer_list<int64_t> strides) {
  const int64_t width = a.size(a.dim() - 1);
  const bool dense = std::all_of(strides.begin(), strides.end(),
                                 [width](int64_t stride) { return stride == width; });
  return dense ? a.numel() : width;
}

template <typename Kernel>
void run(Kernel kernel, SwiGLU call, const Tensor& a) {
  call.blocks = (call.width + kSwiGLUBlock - 1) / kSwiGLUBlock;
  for_items(a.numel() / call.width * call.blocks, std::min(call.width, kSwiGLUBlock),
            [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// Writes y, which is contiguous and like a.
void write_swiglu(const Tensor& a_given, const Tensor& b_given, const Tensor& y) {
  STD_TORCH_CHECK(a_given.dim() > 0, "swiglu: a must have a dimension");
  check_like("swiglu", "b", a_given, b_given);
  const auto forward = rows().forward[dtype_index("swiglu", a_given)];
  if (y.numel() == 0) return;
  const Tensor a = with_equal_rows(a_given), b = with_equal_rows(b_given);
  SwiGLU call = {};
  call.a = a.const_data_ptr();
  call.b = b.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.a_stride = row_stride(a);
  call.b_stride = row_stride(b);
  call.width = width_of(a, {call.a_stride, call.b_stride});
  call.streamed = worth_streaming(y, call.width);
  run(forward, call, a);
}

Tensor swiglu_cpu(const Tensor& a, const Tensor& b) {
  Tensor y = torch::stable::new_empty(a, a.sizes());
  write_swiglu(a, b, y);
  return y;
}

void swiglu_out_cpu(const Tensor& a, const Tensor& b, Tensor y) {
  check_like("swiglu", "out", a, y);
  STD_TORCH_CHECK(y.is_contiguous(), "swiglu: out must be contiguous");
  write_swiglu(a, b, y);
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& grad_given, const Tensor& a_given,
                                               const Tensor& b_given) {
  STD_TORCH_CHECK(a_given.dim() > 0, "swiglu_backward: a must have a dimension");
  check_like("swiglu_backward", "b", a_given, b_given);
  check_like("swiglu_backward", "grad", a_given, grad_given);
  const auto backward = rows().backward[dtype_index("swiglu_backward", a_given)];
  Tensor d_a = torch::stable::new_empty(a_given, a_given.sizes());
  Tensor d_b = torch::stable::new_empty(a_given, a_given.sizes());
  if (d_a.numel() == 0) return {d_a, d_b};
  const Tensor a = with_equal_rows(a_given), b = with_equal_rows(b_given);
  const Tensor grad = with_equal_rows(grad_given);
  SwiGLU call = {};
  call.a = a.const_data_ptr();
  call.b = b.const_data_ptr();
  call.grad = grad.const_data_ptr();
  call.d_a = d_a.mutable_data_ptr();
  call.d_b = d_b.mutable_data_ptr();
  call.a_stride = row_stride(a);
  call.b_stride = row_stride(b);
  call.grad_stride = row_stride(grad);
  call.width = width_of(a, {call.a_stride, call.b_stride, call.grad_stride});
  call.streamed = worth_streaming(d_a, call.width) && worth_streaming(d_b, call.width);
  run(backward, call, a);
  return {d_a, d_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_out", TORCH_BOX(&swiglu_out_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}

}  // namespace clipflow
