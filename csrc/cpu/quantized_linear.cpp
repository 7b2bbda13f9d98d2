// Linear layer in int8 on the CPU; the op is defined in clipflow/ops/quantized_linear.py, the
// arithmetic in quantized_linear_rows.cpp. This file checks, allocates and shares the work among
// threads.

#include "cpu/quantized_linear_rows.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Quantized rows are kept for as many rows at a time as fit; the weight is read once for each.
constexpr int64_t kPreparedBytes = 1 << 20;
constexpr int64_t kMostInputs = 1 << 17;  // more could overflow 32 bits

const QuantizedLinearRows& rows() { return CLIPFLOW_CHOOSE(quantized_linear_rows); }

// Whether this machine has VNNI in the registers of the instruction set in use.
bool has_dot_products() {
#if defined(CLIPFLOW_X86)
  static const bool wide = __builtin_cpu_supports("avx512vnni");
  static const bool narrow = __builtin_cpu_supports("avxvnni");
  if (instruction_set() == InstructionSet::kAvx512) return wide;
  if (instruction_set() == InstructionSet::kAvx2) return narrow;
#endif
  return false;
}

const float* vector_of(const char* name, const Tensor& values, int64_t count) {
  STD_TORCH_CHECK(values.is_cpu() && values.is_contiguous() && values.numel() == count &&
                      values.scalar_type() == ScalarType::Float,
                  "quantized_linear: ", name, " must be ", count, " contiguous float32 values");
  return static_cast<const float*>(values.const_data_ptr());
}

int64_t input_index(const Tensor& x, const std::optional<Tensor>& x_scales) {
  if (x.scalar_type() == ScalarType::Char) {
    STD_TORCH_CHECK(x_scales.has_value(), "quantized_linear: int8 x needs x_scales");
    return 3;
  }
  const int64_t dtype = dtype_index("quantized_linear", x);
  STD_TORCH_CHECK(dtype < 3, "quantized_linear: x must not be float64");
  STD_TORCH_CHECK(!x_scales.has_value(), "quantized_linear: x_scales go with int8 x");
  return dtype;
}

void check_weight(const Tensor& weight, const Tensor& limits, int64_t K, int64_t N) {
  const int64_t groups = (K + kGroup - 1) / kGroup, panels = (N + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(K >= 1 && K <= kMostInputs, "quantized_linear: K must be in 1..", kMostInputs);
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous() &&
                      weight.scalar_type() == ScalarType::Byte && weight.dim() == 5 &&
                      weight.size(0) == panels && weight.size(1) == groups &&
                      weight.size(2) == 4 && weight.size(3) == kPanel && weight.size(4) == 4,
                  "quantized_linear: weight must be the uint8 tiles of quantize_weight, [", panels,
                  ", ", groups, ", 4, 16, 4]");
  STD_TORCH_CHECK(limits.is_cpu() && limits.is_contiguous() && limits.numel() == groups * 2 &&
                      limits.scalar_type() == ScalarType::Int,
                  "quantized_linear: limits must be int32 [", groups, ", 2]");
}

// Of y: 0 float32, 1 bfloat16, 2 float16.
ScalarType result_dtype(int64_t dtype) {
  constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  STD_TORCH_CHECK(dtype >= 0 && dtype < 3, "quantized_linear: dtype must be 0, 1 or 2");
  return kDtypes[dtype];
}

// Writes y, [..., N], which is contiguous and has `dtype`.
void write_quantized_linear(const Tensor& x, const Optional& x_scales, const Tensor& weight,
                            const Tensor& limits, const Tensor& scales, const Optional& bias,
                            int64_t dtype, const Tensor& y) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.is_contiguous(),
                  "quantized_linear: x must be contiguous, [..., K], on the CPU");
  const int64_t input = input_index(x, x_scales);
  const int64_t K = x.size(x.dim() - 1), N = scales.numel();
  check_weight(weight, limits, K, N);
  if (y.numel() == 0) return;

  const int64_t M = x.numel() / K, panels = weight.size(0), groups = weight.size(1);
  const int64_t row_bytes =
      (static_cast<int64_t>(sizeof(PreparedRow)) + groups * kPreparedGroup +
       most_remainders(groups) * kRemainderBytes + 63) / 64 * 64;
  const int64_t block =
      std::min(M, even_share(M, std::max<int64_t>(1, kPreparedBytes / row_bytes)));
  const std::unique_ptr<uint8_t[]> prepared(new uint8_t[block * row_bytes]);
  QuantizedLinear call = {
      .x = x.const_data_ptr(),
      .x_scales = x_scales ? vector_of("x_scales", *x_scales, M) : nullptr,
      .weight = static_cast<const uint8_t*>(weight.const_data_ptr()),
      .limits = static_cast<const int32_t*>(limits.const_data_ptr()),
      .scales = vector_of("scales", scales, N),
      .bias = bias ? vector_of("bias", *bias, N) : nullptr,
      .y = y.mutable_data_ptr(),
      .prepared = prepared.get(),
      .K = K,
      .N = N,
      .groups = groups,
      .panels = panels,
      .first = 0,
      .rows = 0,
      .row_bytes = row_bytes,
      .block_rows = 0,
      .dot_products = has_dot_products(),
  };
  for (; call.first < M; call.first += block) {
    call.rows = std::min(block, M - call.first);
    for_items(call.rows, K,
              [&](int64_t begin, int64_t end) { rows().prepare[input](call, begin, end); });
    call.block_rows = even_share(call.rows, kBlockRows);
    const int64_t blocks = (call.rows + call.block_rows - 1) / call.block_rows;
    for_items(blocks * panels, call.block_rows * groups * kGroup,
              [&](int64_t begin, int64_t end) { rows().multiply[dtype](call, begin, end); });
  }
}

Tensor quantized_linear_cpu(const Tensor& x, const Optional& x_scales, const Tensor& weight,
                            const Tensor& limits, const Tensor& scales, const Optional& bias,
                            int64_t dtype) {
  STD_TORCH_CHECK(x.dim() >= 1, "quantized_linear: x must be [..., K]");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = scales.numel();
  Tensor y = torch::stable::new_empty(x, shape, result_dtype(dtype));
  write_quantized_linear(x, x_scales, weight, limits, scales, bias, dtype, y);
  return y;
}

void quantized_linear_out_cpu(const Tensor& x, const Optional& x_scales, const Tensor& weight,
                              const Tensor& limits, const Tensor& scales, const Optional& bias,
                              int64_t dtype, Tensor y) {
  const auto sizes = x.sizes(), found = y.sizes();
  STD_TORCH_CHECK(!sizes.empty() && found.size() == sizes.size() &&
                      std::equal(sizes.begin(), sizes.end() - 1, found.begin()) &&
                      found[found.size() - 1] == scales.numel() && y.is_contiguous() &&
                      y.is_cpu() && y.scalar_type() == result_dtype(dtype),
                  "quantized_linear: out must be [..., ", scales.numel(),
                  "], contiguous and in the dtype of the output");
  write_quantized_linear(x, x_scales, weight, limits, scales, bias, dtype, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear_cpu));
  m.impl("quantized_linear_out", TORCH_BOX(&quantized_linear_out_cpu));
}

}  // namespace clipflow
