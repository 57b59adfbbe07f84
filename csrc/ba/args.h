// The argument checks of ba, shared by its CPU and CUDA sides.
#pragma once

#include <cmath>

#include "../../kernels/ba/ba.h"
#include "../common/check.h"

namespace effk::ba {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 30;

inline Model model_of(const char* op, const std::string& name) {
  static const std::pair<const char*, Model> names[] = {
      {"snavely", Model::snavely},   {"simple_pinhole", Model::simple_pinhole},
      {"pinhole", Model::pinhole},   {"simple_radial", Model::simple_radial},
      {"radial", Model::radial},     {"opencv", Model::opencv},
      {"position", Model::position},
  };
  return check::choice(op, "model", name, names);
}

inline Loss loss_of(const char* op, const std::string& name) {
  static const std::pair<const char*, Loss> names[] = {{"trivial", Loss::trivial},
                                                       {"huber", Loss::huber},
                                                       {"cauchy", Loss::cauchy},
                                                       {"soft_l1", Loss::soft_l1},
                                                       {"tukey", Loss::tukey}};
  return check::choice(op, "loss", name, names);
}

inline void check_positive(const char* op, const char* arg, double value) {
  EFFK_CHECK(value > 0, op, arg, " is ", value, "; wanted more than 0");
}

// A checked call: contiguous tensors and what kernels see of them, but for indices.
struct ProblemCall {
  Tensor cameras, points, observations, camera_index, point_index;
  OptTensor depth, fixed;
  bool quaternion;
  Problem args{};

