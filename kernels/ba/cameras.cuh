// Passes over cameras, on CUDA. A block has one, or a part of its observations where there are few cameras: a second
// kernel joins parts, in order. A thread linearizes an observation at a time.
#pragma once

#include "points.cuh"

namespace effk::ba {

constexpr int kCameraThreads = 128;

// Units of work that blocks share. A unit's result is `width` numbers.
struct Shares {
  int64_t units, splits;  // blocks a unit
  double* partial;        // [units, splits, width] if there are several
};

// The part of [begin, end) that a block has.
EFFK_DEVICE void cut(int64_t splits, int64_t split, int64_t& begin, int64_t& end) {
  const int64_t share = ceil_div(end - begin, splits), from = begin + split * share;
  end = min_of(from + share, end);
  begin = from;
}

// Number i of a unit: Args have store(unit, i, v) for that.
template <class Args>
EFFK_DEVICE void leave(const Args& a, int64_t unit, int64_t split, int i, double v) {
  if (a.s.splits == 1)
    a.store(unit, i, v);
  else
    a.s.partial[(unit * a.s.splits + split) * a.width() + i] = v;
}

template <class Args>
EFFK_KERNEL(kEachThreads, 4)
join_kernel(EFFK_GRID_CONSTANT(Args) a) {
  const int64_t width = a.width();
  for (int64_t at = int64_t{blockIdx.x} * kEachThreads + threadIdx.x; at < a.s.units * width;
       at += int64_t{gridDim.x} * kEachThreads) {
    const int64_t unit = at / width, i = at % width;
    double v = 0;
    for (int64_t split = 0; split < a.s.splits; ++split) v += a.s.partial[(unit * a.s.splits + split) * width + i];
    a.store(unit, static_cast<int>(i), v);
  }
}

// Sums over rows in shared memory of products of two of their columns. A thread has squares of them, kSide x kSide
// products each, and takes some of the rows.
constexpr int kSide = 3, kSquare = kSide * kSide;
EFFK_HD constexpr int squares_of(int n) { return (n + kSide - 1) / kSide; }  // that n columns make

EFFK_DEVICE void add_products(const double* left, const double* right, double (&sums)[kSquare]) {
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int j = 0; j < kSide; ++j) sums[i * kSide + j] += left[i] * right[j];
}

// Adds up what threads have of kCount squares, each of them every kParts-th row, and leaves that.
template <int kCount, class Args>
EFFK_DEVICE void leave_squares(const Args& a, int64_t unit, int64_t split, const double (&sums)[kSquare],
                               double* shared) {
  constexpr int kParts = kCameraThreads / kCount, kWidth = kCount * kSquare;
  const int thread = threadIdx.x;
  if (thread < kParts * kCount) {
#pragma unroll
    for (int i = 0; i < kSquare; ++i) shared[thread * kSquare + i] = sums[i];
  }
  gpu::sync_block();
  for (int i = thread; i < kWidth; i += kCameraThreads) {
    double v = 0;
#pragma unroll 4
    for (int part = 0; part < kParts; ++part) v += shared[part * kWidth + i];
    leave(a, unit, split, i, v);
  }
}

// --- Hessians, gradients and right-hand sides ---

struct CamerasArgs {
  Given p;
  ByCamera by;
  Shares s;             // a unit is a camera
  const double* steps;  // [points, kStepRow]: V^-1 J_p^T r; or null
  int n;
  double* hessian;   // [cameras, n, n]: J_c^T J_c
  double* gradient;  // [cameras, n]: J_c^T r
  double* rhs;       // [cameras, n]: less J_c^T (r - J_p V^-1 J_p^T r); or null
  double* diagonal;  // [cameras, n], or null

  // Squares of the hessian's lower triangle by rows of squares, behind each of them one of gradient and rhs.
  EFFK_HD static constexpr int count(int n) { return squares_of(n) * (squares_of(n) + 3) / 2; }
  EFFK_HD static constexpr int width_of(int n) { return count(n) * kSquare; }
  EFFK_HD int width() const { return width_of(n); }

