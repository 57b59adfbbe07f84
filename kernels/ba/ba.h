// ba's arguments as kernels see them, on every device, and its CPU levels: what csrc/ calls. No torch here.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effk::ba {

enum class Model : int { snavely, simple_pinhole, pinhole, simple_radial, radial, opencv, position };
enum class Loss : int { trivial, huber, cauchy, soft_l1, tukey };

constexpr double kMinScale = 1e-5;     // of a direction, in model `position`
constexpr double kMinDiagonal = 1e-6;  // what damping takes for a smaller diagonal entry, as Ceres does

constexpr int kMostIntrinsics = 8;
constexpr int kMostParameters = 6 + kMostIntrinsics;  // of a camera's tangent

// A camera as kernels read it: rotation matrix by rows (9), translation (3), intrinsics, and zeros; of model
// `position` the centre (3).
constexpr int kCameraRow = 24;

EFFK_HD constexpr int num_intrinsics(Model m) {
  switch (m) {  // and no table, which a GPU would keep in local memory
    case Model::snavely:
    case Model::simple_pinhole: return 3;
    case Model::pinhole:
    case Model::simple_radial: return 4;
    case Model::radial: return 5;
    case Model::opencv: return 8;
    default: return 0;
  }
}
// Of a camera's tangent: rotation, translation, intrinsics; or its centre.
EFFK_HD constexpr int num_parameters(Model m) { return m == Model::position ? 3 : 6 + num_intrinsics(m); }
// Columns of cameras.
EFFK_HD constexpr int num_numbers(Model m, bool quaternion) {
  return (m == Model::position ? 0 : quaternion ? 4 : 3) + 3 + num_intrinsics(m);
}
// Columns of observations.
EFFK_HD constexpr int num_columns(Model m) { return m == Model::position ? 3 : 2; }

// Observations of points by cameras. The storage type is double or float; computation is in double.
struct Problem {
  Model model;
  Loss loss;
  double loss_scale;
  bool is_double;
  int64_t cameras, points, observations;
  const double* camera_rows;  // [cameras, kCameraRow]
  const void* point;          // [points, 3], storage type
  const void* observed;       // [observations, num_columns], storage type
  const int32_t* camera;      // [observations], in range
  const int32_t* of_point;    // [observations], in range
  const void* depth;          // [observations], storage type, or null: no row for it
  double depth_weight;
  const uint8_t* fixed;  // [points], or null: none
  double radius;         // of the trust region: damping is its inverse

  int rows() const { return depth || model == Model::position ? 3 : 2; }
};

// What passes over ascending points add up of cameras, a part of the work each.
struct CameraSums {
  double* gradient;         // [cameras, pitch]: J^T r
  double* rhs;              // [cameras, pitch]: of the reduced system
  double* diagonal;         // [cameras, pitch]: of J^T J
  double* blocks;           // [number of blocks, block_size]
  const int32_t* block_of;  // [cameras, cameras], row >= column: number of the block, or -1; null: only the diagonal
  double cost;
  double most;  // the largest |entry| of a point's gradient; NaN if there is one
};

// One table a CPU level; csrc/ shares ranges of observations out among threads, for passes over ascending points at
// ends of points.
struct Cpu {
  // Whether indices are below limit, as unsigned numbers; and whether none is less than the one before it.
  bool (*in_range)(const uint32_t* index, int64_t count, uint32_t limit);
  bool (*ascending)(const int32_t* index, int64_t count);
  void (*prepare)(Model, bool quaternion, bool is_double, const void* cameras, int64_t count, double* rows);
  // Storage type; jac_camera and jac_point may be null.
  void (*residual)(const Problem&, int64_t o0, int64_t o1, void* residual, bool* valid, void* jac_camera,
                   void* jac_point);
  double (*cost)(const Problem&, int64_t o0, int64_t o1);
  // Without rhs and diagonal; blocks are camera by camera. [points, 3] and [points, 3, 3] are zero where no observation
  // is.
  void (*build)(const Problem&, int64_t o0, int64_t o1, CameraSums&, double* point_gradient, double* point_hessian);
  void (*schur)(const Problem&, int64_t o0, int64_t o1, CameraSums&);
  // y += S x, both [cameras, pitch].
  void (*schur_mv)(const Problem&, int64_t o0, int64_t o1, const double* x, double* y);
  // step: [cameras, pitch]; point_step [points, 3] is zero where no observation is. Returns the model's change.
  double (*backsubstitute)(const Problem&, int64_t o0, int64_t o1, const double* step, double* point_step);
  // Steps are in the tangent; out may be cameras itself.
  void (*retract)(Model, bool quaternion, bool is_double, const void* cameras, const double* steps, int64_t count,
                  void* out);
  // Of a block as the passes add it up, in doubles; and `count` of them added to blocks [n, n].
  int64_t (*block_size)(Model);
  void (*add_blocks)(Model, const double* from, int64_t count, double* to);
  int pitch;  // of rows of doubles, a multiple of: rows of n entries get as many as the next multiple has

  int64_t pitch_of(Model m) const { return (num_parameters(m) + pitch - 1) / pitch * pitch; }
};

extern const Cpu cpu_scalar, cpu_avx2, cpu_avx512;

}  // namespace effk::ba
