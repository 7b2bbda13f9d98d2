// What the norms of diffusion transformers share on CUDA: statistics, modulation, and gradients
// that are summed over groups of rows.
//
//   y = norm(x) * weight * (1 + scale + table[1]) + shift + table[0]
//
// where norm is LayerNorm without parameters or RMSNorm. Modulation has S rows, each for the next
// `group` rows of x. A backward sums gradients over a group in two stages, over chunks of rows and
// then over chunks, in a fixed order and without atomics. All is float32.

#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "common/dispatch.cuh"
#include "common/row_forms.cuh"
#include "common/tensor.h"

namespace clipflow {

struct Statistics {
  float mean, rstd;  // mean is 0 for RMSNorm
};

template <typename Row, typename X>
__device__ __forceinline__ Statistics statistics(const Row& row, const X& x, bool rms, float eps,
                                                 TeamSums& sums) {
  const float mean = rms ? 0.f : row_sum(row, sums, x) / row.channels;
  const float squares = row_sum(row, sums, [&](Place at) {
    const float centered = x(at) - mean;
    return centered * centered;
  });
  return {mean, rsqrtf(squares / row.channels + eps)};
}

// `value` as a tensor of T holds it.
template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

template <typename T>
struct Modulation {
  const T *shift, *scale, *weight, *table;  // all but scale may be null
  int64_t shift_stride, scale_stride, table_stride;

  __device__ __forceinline__ const T* shift_row(int64_t sample) const {
    return shift == nullptr ? nullptr : shift + sample * shift_stride;
  }
  __device__ __forceinline__ const T* scale_row(int64_t sample) const {
    return scale + sample * scale_stride;
  }
};

// A function of (Place, normed) that modulates. `shift` and `scale` are rows loaded early, so that
// they arrive while the sums are taken; weight and table are the same for all rows, and close.
template <typename T, typename Row, typename Shift, typename Scale>
__device__ __forceinline__ auto modulator(const Modulation<T>& m, const Row& row,
                                          const Shift& shift, const Scale& scale) {
  const auto weight = row.load_optional(m.weight);
  const auto offset = row.load_optional(m.table);
  const auto gain = row.load_optional(m.table == nullptr ? nullptr : m.table + m.table_stride);
  const bool weighted = m.weight != nullptr;
  return [=](Place at, float normed) {
    const float factor = 1.f + (scale(at) + gain(at));
    return normed * (weighted ? weight(at) : 1.f) * factor + (shift(at) + offset(at));
  };
}

// What LayerNorm or RMSNorm passes back for a row: the gradient of x from that of norm(x).
struct NormGradient {
  Statistics of;
  float mean_grad, mean_product;  // of the gradient, and of it times norm(x)

  __device__ __forceinline__ float normed(float x) const { return (x - of.mean) * of.rstd; }
  __device__ __forceinline__ float operator()(float x, float d_normed) const {
    return (d_normed - mean_grad - normed(x) * mean_product) * of.rstd;
  }
};

template <typename Row, typename X, typename G>
__device__ __forceinline__ NormGradient norm_gradient(const Row& row, const X& x, const G& d_normed,
                                                      bool rms, float eps, TeamSums& sums) {
  float2 total = {0.f, 0.f};
  if (!rms) total = row_sums(row, sums, [&](Place at) { return float2{x(at), d_normed(at)}; });
  const float mean = total.x / row.channels;
  const float2 products = row_sums(row, sums, [&](Place at) {
    const float centered = x(at) - mean;
    return float2{centered * centered, centered * d_normed(at)};
  });
  const float rstd = rsqrtf(products.x / row.channels + eps);
  return {{mean, rstd}, total.y / row.channels, products.y / row.channels * rstd};
}

// How a backward shares out the rows of each group.
struct Groups {
  int64_t samples;     // S
  int64_t group;       // rows of x for each
  int64_t chunk_rows;  // rows that one team sums
  int64_t chunks;      // ... and how many such teams a group has

  Groups(int64_t rows, int64_t samples) : samples(samples), group(rows / samples) {
    // About 16 chunks of 4 to 64 rows, by the group alone: sums must not depend on the batch.
    chunk_rows = std::clamp<int64_t>(next_power_of_2(group) / 16, 4, 64);
    chunks = (group + chunk_rows - 1) / chunk_rows;
  }
  __host__ __device__ int64_t teams() const { return samples * chunks; }
};

// The rows of one team.
struct Chunk {
  int64_t sample, first, rows;

  __device__ __forceinline__ Chunk(const Groups& groups, int64_t team)
      : sample(team / groups.chunks) {
    const int64_t begin = (team - sample * groups.chunks) * groups.chunk_rows;
    first = sample * groups.group + begin;
    rows = min(groups.chunk_rows, groups.group - begin);
  }
};

constexpr int kMostParts = 3;
constexpr int kSumLanes = 8;

// Sums that a backward returns, [S, D] each, and what its teams write: [S, chunks, D], the sums
// themselves where a group is one chunk.
struct Parts {
  float* sums[kMostParts];
  float* chunks[kMostParts];
};

namespace {

// Adds up the chunks of part blockIdx.y: a column of kSumLanes threads a channel, each a strided
// share of them.
__global__ void __launch_bounds__(kWarp* kSumLanes)
    group_sum_kernel(Parts parts, int64_t chunks, int64_t channels) {
  __shared__ float lanes[kSumLanes][kWarp];
  const int64_t blocks = (channels + kWarp - 1) / kWarp;
  const int64_t sample = blockIdx.x / blocks;
  const int64_t channel = (blockIdx.x - sample * blocks) * kWarp + threadIdx.x;
  // Not indexed by blockIdx.y: that would copy the parameter to local memory.
  const unsigned part = blockIdx.y;
  const float* from = part == 0 ? parts.chunks[0] : part == 1 ? parts.chunks[1] : parts.chunks[2];
  float* to = part == 0 ? parts.sums[0] : part == 1 ? parts.sums[1] : parts.sums[2];
  from += sample * chunks * channels + channel;
  float total = 0.f;
  if (channel < channels)
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSumLanes)
      total += from[chunk * channels];
  lanes[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= channels) return;
  for (int lane = 1; lane < kSumLanes; ++lane) total += lanes[lane][threadIdx.x];
  to[sample * channels + channel] = total;
}

inline void sum_groups(const Parts& parts, int count, const Groups& groups, int64_t channels,
                       cudaStream_t stream) {
  if (groups.chunks == 1) return;
  const auto blocks = static_cast<unsigned>(groups.samples * ((channels + kWarp - 1) / kWarp));
  group_sum_kernel<<<dim3(blocks, count), dim3(kWarp, kSumLanes), 0, stream>>>(
      parts, groups.chunks, channels);
}

// Tensors [S, D] float32 for `count` sums like `gain`, and room for their chunks.
struct PartTensors {
  Tensor sums[kMostParts];
  std::optional<Tensor> room;
  Parts parts;

