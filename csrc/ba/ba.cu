// ba: the CUDA side.
#include "../../kernels/ba/retract.cuh"
#include "../../kernels/ba/system.cuh"
#include "../common/cuda.h"
#include "args.h"

namespace effk::ba {
namespace {

double* doubles_of(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// Sorts numbers, equal ones in the order that they are in: the numbers, and where they were.
std::pair<Tensor, Tensor> stable_sort(const Tensor& t) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(t), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// A checked call on the GPU, and what keeps its memory alive.
class Ready {
 public:
  Ready(const char* op, Op which, ProblemCall checked, const OptTensor& step = std::nullopt,
        const OptTensor& pairs = std::nullopt)
      : op_(op),
        checked_(std::move(checked)),
        camera_(cuda::indices(checked_.camera_index)),
        point_(cuda::indices(checked_.point_index)),
        pairs_(cuda::indices(pairs)) {
    const Tensor& cameras = checked_.cameras;
    call.op = which;
    call.p = {checked_.args, camera_.args, point_.args};
    call.quaternion = checked_.quaternion;
    call.cameras = cameras.const_data_ptr();
    if (step) {
      step_ = as_contiguous(*step);
      call.step = static_cast<const double*>(step_->const_data_ptr());
    }
    call.num_sms = cuda::num_sms(op, cameras);
    call.most_blocks = kMostBlocks;
    call.is_diagonal = !pairs;
    call.pairs = pairs_.args;
    call.num_pairs = pairs ? pairs->size(0) : 0;
    if (call.by_camera()) {
      // As long as camera_index stays the same, so does this order: a caller that kept it would save the sorting, which
      // every product pays for again.
      const Tensor keys = empty_like_device(cameras, {checked_.args.observations}, ScalarType::Int);
      check(launch_keys(call, static_cast<int32_t*>(keys.mutable_data_ptr()), stream()));
      std::tie(keys_, order_) = stable_sort(keys);
      call.keys = static_cast<const int32_t*>(keys_->const_data_ptr());
      call.order = static_cast<const int64_t*>(order_->const_data_ptr());
    }
    scratch_ = cuda::workspace(cameras, place(call, nullptr));
    place(call, scratch_->mutable_data_ptr());
  }

  void check(gpu::Error e) const { cuda::check(op_, e); }
  cudaStream_t stream() const { return cuda::current_stream(checked_.cameras); }
  Tensor empty(const std::vector<int64_t>& sizes) const { return doubles(checked_.points, sizes); }
  int64_t cameras() const { return checked_.args.cameras; }
  int64_t points() const { return checked_.args.points; }
  int64_t n() const { return checked_.n(); }

  Call call{};

 private:
  const char* op_;
  ProblemCall checked_;
  cuda::IndexTensor camera_, point_, pairs_;
  OptTensor step_, keys_, order_, scratch_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobian_of(const char* op, const Tensor& cameras, const Tensor& points,
                                                       const Tensor& observations, const Tensor& camera_index,
                                                       const Tensor& point_index, const OptTensor& depth,
                                                       const std::string& model, double depth_weight,
                                                       bool with_jacobian) {
  const cuda::DeviceGuard guard(cameras.get_device_index());
  const Ready ready(op, Op::residual,
                    check_problem(op, cameras, points, observations, camera_index, point_index, depth, std::nullopt,
                                  model, "trivial", 1, depth_weight, 1));
  const Problem& a = ready.call.p.a;
  const int64_t rows = a.rows(), count = with_jacobian ? a.observations : 0;
  const Tensor residual = empty_like_device(points, {a.observations, rows});
  const Tensor valid = empty_like_device(points, {a.observations}, ScalarType::Bool);
  const Tensor jac_camera = empty_like_device(points, {count, rows, ready.n()});
  const Tensor jac_point = empty_like_device(points, {count, rows, 3});
  ready.check(launch_residual(ready.call, residual.mutable_data_ptr(), static_cast<uint8_t*>(valid.mutable_data_ptr()),
                              with_jacobian ? jac_camera.mutable_data_ptr() : nullptr,
                              with_jacobian ? jac_point.mutable_data_ptr() : nullptr, ready.stream()));
  return {residual, jac_camera, jac_point, valid};
}

std::tuple<Tensor, Tensor> residual(const Tensor& cameras, const Tensor& points, const Tensor& observations,
                                    const Tensor& camera_index, const Tensor& point_index, const OptTensor& depth,
                                    std::string model, double depth_weight) {
  const auto [values, jac_camera, jac_point, valid] = jacobian_of(
      "ba_residual", cameras, points, observations, camera_index, point_index, depth, model, depth_weight, false);
  return {values, valid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobian(const Tensor& cameras, const Tensor& points,
                                                    const Tensor& observations, const Tensor& camera_index,
                                                    const Tensor& point_index, const OptTensor& depth,
                                                    std::string model, double depth_weight) {
  return jacobian_of("ba_jacobian", cameras, points, observations, camera_index, point_index, depth, model,
                     depth_weight, true);
}

Tensor cost(const Tensor& cameras, const Tensor& points, const Tensor& observations, const Tensor& camera_index,
            const Tensor& point_index, const OptTensor& depth, std::string model, std::string loss, double loss_scale,
            double depth_weight) {
  constexpr const char* op = "ba_cost";
  const cuda::DeviceGuard guard(cameras.get_device_index());
  const Ready ready(op, Op::cost,
                    check_problem(op, cameras, points, observations, camera_index, point_index, depth, std::nullopt,
                                  model, loss, loss_scale, depth_weight, 1));
  const Tensor total = ready.empty({});
  ready.check(launch_cost(ready.call, doubles_of(total), ready.stream()));
  return total;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build(const Tensor& cameras, const Tensor& points,
                                                         const Tensor& observations, const Tensor& camera_index,
                                                         const Tensor& point_index, const OptTensor& depth,
                                                         std::string model, std::string loss, double loss_scale,
                                                         double depth_weight) {
  constexpr const char* op = "ba_build";
  const cuda::DeviceGuard guard(cameras.get_device_index());
  const Ready ready(op, Op::build,
                    check_problem(op, cameras, points, observations, camera_index, point_index, depth, std::nullopt,
                                  model, loss, loss_scale, depth_weight, 1));
  const int64_t c = ready.cameras(), p = ready.points(), n = ready.n();
  const Tensor total = ready.empty({}), camera_gradient = ready.empty({c, n}), camera_hessian = ready.empty({c, n, n});
  const Tensor point_gradient = ready.empty({p, 3}), point_hessian = ready.empty({p, 3, 3});
  const Built to{doubles_of(total), doubles_of(camera_gradient), doubles_of(camera_hessian), doubles_of(point_gradient),
                 doubles_of(point_hessian)};
  ready.check(launch_build(ready.call, to, ready.stream()));
  return {total, camera_gradient, camera_hessian, point_gradient, point_hessian};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> schur(const Tensor& cameras, const Tensor& points,
                                                                 const Tensor& observations, const Tensor& camera_index,
                                                                 const Tensor& point_index, const OptTensor& pairs,
                                                                 const OptTensor& depth, const OptTensor& fixed_points,
                                                                 std::string model, std::string loss, double loss_scale,
                                                                 double depth_weight, double radius) {
  constexpr const char* op = "ba_schur";
  const cuda::DeviceGuard guard(cameras.get_device_index());
  ProblemCall checked = check_problem(op, cameras, points, observations, camera_index, point_index, depth, fixed_points,
                                      model, loss, loss_scale, depth_weight, radius);
  check_pairs(op, pairs, cameras);
  const Ready ready(op, Op::schur, std::move(checked), std::nullopt, pairs);
  const int64_t c = ready.cameras(), n = ready.n();
  const Tensor blocks = ready.empty({pairs ? pairs->size(0) : c, n, n}), rhs = ready.empty({c, n});
  const Tensor gradient = ready.empty({c, n}), diagonal = ready.empty({c, n});
  const Tensor point_gradient = ready.empty({}), total = ready.empty({});
  const Reduced to{doubles_of(blocks),         doubles_of(rhs),  doubles_of(gradient), doubles_of(diagonal),
                   doubles_of(point_gradient), doubles_of(total)};
  ready.check(launch_schur(ready.call, to, ready.stream()));
  return {blocks, rhs, gradient, diagonal, point_gradient, total};
}

Tensor schur_mv(const Tensor& cameras, const Tensor& points, const Tensor& observations, const Tensor& camera_index,
                const Tensor& point_index, const Tensor& x, const OptTensor& depth, const OptTensor& fixed_points,
                std::string model, std::string loss, double loss_scale, double depth_weight, double radius) {
  constexpr const char* op = "ba_schur_mv";
  const cuda::DeviceGuard guard(cameras.get_device_index());
  ProblemCall checked = check_problem(op, cameras, points, observations, camera_index, point_index, depth, fixed_points,
                                      model, loss, loss_scale, depth_weight, radius);
  check_tangents(op, "x", x, checked.args.cameras, checked.n(), cameras);
  const Ready ready(op, Op::schur_mv, std::move(checked), x);
  const Tensor y = ready.empty({ready.cameras(), ready.n()});
  ready.check(launch_schur_mv(ready.call, doubles_of(y), ready.stream()));
  return y;
}

std::tuple<Tensor, Tensor> backsubstitute(const Tensor& cameras, const Tensor& points, const Tensor& observations,
                                          const Tensor& camera_index, const Tensor& point_index,
                                          const Tensor& camera_step, const OptTensor& depth,
                                          const OptTensor& fixed_points, std::string model, std::string loss,
                                          double loss_scale, double depth_weight, double radius) {
  constexpr const char* op = "ba_backsubstitute";
  const cuda::DeviceGuard guard(cameras.get_device_index());
  ProblemCall checked = check_problem(op, cameras, points, observations, camera_index, point_index, depth, fixed_points,
                                      model, loss, loss_scale, depth_weight, radius);
  check_tangents(op, "camera_step", camera_step, checked.args.cameras, checked.n(), cameras);
  const Ready ready(op, Op::backsubstitute, std::move(checked), camera_step);
  const Tensor point_step = ready.empty({ready.points(), 3}), change = ready.empty({});
  ready.check(launch_backsubstitute(ready.call, {doubles_of(point_step), doubles_of(change)}, ready.stream()));
  return {point_step, change};
}

std::tuple<Tensor, Tensor> retract(const Tensor& cameras, const Tensor& points, const Tensor& camera_step,
                                   const Tensor& point_step, std::string model) {
  const cuda::DeviceGuard guard(cameras.get_device_index());
  const RetractCall call = check_retract(cameras, points, camera_step, point_step, model);
  const RetractArgs a{call.model,
                      call.quaternion,
                      cameras.scalar_type() == ScalarType::Double,
                      cameras.size(0),
                      points.numel(),
                      call.cameras.const_data_ptr(),
                      call.points.const_data_ptr(),
                      static_cast<const double*>(call.camera_step.const_data_ptr()),
                      static_cast<const double*>(call.point_step.const_data_ptr()),
                      call.new_cameras.mutable_data_ptr(),
                      call.new_points.mutable_data_ptr()};
  cuda::check("ba_retract", launch_retract(a, kMostBlocks, cuda::current_stream(cameras)));
  return {call.new_cameras, call.new_points};
}

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  m.impl("ba_residual", TORCH_BOX(&residual));
  m.impl("ba_jacobian", TORCH_BOX(&jacobian));
  m.impl("ba_cost", TORCH_BOX(&cost));
  m.impl("ba_build", TORCH_BOX(&build));
  m.impl("ba_schur", TORCH_BOX(&schur));
  m.impl("ba_schur_mv", TORCH_BOX(&schur_mv));
  m.impl("ba_backsubstitute", TORCH_BOX(&backsubstitute));
  m.impl("ba_retract", TORCH_BOX(&retract));
}

}  // namespace
}  // namespace effk::ba
