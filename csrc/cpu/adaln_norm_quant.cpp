// Adaptive layer norm to 8 bits on the CPU; the op is defined in clipflow/ops/adaln_norm_quant.py,
// the arithmetic in adaln_norm_quant_rows.cpp. This file checks, allocates and shares the work.

#include "cpu/adaln_norm_quant_rows.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/norm_tensors.h"

namespace clipflow {
namespace {

using torch::headeronly::ScalarType;

const AdaLNNormQuantRows& rows() { return CLIPFLOW_CHOOSE(adaln_norm_quant_rows); }

using Optional = std::optional<Tensor>;

constexpr const char* kOp = "adaln_norm_quant";

// Writes values, int8 in the shape of x, and scales, float32, one a token; both are contiguous.
void write_adaln_norm_quant(const Tensor& x, const Optional& shift, const Tensor& scale,
                            const Optional& weight, const Optional& table, bool rms, double eps,
                            ScalarType dtype, const Tensor& values, const Tensor& scales) {
  check_tokens(kOp, "x", x, x);
  STD_TORCH_CHECK(dtype == ScalarType::Char, kOp, ": dtype must be int8 on the CPU");
  const auto forward = rows().forward[dtype_index(kOp, x)];
  AdaLNQuant call = {};
  call.modulation = modulation_of(kOp, x, shift, scale, weight, table);
  if (x.numel() == 0) return;
  call.x = x.const_data_ptr();
  call.values = static_cast<int8_t*>(values.mutable_data_ptr());
  call.scales = static_cast<float*>(scales.mutable_data_ptr());
  call.shape = shape_of(kOp, x, scale.size(0), rms, eps, {});
  for_items_with_scratch(
      scale.size(0) * call.shape.tokens, call.shape.channels, call.shape,
      [&](int64_t begin, int64_t end, void* scratch) { forward(call, begin, end, scratch); });
}

std::tuple<Tensor, Tensor> adaln_norm_quant_cpu(const Tensor& x, const Optional& shift,
                                                const Tensor& scale, const Optional& weight,
                                                const Optional& table, bool rms, double eps,
                                                ScalarType dtype) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(!sizes.empty(), kOp, ": x must be [..., D]");
  Tensor values = new_on(x, sizes, aoti_torch_dtype_int8());
  Tensor scales = new_on(x, {sizes.data(), sizes.size() - 1}, aoti_torch_dtype_float32());
  write_adaln_norm_quant(x, shift, scale, weight, table, rms, eps, dtype, values, scales);
  return {values, scales};
}

void adaln_norm_quant_out_cpu(const Tensor& x, const Optional& shift, const Tensor& scale,
                              const Optional& weight, const Optional& table, bool rms, double eps,
                              ScalarType dtype, Tensor values, Tensor scales) {
  const auto sizes = x.sizes(), values_sizes = values.sizes(), scales_sizes = scales.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), values_sizes.begin(),
                             values_sizes.end()) &&
                      values.scalar_type() == ScalarType::Char && values.is_contiguous() &&
                      values.is_cpu(),
                  kOp, ": values must be int8, contiguous and in the shape of x");
  STD_TORCH_CHECK(!sizes.empty() &&
                      std::equal(sizes.begin(), sizes.end() - 1, scales_sizes.begin(),
                                 scales_sizes.end()) &&
                      scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                      scales.is_cpu(),
                  kOp, ": scales must be float32, contiguous, one for each token of x");
  write_adaln_norm_quant(x, shift, scale, weight, table, rms, eps, dtype, values, scales);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("adaln_norm_quant", TORCH_BOX(&adaln_norm_quant_cpu));
  m.impl("adaln_norm_quant_out", TORCH_BOX(&adaln_norm_quant_out_cpu));
}

}  // namespace clipflow
