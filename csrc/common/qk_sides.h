// What the CPU and the CUDA form of qk_norm_rope check in the same way.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/tensor.h"

namespace clipflow {

// Queries or keys, with what belongs to them.
struct QKTensors {
  const char* name;
  const Tensor& x;  // [B, L, H, K]
  const std::optional<Tensor>&weight, &bias, &cos, &sin;
};

inline const void* qk_parameter(const char* name, const std::optional<Tensor>& values,
                                const Tensor& x, int64_t group) {
  if (!values.has_value()) return nullptr;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == group, "qk_norm_rope: ", name,
                  " must be [", group, "]");
  STD_TORCH_CHECK(values->is_contiguous() && values->scalar_type() == x.scalar_type() &&
                      values->is_cpu() == x.is_cpu(),
                  "qk_norm_rope: ", name, " must be contiguous, with dtype and device of q");
  return values->const_data_ptr();
}

inline const float* qk_table(const char* name, const std::optional<Tensor>& values,
                             const Tensor& x) {
  if (!values.has_value()) return nullptr;
  const int64_t tokens = x.size(1), pairs = x.size(3) / 2;
  STD_TORCH_CHECK(values->dim() == 2 && values->size(0) == tokens && values->size(1) == pairs,
                  "qk_norm_rope: ", name, " must be [", tokens, ", ", pairs, "]");
  STD_TORCH_CHECK(values->is_contiguous() &&
                      values->scalar_type() == torch::headeronly::ScalarType::Float &&
                      values->is_cpu() == x.is_cpu(),
                  "qk_norm_rope: ", name, " must be contiguous float32 on the device of q");
  return static_cast<const float*>(values->const_data_ptr());
}

inline void check_qk(const QKTensors& side, const Tensor& q, bool across_heads) {
  const Tensor& x = side.x;
  STD_TORCH_CHECK(x.dim() == 4 && q.dim() == 4, "qk_norm_rope: ", side.name,
                  " must have 4 dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(3) == q.size(3) && x.size(3) > 0 &&
                      x.size(3) % 2 == 0,
                  "qk_norm_rope: ", side.name, " must have the batch and the even width of q");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type() && x.is_cpu() == q.is_cpu(),
                  "qk_norm_rope: ", side.name, " must have the dtype and the device of q");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.numel() == 0, "qk_norm_rope: ", side.name,
                  " must have contiguous heads, got stride ", x.stride(3));
  STD_TORCH_CHECK(!across_heads || x.size(2) <= 1 || x.stride(2) == x.size(3) || x.numel() == 0,
                  "qk_norm_rope: ", side.name, " must have heads without gaps, got stride ",
                  x.stride(2));
  STD_TORCH_CHECK(side.cos.has_value() == side.sin.has_value(), "qk_norm_rope: ", side.name,
                  " must have a table of cosines and one of sines, or none");
}

// [B, L, H, K], contiguous, with the shape, dtype and device of `x`.
inline void check_qk_out(const char* name, const Tensor& out, const Tensor& x) {
  const auto wanted = x.sizes(), found = out.sizes();
  STD_TORCH_CHECK(std::equal(wanted.begin(), wanted.end(), found.begin(), found.end()) &&
                      out.is_contiguous() && out.scalar_type() == x.scalar_type() &&
                      out.is_cpu() == x.is_cpu(),
                  "qk_norm_rope: ", name,
                  " must be contiguous, with the shape, dtype and device of its input");
}

}  // namespace clipflow