  PartTensors(const Tensor& gain, int count, const Groups& groups)
      : sums{torch::stable::empty_like(gain), torch::stable::empty_like(gain),
             count > 2 ? torch::stable::empty_like(gain) : torch::stable::new_empty(gain, {0})} {
    const int64_t size = groups.teams() * gain.size(1);
    if (groups.chunks > 1) room = torch::stable::new_empty(gain, {count * size});
    float* at = room ? static_cast<float*>(room->mutable_data_ptr()) : nullptr;
    for (int i = 0; i < kMostParts; ++i) {
      parts.sums[i] = static_cast<float*>(sums[i].mutable_data_ptr());
      parts.chunks[i] = room ? at + i * size : parts.sums[i];
    }
  }
};

// Rows of modulation [S, D], or null: contiguous rows, any stride apart.
template <typename T>
const T* modulation_rows(const char* op, const char* name, const Tensor& x,
                         const std::optional<Tensor>& rows, int64_t count) {
  if (!rows.has_value()) return nullptr;
  const int64_t channels = x.size(x.dim() - 1);
  STD_TORCH_CHECK(rows->dim() == 2 && rows->size(0) == count && rows->size(1) == channels, op, ": ",
                  name, " must be [", count, ", ", channels, "]");
  STD_TORCH_CHECK(channels == 1 || rows->stride(1) == 1, op, ": ", name,
                  " must have contiguous rows, got stride ", rows->stride(1));
  STD_TORCH_CHECK(rows->scalar_type() == x.scalar_type() && rows->is_cpu() == x.is_cpu(), op, ": ",
                  name, " must have the dtype and device of x");
  return static_cast<const T*>(rows->const_data_ptr());
}

// A vector [D], or null.
template <typename T>
const T* channel_vector(const char* op, const char* name, const Tensor& x,
                        const std::optional<Tensor>& vector) {
  if (!vector.has_value()) return nullptr;
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == x.size(x.dim() - 1) &&
                      vector->is_contiguous() && vector->scalar_type() == x.scalar_type() &&
                      vector->is_cpu() == x.is_cpu(),
                  op, ": ", name, " must be contiguous, [", x.size(x.dim() - 1),
                  "], with the dtype and device of x");
  return static_cast<const T*>(vector->const_data_ptr());
}

inline int64_t row_stride(const std::optional<Tensor>& rows) {
  return rows.has_value() ? rows->stride(0) : 0;
}

template <typename T>
Modulation<T> modulation_of(const char* op, const Tensor& x, const std::optional<Tensor>& shift,
                            const Tensor& scale, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& table) {
  return {modulation_rows<T>(op, "shift", x, shift, scale.size(0)),
          modulation_rows<T>(op, "scale", x, scale, scale.size(0)),
          channel_vector<T>(op, "weight", x, weight),
          modulation_rows<T>(op, "table", x, table, 2),
          row_stride(shift),
          scale.stride(0),
          row_stride(table)};
}

// Whether rows `stride` elements of T apart keep the alignment of the first.
template <typename T>
bool strides16(std::initializer_list<int64_t> strides) {
  return std::all_of(strides.begin(), strides.end(),
                     [](int64_t stride) { return stride * sizeof(T) % 16 == 0; });
}

template <typename T>
bool aligned(const Modulation<T>& m) {
  return aligned16({m.shift, m.scale, m.weight, m.table}) &&
         strides16<T>({m.shift_stride, m.scale_stride, m.table_stride});
}

// x: [..., D], contiguous; the others like it.
inline void check_rows_like(const char* op, const char* name, const Tensor& x,
                            const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == x.numel() &&
                      tensor.size(tensor.dim() - 1) == x.size(x.dim() - 1) &&
                      tensor.scalar_type() == x.scalar_type() && tensor.is_cpu() == x.is_cpu(),
                  op, ": ", name, " must be contiguous and have the shape, dtype and device of x");
}

// Float32 [S, D] with S dividing the rows of x.
inline void check_gain(const char* op, const char* name, const Tensor& x, const Tensor& gain) {
  const int64_t channels = x.size(x.dim() - 1);
  STD_TORCH_CHECK(gain.dim() == 2 && gain.size(1) == channels && gain.is_contiguous() &&
                      gain.scalar_type() == torch::headeronly::ScalarType::Float &&
                      gain.is_cpu() == x.is_cpu(),
                  op, ": ", name, " must be contiguous float32 [S, ", channels, "]");
}

}  // namespace
}  // namespace clipflow
