// The arguments of flow_step, checked: the same on the CPU and CUDA.

#pragma once

#include <optional>

#include "common/tensor.h"

namespace clipflow {

struct FlowCall {
  Tensor latents, velocity;  // contiguous, as all tensors here
  std::optional<Tensor> previous, coefficients, guidances;
  double step, gain, keep, rest, guidance;
  bool dpmpp_2m;  // or Euler and Heun, which differ in `previous` and `kept` alone
  bool guided;    // velocity has null rows, then conditioned ones
  Tensor new_latents;
  std::optional<Tensor> model_input, kept;
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
  STD_TORCH_CHECK(tensor.is_contiguous(), "flow_step: ", name, " must be contiguous");
}

inline FlowCall flow_call(const Tensor& latents, const Tensor& velocity,
                          const std::optional<Tensor>& previous,
                          const std::optional<Tensor>& coefficients,
                          const std::optional<Tensor>& guidances, double step, double gain,
                          double keep, double rest, double guidance, bool dpmpp_2m,
                          const Tensor& new_latents, const std::optional<Tensor>& model_input,
                          const std::optional<Tensor>& kept) {
  using torch::headeronly::ScalarType;
  const FlowCall call{.latents = contiguous_of(latents),
                      .velocity = contiguous_of(velocity),
                      .previous = contiguous_of(previous),
                      .coefficients = contiguous_of(coefficients),
                      .guidances = contiguous_of(guidances),
                      .step = step,
                      .gain = gain,
                      .keep = keep,
                      .rest = rest,
                      .guidance = guidance,
                      .dpmpp_2m = dpmpp_2m,
                      .guided = velocity.size(0) != latents.size(0),
                      .new_latents = new_latents,
                      .model_input = model_input,
                      .kept = kept};
  const int64_t numel = latents.numel(), rows = call.guided ? 2 * numel : numel;
  const ScalarType dtype = latents.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "flow_step: latents must be float32 or float64");
  check_flow_tensor("velocity", call, call.velocity, rows, velocity.scalar_type());
  check_flow_tensor("new", call, new_latents, numel, dtype);
  if (model_input)
    check_flow_tensor("model_input", call, *model_input, rows, model_input->scalar_type());
  if (kept) check_flow_tensor("kept", call, *kept, numel, dtype);
  if (previous) check_flow_tensor("previous", call, *call.previous, numel, dtype);
  if (coefficients)
    check_flow_tensor("coefficients", call, *call.coefficients, 4, ScalarType::Double);
  if (guidances)
    check_flow_tensor("guidance", call, *call.guidances, latents.size(0), ScalarType::Float);
  STD_TORCH_CHECK(!dpmpp_2m || kept.has_value(), "flow_step: kept must be given in dpmpp_2m");
  return call;
}

}  // namespace clipflow