  EFFK_HD static void place(int square, int n, int& row, int& column) {
    for (row = 0; square >= row + 2; ++row) square -= row + 2;
    column = square <= row ? square : squares_of(n);
  }
  EFFK_DEVICE void store(int64_t camera, int i, double v) const {
    int row, column;
    place(i / kSquare, n, row, column);
    row = row * kSide + i % kSquare / kSide;
    column = column * kSide + i % kSide;
    if (row >= n) return;
    const int behind = column - squares_of(n) * kSide;
    if (behind < 0) {
      if (column > row) return;
      double* const block = hessian + camera * n * n;
      block[row * n + column] = v;
      if (column == row) {
        if (diagonal) diagonal[camera * n + row] = v;
      } else {
        block[column * n + row] = v;
      }
    } else if (behind == 0) {
      gradient[camera * n + row] = v;
    } else if (behind == 1 && rhs) {
      rhs[camera * n + row] = -v;
    }
  }
};

// In shared memory, of each of an observation's rows: J_c, zeros up to whole squares, r, r - J_p V^-1 J_p^T r, 0.
template <class M, bool kDepth>
constexpr int kCameraPitch = (squares_of(num_parameters(M::kModel)) * kSide + 3) | 1;
template <class M, bool kDepth>
constexpr int kCamerasBytes = kCameraThreads * Linear<M, kDepth, double>::kRows * kCameraPitch<M, kDepth> * 8;

template <class M, bool kDepth>
EFFK_KERNEL(kCameraThreads, 2)
cameras_kernel(EFFK_GRID_CONSTANT(CamerasArgs) a) {
  using L = Linear<M, kDepth, double>;
  constexpr int kRows = L::kRows, n = L::kParameters, kColumns = squares_of(n) * kSide,
                kPitch = kCameraPitch<M, kDepth>;
  constexpr int kCount = CamerasArgs::count(n), kParts = kCameraThreads / kCount;
  EFFK_SHARED(double[kCameraRow], own_camera);
  double* const rows = reinterpret_cast<double*>(gpu::shared_memory());
  const Problem& p = a.p.a;
  const int thread = threadIdx.x, part = thread / kCount;
  const int64_t camera = blockIdx.x / a.s.splits, split = blockIdx.x % a.s.splits;
  int64_t begin = a.by.begin[camera], end = a.by.begin[camera + 1];
  cut(a.s.splits, split, begin, end);
  if (thread < kCameraRow) own_camera[thread] = p.camera_rows[camera * kCameraRow + thread];
  gpu::sync_block();
  int row, column;
  CamerasArgs::place(thread % kCount, n, row, column);
  const double *left = rows + row * kSide, *right = rows + column * kSide;
  double sums[kSquare] = {};
  for (int64_t tile = begin; tile < end; tile += kCameraThreads) {
    const int count = static_cast<int>(min_of(kCameraThreads, end - tile));
    if (thread < count) {
      double* own = rows + thread * kRows * kPitch;
      const int64_t point = a.by.point[tile + thread];
      if (is_in(point, p.points)) {
        L l;
        double at[3], step[kStepRow] = {};
        load_numbers(p.point, p.is_double, point * 3, at);
        linearize_at(p, own_camera, at, a.by.order[tile + thread], l);
        weigh(p.loss, p.loss_scale, l);
        if (a.steps) load_row<kStepRow>(a.steps + point * kStepRow, step);
#pragma unroll
        for (int r = 0; r < kRows; ++r, own += kPitch) {
          double rest = l.residual[r];
#pragma unroll
          for (int i = 0; i < 3; ++i) rest -= l.by_point[r][i] * step[i];
#pragma unroll
          for (int i = 0; i < kColumns; ++i) own[i] = i < n ? l.by_camera[r][i < n ? i : 0] : 0;
          own[kColumns] = l.residual[r], own[kColumns + 1] = rest, own[kColumns + 2] = 0;
        }
      } else {
        for (int i = 0; i < kRows * kPitch; ++i) own[i] = 0;
      }
    }
    gpu::sync_block();
    if (part < kParts) {
#pragma unroll 2
      for (int k = part; k < count * kRows; k += kParts) add_products(left + k * kPitch, right + k * kPitch, sums);
    }
    gpu::sync_block();
  }
  leave_squares<kCount>(a, camera, split, sums, rows);
}

// --- The product with the reduced matrix ---

struct ProductArgs {
  Given p;
  ByCamera by;
  Shares s;                 // a unit is a camera
  const double* step_rows;  // [cameras, even(n)]: x
  const double* steps;      // [points, kStepRow]: V^-1 J_p^T J_c x
  int n;
  double* y;  // [cameras, n]: J_c^T (J_c x - J_p steps)

