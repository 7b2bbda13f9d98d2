// Normalization of CLIP features on the CPU; the op is defined in clipflow/ops/clip_normalize.py,
// the arithmetic in clip_normalize_rows.cpp. This file checks, allocates and shares the work among
// threads.

#include "cpu/clip_normalize_rows.h"

#include <cmath>
#include <memory>
#include <optional>

#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

const ClipNormalizeRows& rows() { return CLIPFLOW_CHOOSE(clip_normalize_rows); }

// Outputs of more bytes than this are streamed: they would push everything else out of the caches.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

using Rows = void (*)(const ClipNormalize&, int64_t, int64_t, void*);

// The data of a per-channel statistic [C], given in the type that the op computes in.
const void* statistic(const char* name, const std::optional<Tensor>& values, const Tensor& x) {
  using torch::headeronly::ScalarType;
  if (!values.has_value()) return nullptr;
  const auto wide =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == x.size(2), "clip_normalize: ", name,
                  " must be [", x.size(2), "]");
  STD_TORCH_CHECK(values->is_contiguous() && values->scalar_type() == wide && values->is_cpu(),
                  "clip_normalize: ", name, " must be contiguous float32 (float64 if x is)");
  return values->const_data_ptr();
}

ClipNormalize call_of(const Tensor& x, const std::optional<Tensor>& mean,
                      const std::optional<Tensor>& std, int64_t mode, int64_t pool, double eps,
                      bool inverse) {
  check_contiguous("clip_normalize", "x", x, x);
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "clip_normalize: mode must be 0, 1 or 2, got ", mode);
  STD_TORCH_CHECK(pool >= 1, "clip_normalize: pool must be at least 1, got ", pool);
  STD_TORCH_CHECK(mode != 2 || std.has_value(), "clip_normalize: std must be given in mode 2");
  int64_t side = x.size(1);
  if (pool > 1) {
    side = static_cast<int64_t>(std::llround(std::sqrt(static_cast<double>(x.size(1)))));
    STD_TORCH_CHECK(side * side == x.size(1) && side % pool == 0,
                    "clip_normalize: x must have side * side tokens, side a multiple of ", pool,
                    ", got ", x.size(1));
  }
  return {
      .x = x.const_data_ptr(),
      .grad = nullptr,
      .mean = statistic("mean", mean, x),
      .std = statistic("std", std, x),
      .out = nullptr,
      .side = side,
      .pool = pool,
      .channels = x.size(2),
      .mode = static_cast<ClipMode>(mode),
      .eps = eps,
      .inverse = inverse,
      .streamed = false,
  };
}

void run(Rows kernel, const ClipNormalize& call, int64_t pooled_tokens) {
  for_items(pooled_tokens, call.channels * call.pool * call.pool, [&](int64_t begin, int64_t end) {
    // Doubles hold the row of every dtype.
    const std::unique_ptr<double[]> scratch(new double[2 * ((call.channels + 15) / 16 * 16)]);
    kernel(call, begin, end, scratch.get());
  });
}

Tensor clip_normalize_cpu(const Tensor& x, const std::optional<Tensor>& mean,
                          const std::optional<Tensor>& std, int64_t mode, int64_t pool, double eps,
                          bool inverse) {
  ClipNormalize call = call_of(x, mean, std, mode, pool, eps, inverse);
  STD_TORCH_CHECK(mode != 2 || mean.has_value(), "clip_normalize: mean must be given in mode 2");
  const int64_t samples = x.size(0), tokens = x.size(1) / (pool * pool);
  Tensor y = torch::stable::new_empty(x, {samples, tokens, call.channels});
  if (y.numel() == 0) return y;
  call.out = y.mutable_data_ptr();
  call.streamed = y.numel() * static_cast<int64_t>(y.element_size()) >= kStreamedBytes;
  run(rows().forward[dtype_index("clip_normalize", x)], call, samples * tokens);
  return y;
}

Tensor clip_normalize_backward_cpu(const Tensor& grad, const Tensor& x,
                                   const std::optional<Tensor>& std, int64_t mode, int64_t pool,
                                   double eps, bool inverse) {
  ClipNormalize call = call_of(x, std::nullopt, std, mode, pool, eps, inverse);
  check_contiguous("clip_normalize_backward", "grad", x, grad);
  const int64_t samples = x.size(0), tokens = x.size(1) / (pool * pool);
  STD_TORCH_CHECK(grad.size(0) == samples && grad.size(1) == tokens && grad.size(2) == x.size(2),
                  "clip_normalize_backward: grad must be [", samples, ", ", tokens, ", ", x.size(2),
                  "]");
  Tensor d_x = torch::stable::empty_like(x);
  if (d_x.numel() == 0) return d_x;
  call.grad = grad.const_data_ptr();
  call.out = d_x.mutable_data_ptr();
  run(rows().backward[dtype_index("clip_normalize", x)], call, samples * tokens);
  return d_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("clip_normalize", TORCH_BOX(&clip_normalize_cpu));
  m.impl("clip_normalize_backward", TORCH_BOX(&clip_normalize_backward_cpu));
}

}  // namespace clipflow
