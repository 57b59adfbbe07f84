// What needs no order of observations, on CUDA: residuals, Jacobians and costs. A thread an observation.
#pragma once

#include "load.cuh"

namespace effk::ba {

constexpr int kResidualThreads = 64, kCostThreads = 128;

struct ResidualArgs {
  Given p;
  void* residual;  // [observations, rows], storage type
  uint8_t* valid;
  void *jac_camera, *jac_point;  // [observations, rows, n] and [observations, rows, 3], or null
};

// Of `count` threads' rows in shared memory kWidth numbers, to rows that follow each other.
template <int kWidth>
EFFK_DEVICE void store_rows(const double* rows, int pitch, int count, bool is_double, void* to, int64_t first) {
  for (int i = threadIdx.x; i < count * kWidth; i += kResidualThreads)
    store_number(rows[i / kWidth * pitch + i % kWidth], is_double, to, first * kWidth + i);
}

template <class M, bool kDepth, bool kJacobian>
EFFK_KERNEL(kResidualThreads, 4)
residual_kernel(EFFK_GRID_CONSTANT(ResidualArgs) a) {
  using L = Linear<M, kDepth, double>;
  constexpr int kRows = L::kRows, n = L::kParameters, kOwn = kRows * (kJacobian ? n + 4 : 1), kPitch = kOwn | 1;
  EFFK_SHARED(double[kResidualThreads * kPitch], rows);
  const Problem& p = a.p.a;
  double* const own = rows + threadIdx.x * kPitch;
  for (int64_t first = int64_t{blockIdx.x} * kResidualThreads; first < p.observations;
       first += int64_t{gridDim.x} * kResidualThreads) {
    const int count = static_cast<int>(min_of(kResidualThreads, p.observations - first));
    if (static_cast<int>(threadIdx.x) < count) {
      const int64_t o = first + threadIdx.x;
      L l;
      int64_t camera, point;
      if (linearize_one<kJacobian>(a.p, o, l, camera, point)) {
        a.valid[o] = l.depth > 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          own[r] = l.residual[r];
          if constexpr (kJacobian) {
#pragma unroll
            for (int i = 0; i < n; ++i) own[kRows + r * n + i] = l.by_camera[r][i];
#pragma unroll
            for (int i = 0; i < 3; ++i) own[kRows * (1 + n) + r * 3 + i] = l.by_point[r][i];
          }
        }
      } else {
        a.valid[o] = false;
        for (int i = 0; i < kOwn; ++i) own[i] = 0;
      }
    }
    gpu::sync_block();
    store_rows<kRows>(rows, kPitch, count, p.is_double, a.residual, first);
    if constexpr (kJacobian) {
      store_rows<kRows * n>(rows + kRows, kPitch, count, p.is_double, a.jac_camera, first);
      store_rows<kRows * 3>(rows + kRows * (1 + n), kPitch, count, p.is_double, a.jac_point, first);
    }
    gpu::sync_block();
  }
}

struct CostArgs {
  Given p;
  double* parts;            // a block each
  const double* step_rows;  // of what the linear model promises of a step: [cameras, even(n)]
  const double* steps;      // [points, kStepRow], less which points are moved
};

constexpr int kStepRow = 4;  // of a point: 3 numbers and 0

// The sum of costs, or by how much the linear model lowers it.
template <class M, bool kDepth, bool kChange>
EFFK_KERNEL(kCostThreads, 3)
cost_kernel(EFFK_GRID_CONSTANT(CostArgs) a) {
  using L = Linear<M, kDepth, double>;
  constexpr int n = L::kParameters;
  EFFK_SHARED(double[kCostThreads], shared);
  const Problem& p = a.p.a;
  double sum = 0;
  for (int64_t o = int64_t{blockIdx.x} * kCostThreads + threadIdx.x; o < p.observations;
       o += int64_t{gridDim.x} * kCostThreads) {
    L l;
    int64_t camera, point;
    if (!linearize_one<kChange>(a.p, o, l, camera, point)) continue;
    const double cost = weigh<kChange>(p.loss, p.loss_scale, l);
    if constexpr (kChange) {
      double x[even(n)], step[kStepRow], change = 0;
      load_row<n>(a.step_rows + camera * even(n), x);
      load_row<kStepRow>(a.steps + point * kStepRow, step);
#pragma unroll
      for (int r = 0; r < L::kRows; ++r) {
        double after = l.residual[r];
#pragma unroll
        for (int i = 0; i < n; ++i) after += l.by_camera[r][i] * x[i];
#pragma unroll
        for (int i = 0; i < 3; ++i) after -= l.by_point[r][i] * step[i];
        change += (l.residual[r] - after) * (l.residual[r] + after);
      }
      sum += 0.5 * change;
    } else {
      sum += cost;
    }
  }
  sum = join_block(sum, shared, sum_of);
  if (threadIdx.x == 0) a.parts[blockIdx.x] = sum;
}

// --- Host side ---

inline gpu::Error launch_residual(const ResidualArgs& a, int64_t most_blocks, gpu::Stream stream) {
  if (a.p.a.observations == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(blocks_of(a.p.a.observations, kResidualThreads, most_blocks)));
  return by_model(a.p.a, [&]<class M, bool kDepth>() {
    return gpu::launch(a.jac_camera ? residual_kernel<M, kDepth, true> : residual_kernel<M, kDepth, false>, grid,
                       kResidualThreads, 0, stream, a);
  });
}

inline int64_t cost_parts(const Problem& p, int64_t most_blocks) {
  return blocks_of(p.observations, kCostThreads, most_blocks);
}

// To `total`. a.parts has cost_parts() numbers.
template <bool kChange = false>
gpu::Error launch_cost(const CostArgs& a, int64_t most_blocks, double* total, gpu::Stream stream) {
  const int64_t blocks = cost_parts(a.p.a, most_blocks);
  if (gpu::Error e = by_model(a.p.a, [&]<class M, bool kDepth>() {
        return gpu::launch(cost_kernel<M, kDepth, kChange>, dim3(static_cast<unsigned>(blocks)), kCostThreads, 0,
                           stream, a);
      }))
    return e;
  return launch_total({a.parts, blocks, true, total}, stream);
}

}  // namespace effk::ba
