// A thread's share of a row in one of two forms with the same members, so that the body of a kernel
// is written once: HeldRow keeps what it reads in registers, StreamedRow reads it again each time,
// for rows of any length. Which one a row takes depends on its length and alignment alone.

#pragma once

#include <algorithm>

#include "common/rows.cuh"

namespace clipflow {

// One channel of the thread's share: pack v, element i of it.
struct Place {
  int v, i;
  int64_t channel;
};

template <int N, int V>
struct HeldRow {
  int channels;

  // What `load` returns: the elements as they lie in memory.
  template <typename T>
  struct Loaded {
    Pack<T, N> packs[V];
    __device__ __forceinline__ float operator()(Place at) const {
      return to_float(packs[at.v].at[at.i]);
    }
  };

  // What `keep` returns.
  struct Kept {
    float values[N * V];
    __device__ __forceinline__ float operator()(Place at) const { return values[at.v * N + at.i]; }
    __device__ __forceinline__ float& operator[](Place at) { return values[at.v * N + at.i]; }
  };

  // Sums in registers.
  struct Running {
    float values[N * V] = {};
    __device__ __forceinline__ void add(Place at, float value) { values[at.v * N + at.i] += value; }
  };

  __device__ __forceinline__ explicit HeldRow(int64_t count) : channels(static_cast<int>(count)) {}

  template <typename F>
  __device__ __forceinline__ void each_pack(F f) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int channel = pack_channel<N>(v);
      if (channel < channels) f(v, channel);
    }
  }

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    each_pack([&](int v, int channel) {
#pragma unroll
      for (int i = 0; i < N; ++i) f(Place{v, i, channel + i});
    });
  }

  template <typename T>
  __device__ __forceinline__ Loaded<T> load(const T* row) const {
    Loaded<T> loaded;
    each_pack([&](int v, int channel) {
      loaded.packs[v] = clipflow::load<T, N>(row + channel);
    });
    return loaded;
  }

  // Zeros for a null pointer.
  template <typename T>
  __device__ __forceinline__ Loaded<T> load_optional(const T* row) const {
    if (row != nullptr) return load(row);
    Loaded<T> zeros;
    each([&](Place at) { zeros.packs[at.v].at[at.i] = from_float<T>(0.f); });
    return zeros;
  }

  // The values of f, in registers.
  template <typename F>
  __device__ __forceinline__ Kept keep(F f) const {
    Kept kept;
    each([&](Place at) { kept[at] = f(at); });
    return kept;
  }

  // As `keep`, of values that T holds, and stored to `row`, which f may have read.
  template <typename T, typename F>
  __device__ __forceinline__ Kept keep_stored(T* row, F f) const {
    const Kept kept = keep(f);
    store(row, kept);
    return kept;
  }

  // factor times the sum of `count` rows; row number k begins at row_of(k).
  template <typename RowOf>
  __device__ __forceinline__ Kept sum_of_rows(int count, float factor, RowOf row_of) const {
    Kept kept = keep([](Place) { return 0.f; });
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const auto loaded = load(row_of(k));
      each([&](Place at) { kept[at] += loaded(at); });
    }
    each([&](Place at) { kept[at] *= factor; });
    return kept;
  }

  // Sums that begin at zero and are written to `row` by `finish`.
  __device__ __forceinline__ Running running(float*) const { return {}; }
  __device__ __forceinline__ void finish(const Running& sums, float* row) const {
    store(row, [&](Place at) { return sums.values[at.v * N + at.i]; });
  }

  template <typename T, typename F>
  __device__ __forceinline__ void store(T* row, F f) const {
    each_pack([&](int v, int channel) {
      float values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = f(Place{v, i, channel + i});
      clipflow::store<T, N>(row + channel, values);
    });
  }
};

struct StreamedRow {
  int64_t channels;

  template <typename T>
  struct Loaded {
    const T* row;
    __device__ __forceinline__ float operator()(Place at) const {
      return to_float(row[at.channel]);
    }
  };

  template <typename T>
  struct LoadedOptional {
    const T* row;
    __device__ __forceinline__ float operator()(Place at) const {
      return row == nullptr ? 0.f : to_float(row[at.channel]);
    }
  };

