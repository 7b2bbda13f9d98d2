// Normalization and rotation of queries and keys on CUDA, forward; the op is defined in
// clipflow/ops/qk_norm_rope.py.
//
//   n = (x - mean) * rstd * weight + bias,   y_i = n_i cos - n_j sin,   y_j = n_j cos + n_i sin
//
// Source: Su et al., "RoFormer" (2021), section 3.4.2, for the rotation; Henry et al., "Query-Key
// Normalization for Transformers" (2020), for the normalization.
// Bytes moved: reads x and writes y, of queries and keys in one launch. Statistics are float32.
//
// A group, which is a head or all heads of a token, belongs to a team of threads. A thread holds
// packs in twos, one in each half of a head, so that it has both of every pair that it turns.

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/dispatch.cuh"
#include "common/qk_sides.h"
#include "common/rows.cuh"
#include "common/tensor.h"

namespace clipflow {
namespace {

constexpr int kBlock = 128;        // threads of a block of several teams
constexpr int kMostThreads = 512;  // ... and of a block that is one team

enum Norm : int { kNone, kRms, kLayer };

// Queries or keys. Shape suffixes: B = batch, L = tokens, H = heads, K = width of a head.
struct Side {
  const void* x;       // [B, L, H, K]
  const void* weight;  // [K] or [H * K], or null
  const void* bias;    // as weight
  const float* cos;    // [L, K / 2], or null
  const float* sin;
  void* y;                   // [B, L, H, K], contiguous
  int64_t groups;            // B * L, or B * L * H
  int64_t tokens;            // L
  int64_t sample_stride, token_stride, head_stride;
  int heads;
  unsigned blocks;  // of the grid
};

struct Call {
  Side sides[2];
  int width;  // K
  int norm;
  bool across_heads, interleaved;
  float eps;
};

// Sum over the team, in every thread. Teams of at most a warp are a power of two; larger ones are
// the whole block.
__device__ inline float sum_of_team(float value, float* buffer) {
  const int lanes = min(blockDim.x, kWarp);
  for (int lane = lanes / 2; lane > 0; lane /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, lane);
  if (blockDim.x <= kWarp) return value;
  if (threadIdx.x % kWarp == 0) buffer[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += buffer[warp];
  return total;
}

// Where a group lies.
struct Group {
  int64_t from, to;  // first elements in x and y
  int64_t token;     // position in its sample
  bool real;

  __device__ inline Group(const Call& call, const Side& side, int64_t index) {
    real = index < side.groups;
    if (!real) index = 0;
    const int64_t row = call.across_heads ? index : index / side.heads;
    const int head = static_cast<int>(index - (call.across_heads ? index : row * side.heads));
    const int64_t sample = row / side.tokens;
    token = row - sample * side.tokens;
    from = sample * side.sample_stride + token * side.token_stride +
           head * side.head_stride;
    to = (row * side.heads + head) * call.width;
  }
};

// V twos of packs of N elements a thread, for all the team's threads together; number v begins at
// these elements of the group.
template <int N>
struct Twos {
  int first, second;  // elements of the group
  int pair;           // of the head, of the first element
  bool real;

  __device__ inline Twos(const Call& call, int count, int v) {
    const int index = v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    const int half = call.width / 2, per_head = half / N;
    const int head = index / per_head;
    pair = (index - head * per_head) * N;
    real = index < count;
    if constexpr (N == 1) {
      first = head * call.width + (call.interleaved ? 2 * pair : pair);
      second = first + (call.interleaved ? 1 : half);
    } else {
      first = head * call.width + pair;
      second = first + half;
    }
  }
};

template <typename T, int N>
__device__ inline void read(const T* from, bool real, float* values) {
  if (real) {
    const Pack<T, N> pack = load<T, N>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_float(pack.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = 0.f;
  }
}

// M values of a table, in words as wide as M allows.
template <int M>
__device__ inline void read_angles(const float* from, float* values) {
  if constexpr (M % 4 == 0) {
#pragma unroll
    for (int i = 0; i < M; i += 4)
      *reinterpret_cast<float4*>(values + i) = __ldg(reinterpret_cast<const float4*>(from + i));
  } else if constexpr (M == 2) {
    *reinterpret_cast<float2*>(values) = __ldg(reinterpret_cast<const float2*>(from));
  } else {
    values[0] = __ldg(from);
  }
}

__device__ inline void turn_pair(float c, float s, float& i, float& j) {
  const float first = i, second = j;
  i = first * c - second * s;
  j = second * c + first * s;
}

// Turns the neighbors of one pack.
template <int N>
__device__ inline void turn_neighbors(const float* cos, const float* sin, float* values) {
  alignas(16) float c[N / 2], s[N / 2];
  read_angles<N / 2>(cos, c);
  read_angles<N / 2>(sin, s);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) turn_pair(c[i], s[i], values[2 * i], values[2 * i + 1]);
}

// Turns the pairs of a thread's two packs. Neighbors lie in one pack; in halves, element i of the
// one goes with element i of the other, as it does where a pack is one element.
template <int N>
__device__ inline void turn(const Call& call, const float* cos, const float* sin, int pair,
                            float* first, float* second) {
  if constexpr (N > 1) {
    if (call.interleaved) {
      const int half = call.width / 4;  // pairs in half a head
      turn_neighbors<N>(cos + pair / 2, sin + pair / 2, first);
      turn_neighbors<N>(cos + half + pair / 2, sin + half + pair / 2, second);
      return;
    }
  }
  alignas(16) float c[N], s[N];
  read_angles<N>(cos + pair, c);
  read_angles<N>(sin + pair, s);
#pragma unroll
  for (int i = 0; i < N; ++i) turn_pair(c[i], s[i], first[i], second[i]);
}

template <typename T, int N, int V>
__global__ void __launch_bounds__(kMostThreads)
    qk_norm_rope_fwd_kernel(const __grid_constant__ Call call) {
  __shared__ float sums[2][kMostThreads / kWarp];
  const bool keys = blockIdx.x >= call.sides[0].blocks;
  const Side& side = call.sides[keys];
  const int64_t block = blockIdx.x - (keys ? call.sides[0].blocks : 0u);
  const Group group(call, side, block * blockDim.y + threadIdx.y);
  const int heads = call.across_heads ? side.heads : 1;
  const int count = heads * (call.width / 2 / N);
  const T* x = static_cast<const T*>(side.x) + group.from;
  T* y = static_cast<T*>(side.y) + group.to;

  float first[V][N], second[V][N];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Twos<N> two(call, count, v);
    read<T, N>(x + two.first, two.real, first[v]);
    read<T, N>(x + two.second, two.real, second[v]);
  }

  float mean = 0.f, rstd = 1.f;
  const float size = static_cast<float>(heads * call.width);
  if (call.norm == kLayer) {
    float total = 0.f;
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int i = 0; i < N; ++i) total += first[v][i] + second[v][i];
    mean = sum_of_team(total, sums[0]) / size;
  }
  if (call.norm != kNone) {
    float squares = 0.f;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (Twos<N>(call, count, v).real)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float a = first[v][i] - mean, b = second[v][i] - mean;
          squares += a * a + b * b;
        }
    rstd = rsqrtf(sum_of_team(squares, sums[1]) / size + call.eps);
  }

