// Adaptive layer norm on the CPU; the op is defined in clipflow/ops/adaln_norm.py, the arithmetic
// in adaln_norm_rows.cpp. This file checks, allocates and shares the work among threads.

#include "cpu/adaln_norm_rows.h"

#include <memory>
#include <tuple>

#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

// d_shift and d_scale are summed over chunks of this many tokens, then over chunks in order, so
// that they are bitwise the same for every number of threads.
constexpr int64_t kTokensPerChunk = 32;

const AdaLNNormRows& rows() { return CLIPFLOW_CHOOSE(adaln_norm_rows); }

Tensor adaln_norm_cpu(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  check_contiguous("adaln_norm", "x", x, x);
  check_rows("adaln_norm", "shift", x, shift);
  check_rows("adaln_norm", "scale", x, scale);
  const auto forward = rows().forward[dtype_index("adaln_norm", x)];
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;

  const AdaLNForward call = {
      .x = x.const_data_ptr(),
      .shift = shift.const_data_ptr(),
      .scale = scale.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .tokens = x.size(1),
      .channels = x.size(2),
      .shift_stride = shift.stride(0),
      .scale_stride = scale.stride(0),
      .eps = eps,
  };
  for_items(x.size(0) * call.tokens, call.channels,
            [&](int64_t begin, int64_t end) { forward(call, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> adaln_norm_backward_cpu(const Tensor& grad, const Tensor& x,
                                                           const Tensor& scale, double eps) {
  check_contiguous("adaln_norm_backward", "x", x, x);
  check_contiguous("adaln_norm_backward", "grad", x, grad);
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                      grad.size(2) == x.size(2),
                  "adaln_norm_backward: grad must have the shape of x");
  check_rows("adaln_norm_backward", "scale", x, scale);
  const int64_t dtype = dtype_index("adaln_norm_backward", x);
  const int64_t samples = x.size(0), tokens = x.size(1), channels = x.size(2);
  Tensor d_x = torch::stable::empty_like(x);
  Tensor d_shift = torch::stable::new_empty(x, {samples, channels});
  Tensor d_scale = torch::stable::new_empty(x, {samples, channels});
  if (samples * channels == 0) return {d_x, d_shift, d_scale};

  const int64_t chunks = (tokens + kTokensPerChunk - 1) / kTokensPerChunk;
  const int64_t padded_channels = (channels + 15) / 16 * 16;
  // Doubles hold the partial sums of every dtype.
  const std::unique_ptr<double[]> partial(new double[samples * chunks * 2 * padded_channels]());
  const AdaLNBackward call = {
      .grad = grad.const_data_ptr(),
      .x = x.const_data_ptr(),
      .scale = scale.const_data_ptr(),
      .d_x = d_x.mutable_data_ptr(),
      .d_shift = d_shift.mutable_data_ptr(),
      .d_scale = d_scale.mutable_data_ptr(),
      .partial = partial.get(),
      .tokens = tokens,
      .channels = channels,
      .scale_stride = scale.stride(0),
      .chunks = chunks,
      .tokens_per_chunk = kTokensPerChunk,
      .padded_channels = padded_channels,
      .eps = eps,
  };
  for_items(samples * chunks, kTokensPerChunk * channels,
            [&](int64_t begin, int64_t end) { rows().backward[dtype](call, begin, end); });
  for_items(samples, chunks * channels,
            [&](int64_t begin, int64_t end) { rows().reduce[dtype](call, begin, end); });
  return {d_x, d_shift, d_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("adaln_norm", TORCH_BOX(&adaln_norm_cpu));
  m.impl("adaln_norm_backward", TORCH_BOX(&adaln_norm_backward_cpu));
}

}  // namespace clipflow
