// What csrc/cpu/quantized_linear.cpp asks of quantized_linear_rows.cpp, which is compiled per
// instruction set.

#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace clipflow {

constexpr int64_t kPanel = 16;            // output channels that are computed together
constexpr int64_t kGroup = 16;            // input channels that are summed in 16 bits: four fours
constexpr int64_t kTileRows = 8;          // rows that a weight in registers is multiplied by
constexpr int64_t kBlockRows = 64;        // rows whose prepared form stays in the L2 cache
constexpr int64_t kPreparedGroup = 20;    // 16 int8 values, and what their sums start from
constexpr int64_t kRemainderBytes = 8;    // a remainder: which four, and its 4 values

// Remainders of a row beyond which it is faster without.
static inline int64_t most_remainders(int64_t groups) { return (groups + 1) / 2; }

// `count` rows in shares of at most `most`, as even as whole tiles allow.
static inline int64_t even_share(int64_t count, int64_t most) {
  const int64_t shares = (count + most - 1) / most;
  const int64_t share = ((count + shares - 1) / shares + kTileRows - 1) / kTileRows * kTileRows;
  return share < most ? share : most;
}

// What leads a prepared row: groups of kPreparedGroup bytes follow, then the remainders.
struct PreparedRow {
  float scale;         // of the row's int8 values
  int32_t correction;  // to be added to every sum of the row
  int32_t remainders;  // how many there are
  int32_t plain;       // 1: its groups hold all of its values, and there are no remainders
};

struct QuantizedLinear {
  const void* x;            // [M, K]
  const float* x_scales;    // [M] where x is int8, else null
  const uint8_t* weight;    // int8 + 128, [panels, groups, 4, kPanel, 4]
  const int32_t* limits;    // [groups, 2], see quantized_linear_rows.cpp
  const float* scales;      // [N]
  const float* bias;        // [N], or null
  void* y;                  // [M, N]
  uint8_t* prepared;        // the rows [first, first + rows), row_bytes each
  int64_t K, N, groups, panels;
  int64_t first, rows, row_bytes;
  int64_t block_rows;       // at most kBlockRows
  bool dot_products;        // use the instructions for sums of four int8 products (VNNI)
};

struct QuantizedLinearRows {
  // Rows [begin, end) of `rows`, by the dtype of x: dtype_index, with int8 in the place of float64.
  void (*prepare[4])(const QuantizedLinear&, int64_t begin, int64_t end);
  // y of the items [begin, end): blocks of block_rows, `panels` items each; by dtype_index of y.
  void (*multiply[3])(const QuantizedLinear&, int64_t begin, int64_t end);
};

CLIPFLOW_DECLARE_TABLE(QuantizedLinearRows, quantized_linear_rows)

}  // namespace clipflow
