// The checks of flow_interpolate: the same on the CPU and CUDA.

#pragma once

#include <utility>

#include "common/tensor.h"

namespace clipflow {

inline void check_flow_interpolate(const Tensor& data, const Tensor& noise, const Tensor& sigmas,
                                   const Tensor& noisy, const Tensor& target) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = data.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  STD_TORCH_CHECK(data.dim() >= 1 && data.is_contiguous(),
                  "flow_interpolate: data must be [B, ...], contiguous");
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"noise", noise},
                                     {"noisy", noisy},
                                     {"target", target}})
    STD_TORCH_CHECK(tensor.numel() == data.numel() && tensor.scalar_type() == dtype &&
                        tensor.is_cpu() == data.is_cpu() && tensor.is_contiguous(),
                    "flow_interpolate: ", name, " must be like data, contiguous");
  STD_TORCH_CHECK(sigmas.numel() == data.size(0) && sigmas.scalar_type() == wide &&
                      sigmas.is_cpu() == data.is_cpu() && sigmas.is_contiguous(),
                  "flow_interpolate: sigmas must be [B], contiguous, in the type computed in");
}

}  // namespace clipflow
