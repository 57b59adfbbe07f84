// w4a8_linear and w4a8_accumulate on CUDA, after launch_prepare() of quantize.cuh.
//
// The unit of work is a pair: 32 rows of the packed weight, two blocks of one kind (4 or 8 bits), and a step: 32 of
// their columns, for which two m16n8k32 products serve each eight tokens. Pairs of 4 bits come first, then those of 8,
// in one grid. With g = lane / 4 and c = lane % 4:
// - Columns are summed over, so they may be named as we like: a lane's are 8c to 8c + 7 of the step, in W and in x.
//   Then a word of q4 (or two of q8) has all that a lane needs of a row, low halves in one register and high halves in
//   the other, and a token's 8 bytes are one load.
// - So may rows: a lane's are 4g to 4g + 3 of the pair, two for each of the two products. As words of a block go down
//   the rows, the words of four rows are one load of 16 bytes, and a warp reads whole lines.
//
// Sums of a group are integers, exact. They begin at the bits of 1.5 * 2^23, so that, taken for a float, they are that
// number plus the sum: no conversion. Then sum -= zero * (sum of x) and y += (sum * x_scale) * w_scale.
//
// The order of the float sums depends on the matrix alone: groups are cut into kPieces pieces, each is summed from its
// first group to its last, and pieces are added in order. So a token's result has the same bits whatever kernel
// computes it, and whatever tokens are around it.
//
// Two kernels; nothing of them has been measured. Few tokens: bytes of W are the limit. A warp streams its pair through
// registers, several steps ahead, and warps of a block share the pieces of a pair, to have enough bytes in flight. More
// tokens: tiles, with a ring of stages in shared memory that cp.async fills.
#pragma once

#include "quantize.cuh"

namespace effk::w4a8 {

constexpr int kPairRows = 2 * kBlock;
constexpr int kPieces = 8;

EFFK_HD int pairs_of(int64_t n) { return static_cast<int>((n + kPairRows - 1) / kPairRows); }
EFFK_HD int all_pairs(const Shape& s) { return pairs_of(s.n4) + pairs_of(s.n8); }
// The first group of a piece.
EFFK_HD int piece_begin(int groups, int piece) { return groups * piece / kPieces; }  // at most 2^25 groups

// How a call is shared out. What isn't a matter of correctness: nothing here has been tuned on a GPU.
struct LinearPlan {
  enum class Kernel { stream, small_tiles, large_tiles } kernel;
  int pass_tokens;  // of a block; stream: 8, 16 or 32
  int block_pairs;  // of a block
};

struct Pair {
  bool is8;
  int64_t block;  // the first of two, of its kind
  int64_t row;    // in packed order
  int rows;       // 0 to 32
};

EFFK_DEVICE Pair pair_at(const Shape& s, int i) {
  const int pairs4 = pairs_of(s.n4);
  const bool is8 = i >= pairs4;
  const int64_t row = int64_t{is8 ? i - pairs4 : i} * kPairRows, rest = (is8 ? s.n8 : s.n4) - row;
  return {is8, row / kBlock, (is8 ? s.n4 : 0) + row,
          static_cast<int>(rest < 0           ? 0
                           : rest < kPairRows ? rest
                                              : kPairRows)};
}

// Blocks of 8 bits have words of their own layout where they have fewer than 16 rows or the columns don't fill words.
enum class Kind { nibbles, bytes, ragged_bytes };

EFFK_DEVICE Kind kind_of(const Shape& s, const Pair& pair) {
  return !pair.is8 ? Kind::nibbles : s.cols % kWord == 0 && pair.rows % kBlock == 0 ? Kind::bytes : Kind::ragged_bytes;
}

// The cols % 4 bytes behind the whole words of row i, in a ragged block of `rows` rows at `begin`.
EFFK_DEVICE uint32_t last_bytes(const uint8_t* begin, int rows, int cols, int i) {
  const int count = cols % kWord;
  const uint8_t* const from = begin + int64_t{cols - count} * rows + i * count;
  uint32_t out = from[0];
  if (count > 1) out |= static_cast<uint32_t>(from[1]) << 8;
  if (count > 2) out |= static_cast<uint32_t>(from[2]) << 16;
  return out;
}

// A lane's words of a step: those of rows 4g to 4g + 3, of 8 columns; 8 bits have two for a row.
template <bool kIs8>
struct Words {
  uint4 v[kIs8 ? 2 : 1];
};

EFFK_DEVICE uint32_t component(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The left operand of product 0 or 1 of a step.
EFFK_DEVICE void fragment(const Words<false>& w, int product, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = component(w.v[0], 2 * product + i);
    a[i] = word & 0x0f0f0f0f;
    a[i + 2] = word >> 4 & 0x0f0f0f0f;
  }
}
EFFK_DEVICE void fragment(const Words<true>& w, int product, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = component(w.v[i / 2], 2 * product + i % 2) ^ 0x80808080;
}

// A lane's four rows in a group: scales and zero points.
struct RowData {
  float scale[4];
  uint32_t zeros;
};

class RowDataReader {
 public:
  EFFK_DEVICE RowDataReader(const Shape& s, const Pair& pair) {
    const int quad = threadIdx.x % gpu::kWarp / 4;
    at_ = quad / 4 * kBlock < pair.rows ? (pair.block + quad / 4) * s.groups() * kBlock + quad % 4 * 4 : -1;
  }

