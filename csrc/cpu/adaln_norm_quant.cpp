// Adaptive layer norm to 8 bits on the CPU; the op is defined in clipflow/ops/adaln_norm_quant.py,
// the arithmetic in adaln_norm_quant_rows.cpp. This file checks, allocates and shares the work.

#include "cpu/adaln_norm_quant_rows.h"

#include <optional>
#include <tuple>

#include "common/norm_tensors.h"

namespace clipflow {
namespace {

using torch::headeronly::ScalarType;

const AdaLNNormQuantRows& rows() { return CLIPFLOW_CHOOSE(adaln_norm_quant_rows); }

std::tuple<Tensor, Tensor> adaln_norm_quant_cpu(const Tensor& x, const std::optional<Tensor>& shift,
                                                const Tensor& scale,
                                                const std::optional<Tensor>& weight,
                                                const std::optional<Tensor>& table, bool rms,
                                                double eps, ScalarType dtype) {
  constexpr const char* kOp = "adaln_norm_quant";
  check_tokens(kOp, "x", x, x);
  STD_TORCH_CHECK(dtype == ScalarType::Char, kOp, ": dtype must be int8 on the CPU");
  const auto forward = rows().forward[dtype_index(kOp, x)];
  AdaLNQuant call = {};
  call.modulation = modulation_of(kOp, x, shift, scale, weight, table);
  const auto sizes = x.sizes();
  Tensor values = new_on(x, sizes, aoti_torch_dtype_int8());
  Tensor scales = new_on(x, {sizes.data(), sizes.size() - 1}, aoti_torch_dtype_float32());
  if (x.numel() == 0) return {values, scales};
  call.x = x.const_data_ptr();
  call.values = static_cast<int8_t*>(values.mutable_data_ptr());
  call.scales = static_cast<float*>(scales.mutable_data_ptr());
  call.shape = shape_of(kOp, x, scale.size(0), rms, eps, {});
  for_items_with_scratch(
      scale.size(0) * call.shape.tokens, call.shape.channels, call.shape,
      [&](int64_t begin, int64_t end, void* scratch) { forward(call, begin, end, scratch); });
  return {values, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("adaln_norm_quant", TORCH_BOX(&adaln_norm_quant_cpu));
}

}  // namespace clipflow
