// From a tensor to the kernel of its element type, and what decides whether packs may be used.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "common/tensor.h"

namespace clipflow {

// Whether all pointers allow 16-byte loads.
inline bool aligned16(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  });
}

// Smallest power of two that is not below `value`, at least 1.
inline int64_t next_power_of_2(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// Calls `run` with a null pointer of the tensor's element type.
template <typename Run>
void with_element(const char* op, const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return run(static_cast<float*>(nullptr));
    case torch::headeronly::ScalarType::Half:
      return run(static_cast<__half*>(nullptr));
    case torch::headeronly::ScalarType::BFloat16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace clipflow