  template <bool kIs8>
  EFFK_DEVICE RowData load(const Packed& w, int group) const {
    RowData d{{0, 0, 0, 0}, 0};
    if (at_ < 0) return d;
    const int64_t at = at_ + int64_t{group} * kBlock;
    const uint4 scale = gpu::load_reused((kIs8 ? w.scale8 : w.scale4) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) d.scale[i] = float_of(component(scale, i));
    if constexpr (!kIs8) d.zeros = *reinterpret_cast<const uint32_t*>(w.zero4 + at);
    return d;
  }

 private:
  int64_t at_;  // in the first group, or -1 where the block isn't there
};

// The scales of tokens 2c and 2c + 1 of eight, and the sums of their q in the group.
struct TokenData {
  float scale[2], sum[2];
};
EFFK_DEVICE TokenData token_data(const uint4& v) {
  return {{float_of(v.x), float_of(v.y)}, {float_of(v.z), float_of(v.w)}};
}

// y += (sum * x_scale) * w_scale for the sums of two products with eight tokens.
template <bool kIs8>
EFFK_DEVICE void add_group(const int32_t (&sums)[2][4], const TokenData& tokens, const RowData& rows,
                           float (&y)[2][4]) {
#pragma unroll
  for (int product = 0; product < 2; ++product)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * product + i / 2;
      float sum = float_of(static_cast<uint32_t>(sums[product][i])) - kMagic;
      if constexpr (!kIs8)
        sum = fmaf(-static_cast<float>(rows.zeros >> 8 * row & 255), tokens.sum[i % 2], sum);  // exact
      y[product][i] = fmaf(sum * tokens.scale[i % 2], rows.scale[row], y[product][i]);
    }
}

// A lane's results of eight tokens, of which it has two: its four rows of token 2c + i as 16 bytes.
EFFK_DEVICE uint4 rows_of_token(const float (&y)[2][4], int i) {
  return {bits_of(y[0][i]), bits_of(y[0][i + 2]), bits_of(y[1][i]), bits_of(y[1][i + 2])};
}

EFFK_DEVICE void store_y(const Linear& a, int64_t token, int64_t feature, float v) {
  const int64_t at = token * a.w.shape.rows() + feature;
  if (a.y_type == Type::f32)
    from_float(v, static_cast<float*>(a.y) + at);
  else if (a.y_type == Type::f16)
    from_float(v, static_cast<Half*>(a.y) + at);
  else
    from_float(v, static_cast<BFloat16*>(a.y) + at);
}

EFFK_DEVICE void finish(const Linear& a, int64_t token, const Place& place, float sum) {
  if (place.feature >= 0) store_y(a, token, place.feature, a.bias ? sum + a.bias[place.feature] : sum);
  if (place.hole >= 0) store_y(a, token, place.hole, 0);
}

// Passes over tokens lie in two dimensions of the grid, since each of them ends at 65535.
EFFK_DEVICE int64_t pass_index() { return int64_t{blockIdx.z} * gridDim.y + blockIdx.y; }
inline dim3 grid_of_passes(int64_t blocks, int64_t passes) {
  constexpr int64_t kMost = 65535;
  const int64_t y = passes < kMost ? passes : kMost;
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(y), static_cast<unsigned>(ceil_div(passes, y)));
}

// Where the row of slot i of the block's pairs, from `pair` on, belongs.
EFFK_DEVICE Place place_of_slot(const Packed& w, const Prepared& p, int pair, int i) {
  const Pair at = pair_at(w.shape, pair + i / kPairRows);
  return i % kPairRows < at.rows ? place_of(w, p.inverse, at.row + i % kPairRows) : Place{-1, -1};
}

// --- Few tokens: streams ---

// A lane's words of a pair, step by step. What isn't there is 0.
template <Kind kKind>
class WordStream {
  static constexpr bool kIs8 = kKind != Kind::nibbles;
  // Of 4 columns each; q4 has two in a word.
  static constexpr int kStepWords = kStep / (kIs8 ? kWord : kChunk), kLaneWords = kStepWords / 4;

 public:
  EFFK_DEVICE WordStream(const Packed& w, const Pair& pair) : cols_(static_cast<int>(w.shape.cols)) {
    const int lane = threadIdx.x % gpu::kWarp, quad = lane / 4, first = lane % 4 * kLaneWords;
    const int64_t block = pair.block + quad / 4;
    const int rows = pair.rows - quad / 4 * kBlock;
    rows_ = rows < 0 ? 0 : rows < kBlock ? rows : kBlock;
    const int words = static_cast<int>(kIs8 ? cols_ / kWord : w.shape.chunks());
    end_ = rows_ ? words - first : 0;
    const int64_t begin = kIs8 ? block * kBlock * cols_ : block * kBlock * w.shape.chunks() * kWord;
    from_ = (kIs8 ? w.q8 : w.q4) + begin;
    if constexpr (kKind != Kind::ragged_bytes) {
      from_ += (first * kBlock + quad % 4 * 4) * kWord;
    } else {
      from_ += (first * rows_ + quad % 4 * 4) * kWord;
      left_ = rows_ - quad % 4 * 4;
    }
  }

