// Blocks of the reduced matrix, on CUDA. A block of threads has one of a pair of cameras (a, b), or a part of it, so
// that nobody else adds to it: it looks for the points that both see, whose observations ascend by point in either
// camera.
//
// With L the Cholesky factor of a point's V, and E = L^-1 J_p^T J_c summed over the observations of the point by a
// camera, the block of (a, b) is -sum of E_a^T E_b over points, and J_c^T J_c more where a is b.
#pragma once

#include "cameras.cuh"

namespace effk::ba {

constexpr int kPairThreads = kCameraThreads;

struct PairsArgs {
  Given p;
  ByCamera by;
  Shares s;  // a unit is a pair
  bool is_diagonal;
  Indices pairs;          // [units, 2], unless all the pairs of a camera with itself are wanted
  const double* factors;  // [points, kFactor]
  const double* hessian;  // [cameras, n, n]; may be `blocks` where only the diagonal is wanted
  int n;
  double* blocks;  // [units, n, n]

  EFFK_DEVICE void cameras_of(int64_t unit, int64_t& a, int64_t& b) const {
    a = is_diagonal ? unit : index_at(pairs, 2 * unit);
    b = is_diagonal ? unit : index_at(pairs, 2 * unit + 1);
  }
  EFFK_HD static constexpr int count(int n) { return squares_of(n) * squares_of(n); }
  EFFK_HD static constexpr int width_of(int n) { return count(n) * kSquare; }
  EFFK_HD int width() const { return width_of(n); }
  EFFK_DEVICE void store(int64_t unit, int i, double v) const {
    const int square = i / kSquare, side = squares_of(n);
    const int row = square / side * kSide + i % kSquare / kSide, column = square % side * kSide + i % kSide;
    if (row >= n || column >= n) return;
    int64_t a, b;
    cameras_of(unit, a, b);
    const int64_t at = row * n + column;
    blocks[unit * n * n + at] = (a == b && is_in(a, p.a.cameras) ? hessian[a * n * n + at] : 0) - v;
  }
};

// In shared memory, of each E: three rows, of whole squares.
template <class M>
constexpr int kPairPitch = (3 * squares_of(num_parameters(M::kModel)) * kSide) | 1;
template <class M>
constexpr int kPairsBytes = kPairThreads * kPairPitch<M> * 8;

template <class M, bool kDepth>
EFFK_KERNEL(kPairThreads, 3)
pairs_kernel(EFFK_GRID_CONSTANT(PairsArgs) a) {
  using L = Linear<M, kDepth, double>;
  constexpr int kRows = L::kRows, n = L::kParameters, kColumns = squares_of(n) * kSide, kPitch = kPairPitch<M>;
  constexpr int kCount = PairsArgs::count(n), kParts = kPairThreads / kCount, kWarps = kPairThreads / gpu::kWarp;
  EFFK_SHARED(double[2][kCameraRow], own_cameras);
  EFFK_SHARED(int32_t[2][2 * kPairThreads], found);  // where, in the lists of both, shared points begin
  EFFK_SHARED(uint32_t[kWarps], counts);
  double* const all = reinterpret_cast<double*>(gpu::shared_memory());
  const Problem& p = a.p.a;
  const int thread = threadIdx.x, part = thread / kCount;
  const int64_t unit = blockIdx.x / a.s.splits, split = blockIdx.x % a.s.splits;
  int64_t camera[2], begin[2] = {}, end[2] = {};
  a.cameras_of(unit, camera[0], camera[1]);
  if (is_in(camera[0], p.cameras) && is_in(camera[1], p.cameras)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      begin[i] = a.by.begin[camera[i]], end[i] = a.by.begin[camera[i] + 1];
      if (thread < kCameraRow) own_cameras[i][thread] = p.camera_rows[camera[i] * kCameraRow + thread];
    }
  }
  // Of one camera, threads have a point each; of two, one of its Es each.
  const bool is_one = camera[0] == camera[1];
  const int most = is_one ? kPairThreads : kPairThreads / 2, side = thread / most, place = thread % most;
  int64_t from = begin[0], to = end[0];
  cut(a.s.splits, split, from, to);

