// The packed format of lscd, for every device. docs/formats/lscd.md is its specification.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effk::lscd {

// Weights [rows, cols] are cut into 8x8 sub-tiles; bit 8*r + c of a sub-tile's word says that weight
// (r, c) of it is stored. A strip is 16 rows: two sub-tiles high. Its words are stored column by column,
// upper sub-tile first, so that four consecutive words are one 16x16 operand of mma.m16n8k16.
constexpr int kSub = 8;           // side of a sub-tile
constexpr int kStripRows = 16;    // rows of a strip
constexpr int kStripSubs = 2;     // sub-tiles from top to bottom of a strip
constexpr int kTileSubCols = 32;  // columns of sub-tiles in a tile: 16 x 256 weights share an offset
constexpr int kTileCols = kTileSubCols * kSub;
constexpr int kTileWords = kTileSubCols * kStripSubs;
constexpr int kTileWeights = kStripRows * kTileCols;
constexpr int kValueAlign = 16;  // a tile's values start at a multiple of this many values
constexpr int kValuePad = 64;    // values has this many entries after the last tile, so that readers may overrun

struct Shape {
  int64_t rows, cols;
  EFFK_HD int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
  // Even, so that a strip is a whole number of 16x16 operands.
  EFFK_HD int64_t sub_cols() const { return (cols + 2 * kSub - 1) / (2 * kSub) * 2; }
  EFFK_HD int64_t padded_cols() const { return sub_cols() * kSub; }
  EFFK_HD int64_t tiles() const { return (sub_cols() + kTileSubCols - 1) / kTileSubCols; }  // of one strip
  EFFK_HD int64_t words() const { return strips() * sub_cols() * kStripSubs; }
  EFFK_HD int64_t offsets() const { return strips() * tiles() + 1; }
};

EFFK_HD int64_t align_values(int64_t n) { return (n + kValueAlign - 1) / kValueAlign * kValueAlign; }

}  // namespace effk::lscd