  EFFK_DEVICE Words<kIs8> load(int step) const {
    Words<kIs8> out;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      const int word = step * kStepWords + i;
      out.v[i] = {0, 0, 0, 0};
      if constexpr (kKind != Kind::ragged_bytes) {
        if (word < end_) out.v[i] = gpu::load_once(from_ + int64_t{word} * (kBlock * kWord));
      } else {
        const auto* const words = reinterpret_cast<const uint32_t*>(from_) + int64_t{word} * rows_;
        if (word < end_) {
          if (0 < left_) out.v[i].x = words[0];
          if (1 < left_) out.v[i].y = words[1];
          if (2 < left_) out.v[i].z = words[2];
          if (3 < left_) out.v[i].w = words[3];
        } else if (word == end_ && cols_ % kWord != 0) {
          const int lane = threadIdx.x % gpu::kWarp, row = lane / 4 % 4 * 4;
          const uint8_t* const begin = from_ - (lane % 4 * kLaneWords * rows_ + row) * kWord;
          if (0 < left_) out.v[i].x = last_bytes(begin, rows_, cols_, row);
          if (1 < left_) out.v[i].y = last_bytes(begin, rows_, cols_, row + 1);
          if (2 < left_) out.v[i].z = last_bytes(begin, rows_, cols_, row + 2);
          if (3 < left_) out.v[i].w = last_bytes(begin, rows_, cols_, row + 3);
        }
      }
    }
    return out;
  }

 private:
  const uint8_t* from_;  // the lane's first word
  int cols_;
  int end_;       // words that there are from there on
  int rows_;      // of the lane's block
  int left_ = 0;  // of them, from the lane's first on
};

// Steps whose words and tokens a warp has in registers or on their way.
template <Kind kKind, int kTokens>
constexpr int kAhead = (kTokens == 16 ? 4 : 8) / (kKind == Kind::nibbles ? 1
                                                  : kKind == Kind::bytes ? 2
                                                                         : 4);

template <int kTokens>
constexpr int kStreamBlocks = kTokens == 32 ? 1 : 2;  // of a multiprocessor, as registers allow

EFFK_HD constexpr int slot_pitch(int rows) { return rows + 4; }  // floats of a token: keeps lanes in different banks

// Sums [token][row] of pieces in shared memory. Those of a warp that begins with the pair's first piece are added up
// at once, the others wait for their turn: which they have, one for each piece, is told by the number of warps.
EFFK_HD constexpr int slots_of(int pair_warps) { return 1 + kPieces - kPieces / pair_warps; }

// A warp's share of a pair: pieces [piece0, piece1). Writes their sums to slots [kTokens][pitch] of shared memory, or
// the integer sums to a.accumulators. Groups have a multiple of kEvery steps. Calls meanwhile() once, when the first
// loads are on their way.
template <Kind kKind, int kTokens, int kEvery, bool kInts, class F>
EFFK_DEVICE void stream_pair(const Linear& a, const Prepared& p, const Pair& pair, int piece0, int piece1,
                             int64_t token0, float* slots, int pitch, int slot_floats, const Place* places,
                             const F& meanwhile) {
  constexpr bool kIs8 = kKind != Kind::nibbles;
  constexpr int kGroups = kTokens / kTokenBlock, kDepth = kAhead<kKind, kTokens>;
  const Shape& s = a.w.shape;
  const int lane = threadIdx.x % gpu::kWarp, g = lane / 4, c = lane % 4;
  const int group_steps = static_cast<int>(s.group) / kStep, shift = gpu::popcount(group_steps - 1u);
  const int groups = static_cast<int>(s.groups()), last_step = static_cast<int>((s.cols + kStep - 1) / kStep);
  const int step0 = piece_begin(groups, piece0) << shift, end = piece_begin(groups, piece1) << shift;
  const int step1 = end < last_step ? end : last_step;
  if (step0 >= step1) return meanwhile();

  const WordStream<kKind> words(a.w, pair);
  const RowDataReader row_reader(s, pair);
  // Lanes of tokens past the last one read that one again.
  const int8_t* tokens[kGroups];
  int twos[kGroups];  // which of the pairs of tokens
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    int64_t token = token0 + n * kTokenBlock + g, two = token0 + n * kTokenBlock + 2 * c;
    token = token < a.tokens ? token : a.tokens - 1;
    two = two < a.tokens ? two : a.tokens - 1;
    tokens[n] = p.q + (token / kTokenBlock * p.steps * kTokenBlock + token % kTokenBlock) * kStep + c * kChunk;
    twos[n] = static_cast<int>(two / 2);
  }
  struct Ahead {
    Words<kIs8> words;
    uint2 tokens[kGroups];
  } ring[kDepth];
  const auto load = [&](Ahead& to, int step) {
    to.words = words.load(step);
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      to.tokens[n] = *reinterpret_cast<const uint2*>(tokens[n] + int64_t{step} * (kTokenBlock * kStep));
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i)
    if (step0 + i < step1) load(ring[i], step0 + i);
  meanwhile();

  constexpr int32_t kStart = kInts ? 0 : kMagicBits;
  int32_t sums[kGroups][2][4];
  float y[kGroups][2][4];
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[n][i / 4][i % 4] = kStart, y[n][i / 4][i % 4] = 0;
  RowData row_data = row_reader.template load<kIs8>(a.w, step0 >> shift);  // a group ahead: it comes from afar

  int piece = piece0;
  const auto end_group = [&](int group, bool has_next) {
    uint4 of_tokens[kGroups];
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      of_tokens[n] = gpu::load_reused(p.token_data + (group * (p.tokens / 2) + twos[n]) * 4);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const TokenData t = token_data(of_tokens[n]);
      if constexpr (kInts) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = i / 4 * 2 + i % 4 / 2;
          const int64_t token = token0 + n * kTokenBlock + 2 * c + i % 2;
          const int32_t zero = kIs8 ? 0 : static_cast<int32_t>(row_data.zeros >> 8 * row & 255);
          const int32_t feature = places[4 * g + row].feature;
          if (token < a.tokens && feature >= 0)
            a.accumulators[(token * groups + group) * s.rows() + feature] =
                sums[n][i / 4][i % 4] - zero * static_cast<int32_t>(t.sum[i % 2]);
        }
      } else {
        add_group<kIs8>(sums[n], t, row_data, y[n]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[n][i / 4][i % 4] = kStart;
    }
    if constexpr (!kInts) {
      while (piece_begin(groups, piece + 1) <= group) ++piece;  // pieces may be empty
      if (piece_begin(groups, piece + 1) == group + 1) {
        const bool is_first = piece_begin(groups, piece) << shift == step0;  // of this warp's pieces
        const int per_warp = piece1 - piece0;
        float* const slot = slots + (piece < per_warp ? 0 : piece - per_warp + 1) * slot_floats;
#pragma unroll
        for (int n = 0; n < kGroups; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            auto* const to = reinterpret_cast<uint4*>(slot + (n * kTokenBlock + 2 * c + i) * pitch + 4 * g);
            uint4 v = rows_of_token(y[n], i);
            if (piece < per_warp && !is_first) {
              const uint4 old = *to;
              v = {bits_of(float_of(old.x) + float_of(v.x)), bits_of(float_of(old.y) + float_of(v.y)),
                   bits_of(float_of(old.z) + float_of(v.z)), bits_of(float_of(old.w) + float_of(v.w))};
            }
            *to = v;
          }
#pragma unroll
        for (int n = 0; n < kGroups; ++n)
#pragma unroll
          for (int i = 0; i < 8; ++i) y[n][i / 4][i % 4] = 0;
      }
    }
    if (has_next) row_data = row_reader.template load<kIs8>(a.w, group + 1);
  };

  for (int base = step0; base < step1; base += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int step = base + d;
      if (step >= step1) break;
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        uint32_t left[4];
        fragment(ring[d].words, product, left);
#pragma unroll
        for (int n = 0; n < kGroups; ++n)
          gpu::mma_s8(sums[n][product], left, {ring[d].tokens[n].x, ring[d].tokens[n].y});
      }
      if (step + kDepth < step1) load(ring[d], step + kDepth);
      const bool may_end = kDepth % kEvery != 0 || (d + 1) % kEvery == 0;  // known when compiled
      if (may_end && ((step + 1) & (group_steps - 1)) == 0) end_group(step >> shift, step + 1 < step1);
    }
  }
  if ((step1 & (group_steps - 1)) != 0) end_group(step1 >> shift, false);  // the last group may be cut
}

