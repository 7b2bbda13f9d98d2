// One sampler step on the CPU; the op is defined in clipflow/ops/flow_step.py, the arithmetic in
// flow_step_rows.cpp. This file checks and shares the work among threads.

#include "cpu/flow_step_rows.h"

#include <optional>

#include "common/flow_step_call.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

// Outputs of more bytes than this are streamed: they would push everything else out of the caches.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

const FlowStepRows& rows() { return CLIPFLOW_CHOOSE(flow_step_rows); }

FlowForm form_of(const FlowCall& call) {
  if (call.dpmpp_2m) return call.previous ? FlowForm::kSecondOrder : FlowForm::kFirstOrder;
  return call.previous ? FlowForm::kHeunSecond : FlowForm::kMove;
}

double coefficient(const FlowCall& call, int64_t i, double given) {
  return call.coefficients
             ? static_cast<const double*>(call.coefficients->const_data_ptr())[i]
             : given;
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

int64_t bytes_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->numel() * static_cast<int64_t>(tensor->element_size()) : 0;
}

FlowStep step_of(const FlowCall& call) {
  const int64_t total = call.latents.numel();
  const int64_t samples = call.guidances ? call.latents.size(0) : 1, values = total / samples;
  const int64_t written = bytes_of(call.new_latents) + bytes_of(call.model_input) +
                          bytes_of(call.kept);
  return {
      .latents = call.latents.const_data_ptr(),
      .velocity = call.velocity.const_data_ptr(),
      .previous = data_of(call.previous),
      .guidances = static_cast<const float*>(data_of(call.guidances)),
      .out = call.new_latents.mutable_data_ptr(),
      .model_input = const_cast<void*>(data_of(call.model_input)),
      .kept = const_cast<void*>(data_of(call.kept)),
      .samples = samples,
      .values = values,
      .blocks = (values + kFlowBlock - 1) / kFlowBlock,
      .step = coefficient(call, 0, call.step),
      .gain = coefficient(call, 1, call.gain),
      .keep = coefficient(call, 2, call.keep),
      .rest = coefficient(call, 3, call.rest),
      .guidance = call.guidance,
      .streamed = written > kStreamedBytes,
  };
}

void flow_step_cpu(const Tensor& latents, const Tensor& velocity,
                   const std::optional<Tensor>& previous,
                   const std::optional<Tensor>& coefficients,
                   const std::optional<Tensor>& guidances, double step, double gain, double keep,
                   double rest, double guidance, bool dpmpp_2m, Tensor new_latents,
                   std::optional<Tensor> model_input, std::optional<Tensor> kept) {
  const FlowCall call =
      flow_call(latents, velocity, previous, coefficients, guidances, step, gain, keep, rest,
                guidance, dpmpp_2m, new_latents, model_input, kept);
  if (latents.numel() == 0) return;
  const auto form = static_cast<int64_t>(form_of(call));
  const int64_t v = dtype_index("flow_step", call.velocity);
  const int64_t m = model_input ? dtype_index("flow_step", *model_input) : v;
  const bool is_double = latents.scalar_type() == torch::headeronly::ScalarType::Double;
  STD_TORCH_CHECK(is_double ? v == 3 && m == 3 : v != 3 && m != 3,
                  "flow_step: float64 latents go with float64 velocity and model input, and only "
                  "they do");
  const FlowStepBlocks blocks = is_double ? rows().step_double[form][call.guided]
                                          : rows().step[v][m][form][call.guided];
  const FlowStep work = step_of(call);
  for_items(work.samples * work.blocks, work.values < kFlowBlock ? work.values : kFlowBlock,
            [&](int64_t begin, int64_t end) { blocks(work, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) { m.impl("flow_step", TORCH_BOX(&flow_step_cpu)); }

}  // namespace clipflow
