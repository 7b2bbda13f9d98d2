// Noisy data and target velocity on the CPU; the op is defined in clipflow/ops/flow_interpolate.py,
// the arithmetic in flow_interpolate_rows.cpp. This file checks and shares the work among threads.

#include "cpu/flow_interpolate_rows.h"

#include "common/flow_interpolate_call.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {
namespace {

// Outputs of more bytes than this are streamed: they would push everything else out of the caches.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

const FlowInterpolateRows& rows() { return CLIPFLOW_CHOOSE(flow_interpolate_rows); }

void flow_interpolate_cpu(const Tensor& data, const Tensor& noise, const Tensor& sigmas,
                          Tensor noisy, Tensor target) {
  check_flow_interpolate(data, noise, sigmas, noisy, target);
  if (data.numel() == 0) return;
  const int64_t samples = data.size(0), values = data.numel() / samples;
  const int64_t written = 2 * data.numel() * static_cast<int64_t>(data.element_size());
  const FlowInterpolate call = {
      .data = data.const_data_ptr(),
      .noise = noise.const_data_ptr(),
      .sigmas = sigmas.const_data_ptr(),
      .noisy = noisy.mutable_data_ptr(),
      .target = target.mutable_data_ptr(),
      .values = values,
      .blocks = (values + kInterpolateBlock - 1) / kInterpolateBlock,
      .streamed = written > kStreamedBytes,
  };
  const auto blocks = rows().blocks[dtype_index("flow_interpolate", data)];
  for_items(samples * call.blocks, values < kInterpolateBlock ? values : kInterpolateBlock,
            [&](int64_t begin, int64_t end) { blocks(call, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CPU, m) {
  m.impl("flow_interpolate", TORCH_BOX(&flow_interpolate_cpu));
}

}  // namespace clipflow
