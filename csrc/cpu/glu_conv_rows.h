// What csrc/cpu/glu_conv.cpp asks of glu_conv_rows.cpp, which is compiled per instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

// The output is made in tiles of so many channels, rows and columns of the grid. Three rows of x
// are then about as large as the L1 cache, and 18 rows lie on fewer pages than the processor
// remembers, so that the tile of the next channels, on the same pages, finds their addresses.
constexpr int64_t kTileChannels = 32, kTileRows = 16, kTileColumns = 32;

struct GluConv {
  const void* x;       // [B, height * width, 2M], tokens `token_stride` values apart
  const void* weight;  // [2M, 3, 3]
  const void* bias;    // [2M]
  void* y;             // [B, height * width, M]
  int64_t samples, height, width, channels;  // channels: M
  int64_t sample_stride, token_stride;
  int64_t row_tiles, column_tiles, channel_tiles;
  bool pre_silu;
  bool stream;  // whether y is written past the caches; its tokens then begin cache lines
};

// Index = dtype_index of common/tensor.h: float32, bfloat16, float16, float64.
struct GluConvRows {
  // y of the tiles [begin, end) of [B, row_tiles, column_tiles, channel_tiles].
  void (*forward[4])(const GluConv&, int64_t begin, int64_t end);
};

CLIPFLOW_DECLARE_TABLE(GluConvRows, glu_conv_rows)

}  // namespace clipflow
