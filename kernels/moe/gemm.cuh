// Products of moe on CUDA: rows sorted by expert, each times its expert's weight. One kernel serves moe_grouped_gemm
// and both products of moe_mlp, which differ in what becomes of the sums.
//
// Blocks stay and take tiles of all experts. Which ones there are they learn from the offsets on the device, so nobody
// waits for it. Rows are gathered while they are copied to shared memory. A stage there has 128 bytes of each row of a
// tile, of x and of w, in pieces of 16 bytes whose order depends on the row, so that readers of one piece of several
// rows meet different banks. The columns of a tile are two halves: with gates, these and what they multiply, so that
// one thread has both.
//
// 16-bit types go through tensor cores; float32 doesn't, as they would round it to TF32.
//
// Up to 64 rows an expert an H200 reads weights at two thirds of its memory's rate and more. With many rows the product
// reaches a quarter of its tensor cores' rate: copies of tiles from the L2 cache are waited for.
#pragma once

#include "load.cuh"

namespace effk::moe {

// y[i] = w[e] x[gather[i] / divisor], and what one of the kinds below makes of it.
struct Product {
  Operands in;  // without source
  int64_t x_rows;
  Indices gather;    // [rows] or none
  uint32_t divisor;  // other than 1: gather holds pairs
  Groups groups;
  int64_t cols;  // of y
  bool is_gated;
  void* y;  // [rows, cols]

  const void* bias;  // [experts, cols] or null
  Type out_type;
  Activation activation;
  const float* weight;  // of pairs
  const int64_t* pair;  // [rows]
};

// --- What becomes of the sums ---

EFFK_DEVICE float activated(Activation a, float gate, float up) {
  if (a == Activation::relu2) return up < 0 ? 0.0f : up * up;
  if (a == Activation::geglu) return 0.5f * gate * erfcf(gate * -0.70710678f) * up;
  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
  const float exponent = a == Activation::swiglu ? gate : 1.59576912f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1 + expf(-exponent)) * up;
}

// Bias and any type.
struct LinearKind {
  EFFK_DEVICE static float factor(const Product&, int64_t) { return 1; }

  template <class X, int kCount>
  EFFK_DEVICE static void store(const Product& p, int64_t expert, int64_t row, float, int64_t col,
                                const float (&sums)[kCount]) {
    float v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = sums[i];
      if (p.bias && expert < p.groups.experts && col + i < p.cols)
        v[i] += to_float(static_cast<const X*>(p.bias)[expert * p.cols + col + i]);
    }
    const int64_t at = row * p.cols + col, left = p.cols - col;
    if (p.out_type == Type::f32)
      store_values(static_cast<float*>(p.y) + at, v, left);
    else if (p.out_type == Type::f16)
      store_values(static_cast<Half*>(p.y) + at, v, left);
    else
      store_values(static_cast<BFloat16*>(p.y) + at, v, left);
  }
};

// The activation, and x's type. Sums of two halves come as one where there are gates.
struct UpKind {
  EFFK_DEVICE static float factor(const Product&, int64_t) { return 1; }

  template <class X, int kCount>
  EFFK_DEVICE static void store(const Product& p, int64_t, int64_t row, float, int64_t col,
                                const float (&sums)[kCount]) {
    store_values(static_cast<X*>(p.y) + row * p.cols + col, sums, p.cols - col);
  }
};

// The weight of the row's pair, and float32.
struct DownKind {
  EFFK_DEVICE static float factor(const Product& p, int64_t row) { return p.weight[p.pair[row]]; }

  template <class X, int kCount>
  EFFK_DEVICE static void store(const Product& p, int64_t, int64_t row, float factor, int64_t col,
                                const float (&sums)[kCount]) {
    float v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = factor * sums[i];
    store_values(static_cast<float*>(p.y) + row * p.cols + col, v, p.cols - col);
  }
};

// --- Tiles ---

constexpr int kRowBytes = 128, kPieceBytes = 16, kRowPieces = kRowBytes / kPieceBytes;  // of a stage

// Where a piece of a row is in a stage.
EFFK_DEVICE int piece_at(int row, int piece) { return row * kRowBytes + (piece ^ row % kRowPieces) * kPieceBytes; }

