// The packed format of w4a8, for every device. docs/formats/w4a8.md is its specification.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effk::w4a8 {

constexpr int kBlock = 16;   // output features of a block
constexpr int kChunk = 8;    // input features in a 32-bit word of q4: low halves k..k+3, high halves k+4..k+7
constexpr int kWord = 4;     // input features in a 32-bit word of q8
constexpr int kZero8 = 128;  // what stands for zero in q8
constexpr int kMaxQuantized = 127;

// Output features are stored 4-bit ones first: rows [0, n4) have 4 bits, rows [n4, n4 + n8) have 8. Each kind has
// blocks of its own.
struct Shape {
  int64_t n4, n8, cols;
  int64_t group;  // 32, 64, 128 or 256
  EFFK_HD int64_t rows() const { return n4 + n8; }
  EFFK_HD int64_t groups() const { return (cols + group - 1) / group; }
  EFFK_HD int64_t chunks() const { return (cols + kChunk - 1) / kChunk; }
  EFFK_HD int64_t blocks4() const { return (n4 + kBlock - 1) / kBlock; }
  EFFK_HD int64_t blocks8() const { return (n8 + kBlock - 1) / kBlock; }
  EFFK_HD int64_t blocks() const { return blocks4() + blocks8(); }
};

// Rows of block b of n: 16, or the rest.
EFFK_HD int64_t block_rows(int64_t n, int64_t b) { return n - b * kBlock < kBlock ? n - b * kBlock : kBlock; }

// The byte of q4 that holds (row, k), row < n4; in its high half where k % 8 >= 4.
EFFK_HD int64_t q4_at(const Shape& s, int64_t row, int64_t k) {
  return ((row / kBlock * s.chunks() + k / kChunk) * kBlock + row % kBlock) * 4 + k % 4;
}

// The byte of q8 that holds (row, k), row < n8. A block of r rows has r*cols bytes: words of 4 k, row by row, then the
// cols % 4 bytes that are left of each row.
EFFK_HD int64_t q8_at(const Shape& s, int64_t row, int64_t k) {
  const int64_t b = row / kBlock, i = row % kBlock, r = block_rows(s.n8, b), words = s.cols / kWord;
  const int64_t begin = b * kBlock * s.cols;
  if (k < words * kWord) return begin + (k / kWord * r + i) * kWord + k % kWord;
  return begin + words * kWord * r + i * (s.cols % kWord) + k % kWord;
}

// Where scale and zero point of (row, group) are, in the arrays of row's kind.
EFFK_HD int64_t group_at(const Shape& s, int64_t row, int64_t group) {
  return (row / kBlock * s.groups() + group) * kBlock + row % kBlock;
}

}  // namespace effk::w4a8