  EFFK_HD int width() const { return n; }
  EFFK_DEVICE void store(int64_t camera, int i, double v) const { y[camera * n + i] = v; }
};

template <class M, bool kDepth>
EFFK_KERNEL(kCameraThreads, 2)
product_kernel(EFFK_GRID_CONSTANT(ProductArgs) a) {
  using L = Linear<M, kDepth, double>;
  constexpr int n = L::kParameters, kPitch = n | 1, kParts = kCameraThreads / n;
  EFFK_SHARED(double[kCameraRow], own_camera);
  EFFK_SHARED(double[n], x);
  EFFK_SHARED(double[kCameraThreads * kPitch], rows);
  EFFK_SHARED(double[kParts * n], parts);
  const Problem& p = a.p.a;
  const int thread = threadIdx.x;
  const int64_t camera = blockIdx.x / a.s.splits, split = blockIdx.x % a.s.splits;
  int64_t begin = a.by.begin[camera], end = a.by.begin[camera + 1];
  cut(a.s.splits, split, begin, end);
  if (thread < kCameraRow) own_camera[thread] = p.camera_rows[camera * kCameraRow + thread];
  if (thread < n) x[thread] = a.step_rows[camera * even(n) + thread];
  gpu::sync_block();
  double sums[n] = {};
  for (int64_t i = begin + thread; i < end; i += kCameraThreads) {
    const int64_t point = a.by.point[i];
    if (!is_in(point, p.points)) continue;
    L l;
    double at[3], step[kStepRow];
    load_numbers(p.point, p.is_double, point * 3, at);
    load_row<kStepRow>(a.steps + point * kStepRow, step);
    linearize_at(p, own_camera, at, a.by.order[i], l);
    weigh(p.loss, p.loss_scale, l);
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      double rest = 0;
#pragma unroll
      for (int k = 0; k < n; ++k) rest += l.by_camera[r][k] * x[k];
#pragma unroll
      for (int k = 0; k < 3; ++k) rest -= l.by_point[r][k] * step[k];
#pragma unroll
      for (int k = 0; k < n; ++k) sums[k] += l.by_camera[r][k] * rest;
    }
  }
#pragma unroll
  for (int k = 0; k < n; ++k) rows[thread * kPitch + k] = sums[k];
  gpu::sync_block();
  const int column = thread % n, part = thread / n;
  if (part < kParts) {
    double v = 0;
#pragma unroll 4
    for (int i = part; i < kCameraThreads; i += kParts) v += rows[i * kPitch + column];
    parts[thread] = v;
  }
  gpu::sync_block();
  if (thread < n) {
    double v = 0;
    for (int i = 0; i < kParts; ++i) v += parts[i * n + thread];
    leave(a, camera, split, thread, v);
  }
}

// --- Host side ---

// So that there are some blocks for each multiprocessor, but none has less than it takes in two steps. items:
// observations of a unit.
inline int64_t splits_of(int64_t units, int64_t items, int num_sms) {
  if (units == 0) return 1;
  return max_of(1, min_of(ceil_div(4 * num_sms, units), items / (2 * kCameraThreads)));
}
inline int64_t partial_size(const Shares& s, int64_t width) { return s.splits > 1 ? s.units * s.splits * width : 0; }

template <class Args>
gpu::Error launch_join(const Args& a, gpu::Stream stream) {
  if (a.s.splits == 1) return nullptr;
  return launch_each(join_kernel<Args>, a.s.units * a.width(), kMostBlocks, stream, a);
}

inline gpu::Error launch_cameras(const CamerasArgs& a, gpu::Stream stream) {
  if (a.s.units == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(a.s.units * a.s.splits));
  if (gpu::Error e = by_model(a.p.a, [&]<class M, bool kDepth>() {
        return gpu::launch(cameras_kernel<M, kDepth>, grid, kCameraThreads, kCamerasBytes<M, kDepth>, stream, a);
      }))
    return e;
  return launch_join(a, stream);
}

inline gpu::Error launch_product(const ProductArgs& a, gpu::Stream stream) {
  if (a.s.units == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(a.s.units * a.s.splits));
  if (gpu::Error e = by_model(a.p.a, [&]<class M, bool kDepth>() {
        return gpu::launch(product_kernel<M, kDepth>, grid, kCameraThreads, 0, stream, a);
      }))
    return e;
  return launch_join(a, stream);
}

}  // namespace effk::ba