// kRows x kCols sums of a block: those of tensor cores. A warp has some of the rows and the same columns of both
// halves.
template <class X_, int kRows_, int kCols_, int kRowWarps, int kColWarps, int kStages_, int kBlocks_>
struct MmaTile {
  using X = X_;
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = kRowWarps * kColWarps * gpu::kWarp;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpCols = kCols / 2 / kColWarps;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpCols / 8;  // products

  float sums[kDown][kAcross][2][4];

  EFFK_DEVICE static int first_row() { return threadIdx.x / gpu::kWarp / kColWarps * kWarpRows; }
  EFFK_DEVICE static int first_col() { return threadIdx.x / gpu::kWarp % kColWarps * kWarpCols; }

  EFFK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kDown * kAcross * 8; ++i) sums[i / 8 / kAcross][i / 8 % kAcross][i / 4 % 2][i % 4] = 0;
  }

  EFFK_DEVICE void multiply(const char* x, const char* w) {
    const int lane = threadIdx.x % gpu::kWarp;
    // Of matrices that are loaded together, rows differ by multiples of 8: their pieces are in the same order.
    const char* const from_x = x + (first_row() + lane % 16) * kRowBytes;
    const char* const from_w = w + (first_col() + lane / 16 * (kCols / 2) + lane % 8) * kRowBytes;
#pragma unroll
    for (int k = 0; k < kRowPieces; k += 2) {
      const int x_piece = ((k + lane / 16) ^ lane % 8) * kPieceBytes;
      const int w_piece = ((k + lane / 8 % 2) ^ lane % 8) * kPieceBytes;
      uint32_t a[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) gpu::load_matrices(a[i], from_x + i * 16 * kRowBytes + x_piece);
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        uint32_t b[4];  // of both halves
        gpu::load_matrices(b, from_w + j * 8 * kRowBytes + w_piece);
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            gpu::mma<X>(sums[i][j][half], a[i][0], a[i][1], a[i][2], a[i][3], b[2 * half], b[2 * half + 1]);
      }
    }
  }

  // Calls at_row(row)(column of the first half, neighbouring sums of the first half, those of the second).
  template <class F>
  EFFK_DEVICE void visit(const F& at_row) const {
    const int lane = threadIdx.x % gpu::kWarp;
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      const auto at = at_row(first_row() + i * 8 + lane / 4);
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const auto& v = sums[i / 2][j];
        const int of = i % 2 * 2;
        const float first[2] = {v[0][of], v[0][of + 1]}, second[2] = {v[1][of], v[1][of + 1]};
        at(first_col() + j * 8 + lane % 4 * 2, first, second);
      }
    }
  }
};

// The same of float32. A thread has kDown x kAcross sums, far apart.
template <int kRows_, int kCols_, int kDown, int kAcross, int kStages_, int kBlocks_>
struct FmaTile {
  using X = float;
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kRowStep = kRows / kDown, kColStep = kCols / kAcross;
  static constexpr int kThreads = kRowStep * kColStep;
  static_assert(kRowStep % 8 == 0 && kColStep % 8 == 0 && kAcross % 2 == 0);

  float sums[kDown][kAcross];

  EFFK_DEVICE static int first_row() { return threadIdx.x / kColStep; }
  EFFK_DEVICE static int first_col() { return threadIdx.x % kColStep; }

  EFFK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kDown * kAcross; ++i) sums[i / kAcross][i % kAcross] = 0;
  }

  EFFK_DEVICE void multiply(const char* x, const char* w) {
#pragma unroll 2
    for (int k = 0; k < kRowPieces; ++k) {
      const char* const from_x = x + piece_at(first_row(), k);
      const char* const from_w = w + piece_at(first_col(), k);
      uint4 b[kAcross];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) b[j] = *reinterpret_cast<const uint4*>(from_w + j * kColStep * kRowBytes);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const uint4 a = *reinterpret_cast<const uint4*>(from_x + i * kRowStep * kRowBytes);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          float sum = fmaf(float_of(a.x), float_of(b[j].x), sums[i][j]);
          sum = fmaf(float_of(a.y), float_of(b[j].y), sum);
          sum = fmaf(float_of(a.z), float_of(b[j].z), sum);
          sums[i][j] = fmaf(float_of(a.w), float_of(b[j].w), sum);
        }
      }
    }
  }

  template <class F>
  EFFK_DEVICE void visit(const F& at_row) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const auto at = at_row(first_row() + i * kRowStep);
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) {
        const float first[1] = {sums[i][j]}, second[1] = {sums[i][j + kAcross / 2]};
        at(first_col() + j * kColStep, first, second);
      }
    }
  }
};

