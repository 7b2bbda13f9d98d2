// Calls of the norms' row kernels: what the files that see torch ask of those compiled per
// instruction set. S is the number of rows of modulation, each for the next `tokens` tokens.

#pragma once

#include <cstdint>

namespace clipflow {

// gain = weight * (1 + scale + table[1]), offset = shift + table[0]; any but `scale` may be null.
struct Modulation {
  const void* shift;   // [S, D], rows `shift_stride` values apart
  const void* scale;   // [S, D], rows `scale_stride` values apart
  const void* weight;  // [D]
  const void* table;   // [2, D], rows `table_stride` values apart
  int64_t shift_stride, scale_stride, table_stride;
};

// What every norm of rows is given. Scratch is aligned, and of kScratchRows rows of doubles.
struct NormShape {
  int64_t tokens, channels;
  double eps;
  bool rms;     // mean square instead of variance
  bool stream;  // whether outputs go past the caches
};

constexpr int64_t kScratchRows = 7;

// Values of a row of scratch or of partial sums: whole registers of every instruction set.
inline constexpr int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

// Gradients; `h` is what was normalized. The wide type is float, and double for double.
struct NormBackward {
  const void* d_h;       // [B, L, D]; not for adaln_norm
  const void* d_normed;  // [B, L, D]
  const void* h;         // [B, L, D]
  const void* y;         // [B, L, D]; null where there is no gate
  const void* gate;      // [S, D], wide
  const void* gain;      // [S, D], wide
  void* d_x;             // [B, L, D]
  void* d_y;             // [B, L, D]
  void* sums[3];         // d_offset, d_gain, d_gate: [S, D], wide
  // [S, chunks, 3, padded(D)], wide: the sums over one chunk of tokens; null if there is one chunk.
  void* partial;
  int64_t chunks, tokens_per_chunk;
  NormShape shape;
};

// Of the chunks [begin, end) of S * chunks.
using NormBackwardRows = void (*)(const NormBackward&, int64_t begin, int64_t end, void* scratch);
// The sums of the rows of modulation [begin, end), chunk after chunk.
using NormReduceRows = void (*)(const NormBackward&, int64_t begin, int64_t end);

}  // namespace clipflow
