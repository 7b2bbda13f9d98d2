// One sampler step on the CPU; the op is defined in clipflow/ops/flow_step.py, the arithmetic in
// flow_step_rows.cpp. This file checks, allocates and shares the work among threads.

#include "cpu/flow_step_rows.h"

#include <optional>
#include <vector>

#include "common/flow_step_call.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

// Outputs of more bytes than this are streamed: they would push everything else out of the caches.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

const FlowStepRows& rows() { return CLIPFLOW_CHOOSE(flow_step_rows); }

FlowForm form_of(const FlowCall& call) {
  if (call.solver == kDpmpp2m)
    return call.previous ? FlowForm::kSecondOrder : FlowForm::kFirstOrder;
  return call.previous ? FlowForm::kHeunSecond : FlowForm::kMove;
}

double coefficient(const FlowCall& call, int64_t i, double given) {
  return call.coefficients
             ? static_cast<const double*>(call.coefficients->const_data_ptr())[i]
             : given;
}

void run(const FlowCall& call, Tensor& out, Tensor* model_input, Tensor* kept) {
  if (call.latents.numel() == 0) return;
  const int64_t total = call.latents.numel(), item = call.latents.element_size();
  const int64_t samples = call.guidances ? call.latents.size(0) : 1, values = total / samples;
  int64_t written = total * item * (kept ? 2 : 1);
  if (model_input) written += model_input->numel() * model_input->element_size();
  const FlowStep step = {
      .latents = call.latents.const_data_ptr(),
      .velocity = call.velocity.const_data_ptr(),
      .previous = call.previous ? call.previous->const_data_ptr() : nullptr,
      .guidances = call.guidances
                       ? static_cast<const float*>(call.guidances->const_data_ptr())
                       : nullptr,
      .out = out.mutable_data_ptr(),
      .model_input = model_input ? model_input->mutable_data_ptr() : nullptr,
      .kept = kept ? kept->mutable_data_ptr() : nullptr,
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
  const auto form = static_cast<int64_t>(form_of(call));
  const int64_t v = dtype_index("flow_step", call.velocity);
  const int64_t m = model_input ? dtype_index("flow_step", *model_input) : v;
  const bool is_double = call.latents.scalar_type() == torch::headeronly::ScalarType::Double;
  STD_TORCH_CHECK(is_double ? v == 3 && m == 3 : v != 3 && m != 3,
                  "flow_step: float64 latents go with float64 velocity and model input, and only "
                  "they do");
  const FlowStepBlocks blocks = is_double ? rows().step_double[form][call.guided]
                                          : rows().step[v][m][form][call.guided];
  const int64_t most = values < kFlowBlock ? values : kFlowBlock;
  for_items(samples * step.blocks, most,
            [&](int64_t begin, int64_t end) { blocks(step, begin, end); });
}

std::vector<Tensor> flow_step_cpu(
    const Tensor& latents, const Tensor& velocity, const std::optional<Tensor>& previous,
    const std::optional<Tensor>& coefficients, const std::optional<Tensor>& guidances, double step,
    double gain, double keep, double rest, double guidance, int64_t solver,
    torch::headeronly::ScalarType model_dtype) {
  const FlowCall call = flow_call(latents, velocity, previous, coefficients, guidances, step, gain,
                                  keep, rest, guidance, solver);
  std::vector<Tensor> results = flow_results(call, model_dtype);
  const bool separate = call.separate_input(model_dtype);
  run(call, results[0], separate ? &results[1] : nullptr,
      call.keeps() ? &results.back() : nullptr);
  return results;
}

void flow_step_out_cpu(const Tensor& latents, const Tensor& velocity,
                       const std::optional<Tensor>& previous,
                       const std::optional<Tensor>& coefficients,
                       const std::optional<Tensor>& guidances, double step, double gain,
                       double keep, double rest, double guidance, int64_t solver,
                       Tensor new_latents, Tensor model_input, std::optional<Tensor> kept) {
  const FlowCall call = flow_call(latents, velocity, previous, coefficients, guidances, step, gain,
                                  keep, rest, guidance, solver);
  check_flow_out(call, new_latents, model_input, kept);
  run(call, new_latents, &model_input, call.keeps() ? &*kept : nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("flow_step", TORCH_BOX(&flow_step_cpu));
  m.impl("flow_step_out", TORCH_BOX(&flow_step_out_cpu));
}

}  // namespace clipflow
