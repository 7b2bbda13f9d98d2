// Depthwise 3x3 convolution with a gated activation on the CPU, compiled once per instruction set.
//
//   c = conv3x3(u) + bias,   u = x or SiLU(x),   y = c[first M channels] * SiLU(c[last M channels])
//
// A tile is made row by row. Three rows of u wait in a buffer that is small, contiguous and float32
// whatever lies how far apart in x. A register of channels walks along them: each value is loaded
// once and added to the three outputs of its row that see it. Places outside of the grid add
// nothing, not even 0 * NaN. Every output adds its bias and taps in one order, in whatever tile.

#include "cpu/glu_conv_rows.h"

#include "common/exp.h"
#include "common/lanes.h"
#include "common/stream.h"

namespace clipflow {
namespace {

// SiLU, in place. `values` is the start of a buffer that has room for whole registers.
template <typename Lanes, typename One>
CLIPFLOW_INLINE void silu(One* values, int64_t count) {
  constexpr int64_t kGroup = 16;
  Power<Lanes> powers[kGroup];
  for (int64_t first = 0; first < count; first += kGroup * kLanes<Lanes>) {
    One* group = values + first;
    const int64_t left = (count - first + kLanes<Lanes> - 1) / kLanes<Lanes>;
    const int64_t size = left < kGroup ? left : kGroup;
    for (int64_t i = 0; i < size; ++i) powers[i] = power_of(-load(group + i * kLanes<Lanes>));
    for (int64_t i = 0; i < size; ++i) {
      One* at = group + i * kLanes<Lanes>;
      store(at, load(at) / (1 + exponential(powers[i])));
    }
  }
}

// SiLU of the `channels` first values of each of `columns` rows of a tile, in place.
template <typename Lanes, typename One>
CLIPFLOW_INLINE void silu_rows(One (*rows)[kTileChannels], int64_t columns, int64_t channels) {
  if (channels == kTileChannels) return silu<Lanes>(rows[0], columns * kTileChannels);
  for (int64_t column = 0; column < columns; ++column) silu<Lanes>(rows[column], channels);
}

// A tile's weights and rows of values, one half of the channels.
template <typename One>
struct alignas(64) Half {
  One taps[9][kTileChannels];
  One bias[kTileChannels];
  One inputs[3][kTileColumns + 2][kTileChannels];  // row y of the grid is inputs[y % 3]
  One outputs[kTileColumns][kTileChannels];
};

template <typename One>
struct Workspace {
  Half<One> halves[2];
};

// Where a tile lies: its channels of M, rows and columns, and the columns of x that it reads.
struct Tile {
  int64_t channel_tile, channel, channels, sample;
  int64_t first_row, last_row, first_column, last_column, first_input, last_input;
};

CLIPFLOW_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

CLIPFLOW_INLINE Tile tile_at(const GluConv& a, int64_t index) {
  Tile tile;
  tile.channel_tile = index % a.channel_tiles;
  index /= a.channel_tiles;
  const int64_t column_tile = index % a.column_tiles;
  index /= a.column_tiles;
  tile.first_row = index % a.row_tiles * kTileRows;
  tile.sample = index / a.row_tiles;
  tile.channel = tile.channel_tile * kTileChannels;
  tile.channels = least(a.channels - tile.channel, kTileChannels);
  tile.last_row = least(tile.first_row + kTileRows, a.height);
  tile.first_column = column_tile * kTileColumns;
  tile.last_column = least(tile.first_column + kTileColumns, a.width);
  tile.first_input = tile.first_column > 0 ? tile.first_column - 1 : 0;
  tile.last_input = least(tile.last_column + 1, a.width);
  return tile;
}

template <typename T, typename One>
CLIPFLOW_INLINE void take_weights(const GluConv& a, const Tile& tile, int64_t half,
                                  Half<One>& to) {
  const int64_t channel = half * a.channels + tile.channel;
  const T* weight = static_cast<const T*>(a.weight) + channel * 9;
  // Convert while contiguous, then transpose.
  One values[9 * kTileChannels] = {};
  using Lanes = typename Wide<T>::Lanes;
  for_lanes<Lanes>(9 * tile.channels, [&](int64_t d, int64_t count) {
    store_first(values + d, load_first(weight + d, count), count);
  });
  for (int64_t c = 0; c < kTileChannels; ++c)
    for (int64_t tap = 0; tap < 9; ++tap) to.taps[tap][c] = values[c * 9 + tap];
  const T* bias = static_cast<const T*>(a.bias) + channel;
  for_lanes<Lanes>(tile.channels, [&](int64_t d, int64_t count) {
    store(to.bias + d, load_first(bias + d, count));
  });
}

// Row `row` of u into its place in both halves.
template <typename T, bool kPreSilu, typename One>
CLIPFLOW_INLINE void take_row(const GluConv& a, const Tile& tile, int64_t row,
                              Workspace<One>& work) {
  using Lanes = typename Wide<T>::Lanes;
  constexpr int64_t kLine = 64 / sizeof(T);
  const T* x = static_cast<const T*>(a.x) + tile.sample * a.sample_stride + tile.channel;
  // The row that the tile needs next; 1.1x at the sizes of SANA.
  const bool prefetch = row + 1 < a.height && row < tile.last_row;
  for (int64_t column = tile.first_input; column < tile.last_input; ++column) {
    const T* token = x + (row * a.width + column) * a.token_stride;
    for (int64_t half = 0; half < 2; ++half) {
      const T* from = token + half * a.channels;
      if (prefetch)
        for (int64_t d = 0; d < kTileChannels; d += kLine)
          __builtin_prefetch(from + a.width * a.token_stride + d, 0, 2);
      One* to = work.halves[half].inputs[row % 3][column - tile.first_input];
      for_lanes<Lanes>(tile.channels, [&](int64_t d, int64_t count) {
        store(to + d, load_first(from + d, count));
      });
    }
  }
  if (kPreSilu)
    for (Half<One>& half : work.halves)
      silu_rows<Lanes>(half.inputs[row % 3], tile.last_input - tile.first_input, tile.channels);
}

// The convolution of one row of outputs, in the channels [d, d + lanes) of the tile; kAbove and
// kBelow say whether the grid has a row there.
template <typename Lanes, bool kAbove, bool kBelow, typename One>
CLIPFLOW_INLINE void walk(const Tile& tile, Half<One>& half, int64_t row, int64_t d) {
  const One* above = half.inputs[(row + 2) % 3][0] + d;
  const One* middle = half.inputs[row % 3][0] + d;
  const One* below = half.inputs[(row + 1) % 3][0] + d;
  One* to = half.outputs[0] + d;
  Lanes taps[9];
  for (int64_t tap = 0; tap < 9; ++tap) taps[tap] = load(half.taps[tap] + d);
  const Lanes bias = load(half.bias + d);
  Lanes inputs[3];  // the column of inputs at `at`
  const auto take = [&](int64_t at) __attribute__((always_inline)) {
    if (kAbove) inputs[0] = load(above + at);
    inputs[1] = load(middle + at);
    if (kBelow) inputs[2] = load(below + at);
  };
  // `sum` plus that column, weighted by column `tap` of the kernel.
  const auto add = [&](Lanes sum, int64_t tap) __attribute__((always_inline)) {
    if (kAbove) sum += taps[tap] * inputs[0];
    sum += taps[3 + tap] * inputs[1];
    if (kBelow) sum += taps[6 + tap] * inputs[2];
    return sum;
  };

  int64_t at = 0;
  Lanes current = bias;
  if (tile.first_input < tile.first_column) {
    take(at);
    current = add(bias, 0);
    at += kTileChannels;
  }
  take(at);
  Lanes next = add(bias, 0);
  current = add(current, 1);
  const int64_t columns = tile.last_input - tile.first_column;
  for (int64_t column = 1; column < columns; ++column) {
    at += kTileChannels;
    take(at);
    store(to, add(current, 2));
    current = add(next, 1);
    next = add(bias, 0);
    to += kTileChannels;
  }
  if (tile.last_input == tile.last_column) store(to, current);
}

template <typename Lanes, typename One>
CLIPFLOW_INLINE void convolve_row(const GluConv& a, const Tile& tile, int64_t row,
                                  Half<One>& half) {
  const bool above = row > 0, below = row + 1 < a.height;
  for (int64_t d = 0; d < tile.channels; d += kLanes<Lanes>) {
    if (above && below)
      walk<Lanes, true, true>(tile, half, row, d);
    else if (above)
      walk<Lanes, true, false>(tile, half, row, d);
    else if (below)
      walk<Lanes, false, true>(tile, half, row, d);
    else
      walk<Lanes, false, false>(tile, half, row, d);
  }
}

template <typename T, typename One>
CLIPFLOW_INLINE void gate_row(const GluConv& a, const Tile& tile, int64_t row,
                              Workspace<One>& work) {
  using Lanes = typename Wide<T>::Lanes;
  const int64_t columns = tile.last_column - tile.first_column;
  silu_rows<Lanes>(work.halves[1].outputs, columns, tile.channels);
  const int64_t token = (tile.sample * a.height + row) * a.width + tile.first_column;
  T* y = static_cast<T*>(a.y) + token * a.channels + tile.channel;
  for (int64_t column = 0; column < columns; ++column) {
    const One* value = work.halves[0].outputs[column];
    const One* gate = work.halves[1].outputs[column];
    for_lanes<Lanes>(tile.channels, [&](int64_t d, int64_t count) {
      const Lanes product = load(value + d) * load(gate + d);
      if (a.stream && count == kLanes<Lanes>)
        stream(y + d, product);
      else
        store_first(y + d, product, count);
    });
    y += a.channels;
  }
}

template <typename T, bool kPreSilu>
CLIPFLOW_INLINE void forward_tiles(const GluConv& a, int64_t begin, int64_t end) {
  using One = typename Wide<T>::One;
  using Lanes = typename Wide<T>::Lanes;
  Workspace<One> work;
  int64_t channel_tile = -1;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(a, index);
    if (tile.channel_tile != channel_tile) {
      channel_tile = tile.channel_tile;
      take_weights<T>(a, tile, 0, work.halves[0]);
      take_weights<T>(a, tile, 1, work.halves[1]);
    }
    for (int64_t row = tile.first_row > 0 ? tile.first_row - 1 : 0; row <= tile.first_row; ++row)
      take_row<T, kPreSilu>(a, tile, row, work);
    for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
      if (row + 1 < a.height) take_row<T, kPreSilu>(a, tile, row + 1, work);
      convolve_row<Lanes>(a, tile, row, work.halves[0]);
      convolve_row<Lanes>(a, tile, row, work.halves[1]);
      gate_row<T>(a, tile, row, work);
    }
  }
  if (a.stream) stream_end();
}

template <typename T>
void forward(const GluConv& a, int64_t begin, int64_t end) {
  if (a.pre_silu)
    forward_tiles<T, true>(a, begin, end);
  else
    forward_tiles<T, false>(a, begin, end);
}

}  // namespace

namespace CLIPFLOW_INSTRUCTION_SET {

const GluConvRows glu_conv_rows = {
    {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
};

}  // namespace CLIPFLOW_INSTRUCTION_SET
}  // namespace clipflow
