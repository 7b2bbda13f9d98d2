// Row kernels: a team of threads holds one row of a [rows, channels] tensor in registers.
//
// A team is one warp (several teams a block) or a whole block (one team). Which one, and how many
// channels a thread holds, depends on the number of channels alone, so that a row is summed in the
// same order whatever the batch.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace clipflow {

constexpr int kWarp = 32;
constexpr int kWarpTeams = 4;           // teams a block, where a team is one warp
constexpr int kMaxThreads = 512;        // threads of a team, and of a block
constexpr int kVectorChannels = 16;     // channels a thread holds at most, in 16-byte packs

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// N elements that lie side by side: one, or 16 bytes, or several times 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <typename T, int N>
__device__ inline Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
  if constexpr (sizeof(pack) >= 16) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i)
      reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    pack = *reinterpret_cast<const Pack<T, N>*>(from);
  }
  return pack;
}

template <typename T, int N>
__device__ inline void store(T* to, const float* values) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = from_float<T>(values[i]);
  if constexpr (sizeof(pack) >= 16) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&pack)[i];
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

// First channel of the thread's pack number v; packs of a team's threads lie side by side.
template <int N>
__device__ inline int pack_channel(int v) {
  return (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
}

// The thread's V packs of a row of T, as they lie in memory; zeros past the row's end.
template <typename T, int N, int V>
struct RowPacks {
  Pack<T, N> packs[V];

  __device__ inline void read(const T* row, int channels) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int channel = pack_channel<N>(v);
      if (channel < channels) {
        packs[v] = load<T, N>(row + channel);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) packs[v].at[i] = from_float<T>(0.f);
      }
    }
  }

  __device__ inline float operator()(int v, int i) const { return to_float(packs[v].at[i]); }
};

// Sum of `value` over the team, in every thread. Two sums that follow each other must use different
// buffers: the barrier of the second then keeps the first's buffer until all have read it.
__device__ inline float2 team_sum(float2 value, float2* buffer) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    value.x += __shfl_xor_sync(0xffffffffu, value.x, lane);
    value.y += __shfl_xor_sync(0xffffffffu, value.y, lane);
  }
  if (blockDim.x == kWarp) return value;
  if (threadIdx.x % kWarp == 0) buffer[threadIdx.x / kWarp] = value;
  __syncthreads();
  float2 total = buffer[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) {
    total.x += buffer[warp].x;
    total.y += buffer[warp].y;
  }
  return total;
}

// Packs of `elements` channels that a thread holds: one where a warp holds the row so, else up to 8
// channels, and 16 only where a block cannot do with 8: more threads have more loads under way.
inline int packs_per_thread(int64_t packs, int elements) {
  const int half = kVectorChannels / 2 / elements;
  if (packs <= kWarp) return 1;
  return packs <= half * kMaxThreads ? half : 2 * half;
}

// Threads of a team (x) and teams of a block (y) for rows of `packs` packs, `per_thread` a thread.
inline dim3 team_block(int packs, int per_thread) {
  const int warps = (packs + per_thread * kWarp - 1) / (per_thread * kWarp);
  return warps == 1 ? dim3(kWarp, kWarpTeams) : dim3(warps * kWarp, 1);
}

}  // namespace clipflow