  const int square = thread % kCount;
  const double* const left = all + square / squares_of(n) * kSide;
  const double* const right = all + square % squares_of(n) * kSide + (is_one ? 0 : most * kPitch);
  double sums[kSquare] = {};
  while (from < to) {
    int count = 0;
    do {
      const int64_t i = from + thread;
      int64_t other = i;
      bool is_found = false;
      if (i < to) {
        const int32_t point = a.by.point[i];
        const bool is_eliminated = is_in(point, p.points) && !(p.fixed && p.fixed[point]);
        if (is_eliminated && (i == begin[0] || a.by.point[i - 1] != point)) {
          if (!is_one) other = lower_bound(begin[1], end[1], point, [&](int64_t j) { return a.by.point[j]; });
          is_found = is_one || (other < end[1] && a.by.point[other] == point);
        }
      }
      // In order of points.
      const uint32_t votes = gpu::vote(is_found);
      if (thread % gpu::kWarp == 0) counts[thread / gpu::kWarp] = gpu::popcount(votes);
      gpu::sync_block();
      int at = count + static_cast<int>(gpu::popcount(votes & ((1u << thread % gpu::kWarp) - 1)));
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < thread / gpu::kWarp) at += static_cast<int>(counts[w]);
        count += static_cast<int>(counts[w]);
      }
      if (is_found) found[0][at] = static_cast<int32_t>(i), found[1][at] = static_cast<int32_t>(other);
      gpu::sync_block();
      from += kPairThreads;
    } while (count < most && from < to);

    for (int base = 0; base < count; base += most) {
      const int here = count - base < most ? count - base : most;
      if (place < here) {
        double* const own = all + thread * kPitch;
        int64_t i = found[side][base + place];
        const int32_t point = a.by.point[i];
        double at[3];
        load_numbers(p.point, p.is_double, int64_t{point} * 3, at);
        const int64_t last = side == 0 ? end[0] : end[1];
        bool is_first = true;
        do {
          L l;
          linearize_at(p, own_cameras[side], at, a.by.order[i], l);
          weigh(p.loss, p.loss_scale, l);
          double factor[kFactor], q[kRows][3];
          load_row<kFactor>(a.factors + int64_t{point} * kFactor, factor);
#pragma unroll
          for (int r = 0; r < kRows; ++r) times_factor(factor, l.by_point[r], q[r]);
          const auto e = [&](int k, int c) {
            double v = 0;
#pragma unroll
            for (int r = 0; r < kRows && c < n; ++r) v += q[r][k] * l.by_camera[r][c < n ? c : 0];
            return v;
          };
          if (is_first) {
#pragma unroll
            for (int i = 0; i < 3 * kColumns; ++i) own[i] = e(i / kColumns, i % kColumns);
          } else {
            // Rarely. volatile, since loads ahead of their use would take registers that are not there.
            volatile double* const sum = own;
#pragma unroll
            for (int i = 0; i < 3 * kColumns; ++i) sum[i] = sum[i] + e(i / kColumns, i % kColumns);
          }
          is_first = false;
        } while (++i < last && a.by.point[i] == point);
      }
      gpu::sync_block();
      if (part < kParts) {
        for (int k = part; k < here; k += kParts)
#pragma unroll
          for (int r = 0; r < 3; ++r)
            add_products(left + k * kPitch + r * kColumns, right + k * kPitch + r * kColumns, sums);
      }
      gpu::sync_block();
    }
  }
  leave_squares<kCount>(a, unit, split, sums, all);
}

// --- Host side ---

inline gpu::Error launch_pairs(const PairsArgs& a, gpu::Stream stream) {
  if (a.s.units == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(a.s.units * a.s.splits));
  if (gpu::Error e = by_model(a.p.a, [&]<class M, bool kDepth>() {
        return gpu::launch(pairs_kernel<M, kDepth>, grid, kPairThreads, kPairsBytes<M>, stream, a);
      }))
    return e;
  return launch_join(a, stream);
}

}  // namespace effk::ba
