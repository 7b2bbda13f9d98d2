// Adaptive layer norm on the CPU; the op is defined in clipflow/ops/adaln_norm.py, the arithmetic
// in adaln_norm_rows.cpp. This file checks, allocates and shares the work among threads.

#include "cpu/adaln_norm_rows.h"

#include <optional>
#include <tuple>

#include "common/norm_tensors.h"

namespace clipflow {
namespace {

const AdaLNNormRows& rows() { return CLIPFLOW_CHOOSE(adaln_norm_rows); }

using Optional = std::optional<Tensor>;

// Writes y, which is contiguous and like x.
void write_adaln_norm(const Tensor& x, const Optional& shift, const Tensor& scale,
                      const Optional& weight, const Optional& table, bool rms, double eps,
                      const Tensor& y) {
  check_tokens("adaln_norm", "x", x, x);
  const auto forward = rows().forward[dtype_index("adaln_norm", x)];
  AdaLNForward call = {};
  call.modulation = modulation_of("adaln_norm", x, shift, scale, weight, table);
  if (x.numel() == 0) return;
  call.x = x.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.shape = shape_of("adaln_norm", x, scale.size(0), rms, eps, {&y});
  for_items_with_scratch(
      scale.size(0) * call.shape.tokens, call.shape.channels, call.shape,
      [&](int64_t begin, int64_t end, void* scratch) { forward(call, begin, end, scratch); });
}

Tensor adaln_norm_cpu(const Tensor& x, const Optional& shift, const Tensor& scale,
                      const Optional& weight, const Optional& table, bool rms, double eps) {
  Tensor y = new_like(x);
  write_adaln_norm(x, shift, scale, weight, table, rms, eps, y);
  return y;
}

void adaln_norm_out_cpu(const Tensor& x, const Optional& shift, const Tensor& scale,
                        const Optional& weight, const Optional& table, bool rms, double eps,
                        Tensor y) {
  check_tokens("adaln_norm", "out", x, y);
  write_adaln_norm(x, shift, scale, weight, table, rms, eps, y);
}

std::tuple<Tensor, Tensor, Tensor> adaln_norm_backward_cpu(const Tensor& grad, const Tensor& x,
                                                           const Tensor& gain, bool rms,
                                                           double eps) {
  check_tokens("adaln_norm_backward", "x", x, x);
  check_tokens("adaln_norm_backward", "grad", x, grad);
  check_gain("adaln_norm_backward", "gain", x, gain);
  const int64_t dtype = dtype_index("adaln_norm_backward", x);
  Tensor d_x = new_like(x);
  Tensor d_offset = new_like(gain);
  Tensor d_gain = new_like(gain);
  if (x.numel() == 0) {
    torch::stable::zero_(d_offset);
    torch::stable::zero_(d_gain);
    return {d_x, d_offset, d_gain};
  }
  NormBackward call = {};
  call.d_normed = grad.const_data_ptr();
  call.h = x.const_data_ptr();
  call.gain = gain.const_data_ptr();
  call.d_x = d_x.mutable_data_ptr();
  call.sums[0] = d_offset.mutable_data_ptr();
  call.sums[1] = d_gain.mutable_data_ptr();
  call.shape = shape_of("adaln_norm_backward", x, gain.size(0), rms, eps, {});
  run_backward(call, gain.size(0), dtype == 3, rows().backward[dtype], rows().reduce[dtype]);
  return {d_x, d_offset, d_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("adaln_norm", TORCH_BOX(&adaln_norm_cpu));
  m.impl("adaln_norm_out", TORCH_BOX(&adaln_norm_out_cpu));
  m.impl("adaln_norm_backward", TORCH_BOX(&adaln_norm_backward_cpu));
}

}  // namespace clipflow
