// ReLU linear attention on the CPU; the op is defined in clipflow/ops/linear_attention.py, the
// arithmetic in linear_attention_rows.cpp. This file checks, allocates and shares the heads among
// threads.

#include "cpu/linear_attention_rows.h"

#include <memory>

#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

const LinearAttentionRows& rows() { return CLIPFLOW_CHOOSE(linear_attention_rows); }

HeadView view_of(const char* name, const Tensor& tensor, const Tensor& q) {
  STD_TORCH_CHECK(tensor.dim() == 4, "linear_attention: ", name, " must be [B, N, H, K]");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size(d) == q.size(d), "linear_attention: ", name,
                    " must have the shape of q");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(3) == 1 || tensor.stride(3) == 1,
                  "linear_attention: ", name, " must have contiguous heads");
  STD_TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), "linear_attention: ", name,
                  " must have the dtype of q");
  STD_TORCH_CHECK(tensor.is_cpu(), "linear_attention: ", name, " must be on the CPU");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Writes y, which is contiguous and like v.
void write_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, double eps,
                            const Tensor& y) {
  LinearAttention call = {
      .q = view_of("q", q, q),
      .k = view_of("k", k, q),
      .v = view_of("v", v, q),
      .y = nullptr,
      .tokens = q.size(1),
      .heads = q.size(2),
      .width = q.size(3),
      .eps = eps,
  };
  const int64_t dtype = dtype_index("linear_attention", q);
  if (q.numel() == 0) return;
  call.y = y.mutable_data_ptr();
  const auto forward = rows().forward[dtype];
  const int64_t rows_of_scratch = call.width + 1 + 2 * kAttentionChunk;
  // Doubles hold the sums of every dtype; registers want 64-byte alignment for full speed.
  const int64_t scratch = rows_of_scratch * attention_padded(call.width) + 8;
  const int64_t work = call.tokens * call.width * (1 + call.width / 8);
  for_items(q.size(0) * call.heads, work, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> buffer(new double[scratch]);
    const auto address = reinterpret_cast<uintptr_t>(buffer.get());
    forward(call, begin, end, reinterpret_cast<void*>((address + 63) / 64 * 64));
  });
}

Tensor linear_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  Tensor y = torch::stable::new_empty(v, v.sizes());
  write_linear_attention(q, k, v, eps, y);
  return y;
}

void linear_attention_out_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double eps,
                              Tensor y) {
  view_of("out", y, q);
  STD_TORCH_CHECK(y.is_contiguous(), "linear_attention: out must be contiguous");
  write_linear_attention(q, k, v, eps, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&linear_attention_cpu));
  m.impl("linear_attention_out", TORCH_BOX(&linear_attention_out_cpu));
}

}  // namespace clipflow
