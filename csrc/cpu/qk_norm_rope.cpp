// Normalization and rotation of queries and keys on the CPU; the op is defined in
// clipflow/ops/qk_norm_rope.py, the arithmetic in qk_norm_rope_rows.cpp. This file checks,
// allocates and shares the work among threads.

#include "cpu/qk_norm_rope_rows.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "common/parallel.h"
#include "common/qk_sides.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

// Outputs of so many bytes go past the caches.
constexpr int64_t kStreamedBytes = 16 << 20;

using Optional = std::optional<Tensor>;

const QKNormRopeRows& rows() { return CLIPFLOW_CHOOSE(qk_norm_rope_rows); }

QKSide side_of(const QKTensors& given, const Tensor& y, bool across_heads) {
  const Tensor& x = given.x;
  const int64_t heads = x.size(2), width = x.size(3);
  const int64_t group = across_heads ? heads * width : width;
  return {
      .x = x.const_data_ptr(),
      .weight = qk_parameter("weight", given.weight, x, group),
      .bias = qk_parameter("bias", given.bias, x, group),
      .cos = qk_table("cos", given.cos, x),
      .sin = qk_table("sin", given.sin, x),
      .y = y.mutable_data_ptr(),
      .samples = x.size(0),
      .tokens = x.size(1),
      .heads = heads,
      .sample_stride = x.stride(0),
      .token_stride = x.stride(1),
      .head_stride = x.stride(2),
  };
}

// Whether heads begin, and turn, at whole cache lines.
bool aligned(const Tensor& y) {
  return y.size(3) / 2 * y.element_size() % 64 == 0 &&
         reinterpret_cast<std::uintptr_t>(y.const_data_ptr()) % 64 == 0;
}

// Writes q_out and k_out, which are contiguous and like q and k.
void write_qk_norm_rope(const Tensor& q, const Tensor& k, const Optional& q_weight,
                        const Optional& k_weight, const Optional& q_bias, const Optional& k_bias,
                        const Optional& q_cos, const Optional& q_sin, const Optional& k_cos,
                        const Optional& k_sin, int64_t norm, bool across_heads, bool interleaved,
                        double eps, const Tensor& q_out, const Tensor& k_out) {
  const QKTensors queries = {"q", q, q_weight, q_bias, q_cos, q_sin};
  const QKTensors keys = {"k", k, k_weight, k_bias, k_cos, k_sin};
  check_qk(queries, q, across_heads);
  check_qk(keys, q, across_heads);
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "qk_norm_rope: norm must be 0, 1 or 2, got ", norm);
  const auto forward = rows().forward[dtype_index("qk_norm_rope", q)];
  const QKNormRope call = {
      .sides = {side_of(queries, q_out, across_heads), side_of(keys, k_out, across_heads)},
      .width = q.size(3),
      .norm = static_cast<QKNorm>(norm),
      .across_heads = across_heads,
      .interleaved = interleaved,
      .streamed = (q.numel() + k.numel()) * q.element_size() >= kStreamedBytes &&
                  aligned(q_out) && aligned(k_out),
      .eps = eps,
  };

  // A thread takes its share of both sides, so that queries with many heads and keys with few
  // make equal work.
  const int64_t tokens[2] = {q.size(0) * q.size(1), k.size(0) * k.size(1)};
  const int64_t items = std::max(tokens[0], tokens[1]);
  const int64_t heads = std::max(q.size(2), k.size(2));
  if (q.numel() + k.numel() == 0) return;
  for_items(items, (q.numel() + k.numel()) / items, [&](int64_t begin, int64_t end) {
    // Doubles hold the values of every dtype.
    const std::unique_ptr<double[]> scratch(new double[2 * (heads + 1) * call.width]);
    for (int side = 0; side < 2; ++side) {
      const int64_t first = begin * tokens[side] / items, last = end * tokens[side] / items;
      if (first < last) forward(call, side, first, last, scratch.get());
    }
  });
}

std::tuple<Tensor, Tensor> qk_norm_rope_cpu(const Tensor& q, const Tensor& k,
                                            const Optional& q_weight, const Optional& k_weight,
                                            const Optional& q_bias, const Optional& k_bias,
                                            const Optional& q_cos, const Optional& q_sin,
                                            const Optional& k_cos, const Optional& k_sin,
                                            int64_t norm, bool across_heads, bool interleaved,
                                            double eps) {
  Tensor q_out = torch::stable::new_empty(q, q.sizes());
  Tensor k_out = torch::stable::new_empty(k, k.sizes());
  write_qk_norm_rope(q, k, q_weight, k_weight, q_bias, k_bias, q_cos, q_sin, k_cos, k_sin, norm,
                     across_heads, interleaved, eps, q_out, k_out);
  return {q_out, k_out};
}

void qk_norm_rope_out_cpu(const Tensor& q, const Tensor& k, const Optional& q_weight,
                          const Optional& k_weight, const Optional& q_bias, const Optional& k_bias,
                          const Optional& q_cos, const Optional& q_sin, const Optional& k_cos,
                          const Optional& k_sin, int64_t norm, bool across_heads, bool interleaved,
                          double eps, Tensor q_out, Tensor k_out) {
  check_qk_out("q_out", q_out, q);
  check_qk_out("k_out", k_out, k);
  write_qk_norm_rope(q, k, q_weight, k_weight, q_bias, k_bias, q_cos, q_sin, k_cos, k_sin, norm,
                     across_heads, interleaved, eps, q_out, k_out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope_cpu));
  m.impl("qk_norm_rope_out", TORCH_BOX(&qk_norm_rope_out_cpu));
}

}  // namespace clipflow