  int n() const { return num_parameters(args.model); }
};

// Whether the rotations of a model's cameras are quaternions.
inline bool check_cameras(const char* op, const Tensor& cameras, Model model) {
  check::dtype(op, "cameras", cameras, {ScalarType::Float, ScalarType::Double});
  const int64_t narrow = num_numbers(model, false), wide = num_numbers(model, true);
  EFFK_CHECK(cameras.dim() == 2 && (cameras.size(1) == narrow || cameras.size(1) == wide), op, "cameras has shape ",
             check::str(cameras.sizes()), "; wanted [*, ", narrow,
             narrow == wide ? "]" : "] (angle-axis) or [*, " + std::to_string(wide) + "] (quaternions)");
  EFFK_CHECK(cameras.size(0) <= kMaxSide, op, "cameras has shape ", check::str(cameras.sizes()),
             "; wanted at most 2^30");
  return narrow != wide && cameras.size(1) == wide;
}

// Of a tensor that has the cameras' storage type.
inline void check_like_cameras(const char* op, const char* arg, const Tensor& t, std::initializer_list<int64_t> shape,
                               const Tensor& cameras) {
  check::dtype(op, arg, t, {cameras.scalar_type()});
  check::shape(op, arg, t, shape);
  check::device(op, arg, t, "cameras", cameras);
}

inline ProblemCall check_problem(const char* op, const Tensor& cameras, const Tensor& points,
                                 const Tensor& observations, const Tensor& camera_index, const Tensor& point_index,
                                 const OptTensor& depth, const OptTensor& fixed, const std::string& model,
                                 const std::string& loss, double loss_scale, double depth_weight, double radius) {
  ProblemCall call{cameras, points, observations, camera_index, point_index, depth, fixed, false};
  Problem& args = call.args;
  args.model = model_of(op, model);
  args.loss = loss_of(op, loss);
  check_positive(op, "loss_scale", loss_scale);
  check_positive(op, "radius", radius);
  EFFK_CHECK(std::isfinite(depth_weight) && depth_weight >= 0, op, "depth_weight is ", depth_weight,
             "; wanted a number from 0 on");
  call.quaternion = check_cameras(op, cameras, args.model);
  check_like_cameras(op, "points", points, {check::kAny, 3}, cameras);
  check_like_cameras(op, "observations", observations, {check::kAny, num_columns(args.model)}, cameras);
  args.cameras = cameras.size(0);
  args.points = points.size(0);
  args.observations = observations.size(0);
  EFFK_CHECK(args.points <= kMaxSide, op, "points has shape ", check::str(points.sizes()), "; wanted at most 2^30");
  EFFK_CHECK(args.observations <= kMaxSide, op, "observations has shape ", check::str(observations.sizes()),
             "; wanted at most 2^30");
  const std::pair<const char*, const Tensor&> indices[] = {{"camera_index", camera_index},
                                                           {"point_index", point_index}};
  for (const auto& [name, t] : indices) {
    check::index_type(op, name, t);
    check::shape(op, name, t, {args.observations});
    check::device(op, name, t, "cameras", cameras);
  }
  if (depth) {
    EFFK_CHECK(args.model != Model::position, op, "depth is given with model 'position', which has none");
    check_like_cameras(op, "depth", *depth, {args.observations}, cameras);
    call.depth = as_contiguous(*depth);
  }
  if (fixed) {
    check::dtype(op, "fixed_points", *fixed, {ScalarType::Bool});
    check::shape(op, "fixed_points", *fixed, {args.points});
    check::device(op, "fixed_points", *fixed, "cameras", cameras);
    call.fixed = as_contiguous(*fixed);
  }
  call.cameras = as_contiguous(cameras);
  call.points = as_contiguous(points);
  call.observations = as_contiguous(observations);
  args.is_double = cameras.scalar_type() == ScalarType::Double;
  args.loss_scale = loss_scale;
  args.depth_weight = depth_weight;
  args.radius = radius;
  args.point = call.points.const_data_ptr();
  args.observed = call.observations.const_data_ptr();
  // Of no observations, too: rows are counted by it.
  if (depth) {
    const void* const p = call.depth->const_data_ptr();
    args.depth = p ? p : call.cameras.const_data_ptr();
    if (!args.depth) args.depth = &kMinScale;
  }
  if (fixed) args.fixed = static_cast<const uint8_t*>(call.fixed->const_data_ptr());
  return call;
}

// Of vectors of the cameras' tangents, such as steps.
inline void check_tangents(const char* op, const char* arg, const Tensor& t, int64_t cameras, int n,
                           const Tensor& device_of) {
  check::dtype(op, arg, t, {ScalarType::Double});
  check::shape(op, arg, t, {cameras, n});
  check::device(op, arg, t, "cameras", device_of);
}

// [B, 2] pairs of cameras.
inline void check_pairs(const char* op, const OptTensor& pairs, const Tensor& cameras) {
  if (!pairs) return;
  check::index_type(op, "pairs", *pairs);
  check::shape(op, "pairs", *pairs, {check::kAny, 2});
  EFFK_CHECK(pairs->size(0) <= kMaxSide, op, "pairs has shape ", check::str(pairs->sizes()), "; wanted at most 2^30");
  check::device(op, "pairs", *pairs, "cameras", cameras);
}

inline Tensor doubles(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_like_device(like, sizes, ScalarType::Double);
}

struct RetractCall {
  Model model;
  bool quaternion;
  Tensor cameras, points, camera_step, point_step, new_cameras, new_points;
};

inline RetractCall check_retract(const Tensor& cameras, const Tensor& points, const Tensor& camera_step,
                                 const Tensor& point_step, const std::string& model_name) {
  constexpr const char* op = "ba_retract";
  const Model model = model_of(op, model_name);
  const bool quaternion = check_cameras(op, cameras, model);
  check_like_cameras(op, "points", points, {check::kAny, 3}, cameras);
  check_tangents(op, "camera_step", camera_step, cameras.size(0), num_parameters(model), cameras);
  check_tangents(op, "point_step", point_step, points.size(0), 3, cameras);
  const auto sizes = [](const Tensor& t) { return std::vector<int64_t>{t.size(0), t.size(1)}; };
  return {model,
          quaternion,
          as_contiguous(cameras),
          as_contiguous(points),
          as_contiguous(camera_step),
          as_contiguous(point_step),
          empty_like_device(cameras, sizes(cameras)),
          empty_like_device(points, sizes(points))};
}

}  // namespace
}  // namespace effk::ba
