// Depthwise 3x3 convolution with a gated activation on the CPU; the op is defined in
// clipflow/ops/glu_conv.py, the arithmetic in glu_conv_rows.cpp. This file checks, allocates and
// shares the work among threads.

#include "cpu/glu_conv_rows.h"

#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

// Larger outputs are not found in the caches by who reads them.
constexpr int64_t kStreamedBytes = 8 << 20;

bool whole_lines(const Tensor& y) {
  const auto address = reinterpret_cast<uintptr_t>(y.const_data_ptr());
  return (address | y.size(2) * y.element_size()) % 64 == 0;
}

int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

void check_channels(const char* name, const Tensor& x, const Tensor& tensor,
                    int64_t values) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == x.size(2) * values,
                  "glu_conv: ", name, " must be contiguous, ", values, " values a channel of x");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && tensor.is_cpu() == x.is_cpu(),
                  "glu_conv: ", name, " must have the dtype and device of x");
}

void check_tokens(const Tensor& x, int64_t height, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 3 && height >= 0 && width >= 0 && x.size(1) == height * width &&
                      x.size(2) % 2 == 0,
                  "glu_conv: x must be [B, height * width, 2M]");
}

// Writes y, [B, height * width, M], which is contiguous and has the dtype of x.
void write_glu_conv(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t height,
                    int64_t width, bool pre_silu, const Tensor& y) {
  STD_TORCH_CHECK(x.numel() == 0 || x.stride(2) == 1, "glu_conv: x must have contiguous channels");
  check_channels("weight", x, weight, 9);
  check_channels("bias", x, bias, 1);
  const auto forward =
      CLIPFLOW_CHOOSE(glu_conv_rows).forward[dtype_index("glu_conv", x)];
  const int64_t channels = x.size(2) / 2;
  if (y.numel() == 0) return;

  const GluConv call = {
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = bias.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .samples = x.size(0),
      .height = height,
      .width = width,
      .channels = channels,
      .sample_stride = x.stride(0),
      .token_stride = x.stride(1),
      .row_tiles = tiles(height, kTileRows),
      .column_tiles = tiles(width, kTileColumns),
      .channel_tiles = tiles(channels, kTileChannels),
      .pre_silu = pre_silu,
      .stream = y.numel() * y.element_size() >= kStreamedBytes && whole_lines(y),
  };
  const int64_t count =
      call.samples * call.row_tiles * call.column_tiles * call.channel_tiles;
  for_items(count, 2 * (y.numel() / count),
            [&](int64_t begin, int64_t end) { forward(call, begin, end); });
}

Tensor glu_conv_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t height,
                    int64_t width, bool pre_silu) {
  check_tokens(x, height, width);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2) / 2});
  write_glu_conv(x, weight, bias, height, width, pre_silu, y);
  return y;
}

void glu_conv_out_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t height,
                      int64_t width, bool pre_silu, Tensor y) {
  check_tokens(x, height, width);
  STD_TORCH_CHECK(y.dim() == 3 && y.size(0) == x.size(0) && y.size(1) == x.size(1) &&
                      y.size(2) == x.size(2) / 2 && y.is_contiguous() && y.is_cpu() &&
                      y.scalar_type() == x.scalar_type(),
                  "glu_conv: out must be [B, height * width, M], contiguous, with the dtype and "
                  "device of x");
  write_glu_conv(x, weight, bias, height, width, pre_silu, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("glu_conv", TORCH_BOX(&glu_conv_cpu));
  m.impl("glu_conv_out", TORCH_BOX(&glu_conv_out_cpu));
}

}  // namespace clipflow
