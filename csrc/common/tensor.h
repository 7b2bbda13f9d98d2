// What the C++ ops need of torch's stable tensors: checks with text, and the dtype as an index.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace clipflow {

using torch::stable::Tensor;

// Position of a dtype in the kernel tables.
inline int64_t dtype_index(const char* op, const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    case ScalarType::Double:
      return 3;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16, float16 or float64");
  }
}

// [B, L, D], contiguous, with the dtype and device of `x`.
inline void check_contiguous(const char* op, const char* name, const Tensor& x,
                             const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3, op, ": ", name, " must have 3 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name,
                  " must have the dtype of x");
  STD_TORCH_CHECK(tensor.is_cpu() == x.is_cpu(), op, ": ", name, " must be on the device of x");
}

// One row per sample: [B, D] with contiguous rows that may lie any stride apart.
inline void check_rows(const char* op, const char* name, const Tensor& x, const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == x.size(0) && rows.size(1) == x.size(2), op,
                  ": ", name, " must be [", x.size(0), ", ", x.size(2), "]");
  STD_TORCH_CHECK(rows.numel() == 0 || rows.size(1) == 1 || rows.stride(1) == 1, op, ": ", name,
                  " must have contiguous rows, got stride ", rows.stride(1));
  STD_TORCH_CHECK(rows.scalar_type() == x.scalar_type(), op, ": ", name,
                  " must have the dtype of x");
  STD_TORCH_CHECK(rows.is_cpu() == x.is_cpu(), op, ": ", name, " must be on the device of x");
}

}  // namespace clipflow