  const T* weight = static_cast<const T*>(side.weight);
  const T* bias = static_cast<const T*>(side.bias);
  const float* cos = side.cos + group.token * (call.width / 2);
  const float* sin = side.sin + group.token * (call.width / 2);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Twos<N> two(call, count, v);
    if (!two.real || !group.real) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      first[v][i] = (first[v][i] - mean) * rstd;
      second[v][i] = (second[v][i] - mean) * rstd;
    }
    if (weight != nullptr) {
      float a[N], b[N];
      read<T, N>(weight + two.first, true, a);
      read<T, N>(weight + two.second, true, b);
#pragma unroll
      for (int i = 0; i < N; ++i) first[v][i] *= a[i], second[v][i] *= b[i];
    }
    if (bias != nullptr) {
      float a[N], b[N];
      read<T, N>(bias + two.first, true, a);
      read<T, N>(bias + two.second, true, b);
#pragma unroll
      for (int i = 0; i < N; ++i) first[v][i] += a[i], second[v][i] += b[i];
    }
    if (side.cos != nullptr) turn<N>(call, cos, sin, two.pair, first[v], second[v]);
    store<T, N>(y + two.first, first[v]);
    store<T, N>(y + two.second, second[v]);
  }
}

// Groups that do not fit a block's registers: one block a group, which it reads three times.
template <typename T>
__global__ void __launch_bounds__(kMostThreads)
    qk_norm_rope_fwd_long_kernel(const __grid_constant__ Call call) {
  __shared__ float sums[2][kMostThreads / kWarp];
  const bool keys = blockIdx.x >= call.sides[0].blocks;
  const Side& side = call.sides[keys];
  const Group group(call, side, blockIdx.x - (keys ? call.sides[0].blocks : 0u));
  const int heads = call.across_heads ? side.heads : 1;
  const int count = heads * call.width;
  const T* x = static_cast<const T*>(side.x) + group.from;
  T* y = static_cast<T*>(side.y) + group.to;

  float mean = 0.f, rstd = 1.f;
  if (call.norm == kLayer) {
    float total = 0.f;
    for (int d = threadIdx.x; d < count; d += blockDim.x) total += to_float(x[d]);
    mean = sum_of_team(total, sums[0]) / count;
  }
  if (call.norm != kNone) {
    float squares = 0.f;
    for (int d = threadIdx.x; d < count; d += blockDim.x) {
      const float centered = to_float(x[d]) - mean;
      squares += centered * centered;
    }
    rstd = rsqrtf(sum_of_team(squares, sums[1]) / count + call.eps);
  }

  const T* weight = static_cast<const T*>(side.weight);
  const T* bias = static_cast<const T*>(side.bias);
  const auto normed = [&](int d) {
    float value = (to_float(x[d]) - mean) * rstd;
    if (weight != nullptr) value *= to_float(weight[d]);
    return bias != nullptr ? value + to_float(bias[d]) : value;
  };
  for (int v = 0; v * static_cast<int>(blockDim.x) < count / 2; ++v) {
    const Twos<1> two(call, count / 2, v);
    if (!two.real) continue;
    float a = normed(two.first), b = normed(two.second);
    if (side.cos != nullptr)
      turn<1>(call, side.cos + group.token * (call.width / 2),
              side.sin + group.token * (call.width / 2), two.pair, &a, &b);
    y[two.first] = from_float<T>(a);
    y[two.second] = from_float<T>(b);
  }
}

