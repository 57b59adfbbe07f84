// Passes over points, on CUDA. A block has as many points as threads. It goes through their observations, which follow
// each other: a thread linearizes one, which is most of the work, and then each adds up what its own point has of them.
#pragma once

#include "residual.cuh"

namespace effk::ba {

constexpr int kPointThreads = 128;
constexpr int kFactor = 6;  // numbers of a triangle

struct PointsArgs {
  Given p;
  const int32_t* begin;     // [points + 1]
  const double* step_rows;  // [cameras, even(n)], or null: x. Below, u is the residual, J_c x, or their sum
  bool with_residual;
  double* gradient;  // [points, 3]: J_p^T u; or null
  double* hessian;   // [points, 9]: J_p^T J_p; or null
  // Of damped points, V = J_p^T J_p + ..; zero for those that are fixed or that nobody sees. Or null.
  double* factors;     // [points, kFactor]: the inverse of V's lower Cholesky factor, by rows
  double* steps;       // [points, kStepRow]: V^-1 J_p^T u
  double* point_step;  // [points, 3]: less that
  // A block each, or null.
  double* costs;
  double* mosts;  // the largest |J_p^T u| of points that aren't fixed
};

EFFK_DEVICE void factor_of(const double (&v)[kFactor], double radius, double (&f)[kFactor]) {
  const auto damped = [&](double d) { return d + (d < kMinDiagonal ? kMinDiagonal : d) / radius; };
  f[0] = 1 / root(damped(v[0]));
  const double l10 = v[1] * f[0], l20 = v[3] * f[0];
  f[2] = 1 / root(damped(v[2]) - l10 * l10);
  const double l21 = (v[4] - l20 * l10) * f[2];
  f[5] = 1 / root(damped(v[5]) - l20 * l20 - l21 * l21);
  f[1] = -l10 * f[0] * f[2];
  f[4] = -l21 * f[2] * f[5];
  f[3] = -(l20 * f[0] + l21 * f[1]) * f[5];
}

// Of a lower triangle by rows.
EFFK_DEVICE void times_factor(const double* f, const double (&x)[3], double (&y)[3]) {
  y[0] = f[0] * x[0];
  y[1] = f[1] * x[0] + f[2] * x[1];
  y[2] = f[3] * x[0] + f[4] * x[1] + f[5] * x[2];
}
EFFK_DEVICE void times_transposed_factor(const double* f, const double (&x)[3], double (&y)[3]) {
  y[0] = f[0] * x[0] + f[1] * x[1] + f[3] * x[2];
  y[1] = f[2] * x[1] + f[4] * x[2];
  y[2] = f[5] * x[2];
}

// v: V by rows of its lower triangle, g: J_p^T u.
EFFK_DEVICE void finish_point(const PointsArgs& a, int64_t point, bool is_seen, const double (&v)[kFactor],
                              const double (&g)[3], double& most) {
  const Problem& p = a.p.a;
  if (a.gradient) {
#pragma unroll
    for (int i = 0; i < 3; ++i) a.gradient[point * 3 + i] = g[i];
  }
  if (a.hessian) {
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j)
        a.hessian[point * 9 + i * 3 + j] = a.hessian[point * 9 + j * 3 + i] = v[i * (i + 1) / 2 + j];
  }
  const bool is_fixed = p.fixed && p.fixed[point];
  if (!is_fixed) {
#pragma unroll
    for (int i = 0; i < 3; ++i) most = most_of(most, g[i] < 0 ? -g[i] : g[i]);
  }
  if (!a.steps) return;
  double f[kFactor] = {}, step[3] = {};
  if (is_seen && !is_fixed) {
    double half[3];
    factor_of(v, p.radius, f);
    times_factor(f, g, half);
    times_transposed_factor(f, half, step);
  }
  if (a.factors) {
#pragma unroll
    for (int i = 0; i < kFactor; ++i) a.factors[point * kFactor + i] = f[i];
  }
#pragma unroll
  for (int i = 0; i < kStepRow; ++i) a.steps[point * kStepRow + i] = i < 3 ? step[i] : 0;
  if (a.point_step) {
#pragma unroll
    for (int i = 0; i < 3; ++i) a.point_step[point * 3 + i] = -step[i];
  }
}