// Blocks are (pairs, passes), the latter in two dimensions. kPieces warps of a block are shared out to `block_pairs`
// pairs.
template <int kTokens, int kEvery, bool kInts>
EFFK_KERNEL(kThreads, kStreamBlocks<kTokens>)
stream_kernel(Linear a, Prepared p, int block_pairs) {
  static_assert(kWarps == kPieces);
  const Shape& s = a.w.shape;
  const int warp = threadIdx.x / gpu::kWarp, rows = block_pairs * kPairRows;
  const int pair_warps = kWarps / block_pairs, per_warp = kPieces / pair_warps, my_pair = warp / pair_warps;
  const int pair0 = static_cast<int>(blockIdx.x) * block_pairs;
  const int64_t token0 = pass_index() * kTokens;
  if (token0 >= a.tokens) return;
  const int pitch = slot_pitch(rows), slot_floats = kTokens * pitch;
  float* const slots = reinterpret_cast<float*>(gpu::shared_memory());
  Place* const places = reinterpret_cast<Place*>(slots + (kInts ? 0 : slots_of(pair_warps) * slot_floats));
  const auto find_places = [&] {
    if (threadIdx.x < rows) places[threadIdx.x] = place_of_slot(a.w, p, pair0, threadIdx.x);
  };
  if constexpr (kInts) {
    find_places();
    gpu::sync_block();
  }
  const auto meanwhile = [&] {
    if constexpr (!kInts) find_places();  // two loads, one after the other
  };

  if (pair0 + my_pair < all_pairs(s)) {
    const Pair pair = pair_at(s, pair0 + my_pair);
    const int piece0 = warp % pair_warps * per_warp;
    const auto run = [&]<Kind kKind>() {
      stream_pair<kKind, kTokens, kEvery, kInts>(a, p, pair, piece0, piece0 + per_warp, token0,
                                                 slots + my_pair * kPairRows, pitch, slot_floats,
                                                 places + my_pair * kPairRows, meanwhile);
    };
    switch (kind_of(s, pair)) {
      case Kind::nibbles: run.template operator()<Kind::nibbles>(); break;
      case Kind::bytes: run.template operator()<Kind::bytes>(); break;
      default: run.template operator()<Kind::ragged_bytes>();
    }
  } else {
    meanwhile();
  }
  gpu::sync_block();

  const int64_t left = a.tokens - token0;
  const int tokens = static_cast<int>(left < kTokens ? left : kTokens), groups = static_cast<int>(s.groups());
  for (int i = threadIdx.x; i < tokens * rows; i += kThreads) {
    const int row = i % rows, token = i / rows;
    const Place place = places[row];
    if (place.feature < 0 && place.hole < 0) continue;  // maybe there is no such pair
    if constexpr (kInts) {
      if (place.hole < 0) continue;
      for (int group = 0; group < groups; ++group)
        a.accumulators[((token0 + token) * groups + group) * s.rows() + place.hole] = 0;
    } else {
      float sum = 0;
      for (int slot = 0; slot < slots_of(pair_warps); ++slot) {
        const int first = slot ? per_warp + slot - 1 : 0, end = per_warp + slot;
        if (piece_begin(groups, first) < piece_begin(groups, end))
          sum += slots[slot * slot_floats + token * pitch + row];
      }
      finish(a, token0 + token, place, sum);
    }
  }
}