// --- The kernel ---

// Starts the copy of 16 bytes, of which `left` are there, to shared memory; what isn't there becomes 0. kWide: they are
// aligned, and all or none are there.
template <class X, bool kWide>
EFFK_DEVICE void copy_piece(char* to, const char* from, int64_t left) {
  if (left <= 0) {
    *reinterpret_cast<uint4*>(to) = {0, 0, 0, 0};
    return;
  }
  if constexpr (kWide) {
    gpu::async_copy(to, from);
  } else if (left >= kPieceBytes && is_multiple(from, 4)) {
#pragma unroll
    for (int i = 0; i < kPieceBytes; i += 4) gpu::async_copy<4>(to + i, from + i);
  } else {
    *reinterpret_cast<uint4*>(to) = load_each(reinterpret_cast<const X*>(from), left / static_cast<int>(sizeof(X)));
  }
}

// What run_items() is to do. kWide: rows of x and w are made of whole, aligned pieces.
template <class T, class Kind, bool kWide>
class ProductWork {
  using X = typename T::X;
  static constexpr int kPass = T::kThreads / kRowPieces;  // rows that are copied together
  static constexpr int kPassesX = ceil_div(T::kRows, kPass), kHalf = T::kCols / 2 / kPass;
  static_assert(T::kRows % kPass == 0 && T::kCols % (2 * kPass) == 0 && kPass % kRowPieces == 0);

 public:
  static constexpr int kStages = T::kStages, kStageBytes = (T::kRows + T::kCols) * kRowBytes;

  EFFK_DEVICE explicit ProductWork(const Product& p)
      : p_(p), schedule_(p.groups, static_cast<uint32_t>(ceil_div(p.cols, col_step(p))), T::kRows) {}

  EFFK_DEVICE bool find(uint32_t i, Item& item) {
    Part part;
    if (!schedule_.find(i, part)) return false;
    item.group = part.group;
    item.begin = item.row = part.begin + static_cast<int32_t>(part.row_tile) * T::kRows;
    item.end = part.end;
    item.col = static_cast<int32_t>(part.col_tile) * col_step(p_);
    const int64_t steps = ceil_div(row_bytes(), kRowBytes);
    item.steps = part.group < p_.groups.experts && steps > 0 ? static_cast<int32_t>(steps) : 1;
    return true;
  }

  EFFK_DEVICE void start(const Item& item) {
    const int row = threadIdx.x / kRowPieces;
    const bool is_expert = item.group < p_.groups.experts;
    left_ = is_expert ? row_bytes() - piece() * kPieceBytes : 0;
#pragma unroll
    for (int i = 0; i < kPassesX; ++i) {
      const int at = item.row + row + i * kPass;
      int64_t source = -1;
      if (is_expert && at < item.end) {
        source = p_.gather.data ? index_at(p_.gather, at) : at;
        if (p_.divisor != 1) source = static_cast<uint32_t>(source) / p_.divisor;
      }
      x_[i] = nullptr;
      if (source >= 0 && source < p_.x_rows)
        x_[i] = static_cast<const char*>(p_.in.x) +
                (source * p_.in.x_stride * static_cast<int64_t>(sizeof(X)) + piece() * kPieceBytes);
    }
    cols_left_ = static_cast<int>(p_.cols) - item.col - row;
    w_ = static_cast<const char*>(p_.in.w) +
         (item.group * p_.in.w_expert + int64_t{item.col + row} * p_.in.w_stride) * static_cast<int64_t>(sizeof(X)) +
         piece() * kPieceBytes;
  }

