// Threads for row kernels.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace clipflow {

// Fewer values than this are not worth waking a thread for (about 5 us of work).
constexpr int64_t kValuesPerTask = 32768;

// body(begin, end) over [0, count) items of `values` values each, in parallel when it pays.
template <typename F>
void for_items(int64_t count, int64_t values, const F& body) {
  const int64_t grain = values >= kValuesPerTask ? 1 : kValuesPerTask / (values > 0 ? values : 1);
  if (count <= grain)
    body(int64_t{0}, count);
  else
    torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace clipflow
