// Tensors of any rank as rows of their last dimension, such as one half of a packed projection.

#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace clipflow {

// Elements from one row to the next; -1 where rows are not contiguous or not equally far apart.
inline int64_t row_stride(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  if (sizes[last] != 1 && strides[last] != 1) return -1;
  int64_t rows = 1, stride = sizes[last];  // of a single row: as if contiguous
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (rows == 1)
      stride = strides[i];
    else if (strides[i] != rows * stride)
      return -1;
    rows *= sizes[i];
  }
  return stride;
}

// `x` itself, or a contiguous copy where its rows are not equally far apart.
inline Tensor with_equal_rows(const Tensor& x) {
  return row_stride(x) >= 0 ? x : torch::stable::contiguous(x);
}

}  // namespace clipflow