  EFFK_DEVICE void fetch(char* stage) {
    char* to = stage + piece_at(threadIdx.x / kRowPieces, piece());
#pragma unroll
    for (int i = 0; i < kPassesX; ++i, to += kPass * kRowBytes) {
      copy_piece<X, kWide>(to, x_[i], x_[i] ? left_ : 0);
      if (x_[i]) x_[i] += kRowBytes;
    }
    const int64_t stride = p_.in.w_stride * static_cast<int64_t>(sizeof(X));
    const int half_rows = p_.is_gated ? 0 : T::kCols / 2;  // from a half's columns of y to the other's
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const char* from = w_ + (half ? (p_.is_gated ? p_.cols : T::kCols / 2) * stride : 0);
#pragma unroll
      for (int i = 0; i < kHalf; ++i, to += kPass * kRowBytes, from += kPass * stride)
        copy_piece<X, kWide>(to, from, half * half_rows + i * kPass < cols_left_ ? left_ : 0);
    }
    w_ += kRowBytes;
    left_ -= kRowBytes;
  }

  EFFK_DEVICE void clear() { tile_.clear(); }
  EFFK_DEVICE void multiply(const char* stage) { tile_.multiply(stage, stage + T::kRows * kRowBytes); }

  EFFK_DEVICE void finish(const Item& item) const {
    tile_.visit([&](int i) {
      const int64_t row = item.row + i;
      const bool is_there = row < item.end;
      const float factor = is_there ? Kind::factor(p_, row) : 0;
      return [this, &item, row, is_there, factor]<int kCount>(int col, const float (&first)[kCount],
                                                              const float (&second)[kCount]) {
        if (!is_there) return;
        const int64_t to = item.col + col;
        if constexpr (std::is_same_v<Kind, UpKind>) {
          float v[kCount];
#pragma unroll
          for (int j = 0; j < kCount; ++j)
            v[j] = activated(p_.activation, first[j], p_.is_gated ? second[j] : first[j]);
          Kind::template store<X>(p_, item.group, row, factor, to, v);
          if (p_.is_gated) return;
#pragma unroll
          for (int j = 0; j < kCount; ++j) v[j] = activated(Activation::relu2, second[j], second[j]);
          Kind::template store<X>(p_, item.group, row, factor, to + T::kCols / 2, v);
        } else {
          Kind::template store<X>(p_, item.group, row, factor, to, first);
          Kind::template store<X>(p_, item.group, row, factor, to + T::kCols / 2, second);
        }
      };
    });
  }

 private:
  EFFK_DEVICE static int col_step(const Product& p) { return p.is_gated ? T::kCols / 2 : T::kCols; }
  EFFK_DEVICE static int piece() { return threadIdx.x % kRowPieces; }
  EFFK_DEVICE int64_t row_bytes() const { return p_.in.cols * static_cast<int64_t>(sizeof(X)); }

  const Product& p_;
  Schedule schedule_;
  // Of what is copied next: the thread's piece in its rows; null where there is none.
  const char* x_[kPassesX];
  const char* w_;
  int64_t left_;   // bytes of rows from the piece on
  int cols_left_;  // of y, from that of the first row of w on
  T tile_;
};

template <class T, class Kind, bool kWide>
EFFK_KERNEL(T::kThreads, T::kBlocks)
product_kernel(EFFK_GRID_CONSTANT(Product) p) {
  ProductWork<T, Kind, kWide> work(p);
  run_items(work);
}

// --- Host side ---

// A 64 x 64 tile for rows that aren't aligned, and for the others:
enum class Tiling { few, some, many };  // rows an expert

template <class X>
struct Tiles {
  using Few = MmaTile<X, 16, 64, 1, 4, 6, 3>;  // many small copies are on their way
  using Some = MmaTile<X, 64, 128, 2, 4, 3, 2>;
  using Many = MmaTile<X, 128, 128, 2, 4, 3, 2>;
  using Ragged = MmaTile<X, 64, 64, 2, 2, 3, 3>;
};
template <>
struct Tiles<float> {
  using Few = FmaTile<16, 64, 2, 4, 6, 3>;
  using Some = FmaTile<64, 64, 8, 4, 3, 3>;
  using Many = FmaTile<128, 64, 8, 4, 3, 2>;
  using Ragged = FmaTile<64, 64, 8, 4, 3, 3>;
};

