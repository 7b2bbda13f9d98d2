// Gated residual and norm on the CPU; the op is defined in clipflow/ops/gated_residual_norm.py, the
// arithmetic in gated_residual_norm_rows.cpp. This file checks, allocates and shares the work.

#include "cpu/gated_residual_norm_rows.h"

#include <optional>
#include <tuple>

#include "common/norm_tensors.h"

namespace clipflow {
namespace {

using Optional = std::optional<Tensor>;

const GatedResidualNormRows& rows() { return CLIPFLOW_CHOOSE(gated_residual_norm_rows); }

constexpr const char* kOp = "gated_residual_norm";
constexpr const char* kBackwardOp = "gated_residual_norm_backward";

// Writes h and normed, which are contiguous and like x; h may be x, and normed may be y.
void write_gated_residual_norm(const Tensor& x, const Tensor& y, const Optional& gate,
                               const Optional& shift, const Tensor& scale,
                               const Optional& gate_table, const Optional& table, bool rms,
                               double eps, const Tensor& h, const Tensor& normed) {
  check_tokens(kOp, "x", x, x);
  check_tokens(kOp, "y", x, y);
  STD_TORCH_CHECK(gate.has_value() || !gate_table.has_value(), kOp,
                  ": gate_table must be None without a gate");
  const int64_t samples = scale.size(0);
  const auto forward = rows().forward[dtype_index(kOp, x)];
  GatedResidualForward call = {};
  call.modulation = modulation_of(kOp, x, shift, scale, std::nullopt, table);
  call.gate = rows_of(kOp, "gate", x, gate, samples, &call.gate_stride);
  call.gate_table = vector_of(kOp, "gate_table", x, gate_table);
  if (x.numel() == 0) return;
  call.x = x.const_data_ptr();
  call.y = y.const_data_ptr();
  call.h = h.mutable_data_ptr();
  call.normed = normed.mutable_data_ptr();
  call.shape = shape_of(kOp, x, samples, rms, eps, {&h, &normed});
  for_items_with_scratch(
      samples * call.shape.tokens, call.shape.channels, call.shape,
      [&](int64_t begin, int64_t end, void* scratch) { forward(call, begin, end, scratch); });
}

std::tuple<Tensor, Tensor> gated_residual_norm_cpu(const Tensor& x, const Tensor& y,
                                                   const Optional& gate, const Optional& shift,
                                                   const Tensor& scale, const Optional& gate_table,
                                                   const Optional& table, bool rms, double eps) {
  Tensor h = new_like(x);
  Tensor normed = new_like(x);
  write_gated_residual_norm(x, y, gate, shift, scale, gate_table, table, rms, eps, h, normed);
  return {h, normed};
}

void gated_residual_norm_out_cpu(const Tensor& x, const Tensor& y, const Optional& gate,
                                 const Optional& shift, const Tensor& scale,
                                 const Optional& gate_table, const Optional& table, bool rms,
                                 double eps, Tensor h, Tensor normed) {
  check_tokens(kOp, "h", x, h);
  check_tokens(kOp, "normed", x, normed);
  write_gated_residual_norm(x, y, gate, shift, scale, gate_table, table, rms, eps, h, normed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward_cpu(
    const Tensor& d_h, const Tensor& d_normed, const Tensor& h, const Optional& y,
    const Optional& gate, const Tensor& gain, bool rms, double eps) {
  check_tokens(kBackwardOp, "h", h, h);
  check_tokens(kBackwardOp, "d_h", h, d_h);
  check_tokens(kBackwardOp, "d_normed", h, d_normed);
  check_gain(kBackwardOp, "gain", h, gain);
  STD_TORCH_CHECK(gate.has_value() == y.has_value(), kBackwardOp, ": y and gate must go together");
  const bool gated = gate.has_value();
  if (gated) {
    check_tokens(kBackwardOp, "y", h, *y);
    check_gain(kBackwardOp, "gate", h, *gate);
    STD_TORCH_CHECK(gate->size(0) == gain.size(0), kBackwardOp, ": gate must have gain's shape");
  }
  const int64_t dtype = dtype_index(kBackwardOp, h);
  Tensor d_x = new_like(h);
  Tensor d_offset = new_like(gain);
  Tensor d_gain = new_like(gain);
  Tensor d_y = gated ? new_like(h) : torch::stable::new_empty(h, {0});
  Tensor d_gate =
      gated ? new_like(gain) : torch::stable::new_empty(gain, {0});
  if (h.numel() == 0) {
    for (Tensor* sum : {&d_offset, &d_gain, &d_gate}) torch::stable::zero_(*sum);
    return {d_x, d_y, d_gate, d_offset, d_gain};
  }
  NormBackward call = {};
  call.d_h = d_h.const_data_ptr();
  call.d_normed = d_normed.const_data_ptr();
  call.h = h.const_data_ptr();
  call.gain = gain.const_data_ptr();
  call.d_x = d_x.mutable_data_ptr();
  call.sums[0] = d_offset.mutable_data_ptr();
  call.sums[1] = d_gain.mutable_data_ptr();
  if (gated) {
    call.y = y->const_data_ptr();
    call.gate = gate->const_data_ptr();
    call.d_y = d_y.mutable_data_ptr();
    call.sums[2] = d_gate.mutable_data_ptr();
  }
  call.shape = shape_of(kBackwardOp, h, gain.size(0), rms, eps, {});
  run_backward(call, gain.size(0), dtype == 3, rows().backward[dtype], rows().reduce[dtype]);
  return {d_x, d_y, d_gate, d_offset, d_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("gated_residual_norm", TORCH_BOX(&gated_residual_norm_cpu));
  m.impl("gated_residual_norm_out", TORCH_BOX(&gated_residual_norm_out_cpu));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&gated_residual_norm_backward_cpu));
}

}  // namespace clipflow
