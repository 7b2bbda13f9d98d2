// The arguments of flow_step, checked, and its results, allocated: the same on the CPU and CUDA.

#pragma once

#include <optional>
#include <vector>

#include "common/tensor.h"

namespace clipflow {

// In the order of SOLVERS in clipflow/ops/flow_step.py.
constexpr int64_t kEuler = 0, kHeun = 1, kDpmpp2m = 2;

struct FlowCall {
  Tensor latents, velocity;  // contiguous, as all tensors here
  std::optional<Tensor> previous, coefficients, guidances;
  double step, gain, keep, rest, guidance;
  int64_t solver;
  bool guided;  // velocity has null rows, then conditioned ones

  bool keeps() const { return solver == kDpmpp2m || (solver == kHeun && !previous); }

  // Whether the model's input is another tensor than the new latents.
  bool separate_input(torch::headeronly::ScalarType model_dtype) const {
    return guided || model_dtype != latents.scalar_type();
  }
};

inline Tensor contiguous_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> contiguous_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(contiguous_of(*tensor)) : std::nullopt;
}

inline void check_flow_tensor(const char* name, const FlowCall& call, const Tensor& tensor,
                              int64_t numel, torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(tensor.numel() == numel, "flow_step: ", name, " must have ", numel,
                  " values, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "flow_step: ", name, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_cpu() == call.latents.is_cpu(), "flow_step: ", name,
                  " must be on the device of latents");
}

inline FlowCall flow_call(const Tensor& latents, const Tensor& velocity,
                          const std::optional<Tensor>& previous,
                          const std::optional<Tensor>& coefficients,
                          const std::optional<Tensor>& guidances, double step, double gain,
                          double keep, double rest, double guidance, int64_t solver) {
  using torch::headeronly::ScalarType;
  FlowCall call{contiguous_of(latents),      contiguous_of(velocity),  contiguous_of(previous),
                contiguous_of(coefficients), contiguous_of(guidances), step,
                gain,                        keep,                     rest,
                guidance,                    solver,                   false};
  const int64_t numel = latents.numel();
  const ScalarType dtype = latents.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "flow_step: latents must be float32 or float64");
  STD_TORCH_CHECK(solver >= kEuler && solver <= kDpmpp2m,
                  "flow_step: solver must be 0, 1 or 2, got ", solver);
  STD_TORCH_CHECK(latents.dim() >= 1, "flow_step: latents must be [B, ...]");
  call.guided = velocity.size(0) != latents.size(0);
  check_flow_tensor("velocity", call, velocity, call.guided ? 2 * numel : numel,
                    velocity.scalar_type());
  if (previous) check_flow_tensor("previous", call, *previous, numel, dtype);
  if (coefficients) check_flow_tensor("coefficients", call, *coefficients, 4, ScalarType::Double);
  if (guidances)
    check_flow_tensor("guidance", call, *guidances, latents.size(0), ScalarType::Float);
  return call;
}

// The new latents; the model's input where it is another tensor; what is kept, if anything.
inline std::vector<Tensor> flow_results(const FlowCall& call,
                                        torch::headeronly::ScalarType model_dtype) {
  std::vector<Tensor> results{torch::stable::new_empty(call.latents, call.latents.sizes())};
  if (call.separate_input(model_dtype))
    results.push_back(torch::stable::new_empty(call.velocity, call.velocity.sizes(), model_dtype));
  if (call.keeps()) results.push_back(torch::stable::new_empty(call.latents, call.latents.sizes()));
  return results;
}

inline void check_flow_out(const FlowCall& call, const Tensor& new_latents,
                           const Tensor& model_input, const std::optional<Tensor>& kept) {
  const int64_t numel = call.latents.numel();
  check_flow_tensor("new", call, new_latents, numel, call.latents.scalar_type());
  check_flow_tensor("model_input", call, model_input, call.velocity.numel(),
                    model_input.scalar_type());
  STD_TORCH_CHECK(kept.has_value() == call.keeps(),
                  "flow_step: kept must be given where something is kept, and only there");
  if (kept) check_flow_tensor("kept", call, *kept, numel, call.latents.scalar_type());
  STD_TORCH_CHECK(new_latents.is_contiguous() && model_input.is_contiguous() &&
                      (!kept || kept->is_contiguous()),
                  "flow_step: out tensors must be contiguous");
}

}  // namespace clipflow
