// What the norms' ops on the CPU check of their tensors, and how they make and run a call.

#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "common/norm_call.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace clipflow {

// As torch::stable::new_empty, which looks up the op by its name: 0.8 us a tensor. The dtype is one
// of aoti_torch_dtype_...().
inline Tensor new_on(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     int32_t dtype) {
  int32_t layout = 0, device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      x.get(), sizes.data(), sizes.size(), &dtype, &layout, &device, index, nullptr, &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& x) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return new_on(x, x.sizes(), dtype);
}

// Outputs of so many bytes go past the caches.
constexpr int64_t kStreamedBytes = 16 << 20;

inline void check_dtype(const char* op, const char* name, const Tensor& x, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && tensor.is_cpu(), op, ": ", name,
                  " must have the dtype and device of x");
}

// [..., D], contiguous, with the shape, dtype and device of `x`.
inline void check_tokens(const char* op, const char* name, const Tensor& x, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.is_contiguous(), op, ": ", name,
                  " must be [..., D] and contiguous");
  if (&tensor == &x) return;
  const auto wanted = x.sizes(), found = tensor.sizes();
  STD_TORCH_CHECK(std::equal(wanted.begin(), wanted.end(), found.begin(), found.end()), op, ": ",
                  name, " must have the shape of x");
  check_dtype(op, name, x, tensor);
}

// The data of [rows, D] with contiguous rows; their distance goes to `stride`.
inline const void* rows_of(const char* op, const char* name, const Tensor& x, const Tensor& tensor,
                           int64_t rows, int64_t* stride) {
  const int64_t channels = x.size(x.dim() - 1);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == channels, op,
                  ": ", name, " must be [", rows, ", ", channels, "]");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || channels <= 1 || rows == 0, op, ": ", name,
                  " must have contiguous rows, got stride ", tensor.stride(1));
  check_dtype(op, name, x, tensor);
  *stride = tensor.stride(0);
  return tensor.const_data_ptr();
}

inline const void* rows_of(const char* op, const char* name, const Tensor& x,
                           const std::optional<Tensor>& tensor, int64_t rows, int64_t* stride) {
  return tensor.has_value() ? rows_of(op, name, x, *tensor, rows, stride) : nullptr;
}

// The data of [D], contiguous.
inline const void* vector_of(const char* op, const char* name, const Tensor& x,
                             const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  const int64_t channels = x.size(x.dim() - 1);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == channels, op, ": ", name, " must be [",
                  channels, "]");
  STD_TORCH_CHECK(tensor->stride(0) == 1 || channels <= 1, op, ": ", name, " must be contiguous");
  check_dtype(op, name, x, *tensor);
  return tensor->const_data_ptr();
}

// [S, D], contiguous, of the type that `x` is computed in.
inline void check_gain(const char* op, const char* name, const Tensor& x, const Tensor& gain) {
  using torch::headeronly::ScalarType;
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(gain.dim() == 2 && gain.size(1) == x.size(x.dim() - 1) && gain.is_contiguous() &&
                      gain.scalar_type() == wide && gain.is_cpu(),
                  op, ": ", name, " must be [S, D], contiguous and float32 (float64 if x is)");
}

inline Modulation modulation_of(const char* op, const Tensor& x, const std::optional<Tensor>& shift,
                                const Tensor& scale, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& table) {
  Modulation m = {};
  const int64_t rows = scale.size(0);
  m.scale = rows_of(op, "scale", x, scale, rows, &m.scale_stride);
  m.shift = rows_of(op, "shift", x, shift, rows, &m.shift_stride);
  m.table = rows_of(op, "table", x, table, 2, &m.table_stride);
  m.weight = vector_of(op, "weight", x, weight);
  return m;
}

// Where `x` has elements; `outputs` are the tensors to be written.
inline NormShape shape_of(const char* op, const Tensor& x, int64_t rows, bool rms, double eps,
                          std::initializer_list<const Tensor*> outputs) {
  const int64_t channels = x.size(x.dim() - 1), tokens = x.numel() / channels;
  STD_TORCH_CHECK(rows > 0 && tokens % rows == 0, op, ": x must have a multiple of ", rows,
                  " tokens, as many as there are rows of modulation, got ", tokens);
  int64_t bytes = 0;
  bool aligned = true;
  for (const Tensor* output : outputs) {
    const int64_t size = output->element_size();
    bytes += output->numel() * size;
    aligned = aligned && channels * size % 64 == 0 &&
              reinterpret_cast<uintptr_t>(output->const_data_ptr()) % 64 == 0;
  }
  return {tokens / rows, channels, eps, rms, aligned && bytes >= kStreamedBytes};
}

// body(begin, end, scratch) over [0, count) items of `values` values each.
template <typename F>
void for_items_with_scratch(int64_t count, int64_t values, const NormShape& shape, const F& body) {
  for_items(count, values, [&](int64_t begin, int64_t end) {
    constexpr int64_t kAlign = 64;
    const int64_t bytes = kScratchRows * padded(shape.channels) * sizeof(double) + kAlign;
    const std::unique_ptr<char[]> scratch(new char[bytes]);
    const auto at = reinterpret_cast<uintptr_t>(scratch.get());
    body(begin, end, reinterpret_cast<void*>((at + kAlign - 1) / kAlign * kAlign));
  });
}

// Fills in the chunks, and runs both stages. The sums over tokens are taken over chunks, then over
// the chunks in order, so that they are bitwise the same for every number of threads; and chunks
// are of as many tokens in every batch.
inline void run_backward(NormBackward& call, int64_t rows, bool wide_is_double,
                         NormBackwardRows backward, NormReduceRows reduce) {
  constexpr int64_t kLeastTokens = 32, kMostChunks = 16;
  const int64_t tokens = call.shape.tokens, channels = call.shape.channels;
  call.tokens_per_chunk = std::max(kLeastTokens, (tokens + kMostChunks - 1) / kMostChunks);
  call.chunks = (tokens + call.tokens_per_chunk - 1) / call.tokens_per_chunk;
  std::unique_ptr<char[]> partial;
  if (call.chunks > 1) {
    const int64_t item = wide_is_double ? sizeof(double) : sizeof(float);
    partial.reset(new char[rows * call.chunks * 3 * padded(channels) * item]);
    call.partial = partial.get();
  }
  for_items_with_scratch(
      rows * call.chunks, std::min(tokens, call.tokens_per_chunk) * channels, call.shape,
      [&](int64_t begin, int64_t end, void* scratch) { backward(call, begin, end, scratch); });
  if (call.chunks > 1)
    for_items(rows, call.chunks * channels,
              [&](int64_t begin, int64_t end) { reduce(call, begin, end); });
}

}  // namespace clipflow
