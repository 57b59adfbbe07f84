// ba_retract on CUDA: a thread moves a camera, or a number of a point.
#pragma once

#include "load.cuh"

namespace effk::ba {

struct RetractArgs {
  Model model;
  bool quaternion, is_double;
  int64_t cameras, numbers;          // how many; of points 3 each
  const void *camera, *point;        // storage type
  const double *camera_step, *step;  // [cameras, n] and [numbers]
  void *new_camera, *new_point;
};

EFFK_KERNEL(kEachThreads, 2) retract_kernel(EFFK_GRID_CONSTANT(RetractArgs) a) {
  const int width = num_numbers(a.model, a.quaternion), n = num_parameters(a.model);
  for (int64_t i = int64_t{blockIdx.x} * kEachThreads + threadIdx.x; i < a.cameras + a.numbers;
       i += int64_t{gridDim.x} * kEachThreads) {
    if (i >= a.cameras) {
      const int64_t at = i - a.cameras;
      double v[1];
      load_numbers(a.point, a.is_double, at, v);
      store_number(v[0] + a.step[at], a.is_double, a.new_point, at);
    } else if (a.is_double) {
      retract_camera(a.model, a.quaternion, static_cast<const double*>(a.camera) + i * width, a.camera_step + i * n,
                     static_cast<double*>(a.new_camera) + i * width);
    } else {
      retract_camera(a.model, a.quaternion, static_cast<const float*>(a.camera) + i * width, a.camera_step + i * n,
                     static_cast<float*>(a.new_camera) + i * width);
    }
  }
}

inline gpu::Error launch_retract(const RetractArgs& a, int64_t most_blocks, gpu::Stream stream) {
  return launch_each(retract_kernel, a.cameras + a.numbers, most_blocks, stream, a);
}

}  // namespace effk::ba
