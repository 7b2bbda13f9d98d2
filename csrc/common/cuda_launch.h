// The current CUDA stream and launch errors, through PyTorch's stable ABI.

#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace clipflow {

// The stream that PyTorch runs on now on the tensor's device.
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  void* stream = nullptr;
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
#else
  // Not linked against: the extension also loads beside a PyTorch without CUDA.
  using Lookup = int (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Lookup>(symbol);
  }();
  STD_TORCH_CHECK(lookup != nullptr && lookup(device, &stream) == 0,
                  "clipflow: PyTorch's current CUDA stream was not found in libtorch_cuda.so");
#endif
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace clipflow