// Threads of a team that holds `twos` of them, V each.
template <int V>
int team_threads(int64_t twos) {
  const int64_t threads = (twos + V - 1) / V;
  return static_cast<int>(threads <= kWarp ? next_power_of_2(threads)
                                           : (threads + kWarp - 1) / kWarp * kWarp);
}

template <typename T, int N, int V>
void rows(Call call, int64_t twos, cudaStream_t stream) {
  const int team = team_threads<V>(twos);
  const dim3 block(team, team > kWarp ? 1 : kBlock / team);
  for (Side& side : call.sides)
    side.blocks = static_cast<unsigned>((side.groups + block.y - 1) / block.y);
  qk_norm_rope_fwd_kernel<T, N, V>
      <<<call.sides[0].blocks + call.sides[1].blocks, block, 0, stream>>>(call);
}

// Picks the kernel by H, K and alignment alone.
template <typename T>
void launch(Call call, bool aligned, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t heads =
      call.across_heads ? std::max(call.sides[0].heads, call.sides[1].heads) : 1;
  const int64_t pairs = heads * (call.width / 2);
  if (aligned && call.width / 2 % kPack == 0) {
    if (pairs / kPack <= kMostThreads) return rows<T, kPack, 1>(call, pairs / kPack, stream);
    if (pairs / kPack <= 2 * kMostThreads) return rows<T, kPack, 2>(call, pairs / kPack, stream);
  }
  if (pairs <= kMostThreads) return rows<T, 1, 1>(call, pairs, stream);
  if (pairs <= 4 * kMostThreads) return rows<T, 1, 4>(call, pairs, stream);
  for (Side& side : call.sides) side.blocks = static_cast<unsigned>(side.groups);
  qk_norm_rope_fwd_long_kernel<T>
      <<<call.sides[0].blocks + call.sides[1].blocks, kMostThreads, 0, stream>>>(call);
}

using Optional = std::optional<Tensor>;

