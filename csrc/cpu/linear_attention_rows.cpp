// ReLU linear attention of single heads on the CPU, compiled once per instruction set.
//
//   S = sum_j relu(k_j) v_j^T,   z = sum_j relu(k_j),   y_i = relu(q_i) S / (relu(q_i) . z + eps)
//
// A chunk of tokens is widened into scratch memory, where it and the state stay in the L1 or L2
// cache; both matrix products then run on blocks of registers.

#include "cpu/linear_attention_rows.h"

#include "common/lanes.h"

namespace clipflow {
namespace {

constexpr int64_t kRows = 4;     // rows and
constexpr int64_t kColumns = 2;  // registers of columns of a block: 8 sums hide the latency
constexpr int64_t kFetchEvery = 4;  // products of a block for each line fetched

// A matrix of factors: element (r, i) lies at data[r * row + i * step].
template <typename One>
struct Factors {
  const One* data;
  int64_t row, step;
};

// Rows of memory that are needed soon, in up to two blocks: heads lie pages apart, too far for the
// processor to see a pattern. One line at a time is asked for between the products: 1.4x at
// N = 1024 with 70 heads on AVX2.
struct Ahead {
  struct Block {
    const char* data;
    int64_t stride, rows;
  };
  Block blocks[2];
  int64_t bytes;     // of a row
  int64_t line = 0;  // byte of the row

  static inline __attribute__((always_inline)) void fetch(Ahead& ahead) {
    Block& block = ahead.blocks[ahead.blocks[0].rows > 0 ? 0 : 1];
    if (block.rows <= 0) return;
    __builtin_prefetch(block.data + ahead.line, 0, 2);
    ahead.line += 64;
    if (ahead.line < ahead.bytes) return;
    ahead.line = 0;
    block.data += block.stride;
    block.rows -= 1;
  }
};

// sink(r, c, sum over i < count of a(r, i) * b[i * pitch + c ...]) for R rows and C registers.
template <int64_t R, int64_t C, typename One, typename F>
CLIPFLOW_INLINE void product_block(Factors<One> a, const One* b, int64_t pitch, int64_t count,
                                   Ahead& ahead, F sink) {
  using Lanes = typename Wide<One>::Lanes;
  Lanes sums[R][C] = {};
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < C; ++c)
        sums[r][c] += a.data[r * a.row + i * a.step] * load(b + i * pitch + c * kLanes<Lanes>);
    }
  };
  int64_t i = 0;
  for (; i + kFetchEvery <= count; i += kFetchEvery) {
    Ahead::fetch(ahead);
#pragma GCC unroll 4
    for (int64_t di = 0; di < kFetchEvery; ++di) add(i + di);
  }
  for (; i < count; ++i) add(i);
#pragma GCC unroll 4
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < C; ++c) sink(r, c * kLanes<Lanes>, sums[r][c]);
  }
}

template <int64_t C, typename One, typename F>
CLIPFLOW_INLINE void product_columns(Factors<One> a, const One* b, int64_t pitch, int64_t count,
                                     int64_t rows, Ahead& ahead, F sink) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    product_block<kRows, C>({a.data + r * a.row, a.row, a.step}, b, pitch, count, ahead,
                            [&](int64_t dr, int64_t c, auto sum) { sink(r + dr, c, sum); });
  for (; r < rows; ++r)
    product_block<1, C>({a.data + r * a.row, a.row, a.step}, b, pitch, count, ahead,
                        [&](int64_t dr, int64_t c, auto sum) { sink(r + dr, c, sum); });
}

// sink(r, c, register of the product a b at row r, column c). Each element is summed over i in
// order, whatever block it is in. `b` has whole registers of columns.
template <typename One, typename F>
CLIPFLOW_INLINE void product(Factors<One> a, const One* b, int64_t pitch, int64_t count,
                             int64_t rows, int64_t columns, Ahead& ahead, F sink) {
  constexpr int64_t kStep = kLanes<typename Wide<One>::Lanes>;
  int64_t c = 0;
  for (; c + (kColumns - 1) * kStep < columns; c += kColumns * kStep)
    product_columns<kColumns>(a, b + c, pitch, count, rows, ahead,
                              [&](int64_t r, int64_t dc, auto sum) { sink(r, c + dc, sum); });
  for (; c < columns; c += kStep)
    product_columns<1>(a, b + c, pitch, count, rows, ahead,
                       [&](int64_t r, int64_t dc, auto sum) { sink(r, c + dc, sum); });
}

template <typename V>
CLIPFLOW_INLINE V relu(V value) {
  return value < 0 ? V{} : value;  // NaN stays NaN
}

// The rows of `count` tokens, widened and filled up with zeros.
template <bool kRelu, typename T, typename One>
CLIPFLOW_INLINE void pack(const T* from, int64_t stride, int64_t count, int64_t width, One* to,
                          int64_t pitch) {
  using Lanes = typename Wide<T>::Lanes;
  for (int64_t token = 0; token < count; ++token) {
    for_lanes<Lanes>(width, [&](int64_t d, int64_t lanes) {
      const Lanes value = load_first(from + token * stride + d, lanes);
      store(to + token * pitch + d, kRelu ? relu(value) : value);
    });
  }
}

