// Sandwich norm on the CPU; the op is defined in clipflow/ops/sandwich_residual_norm.py, the
// arithmetic in sandwich_residual_norm_rows.cpp. This file checks, allocates and shares the work.

#include "cpu/sandwich_residual_norm_rows.h"

#include <optional>
#include <tuple>

#include "common/norm_tensors.h"

namespace clipflow {
namespace {

using Optional = std::optional<Tensor>;

const SandwichResidualNormRows& rows() { return CLIPFLOW_CHOOSE(sandwich_residual_norm_rows); }

constexpr const char* kOp = "sandwich_residual_norm";
constexpr const char* kBackwardOp = "sandwich_residual_norm_backward";

// Writes h and normed, which are contiguous and like x; h may be x, and normed may be y.
void write_sandwich_residual_norm(const Tensor& x, const Tensor& y, const Tensor& gate,
                                  const Tensor& scale, const Optional& weight,
                                  const Optional& next_weight, double eps, const Tensor& h,
                                  const Tensor& normed) {
  check_tokens(kOp, "x", x, x);
  check_tokens(kOp, "y", x, y);
  const int64_t samples = scale.size(0);
  const auto forward = rows().forward[dtype_index(kOp, x)];
  SandwichResidualForward call = {};
  call.modulation = modulation_of(kOp, x, std::nullopt, scale, next_weight, std::nullopt);
  call.gate = rows_of(kOp, "gate", x, gate, samples, &call.gate_stride);
  call.weight = vector_of(kOp, "weight", x, weight);
  if (x.numel() == 0) return;
  call.x = x.const_data_ptr();
  call.y = y.const_data_ptr();
  call.h = h.mutable_data_ptr();
  call.normed = normed.mutable_data_ptr();
  call.shape = shape_of(kOp, x, samples, true, eps, {&h, &normed});
  for_items_with_scratch(
      samples * call.shape.tokens, call.shape.channels, call.shape,
      [&](int64_t begin, int64_t end, void* scratch) { forward(call, begin, end, scratch); });
}

std::tuple<Tensor, Tensor> sandwich_residual_norm_cpu(const Tensor& x, const Tensor& y,
                                                      const Tensor& gate, const Tensor& scale,
                                                      const Optional& weight,
                                                      const Optional& next_weight, double eps) {
  Tensor h = new_like(x);
  Tensor normed = new_like(x);
  write_sandwich_residual_norm(x, y, gate, scale, weight, next_weight, eps, h, normed);
  return {h, normed};
}

void sandwich_residual_norm_out_cpu(const Tensor& x, const Tensor& y, const Tensor& gate,
                                    const Tensor& scale, const Optional& weight,
                                    const Optional& next_weight, double eps, Tensor h,
                                    Tensor normed) {
  check_tokens(kOp, "h", x, h);
  check_tokens(kOp, "normed", x, normed);
  write_sandwich_residual_norm(x, y, gate, scale, weight, next_weight, eps, h, normed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sandwich_residual_norm_backward_cpu(
    const Tensor& d_h, const Tensor& d_normed, const Tensor& h, const Tensor& y,
    const Tensor& gate, const Tensor& gain, double eps) {
  check_tokens(kBackwardOp, "h", h, h);
  check_tokens(kBackwardOp, "d_h", h, d_h);
  check_tokens(kBackwardOp, "d_normed", h, d_normed);
  check_tokens(kBackwardOp, "y", h, y);
  check_gain(kBackwardOp, "gain", h, gain);
  check_gain(kBackwardOp, "gate", h, gate);
  STD_TORCH_CHECK(gate.size(0) == gain.size(0), kBackwardOp, ": gate must have the shape of gain");
  const int64_t dtype = dtype_index(kBackwardOp, h);
  Tensor d_x = new_like(h);
  Tensor d_y = new_like(h);
  Tensor d_gate = new_like(gain);
  Tensor d_gain = new_like(gain);
  if (h.numel() == 0) {
    for (Tensor* sum : {&d_gate, &d_gain}) torch::stable::zero_(*sum);
    return {d_x, d_y, d_gate, d_gain};
  }
  NormBackward call = {};
  call.d_h = d_h.const_data_ptr();
  call.d_normed = d_normed.const_data_ptr();
  call.h = h.const_data_ptr();
  call.y = y.const_data_ptr();
  call.gate = gate.const_data_ptr();
  call.gain = gain.const_data_ptr();
  call.d_x = d_x.mutable_data_ptr();
  call.d_y = d_y.mutable_data_ptr();
  call.sums[1] = d_gain.mutable_data_ptr();
  call.sums[2] = d_gate.mutable_data_ptr();
  call.shape = shape_of(kBackwardOp, h, gain.size(0), true, eps, {});
  run_backward(call, gain.size(0), dtype == 3, rows().backward[dtype], rows().reduce[dtype]);
  return {d_x, d_y, d_gate, d_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("sandwich_residual_norm", TORCH_BOX(&sandwich_residual_norm_cpu));
  m.impl("sandwich_residual_norm_out", TORCH_BOX(&sandwich_residual_norm_out_cpu));
  m.impl("sandwich_residual_norm_backward", TORCH_BOX(&sandwich_residual_norm_backward_cpu));
}

}  // namespace clipflow