// --- More tokens: tiles ---

// A block multiplies kRowWarps pairs by kTokenWarps * kTiles * 8 tokens. Its warps have a pair each and kTiles * 8
// tokens. Groups have kSteps steps.
template <int kRowWarps_, int kTokenWarps_, int kTiles_, int kSteps_>
struct Tile {
  static constexpr int kRowWarps = kRowWarps_, kTokenWarps = kTokenWarps_, kTiles = kTiles_, kSteps = kSteps_;
  static constexpr int kTileThreads = kRowWarps * kTokenWarps * gpu::kWarp;
  static constexpr int kRows = kRowWarps * kPairRows, kTokens = kTokenWarps * kTiles * kTokenBlock;
  // A stage in shared memory: words of each pair (room for 8 bits), tokens, data of tokens.
  static constexpr int kStageSteps = kSteps < 4 ? 4 : kSteps, kGroups = kStageSteps / kSteps;
  static constexpr int kPairBytes = kPairRows * kStageSteps * kStep;
  static constexpr int kTokenBytes = kTokens * kStageSteps * kStep;
  static constexpr int kDataBytes = kGroups * kTokens * 8;
  static constexpr int kStageBytes = kRowWarps * kPairBytes + kTokenBytes + kDataBytes;
  static constexpr int kMostBytes = 99 << 10;  // of a block on sm_86 and sm_89
  static constexpr int kStages = kMostBytes / kStageBytes < 3 ? kMostBytes / kStageBytes : 3;
  static_assert(kStages >= 2);
  // In the end, the sums [token][row] and where they go.
  static constexpr int kPitch = slot_pitch(kRows);
  static constexpr int kSumBytes = kTokens * kPitch * 4;
  static constexpr int kEndBytes = kSumBytes + kRows * static_cast<int>(sizeof(Place));
  static constexpr int kSharedBytes = kStages * kStageBytes > kEndBytes ? kStages * kStageBytes : kEndBytes;
  static_assert(kSharedBytes <= kMostBytes);
  static constexpr int kBlocks = kTileThreads == 128 ? 2 : 1;  // of a multiprocessor, as registers allow
};

// Where the i-th 16 bytes (a chunk's or word's four rows, chunks or words following each other) of a block are in its
// part of a stage. Lanes with two neighbouring g and all four c read together; mixed up so, they are in different
// banks.
EFFK_DEVICE int mixed(int i) { return i ^ (i / 8 % 4 * 2); }

// Copies stages to shared memory: a pair's words by its kTokenWarps warps, tokens and their data by all. Columns, rows
// and tokens past the last are whatever comes in handy: x is 0 there, or nobody asks for the result.
template <class T, bool kIs8>
class StageCopy {
  static constexpr int kTogether = T::kTokenWarps * gpu::kWarp;
  static constexpr int kBlockBytes = T::kPairBytes / 2;
  static constexpr int kColumnBytes = kBlock * kWord;                     // of words that are below each other
  static constexpr int kRun = T::kStageSteps * kTokenBlock * kStep / 16;  // 16-byte pieces of eight tokens
  static_assert(kTogether % 32 == 0 && T::kTokens / kTokenBlock * kRun % T::kTileThreads == 0);

 public:
  EFFK_DEVICE StageCopy(const Linear& a, const Prepared& p, const Pair& pair, int64_t token0) : rows_(pair.rows) {
    const Shape& s = a.w.shape;
    const int thread = this->thread();
    columns_ = static_cast<int>(kIs8 ? s.cols / kWord : s.chunks());
    words_ = (kIs8 ? a.w.q8 : a.w.q4) + pair.block * block_bytes(s);
    is_ragged_ = kind_of(s, pair) == Kind::ragged_bytes;
    if (!is_ragged_) words_ += thread % 4 * 16;
    const int64_t token_block = token0 / kTokenBlock, block_stride = p.steps * (kTokenBlock * kStep);
    const int64_t left = p.tokens / kTokenBlock - 1 - token_block;
    last_block_ = static_cast<int>(left < T::kTokens ? left : T::kTokens);
    tokens_ = p.q + token_block * block_stride + threadIdx.x % kRun * 16;
    two_ = token0 / 2;
  }

  EFFK_DEVICE void copy_words(const Linear& a, int stage, char* to) const {
    if (kIs8 && is_ragged_)
      copy_ragged(second(a.w.shape), static_cast<int>(a.w.shape.cols), stage, to);
    else
      copy_columns<T::kStageSteps * kStep / (kIs8 ? kWord : kChunk)>(second(a.w.shape), stage, to);
  }