template <typename T, typename One = typename Wide<T>::One>
struct Head {
  const LinearAttention& a;
  int64_t sample, head, pitch;
  One *state, *keys, *left, *right;  // [K, pitch], [pitch], two chunks [kAttentionChunk, pitch]

  const T* at(const HeadView& view, int64_t token) const {
    const T* data = static_cast<const T*>(view.data);
    return data + sample * view.sample + token * view.token + head * view.head;
  }
  // The chunk from `first` on.
  Ahead::Block block(const HeadView& view, int64_t first) const {
    const int64_t left = a.tokens - first;
    return {reinterpret_cast<const char*>(at(view, first)),
            view.token * static_cast<int64_t>(sizeof(T)),
            left < kAttentionChunk ? left : kAttentionChunk};
  }
};

template <typename T>
CLIPFLOW_INLINE void sum_state(const Head<T>& h) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  const LinearAttention& a = h.a;
  for (int64_t i = 0; i < (a.width + 1) * h.pitch; i += kLanes<Lanes>) store(h.state + i, Lanes{});
  for (int64_t first = 0; first < a.tokens; first += kAttentionChunk) {
    const int64_t left = a.tokens - first;
    const int64_t count = left < kAttentionChunk ? left : kAttentionChunk;
    pack<true>(h.at(a.k, first), a.k.token, count, a.width, h.left, h.pitch);
    pack<false>(h.at(a.v, first), a.v.token, count, a.width, h.right, h.pitch);
    for (int64_t d = 0; d < a.width; d += kLanes<Lanes>) {
      Lanes sum = {};
      for (int64_t token = 0; token < count; ++token) sum += load(h.left + token * h.pitch + d);
      store(h.keys + d, load(h.keys + d) + sum);
    }
    const int64_t next = first + kAttentionChunk;
    const Ahead::Block none = {};
    Ahead ahead = {{none, none}, a.width * static_cast<int64_t>(sizeof(T))};
    if (next < a.tokens) {
      ahead.blocks[0] = h.block(a.k, next);
      ahead.blocks[1] = h.block(a.v, next);
    } else {
      ahead.blocks[0] = h.block(a.q, 0);
    }
    product(Factors<One>{h.left, 1, h.pitch}, h.right, h.pitch, count, a.width, a.width, ahead,
            [&](int64_t r, int64_t c, Lanes sum) {
              One* to = h.state + r * h.pitch + c;
              store(to, load(to) + sum);
            });
  }
}

template <typename T>
CLIPFLOW_INLINE void apply_state(const Head<T>& h) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  const LinearAttention& a = h.a;
  One weights[kAttentionChunk];
  for (int64_t first = 0; first < a.tokens; first += kAttentionChunk) {
    const int64_t left = a.tokens - first;
    const int64_t count = left < kAttentionChunk ? left : kAttentionChunk;
    pack<true>(h.at(a.q, first), a.q.token, count, a.width, h.left, h.pitch);
    for (int64_t token = 0; token < count; ++token) {
      const One* q = h.left + token * h.pitch;
      weights[token] = sum_over<Lanes>(a.width, [&](int64_t d, int64_t) {
                         return load(q + d) * load(h.keys + d);
                       }) + static_cast<One>(a.eps);
    }
    T* y = static_cast<T*>(a.y) + ((h.sample * a.tokens + first) * a.heads + h.head) * a.width;
    const int64_t next = first + kAttentionChunk;
    const Ahead::Block none = {};
    Ahead ahead = {{none, none}, a.width * static_cast<int64_t>(sizeof(T))};
    if (next < a.tokens) {
      ahead.blocks[0] = h.block(a.q, next);
    } else if (h.head + 1 < a.heads) {
      Head<T> neighbor = h;
      neighbor.head += 1;
      ahead.blocks[0] = neighbor.block(a.k, 0);
      ahead.blocks[1] = neighbor.block(a.v, 0);
    }
    product(Factors<One>{h.left, h.pitch, 1}, h.state, h.pitch, a.width, count, a.width, ahead,
            [&](int64_t r, int64_t c, Lanes sum) {
              const int64_t inside = a.width - c;
              store_first(y + r * a.heads * a.width + c, sum / weights[r],
                          inside < kLanes<Lanes> ? inside : kLanes<Lanes>);
            });
  }
}

template <typename T>
void forward(const LinearAttention& a, int64_t begin, int64_t end, void* scratch) {
  using One = typename Wide<T>::One;
  const int64_t pitch = (a.width + 15) / 16 * 16;
  One* state = static_cast<One*>(scratch);
  One* keys = state + a.width * pitch;
  One* left = keys + pitch;
  for (int64_t item = begin; item < end; ++item) {
    const Head<T> head = {a,    item / a.heads, item % a.heads, pitch, state,
                          keys, left,           left + kAttentionChunk * pitch};
    sum_state(head);
    apply_state(head);
  }
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const LinearAttentionRows linear_attention_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