Side side_of(const QKTensors& given, const Tensor& y, bool across_heads) {
  const Tensor& x = given.x;
  const int64_t heads = x.size(2), width = x.size(3), tokens = x.size(0) * x.size(1);
  const int64_t group = across_heads ? heads * width : width;
  return {
      .x = x.data_ptr(),
      .weight = qk_parameter("weight", given.weight, x, group),
      .bias = qk_parameter("bias", given.bias, x, group),
      .cos = qk_table("cos", given.cos, x),
      .sin = qk_table("sin", given.sin, x),
      .y = y.data_ptr(),
      .groups = y.numel() == 0 ? 0 : across_heads ? tokens : tokens * heads,
      .tokens = x.size(1),
      .sample_stride = x.stride(0),
      .token_stride = x.stride(1),
      .head_stride = x.stride(2),
      .heads = static_cast<int>(heads),
      .blocks = 0,
  };
}

bool packed(const Side& side, int64_t item) {
  return side.groups == 0 ||
         (aligned16({side.x, side.weight, side.bias, side.cos, side.sin, side.y}) &&
          side.sample_stride * item % 16 == 0 && side.token_stride * item % 16 == 0 &&
          side.head_stride * item % 16 == 0);
}

// Writes q_out and k_out, which are contiguous and like q and k.
void write_qk_norm_rope(const Tensor& q, const Tensor& k, const Optional& q_weight,
                        const Optional& k_weight, const Optional& q_bias, const Optional& k_bias,
                        const Optional& q_cos, const Optional& q_sin, const Optional& k_cos,
                        const Optional& k_sin, int64_t norm, bool across_heads, bool interleaved,
                        double eps, const Tensor& q_out, const Tensor& k_out) {
  const QKTensors queries = {"q", q, q_weight, q_bias, q_cos, q_sin};
  const QKTensors keys = {"k", k, k_weight, k_bias, k_cos, k_sin};
  check_qk(queries, q, across_heads);
  check_qk(keys, q, across_heads);
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "qk_norm_rope: norm must be 0, 1 or 2, got ", norm);
  if (q.numel() + k.numel() == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Call call = {
      .sides = {side_of(queries, q_out, across_heads), side_of(keys, k_out, across_heads)},
      .width = static_cast<int>(q.size(3)),
      .norm = static_cast<int>(norm),
      .across_heads = across_heads,
      .interleaved = interleaved,
      .eps = static_cast<float>(eps),
  };
  const int64_t item = q.element_size();
  const bool aligned = packed(call.sides[0], item) && packed(call.sides[1], item);
  const cudaStream_t stream = current_stream(q);
  with_element("qk_norm_rope", q, [&]<typename T>(T*) { launch<T>(call, aligned, stream); });
  check_launch("qk_norm_rope");
}

std::tuple<Tensor, Tensor> qk_norm_rope_cuda(const Tensor& q, const Tensor& k,
                                             const Optional& q_weight, const Optional& k_weight,
                                             const Optional& q_bias, const Optional& k_bias,
                                             const Optional& q_cos, const Optional& q_sin,
                                             const Optional& k_cos, const Optional& k_sin,
                                             int64_t norm, bool across_heads, bool interleaved,
                                             double eps) {
  Tensor q_out = torch::stable::new_empty(q, q.sizes());
  Tensor k_out = torch::stable::new_empty(k, k.sizes());
  write_qk_norm_rope(q, k, q_weight, k_weight, q_bias, k_bias, q_cos, q_sin, k_cos, k_sin, norm,
                     across_heads, interleaved, eps, q_out, k_out);
  return {q_out, k_out};
}

void qk_norm_rope_out_cuda(const Tensor& q, const Tensor& k, const Optional& q_weight,
                           const Optional& k_weight, const Optional& q_bias,
                           const Optional& k_bias, const Optional& q_cos, const Optional& q_sin,
                           const Optional& k_cos, const Optional& k_sin, int64_t norm,
                           bool across_heads, bool interleaved, double eps, Tensor q_out,
                           Tensor k_out) {
  check_qk_out("q_out", q_out, q);
  check_qk_out("k_out", k_out, k);
  write_qk_norm_rope(q, k, q_weight, k_weight, q_bias, k_bias, q_cos, q_sin, k_cos, k_sin, norm,
                     across_heads, interleaved, eps, q_out, k_out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipflow, CUDA, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope_cuda));
  m.impl("qk_norm_rope_out", TORCH_BOX(&qk_norm_rope_out_cuda));
}

}  // namespace clipflow
