// The ops of ba that linearize observations, on CUDA: what memory a call needs, and which kernels it launches.
// Jacobians are never stored: passes over points and cameras compute them anew.
#pragma once

#include "pairs.cuh"

namespace effk::ba {

enum class Op { residual, cost, build, schur, schur_mv, backsubstitute };

struct Call {
  Op op;
  Given p;  // without camera_rows
  bool quaternion;
  const void* cameras;  // [cameras, ..], storage type
  const double* step;   // [cameras, n], of ops that take one
  int num_sms;
  int64_t most_blocks;  // that stride over what there is: kMostBlocks
  // Observations sorted by what launch_keys() writes: these keys, and where they were. Of ops for which by_camera().
  const int32_t* keys;
  const int64_t* order;
  // Of schur.
  bool is_diagonal;  // of blocks; otherwise
  Indices pairs;     // [num_pairs, 2]
  int64_t num_pairs;

  // Scratch.
  double *camera_rows, *step_rows, *factors, *steps, *costs, *mosts, *hessian;
  int32_t* point_begin;
  ByCamera by;
  Shares of_cameras, of_pairs;

  bool by_camera() const { return op == Op::build || op == Op::schur || op == Op::schur_mv; }
  bool by_point() const { return by_camera() || op == Op::backsubstitute; }
  int n() const { return num_parameters(p.a.model); }
};

// Places scratch in one block of memory, aligned to 16 bytes; its size comes back.
inline int64_t place(Call& c, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const Problem& p = c.p.a;
  const int64_t n = c.n(), eliminated = c.by_point() && c.op != Op::build ? p.points : 0;
  scratch.take(c.camera_rows, p.cameras * kCameraRow);
  scratch.take(c.step_rows, c.step ? p.cameras * even(n) : 0);
  scratch.take(c.point_begin, c.by_point() ? p.points + 1 : 0);
  scratch.take(c.costs, max_of(cost_parts(p, c.most_blocks), point_parts(p, c.most_blocks)));
  scratch.take(c.mosts, point_parts(p, c.most_blocks));
  scratch.take(c.steps, eliminated * kStepRow);
  scratch.take(c.factors, c.op == Op::schur ? eliminated * kFactor : 0);
  scratch.take(c.hessian, c.op == Op::schur && !c.is_diagonal ? p.cameras * n * n : 0);
  scratch.take(c.by.begin, c.by_camera() ? p.cameras + 1 : 0);
  scratch.take(c.by.order, c.by_camera() ? p.observations : 0);
  scratch.take(c.by.point, c.by_camera() ? p.observations : 0);

  const int64_t pairs = c.is_diagonal ? p.cameras : c.num_pairs, seen = ceil_div(p.observations, max_of(1, p.cameras));
  c.of_cameras = {p.cameras, splits_of(p.cameras, seen, c.num_sms), nullptr};
  c.of_pairs = {pairs, splits_of(pairs, seen, c.num_sms), nullptr};
  int64_t partial = 0;
  if (c.by_camera()) partial = partial_size(c.of_cameras, c.op == Op::schur_mv ? n : CamerasArgs::width_of(c.n()));
  if (c.op == Op::schur) partial = max_of(partial, partial_size(c.of_pairs, PairsArgs::width_of(c.n())));
  scratch.take(c.of_cameras.partial, partial);
  c.of_pairs.partial = c.of_cameras.partial;  // one after the other
  return scratch.at - static_cast<char*>(memory);
}

// What observations are to be sorted by, in a stable way, before calls that need it: [observations].
inline gpu::Error launch_keys(const Call& c, int32_t* keys, gpu::Stream stream) {
  const Problem& p = c.p.a;
  return launch_each(keys_kernel, p.observations, c.most_blocks, stream, {c.p.camera, p.observations, p.cameras, keys});
}

// The first kernels of any call; c has been placed. c.p.a.camera_rows is set.
inline gpu::Error launch_start(Call& c, gpu::Stream stream) {
  Problem& p = c.p.a;
  p.camera_rows = c.camera_rows;
  const PrepareArgs cameras{p.model,   c.quaternion,  p.is_double, p.cameras,
                            c.cameras, c.camera_rows, c.step,      c.step_rows};
  if (gpu::Error e = launch_each(prepare_kernel, p.cameras, c.most_blocks, stream, cameras)) return e;
  if (c.by_point()) {
    const BeginsArgs points{c.p.point, p.observations, p.points, c.point_begin};
    if (gpu::Error e = launch_each(begins_kernel, p.points + 1, c.most_blocks, stream, points)) return e;
  }
  if (!c.by_camera()) return nullptr;
  const BeginsArgs begins{{c.keys, false}, p.observations, p.cameras, c.by.begin};
  if (gpu::Error e = launch_each(begins_kernel, p.cameras + 1, c.most_blocks, stream, begins)) return e;
  return launch_each(arrange_kernel, p.observations, c.most_blocks, stream,
                     {c.order, c.p.point, p.observations, p.points, c.by});
}

// What the ops below return, as the contract of each says.
struct Built {
  double *cost, *camera_gradient, *camera_hessian, *point_gradient, *point_hessian;
};
struct Reduced {
  double *blocks, *rhs, *gradient, *diagonal, *point_gradient, *cost;
};
struct Substituted {
  double *point_step, *model_change;
};

inline gpu::Error launch_residual(Call c, void* residual, uint8_t* valid, void* jac_camera, void* jac_point,
                                  gpu::Stream stream) {
  if (gpu::Error e = launch_start(c, stream)) return e;
  return launch_residual({c.p, residual, valid, jac_camera, jac_point}, c.most_blocks, stream);
}

inline gpu::Error launch_cost(Call c, double* cost, gpu::Stream stream) {
  if (gpu::Error e = launch_start(c, stream)) return e;
  return launch_cost<false>({c.p, c.costs, nullptr, nullptr}, c.most_blocks, cost, stream);
}

inline gpu::Error launch_build(Call c, const Built& to, gpu::Stream stream) {
  if (gpu::Error e = launch_start(c, stream)) return e;
  PointsArgs points{};
  points.p = c.p;
  points.begin = c.point_begin;
  points.gradient = to.point_gradient;
  points.hessian = to.point_hessian;
  points.costs = c.costs;
  if (gpu::Error e = launch_points(points, c.most_blocks, stream)) return e;
  if (gpu::Error e = launch_total({c.costs, point_parts(c.p.a, c.most_blocks), true, to.cost}, stream)) return e;
  return launch_cameras(
      {c.p, c.by, c.of_cameras, nullptr, c.n(), to.camera_hessian, to.camera_gradient, nullptr, nullptr}, stream);
}

inline gpu::Error launch_schur(Call c, const Reduced& to, gpu::Stream stream) {
  if (gpu::Error e = launch_start(c, stream)) return e;
  const int64_t parts = point_parts(c.p.a, c.most_blocks);
  PointsArgs points{};
  points.p = c.p;
  points.begin = c.point_begin;
  points.factors = c.factors;
  points.steps = c.steps;
  points.costs = c.costs;
  points.mosts = c.mosts;
  if (gpu::Error e = launch_points(points, c.most_blocks, stream)) return e;
  if (gpu::Error e = launch_total({c.costs, parts, true, to.cost}, stream)) return e;
  if (gpu::Error e = launch_total({c.mosts, parts, false, to.point_gradient}, stream)) return e;
  double* const hessian = c.is_diagonal ? to.blocks : c.hessian;
  if (gpu::Error e =
          launch_cameras({c.p, c.by, c.of_cameras, c.steps, c.n(), hessian, to.gradient, to.rhs, to.diagonal}, stream))
    return e;
  return launch_pairs({c.p, c.by, c.of_pairs, c.is_diagonal, c.pairs, c.factors, hessian, c.n(), to.blocks}, stream);
}

inline gpu::Error launch_schur_mv(Call c, double* y, gpu::Stream stream) {
  if (gpu::Error e = launch_start(c, stream)) return e;
  PointsArgs points{};
  points.p = c.p;
  points.begin = c.point_begin;
  points.step_rows = c.step_rows;
  points.steps = c.steps;
  if (gpu::Error e = launch_points(points, c.most_blocks, stream)) return e;
  return launch_product({c.p, c.by, c.of_cameras, c.step_rows, c.steps, c.n(), y}, stream);
}

inline gpu::Error launch_backsubstitute(Call c, const Substituted& to, gpu::Stream stream) {
  if (gpu::Error e = launch_start(c, stream)) return e;
  PointsArgs points{};
  points.p = c.p;
  points.begin = c.point_begin;
  points.step_rows = c.step_rows;
  points.with_residual = true;
  points.steps = c.steps;
  points.point_step = to.point_step;
  if (gpu::Error e = launch_points(points, c.most_blocks, stream)) return e;
  return launch_cost<true>({c.p, c.costs, c.step_rows, c.steps}, c.most_blocks, to.model_change, stream);
}

}  // namespace effk::ba