  EFFK_DEVICE void copy_tokens(const Linear& a, const Prepared& p, int stage, char* to) const {
    const int8_t* const from = tokens_ + int64_t{stage} * (kRun * 16);
    constexpr int kBlocksAtOnce = T::kTileThreads / kRun;
#pragma unroll
    for (int i = 0; i < T::kTokens / kTokenBlock / kBlocksAtOnce; ++i) {
      const int wanted = threadIdx.x / kRun + i * kBlocksAtOnce, block = wanted < last_block_ ? wanted : last_block_;
      gpu::async_copy(to + (threadIdx.x + i * T::kTileThreads) * 16, from + block * (p.steps * (kTokenBlock * kStep)));
    }
    const int groups = static_cast<int>(a.w.shape.groups());
#pragma unroll
    for (int i = threadIdx.x; i < T::kGroups * T::kTokens / 2; i += T::kTileThreads) {
      const int group = stage * T::kGroups + i / (T::kTokens / 2), two = i % (T::kTokens / 2);
      const int last_two = last_block_ * (kTokenBlock / 2) + kTokenBlock / 2 - 1;
      if (group < groups)
        gpu::async_copy(to + T::kTokenBytes + i * 16,
                        p.token_data + (group * (p.tokens / 2) + two_ + (two < last_two ? two : last_two)) * 4);
    }
  }

 private:
  EFFK_DEVICE static int64_t block_bytes(const Shape& s) { return kIs8 ? kBlock * s.cols : s.chunks() * kColumnBytes; }
  // From the pair's first block to its second, if there is one.
  EFFK_DEVICE int64_t second(const Shape& s) const { return rows_ > kBlock ? block_bytes(s) : 0; }
  // Among those that copy a pair.
  EFFK_DEVICE static int thread() {
    return threadIdx.x / gpu::kWarp / T::kRowWarps * gpu::kWarp + threadIdx.x % gpu::kWarp;
  }

  template <int kColumns>
  EFFK_DEVICE void copy_columns(int64_t second, int stage, char* to) const {
    const int thread = this->thread(), place = mixed(thread) * 16;
#pragma unroll
    for (int i = 0; i < kColumns * 4; i += kTogether) {
      const int wanted = stage * kColumns + (thread + i) / 4, column = wanted < columns_ ? wanted : columns_ - 1;
      const uint8_t* const from = words_ + int64_t{column} * kColumnBytes;
      if ((kColumns * 4) % kTogether == 0 || thread + i < kColumns * 4) {
        gpu::async_copy(to + place + i * 16, from);
        gpu::async_copy(to + kBlockBytes + place + i * 16, from + second);
      }
    }
  }

  EFFK_DEVICE void copy_ragged(int64_t second, int cols, int stage, char* to) const {
    constexpr int kWords = T::kStageSteps * kStep / kWord;
#pragma unroll 1
    for (int block = 0; block < 2; ++block) {
      const int left = second != 0 && block == 1 ? rows_ - kBlock : rows_, rows = left < kBlock ? left : kBlock;
      const uint8_t* const from = words_ + block * second;
#pragma unroll 2
      for (int i = thread(); i < kWords * kBlock; i += kTogether) {
        const int row = i % kBlock < rows ? i % kBlock : rows - 1, word = stage * kWords + i / kBlock;
        char* const place = to + block * kBlockBytes + mixed(i / 4) * 16 + i % 4 * 4;
        if (word < columns_)
          gpu::async_copy<4>(place, from + (int64_t{word} * rows + row) * kWord);
        else
          *reinterpret_cast<uint32_t*>(place) =
              word == columns_ && cols % kWord != 0 ? last_bytes(from, rows, cols, row) : 0;
      }
    }
  }

  const uint8_t* words_;
  const int8_t* tokens_;
  int64_t two_;  // which of the pairs of tokens comes first
  bool is_ragged_;
  int rows_, columns_;
  int last_block_;  // of tokens, from the tile's first on
};

template <class T>
struct TileSums {
  float piece[T::kTiles][2][4], total[T::kTiles][2][4];
};

// Adds one group from shared memory: the pair's words from `words`, of which it is the n-th of the stage, and tokens.
template <class T, bool kIs8>
EFFK_DEVICE void multiply_group(const char* words, const char* tokens, const char* data, int in_stage,
                                const RowData& rows, TileSums<T>& y) {
  const int lane = threadIdx.x % gpu::kWarp, g = lane / 4, c = lane % 4;
  uint32_t left[T::kSteps][2][4];
#pragma unroll
  for (int step = 0; step < T::kSteps; ++step) {
    Words<kIs8> w;
    const int first = (in_stage * T::kSteps + step) * 4 + c;  // chunk, or pair of words
#pragma unroll
    for (int i = 0; i < (kIs8 ? 2 : 1); ++i) {
      const int unit = (kIs8 ? 2 * first + i : first) * 4 + g % 4;
      w.v[i] = *reinterpret_cast<const uint4*>(words + g / 4 * (T::kPairBytes / 2) + mixed(unit) * 16);
    }
#pragma unroll
    for (int product = 0; product < 2; ++product) fragment(w, product, left[step][product]);
  }
#pragma unroll
  for (int n = 0; n < T::kTiles; ++n) {
    int32_t sums[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = kMagicBits;
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
      const uint2 x = *reinterpret_cast<const uint2*>(
          tokens + (n * T::kStageSteps + in_stage * T::kSteps + step) * kTokenBlock * kStep + lane * kChunk);
#pragma unroll
      for (int product = 0; product < 2; ++product) gpu::mma_s8(sums[product], left[step][product], {x.x, x.y});
    }
    const uint4 two =
        *reinterpret_cast<const uint4*>(data + (in_stage * T::kTokens / 2 + n * kTokenBlock / 2 + c) * 16);
    add_group<kIs8>(sums, token_data(two), rows, y.piece[n]);
  }
}