// The tiling that takes the least time by the mean number of rows of an expert, of all or of a gemm's: in clocks of one
// multiprocessor, to which memory brings 20 bytes a clock and the L2 cache 16 bytes of tiles, as measured on an H200.
// The tensor cores are faster than that for all three.
inline Tiling choose_tiling(const Product& p, const Gemm* gemm, int num_sms) {
  if (gemm && *gemm == Gemm::dense) return Tiling::many;
  constexpr struct {
    Tiling tiling;
    int64_t rows, cols;
  } kTilings[] = {{Tiling::few, 16, 64}, {Tiling::some, 64, 128}, {Tiling::many, 128, 128}};
  const double experts = static_cast<double>(min_of(p.groups.experts, p.groups.rows));
  if (experts == 0) return Tiling::few;
  const int64_t rows = ceil_div(p.groups.rows, static_cast<int64_t>(experts)), outputs = p.cols * (p.is_gated ? 2 : 1);
  const double depth = static_cast<double>(p.in.cols), size = static_cast<double>(type_size(p.in.type));
  const double memory = experts * static_cast<double>(outputs) * depth * size / 20 / num_sms;
  Tiling best{};
  double least = INFINITY;
  for (const auto& t : kTilings) {
    if (gemm && t.tiling == Tiling::many) continue;
    const double tiles = experts * static_cast<double>(ceil_div(rows, t.rows) * ceil_div(outputs, t.cols));
    const double of_each = tiles < num_sms ? 1 : tiles / num_sms;  // a tile isn't shared out
    const double work = of_each * depth * static_cast<double>(t.rows + t.cols) * size / 16;
    const double clocks = work > memory ? work : memory;
    if (clocks >= least) continue;
    least = clocks;
    best = t.tiling;
  }
  return best;
}

template <class T, class Kind, bool kWide>
gpu::Error launch_product_of(const Product& p, int num_sms, gpu::Stream stream) {
  using Work = ProductWork<T, Kind, kWide>;
  const int64_t cols = ceil_div(p.cols, p.is_gated ? T::kCols / 2 : T::kCols);
  const int64_t rows = p.groups.rows / T::kRows + min_of(p.groups.rows, p.groups.count());
  if (rows * cols >= kMostTiles) return "too many tiles";
  const int64_t blocks = min_of(int64_t{num_sms} * T::kBlocks, rows * cols);
  return gpu::launch(product_kernel<T, Kind, kWide>, dim3(static_cast<unsigned>(blocks)), T::kThreads,
                     Work::kStages * Work::kStageBytes, stream, p);
}

template <class Kind, class X>
gpu::Error launch_product_of(const Product& p, Tiling tiling, int num_sms, gpu::Stream stream) {
  const int64_t size = sizeof(X), w_rows = p.cols * (p.is_gated ? 2 : 1);
  const bool wide = begin_aligned(p.in.x, p.x_rows, p.in.x_stride, size) &&
                    begin_aligned(p.in.w, w_rows, p.in.w_stride, size) &&
                    begin_aligned(p.in.w, p.groups.experts, p.in.w_expert, size) && p.in.cols * size % kPieceBytes == 0;
  if (!wide) return launch_product_of<typename Tiles<X>::Ragged, Kind, false>(p, num_sms, stream);
  switch (tiling) {
    case Tiling::few: return launch_product_of<typename Tiles<X>::Few, Kind, true>(p, num_sms, stream);
    case Tiling::some: return launch_product_of<typename Tiles<X>::Some, Kind, true>(p, num_sms, stream);
    default: return launch_product_of<typename Tiles<X>::Many, Kind, true>(p, num_sms, stream);
  }
}

template <class Kind>
gpu::Error launch_product(const Product& p, Tiling tiling, int num_sms, gpu::Stream stream) {
  if (p.groups.rows == 0 || p.cols == 0 || p.groups.count() == 0) return nullptr;
  switch (p.in.type) {
    case Type::f32: return launch_product_of<Kind, float>(p, tiling, num_sms, stream);
    case Type::f16: return launch_product_of<Kind, Half>(p, tiling, num_sms, stream);
    default: return launch_product_of<Kind, BFloat16>(p, tiling, num_sms, stream);
  }
}

}  // namespace effk::moe