template <class M, bool kDepth, bool kStep>
EFFK_KERNEL(kPointThreads, 3)
points_kernel(EFFK_GRID_CONSTANT(PointsArgs) a) {
  using L = Linear<M, kDepth, double>;
  constexpr int kRows = L::kRows, n = L::kParameters, kPitch = 4 * kRows + 1;
  EFFK_SHARED(double[kPointThreads * kPitch], rows);  // of an observation's J_p and u
  const Problem& p = a.p.a;
  double* const own = rows + threadIdx.x * kPitch;
  double cost = 0, most = 0;
  for (int64_t first = int64_t{blockIdx.x} * kPointThreads; first < p.points;
       first += int64_t{gridDim.x} * kPointThreads) {
    const int64_t point = first + threadIdx.x, from = a.begin[first];
    const int64_t to = a.begin[min_of(first + kPointThreads, p.points)];
    const int64_t begin = point < p.points ? a.begin[point] : 0, end = point < p.points ? a.begin[point + 1] : 0;
    double v[kFactor] = {}, g[3] = {};
    for (int64_t tile = from; tile < to; tile += kPointThreads) {
      const int64_t o = tile + threadIdx.x;
      L l;
      int64_t camera, of;
      if (o < to && linearize_one(a.p, o, l, camera, of)) {
        cost += weigh(p.loss, p.loss_scale, l);
        double x[even(n)];
        if constexpr (kStep) load_row<n>(a.step_rows + camera * even(n), x);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          double u = l.residual[r];
          if constexpr (kStep) {
            if (!a.with_residual) u = 0;
#pragma unroll
            for (int i = 0; i < n; ++i) u += l.by_camera[r][i] * x[i];
          }
#pragma unroll
          for (int i = 0; i < 3; ++i) own[4 * r + i] = l.by_point[r][i];
          own[4 * r + 3] = u;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4 * kRows; ++i) own[i] = 0;
      }
      gpu::sync_block();
      // Of indices that don't ascend, runs of points are anywhere.
      const int64_t last = min_of(end, tile + kPointThreads);
      for (int64_t i = max_of(begin, tile); i < last; ++i) {
        const double* row = rows + (i - tile) * kPitch;
#pragma unroll
        for (int r = 0; r < kRows; ++r, row += 4) {
          v[0] += row[0] * row[0];
          v[1] += row[1] * row[0], v[2] += row[1] * row[1];
          v[3] += row[2] * row[0], v[4] += row[2] * row[1], v[5] += row[2] * row[2];
          g[0] += row[0] * row[3], g[1] += row[1] * row[3], g[2] += row[2] * row[3];
        }
      }
      gpu::sync_block();
    }
    if (point < p.points) finish_point(a, point, begin < end, v, g, most);
  }
  // rows are free.
  double (&shared)[kPointThreads] = *reinterpret_cast<double (*)[kPointThreads]>(&rows);
  if (a.costs) {
    cost = join_block(cost, shared, sum_of);
    if (threadIdx.x == 0) a.costs[blockIdx.x] = cost;
  }
  if (a.mosts) {
    most = join_block(most, shared, most_of);
    if (threadIdx.x == 0) a.mosts[blockIdx.x] = most;
  }
}

// --- Host side ---

inline int64_t point_parts(const Problem& p, int64_t most_blocks) {
  return blocks_of(p.points, kPointThreads, most_blocks);
}

// a.costs and a.mosts have point_parts() numbers.
inline gpu::Error launch_points(const PointsArgs& a, int64_t most_blocks, gpu::Stream stream) {
  const dim3 grid(static_cast<unsigned>(point_parts(a.p.a, most_blocks)));
  return by_model(a.p.a, [&]<class M, bool kDepth>() {
    return gpu::launch(a.step_rows ? points_kernel<M, kDepth, true> : points_kernel<M, kDepth, false>, grid,
                       kPointThreads, 0, stream, a);
  });
}

}  // namespace effk::ba