// All stages of a tile, for a warp whose pair is of 8 bits or not. Warps of both kinds meet at the barriers.
template <class T, bool kIs8>
EFFK_DEVICE void multiply_tile(const Linear& a, const Prepared& p, const Pair& pair, int64_t token0, char* shared,
                               TileSums<T>& y) {
  const Shape& s = a.w.shape;
  const int warp = threadIdx.x / gpu::kWarp, row_warp = warp % T::kRowWarps, token_warp = warp / T::kRowWarps;
  const int groups = static_cast<int>(s.groups()), stages = (groups + T::kGroups - 1) / T::kGroups;
  const bool active = pair.rows > 0;
  const StageCopy<T, kIs8> stage_copy(a, p, pair, token0);
  const auto copy = [&](int stage, int slot) {
    if (stage < stages) {
      char* const to = shared + slot * T::kStageBytes;
      if (active) stage_copy.copy_words(a, stage, to + row_warp * T::kPairBytes);
      stage_copy.copy_tokens(a, p, stage, to + T::kRowWarps * T::kPairBytes);
    }
    gpu::async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < T::kStages - 1; ++stage) copy(stage, stage);

  const RowDataReader row_reader(s, pair);
  int piece = 0, slot = 0;
  for (int stage = 0; stage < stages; ++stage) {
    gpu::async_wait<T::kStages - 2>();
    gpu::sync_block();  // the stage is there, and nobody uses the one before, which comes next
    copy(stage + T::kStages - 1, slot == 0 ? T::kStages - 1 : slot - 1);
    const char* const at = shared + slot * T::kStageBytes;
    slot = slot + 1 == T::kStages ? 0 : slot + 1;
    if (!active) continue;
    const char* const words = at + row_warp * T::kPairBytes;
    const char* const tokens = at + T::kRowWarps * T::kPairBytes + token_warp * (T::kTokenBytes / T::kTokenWarps);
    const char* const data = at + T::kRowWarps * T::kPairBytes + T::kTokenBytes + token_warp * T::kTiles * 64;
#pragma unroll 1
    for (int i = 0; i < T::kGroups; ++i) {
      const int group = stage * T::kGroups + i;
      if (group >= groups) break;
      multiply_group<T, kIs8>(words, tokens, data, i, row_reader.load<kIs8>(a.w, group), y);
      while (piece_begin(groups, piece + 1) <= group) ++piece;
      if (piece_begin(groups, piece + 1) != group + 1) continue;
#pragma unroll
      for (int n = 0; n < T::kTiles; ++n)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          y.total[n][j / 4][j % 4] += y.piece[n][j / 4][j % 4];
          y.piece[n][j / 4][j % 4] = 0;
        }
    }
  }
}

// Blocks are (row tiles, token tiles), the latter in two dimensions.
template <class T>
EFFK_KERNEL(T::kTileThreads, T::kBlocks)
tile_kernel(Linear a, Prepared p) {
  const int warp = threadIdx.x / gpu::kWarp, row_warp = warp % T::kRowWarps, token_warp = warp / T::kRowWarps;
  const int lane = threadIdx.x % gpu::kWarp, g = lane / 4, c = lane % 4;
  const int pair0 = static_cast<int>(blockIdx.x) * T::kRowWarps;
  const int64_t token0 = pass_index() * T::kTokens;
  if (token0 >= a.tokens) return;
  const Pair pair = pair_at(a.w.shape, pair0 + row_warp);
  char* const shared = gpu::shared_memory();
  TileSums<T> y;
#pragma unroll
  for (int n = 0; n < T::kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 8; ++i) y.piece[n][i / 4][i % 4] = y.total[n][i / 4][i % 4] = 0;
  if (pair.is8)
    multiply_tile<T, true>(a, p, pair, token0, shared, y);
  else
    multiply_tile<T, false>(a, p, pair, token0, shared, y);
  gpu::async_wait<0>();
  gpu::sync_block();

  float* const sums = reinterpret_cast<float*>(shared);
  Place* const places = reinterpret_cast<Place*>(shared + T::kSumBytes);
#pragma unroll
  for (int n = 0; n < T::kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = (token_warp * T::kTiles + n) * kTokenBlock + 2 * c + i;
      *reinterpret_cast<uint4*>(sums + token * T::kPitch + row_warp * kPairRows + 4 * g) = rows_of_token(y.total[n], i);
    }
  if (threadIdx.x < T::kRows) places[threadIdx.x] = place_of_slot(a.w, p, pair0, threadIdx.x);
  gpu::sync_block();
  const int64_t left = a.tokens - token0;
  const int num_tokens = static_cast<int>(left < T::kTokens ? left : T::kTokens);
#pragma unroll 1
  for (int i = threadIdx.x; i < num_tokens * T::kRows; i += T::kTileThreads)
    finish(a, token0 + i / T::kRows, places[i % T::kRows], sums[i / T::kRows * T::kPitch + i % T::kRows]);
}

// --- Launches ---

// As many tokens as registers allow: a warp holds a group of its pair's words, and two sums for each output.
template <int kSteps>
using LargeTile = Tile<4, 2, (kSteps == 8 ? 4 : 6), kSteps>;
template <int kSteps>
using SmallTile = Tile<2, 2, 4, kSteps>;

// How a kernel would share out a call.
inline LinearPlan plan_of(LinearPlan::Kernel kernel, const Shape& s, int64_t tokens, int num_sms) {
  switch (kernel) {
    case LinearPlan::Kernel::small_tiles: return {kernel, SmallTile<1>::kTokens, SmallTile<1>::kRowWarps};
    case LinearPlan::Kernel::large_tiles:
      return {kernel, s.group == 256 ? LargeTile<8>::kTokens : LargeTile<1>::kTokens, LargeTile<1>::kRowWarps};
    default: break;
  }
  LinearPlan plan{kernel, tokens <= 8 ? 8 : tokens <= 16 ? 16 : 32, 1};
  // Pairs of a block share the tokens that it reads; but each multiprocessor wants a block.
  const int64_t pairs = all_pairs(s), passes = ceil_div(tokens, plan.pass_tokens);
  while (plan.block_pairs < 4 && ceil_div(pairs, plan.block_pairs * 2) * passes >= num_sms) plan.block_pairs *= 2;
  return plan;
}