  // Sums that grow in memory, each of them by one thread alone.
  struct Running {
    float* sums;
    __device__ __forceinline__ void add(Place at, float value) { sums[at.channel] += value; }
  };

  __device__ __forceinline__ explicit StreamedRow(int64_t count) : channels(count) {}

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (int64_t d = threadIdx.x; d < channels; d += blockDim.x) f(Place{0, 0, d});
  }

  template <typename T>
  __device__ __forceinline__ Loaded<T> load(const T* row) const {
    return {row};
  }

  template <typename T>
  __device__ __forceinline__ LoadedOptional<T> load_optional(const T* row) const {
    return {row};
  }

  // f itself: its values are computed again each time.
  template <typename F>
  __device__ __forceinline__ F keep(F f) const {
    return f;
  }

  // Read back from `row`, each value by the thread that stored it: what f reads may be overwritten.
  template <typename T, typename F>
  __device__ __forceinline__ Loaded<T> keep_stored(T* row, F f) const {
    store(row, f);
    return {row};
  }

  template <typename RowOf>
  __device__ __forceinline__ auto sum_of_rows(int count, float factor, RowOf row_of) const {
    return [=](Place at) {
      float total = 0.f;
      for (int k = 0; k < count; ++k) total += to_float(row_of(k)[at.channel]);
      return total * factor;
    };
  }

  __device__ __forceinline__ Running running(float* row) const {
    each([&](Place at) { row[at.channel] = 0.f; });
    return {row};
  }
  __device__ __forceinline__ void finish(const Running&, float*) const {}

  template <typename T, typename F>
  __device__ __forceinline__ void store(T* row, F f) const {
    each([&](Place at) { row[at.channel] = from_float<T>(f(at)); });
  }
};

// The two buffers that a team's sums take turns in; `team_sum` says why.
struct TeamSums {
  float2 (*buffers)[kMaxThreads / kWarp];
  int turn = 0;

  __device__ __forceinline__ float2* next() { return buffers[turn ^= 1]; }
};

// Sums of f over the team's row, in every thread; f(Place) is a float2, or a float.
template <typename Row, typename F>
__device__ __forceinline__ float2 row_sums(const Row& row, TeamSums& sums, F f) {
  float2 total = {0.f, 0.f};
  row.each([&](Place at) {
    const float2 value = f(at);
    total.x += value.x;
    total.y += value.y;
  });
  return team_sum(total, sums.next());
}

template <typename Row, typename F>
__device__ __forceinline__ float row_sum(const Row& row, TeamSums& sums, F f) {
  return row_sums(row, sums, [&](Place at) { return float2{f(at), 0.f}; }).x;
}

// Calls the kernel of `call` for rows of `channels` elements of T: rows<N, V>() for V packs of
// N held by a thread, or long_rows(). A thread holds Call::kHeld channels at most in packs, or
// Call::kScalars where it loads them one by one.
template <typename T, typename Call>
void launch_rows(const Call& call, int64_t channels, bool aligned) {
  constexpr int kPack = 16 / sizeof(T);
  constexpr int kMost = Call::kHeld / kPack;
  if (aligned && channels % kPack == 0 && channels <= kMaxThreads * Call::kHeld) {
    const int per_thread = packs_per_thread(channels / kPack, kPack);
    if (per_thread == 1) return call.template rows<kPack, 1>();
    if constexpr (kMost >= 2)
      if (per_thread == 2) return call.template rows<kPack, 2>();
    if constexpr (kMost > 2) return call.template rows<kPack, kMost>();
  }
  if (channels <= kMaxThreads * Call::kScalars) return call.template rows<1, Call::kScalars>();
  call.long_rows();
}

// Threads of a team (x) and teams of a block (y), for rows of `channels` in V packs of N a thread.
template <int N, int V>
inline dim3 row_block(int64_t channels) {
  return team_block(static_cast<int>((channels + N - 1) / N), V);
}

// Blocks of `teams` teams for `rows` rows.
inline unsigned row_grid(int64_t rows, unsigned teams) {
  return static_cast<unsigned>((rows + teams - 1) / teams);
}

}  // namespace clipflow