inline LinearPlan plan_linear(const Shape& s, int64_t tokens, int num_sms) {
  using Kernel = LinearPlan::Kernel;
  constexpr int64_t kMostStreamed = 64;  // tokens
  if (tokens <= kMostStreamed) return plan_of(Kernel::stream, s, tokens, num_sms);
  // Outputs that a multiprocessor computes one after the other. It has one large tile at a time or two small ones,
  // which take a quarter longer for as much.
  const auto outputs = [&](const LinearPlan& plan, int at_once) {
    const int64_t blocks = ceil_div(all_pairs(s), plan.block_pairs) * ceil_div(tokens, plan.pass_tokens);
    return ceil_div(blocks, int64_t{num_sms} * at_once) * at_once * plan.block_pairs * kPairRows * plan.pass_tokens;
  };
  const LinearPlan large = plan_of(Kernel::large_tiles, s, tokens, num_sms),
                   small = plan_of(Kernel::small_tiles, s, tokens, num_sms);
  return outputs(large, 1) <= outputs(small, 2) * 5 / 4 ? large : small;
}

inline int64_t linear_workspace(const Shape& s, int64_t tokens) {
  Prepared p;
  return place_prepared(s, tokens, nullptr, &p);
}

template <class T>
gpu::Error launch_tiles(const Linear& a, const Prepared& p, gpu::Stream stream) {
  return gpu::launch(tile_kernel<T>,
                     grid_of_passes(ceil_div(all_pairs(a.w.shape), T::kRowWarps), ceil_div(a.tokens, T::kTokens)),
                     T::kTileThreads, T::kSharedBytes, stream, a, p);
}

template <int kTokens, int kEvery, bool kInts>
gpu::Error launch_stream(const Linear& a, const Prepared& p, int block_pairs, gpu::Stream stream) {
  const int rows = block_pairs * kPairRows;
  const int sums = kInts ? 0 : slots_of(kWarps / block_pairs) * kTokens * slot_pitch(rows) * 4;
  return gpu::launch(stream_kernel<kTokens, kEvery, kInts>,
                     grid_of_passes(ceil_div(all_pairs(a.w.shape), block_pairs), ceil_div(a.tokens, kTokens)), kThreads,
                     sums + rows * static_cast<int>(sizeof(Place)), stream, a, p, block_pairs);
}

// y of a; x and the sizes in `x`. workspace has linear_workspace() bytes and is aligned to 16, as are the packed
// tensors.
inline gpu::Error launch_linear(const Linear& a, const Quantize& x, const LinearPlan& plan, void* workspace,
                                gpu::Stream stream) {
  if (a.tokens == 0 || a.w.shape.rows() == 0) return nullptr;
  Prepared p;
  place_prepared(a.w.shape, a.tokens, workspace, &p);
  if (gpu::Error e = launch_prepare(x, a.tokens, a.w, p, stream)) return e;
  const int64_t group = a.w.shape.group;
  switch (plan.kernel) {
    case LinearPlan::Kernel::stream: {
      const auto run = [&]<int kEvery>() {
        return plan.pass_tokens == 8    ? launch_stream<8, kEvery, false>(a, p, plan.block_pairs, stream)
               : plan.pass_tokens == 16 ? launch_stream<16, kEvery, false>(a, p, plan.block_pairs, stream)
                                        : launch_stream<32, kEvery, false>(a, p, plan.block_pairs, stream);
      };
      return group < 128 ? run.template operator()<1>() : run.template operator()<4>();
    }
    case LinearPlan::Kernel::small_tiles:
      return group == 32    ? launch_tiles<SmallTile<1>>(a, p, stream)
             : group == 64  ? launch_tiles<SmallTile<2>>(a, p, stream)
             : group == 128 ? launch_tiles<SmallTile<4>>(a, p, stream)
                            : launch_tiles<SmallTile<8>>(a, p, stream);
    default:
      return group == 32    ? launch_tiles<LargeTile<1>>(a, p, stream)
             : group == 64  ? launch_tiles<LargeTile<2>>(a, p, stream)
             : group == 128 ? launch_tiles<LargeTile<4>>(a, p, stream)
                            : launch_tiles<LargeTile<8>>(a, p, stream);
  }
}

// a.accumulators, for integers q [tokens, cols] of any strides.
inline gpu::Error launch_accumulate(const Linear& a, const int8_t* q, int64_t token_stride, int64_t col_stride,
                                    void* workspace, gpu::Stream stream) {
  const Shape& s = a.w.shape;
  if (a.tokens == 0 || s.rows() == 0 || s.groups() == 0) return nullptr;
  Prepared p;
  place_prepared(s, a.tokens, workspace, &p);
  const Quantize x{Type::i8, q, token_stride, col_stride, s.cols, s.group, nullptr, 0, nullptr, nullptr};
  if (gpu::Error e = launch_prepare(x, a.tokens, a.w, p, stream)) return e;
  return launch_stream<8, 1, true>(a, p, 1, stream);
}

}  // namespace effk::w4a8
