// ba: schemas and the CPU side.
#include <algorithm>
#include <cstring>

#include "../../kernels/common/cpu.h"
#include "../../kernels/common/cpu_level.h"
#include "../common/integers.h"
#include "../common/parallel.h"
#include "args.h"

namespace effk::ba {
namespace {

const Cpu& cpu() { return cpu_kernels<Cpu>("ba", {&cpu_scalar, &cpu_avx2, &cpu_avx512}); }

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Indices as int32, all of them in range.
class Index {
 public:
  Index(const Cpu& kernels, const char* op, const char* arg, const Tensor& t, int64_t limit)
      : tensor_(as_contiguous(t)) {
    const int64_t count = tensor_.numel();
    if (t.scalar_type() == ScalarType::Int) {
      data_ = static_cast<const int32_t*>(tensor_.const_data_ptr());
      if (kernels.in_range(reinterpret_cast<const uint32_t*>(data_), count, static_cast<uint32_t>(limit))) return;
      check(op, arg, data_, count, limit);
    } else {
      const auto* const wide = static_cast<const int64_t*>(tensor_.const_data_ptr());
      check(op, arg, wide, count, limit);
      own_.assign(wide, wide + count);
      data_ = own_.data();
    }
  }
  const int32_t* get() const { return data_; }

 private:
  template <class T>
  static void check(const char* op, const char* arg, const T* index, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i)
      EFFK_CHECK(index[i] >= 0 && index[i] < limit, op, arg, "[", i, "] is ", index[i],
                 limit > 0 ? "; wanted 0 to " + std::to_string(limit - 1) : "; wanted none");
  }

  Tensor tensor_;
  std::vector<int32_t> own_;
  const int32_t* data_;
};

// A checked call on the CPU: with cameras as kernels see them.
class Ready {
 public:
  Ready(const char* op, ProblemCall call, bool ascending)
      : kernels(cpu()),
        call(std::move(call)),
        camera_(kernels, op, "camera_index", this->call.camera_index, this->call.args.cameras),
        point_(kernels, op, "point_index", this->call.point_index, this->call.args.points),
        rows_(this->call.args.cameras * kCameraRow) {
    Problem& a = args();
    a.camera = camera_.get();
    a.of_point = point_.get();
    a.camera_rows = rows_.get();
    EFFK_CHECK(!ascending || kernels.ascending(a.of_point, a.observations), op,
               "point_index isn't ascending; wanted observations sorted by point");
    const int64_t width = num_numbers(a.model, this->call.quaternion) * (a.is_double ? 8 : 4);
    for_parts(a.cameras, worthwhile(200), [&](int64_t c0, int64_t c1) {
      kernels.prepare(a.model, this->call.quaternion, a.is_double, const_data<char>(this->call.cameras) + c0 * width,
                      c1 - c0, rows_.get() + c0 * kCameraRow);
    });
  }

  Problem& args() { return call.args; }
  int64_t n() const { return call.n(); }
  int64_t wide() const { return kernels.pitch_of(call.args.model); }

  // Shares observations out in parts that follow from the number of threads alone, so that sums are the same each
  // time: f(part, o0, o1), with whole points in a part. At most `most` parts.
  template <class F>
  void in_parts(int64_t parts, const F& f) {
    const Problem& a = args();
    std::vector<int64_t> ends(parts + 1);
    for (int64_t i = 1; i <= parts; ++i) {
      int64_t end = std::max(ends[i - 1], a.observations * i / parts);
      while (end > 0 && end < a.observations && a.of_point[end] == a.of_point[end - 1]) ++end;
      ends[i] = end;
    }
    torch::stable::parallel_for(0, parts, 1, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; ++p)
        if (ends[p] < ends[p + 1]) f(p, ends[p], ends[p + 1]);
    });
  }
  int64_t parts(int64_t most = INT64_MAX) {
    constexpr int64_t kWorth = 2048;  // observations
    return std::max<int64_t>(1,
                             std::min({int64_t{torch::stable::get_num_threads()}, args().observations / kWorth, most}));
  }

  const Cpu& kernels;
  ProblemCall call;

 private:
  Index camera_, point_;
  Buffer<double> rows_;
};

// Vectors of the cameras' tangents with rows as kernels want them.
class Tangents {
 public:
  Tangents(const Tensor& t, int64_t n, int64_t wide) : buffer_(t.size(0) * wide) {
    const Tensor rows = as_contiguous(t);
    const auto* const from = const_data<double>(rows);
    std::memset(buffer_.get(), 0, t.size(0) * wide * sizeof(double));
    for (int64_t c = 0; c < t.size(0); ++c) std::memcpy(buffer_.get() + c * wide, from + c * n, n * sizeof(double));
  }
  const double* get() const { return buffer_.get(); }

 private:
  Buffer<double> buffer_;
};

// What each part adds up of `rows` rows, and their sum.
class Sums {
 public:
  Sums(int64_t parts, int64_t rows, int64_t wide)
      : parts_(parts), rows_(rows), wide_(wide), buffer_(parts * rows * wide) {
    // Each by the thread that will add to it, whose memory it is then; little of it isn't worth waking that up.
    constexpr int64_t kLittle = 1 << 17;
    torch::stable::parallel_for(0, parts, rows * wide > kLittle ? 1 : parts, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; ++p) std::memset(part(p), 0, rows * wide * sizeof(double));
    });
  }
  double* part(int64_t p) const { return buffer_.get() + p * rows_ * wide_; }
  // Blocks, to [n, n] each.
  void write_blocks(const Cpu& kernels, Model model, double* to) const {
    const int64_t n = num_parameters(model);
    for_parts(rows_, worthwhile(n * n * parts_), [&](int64_t r0, int64_t r1) {
      std::memset(to + r0 * n * n, 0, (r1 - r0) * n * n * sizeof(double));
      for (int64_t p = 0; p < parts_; ++p) kernels.add_blocks(model, part(p) + r0 * wide_, r1 - r0, to + r0 * n * n);
    });
  }
  // To rows of n numbers.
  void write(double* to, int64_t n) const {
    for_parts(rows_, worthwhile(n * parts_), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t i = 0; i < n; ++i) {
          double sum = 0;
          for (int64_t p = 0; p < parts_; ++p) sum += part(p)[r * wide_ + i];
          to[r * n + i] = sum;
        }
    });
  }

 private:
  int64_t parts_, rows_, wide_;
  Buffer<double> buffer_;
};

Tensor scalar(const Tensor& like, double value) {
  const Tensor t = doubles(like, {});
  *data<double>(t) = value;
  return t;
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
  const Tensor t = doubles(like, sizes);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * sizeof(double));
  return t;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobian_of(const char* op, const Tensor& cameras, const Tensor& points,
                                                       const Tensor& observations, const Tensor& camera_index,
                                                       const Tensor& point_index, const OptTensor& depth,
                                                       const std::string& model, double depth_weight,
                                                       bool with_jacobian) {
  Ready ready(op,
              check_problem(op, cameras, points, observations, camera_index, point_index, depth, std::nullopt, model,
                            "trivial", 1, depth_weight, 1),
              false);
  const Problem& a = ready.args();
  const int64_t rows = a.rows(), n = ready.n();
  const Tensor residual = empty_like_device(points, {a.observations, rows});
  const Tensor valid = empty_like_device(points, {a.observations}, ScalarType::Bool);
  const Tensor jac_camera = empty_like_device(points, {with_jacobian ? a.observations : 0, rows, n});
  const Tensor jac_point = empty_like_device(points, {with_jacobian ? a.observations : 0, rows, 3});
  for_parts(a.observations, worthwhile(200), [&](int64_t o0, int64_t o1) {
    ready.kernels.residual(a, o0, o1, residual.mutable_data_ptr(), data<bool>(valid),
                           with_jacobian ? jac_camera.mutable_data_ptr() : nullptr,
                           with_jacobian ? jac_point.mutable_data_ptr() : nullptr);
  });
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
  Ready ready(op,
              check_problem(op, cameras, points, observations, camera_index, point_index, depth, std::nullopt, model,
                            loss, loss_scale, depth_weight, 1),
              false);
  const Problem& a = ready.args();
  const int64_t parts = ready.parts();
  std::vector<double> sums(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p)
      sums[p] = ready.kernels.cost(a, a.observations * p / parts, a.observations * (p + 1) / parts);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return scalar(points, total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build(const Tensor& cameras, const Tensor& points,
                                                         const Tensor& observations, const Tensor& camera_index,
                                                         const Tensor& point_index, const OptTensor& depth,
                                                         std::string model, std::string loss, double loss_scale,
                                                         double depth_weight) {
  constexpr const char* op = "ba_build";
  Ready ready(op,
              check_problem(op, cameras, points, observations, camera_index, point_index, depth, std::nullopt, model,
                            loss, loss_scale, depth_weight, 1),
              true);
  const Problem& a = ready.args();
  const int64_t n = ready.n(), wide = ready.wide(), parts = ready.parts();
  const Sums gradients(parts, a.cameras, wide), hessians(parts, a.cameras, ready.kernels.block_size(a.model));
  const Tensor camera_gradient = doubles(points, {a.cameras, n}), camera_hessian = doubles(points, {a.cameras, n, n});
  const Tensor point_gradient = zeros(points, {a.points, 3}), point_hessian = zeros(points, {a.points, 3, 3});
  std::vector<CameraSums> sums(parts);
  ready.in_parts(parts, [&](int64_t p, int64_t o0, int64_t o1) {
    sums[p].gradient = gradients.part(p);
    sums[p].blocks = hessians.part(p);
    ready.kernels.build(a, o0, o1, sums[p], data<double>(point_gradient), data<double>(point_hessian));
  });
  double total = 0;
  for (const CameraSums& s : sums) total += s.cost;
  gradients.write(data<double>(camera_gradient), n);
  hessians.write_blocks(ready.kernels, a.model, data<double>(camera_hessian));
  return {scalar(points, total), camera_gradient, camera_hessian, point_gradient, point_hessian};
}

// [cameras, cameras]: which pair one is, or -1.
std::vector<int32_t> numbers_of(const char* op, const Tensor& pairs, int64_t cameras) {
  constexpr int64_t kMost = 1 << 13;  // a table of all pairs
  EFFK_CHECK(cameras <= kMost, op, "pairs is given with ", cameras, " cameras; wanted at most ", kMost);
  std::vector<int32_t> numbers(cameras * cameras, -1);
  const Integers given(pairs);
  int64_t before = -1;
  for (int64_t i = 0; i < pairs.size(0); ++i) {
    const int64_t row = given[2 * i], column = given[2 * i + 1];
    EFFK_CHECK(row >= 0 && row < cameras && column >= 0 && column <= row, op, "pairs[", i, "] is (", row, ", ", column,
               "); wanted two cameras, the larger one first");
    EFFK_CHECK(row * cameras + column > before, op, "pairs[", i, "] isn't behind the one before it");
    before = row * cameras + column;
    numbers[before] = static_cast<int32_t>(i);
  }
  return numbers;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> schur(const Tensor& cameras, const Tensor& points,
                                                                 const Tensor& observations, const Tensor& camera_index,
                                                                 const Tensor& point_index, const OptTensor& pairs,
                                                                 const OptTensor& depth, const OptTensor& fixed_points,
                                                                 std::string model, std::string loss, double loss_scale,
                                                                 double depth_weight, double radius) {
  constexpr const char* op = "ba_schur";
  Ready ready(op,
              check_problem(op, cameras, points, observations, camera_index, point_index, depth, fixed_points, model,
                            loss, loss_scale, depth_weight, radius),
              true);
  check_pairs(op, pairs, cameras);
  const Problem& a = ready.args();
  const std::vector<int32_t> numbers = pairs ? numbers_of(op, *pairs, a.cameras) : std::vector<int32_t>();
  const int64_t n = ready.n(), wide = ready.wide(), count = pairs ? pairs->size(0) : a.cameras;
  const int64_t size = ready.kernels.block_size(a.model);
  // Each part has all blocks to itself.
  constexpr int64_t kMostBytes = int64_t{1} << 30;
  const int64_t parts = ready.parts(kMostBytes / std::max<int64_t>(1, count * size * 8));
  const Sums block_sums(parts, count, size), rhs_sums(parts, a.cameras, wide), gradients(parts, a.cameras, wide),
      diagonals(parts, a.cameras, wide);
  std::vector<CameraSums> sums(parts);
  ready.in_parts(parts, [&](int64_t p, int64_t o0, int64_t o1) {
    sums[p] = {gradients.part(p),
               rhs_sums.part(p),
               diagonals.part(p),
               block_sums.part(p),
               pairs ? numbers.data() : nullptr,
               0,
               0};
    ready.kernels.schur(a, o0, o1, sums[p]);
  });
  double total = 0, most = 0;
  for (const CameraSums& s : sums) {
    total += s.cost;
    if (s.most > most || s.most != s.most) most = s.most;
  }
  const Tensor blocks = doubles(points, {count, n, n}), rhs = doubles(points, {a.cameras, n});
  const Tensor gradient = doubles(points, {a.cameras, n}), diagonal = doubles(points, {a.cameras, n});
  block_sums.write_blocks(ready.kernels, a.model, data<double>(blocks));
  rhs_sums.write(data<double>(rhs), n);
  gradients.write(data<double>(gradient), n);
  diagonals.write(data<double>(diagonal), n);
  return {blocks, rhs, gradient, diagonal, scalar(points, most), scalar(points, total)};
}

Tensor schur_mv(const Tensor& cameras, const Tensor& points, const Tensor& observations, const Tensor& camera_index,
                const Tensor& point_index, const Tensor& x, const OptTensor& depth, const OptTensor& fixed_points,
                std::string model, std::string loss, double loss_scale, double depth_weight, double radius) {
  constexpr const char* op = "ba_schur_mv";
  Ready ready(op,
              check_problem(op, cameras, points, observations, camera_index, point_index, depth, fixed_points, model,
                            loss, loss_scale, depth_weight, radius),
              true);
  const Problem& a = ready.args();
  const int64_t n = ready.n(), wide = ready.wide(), parts = ready.parts();
  check_tangents(op, "x", x, a.cameras, ready.call.n(), cameras);
  const Tangents from(x, n, wide);
  const Sums sums(parts, a.cameras, wide);
  ready.in_parts(
      parts, [&](int64_t p, int64_t o0, int64_t o1) { ready.kernels.schur_mv(a, o0, o1, from.get(), sums.part(p)); });
  const Tensor y = doubles(points, {a.cameras, n});
  sums.write(data<double>(y), n);
  return y;
}

std::tuple<Tensor, Tensor> backsubstitute(const Tensor& cameras, const Tensor& points, const Tensor& observations,
                                          const Tensor& camera_index, const Tensor& point_index,
                                          const Tensor& camera_step, const OptTensor& depth,
                                          const OptTensor& fixed_points, std::string model, std::string loss,
                                          double loss_scale, double depth_weight, double radius) {
  constexpr const char* op = "ba_backsubstitute";
  Ready ready(op,
              check_problem(op, cameras, points, observations, camera_index, point_index, depth, fixed_points, model,
                            loss, loss_scale, depth_weight, radius),
              true);
  const Problem& a = ready.args();
  check_tangents(op, "camera_step", camera_step, a.cameras, ready.call.n(), cameras);
  const Tangents step(camera_step, ready.n(), ready.wide());
  const Tensor point_step = zeros(points, {a.points, 3});
  const int64_t parts = ready.parts();
  std::vector<double> changes(parts);
  ready.in_parts(parts, [&](int64_t p, int64_t o0, int64_t o1) {
    changes[p] = ready.kernels.backsubstitute(a, o0, o1, step.get(), data<double>(point_step));
  });
  double total = 0;
  for (double change : changes) total += change;
  return {point_step, scalar(points, total)};
}

std::tuple<Tensor, Tensor> retract(const Tensor& cameras, const Tensor& points, const Tensor& camera_step,
                                   const Tensor& point_step, std::string model) {
  const RetractCall call = check_retract(cameras, points, camera_step, point_step, model);
  const bool is_double = cameras.scalar_type() == ScalarType::Double;
  const int64_t width = cameras.size(1) * (is_double ? 8 : 4), n = num_parameters(call.model);
  for_parts(cameras.size(0), worthwhile(200), [&](int64_t c0, int64_t c1) {
    cpu().retract(call.model, call.quaternion, is_double, const_data<char>(call.cameras) + c0 * width,
                  const_data<double>(call.camera_step) + c0 * n, c1 - c0, data<char>(call.new_cameras) + c0 * width);
  });
  const auto move = [&]<class T>(T*) {
    const T* const from = const_data<T>(call.points);
    T* const to = data<T>(call.new_points);
    const double* const step = const_data<double>(call.point_step);
    for_parts(points.numel(), worthwhile(1), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) to[i] = static_cast<T>(from[i] + step[i]);
    });
  };
  is_double ? move(static_cast<double*>(nullptr)) : move(static_cast<float*>(nullptr));
  return {call.new_cameras, call.new_points};
}

#define EFFK_PROBLEM "Tensor cameras, Tensor points, Tensor observations, Tensor camera_index, Tensor point_index"
#define EFFK_MODEL ", *, str model=\"snavely\""
#define EFFK_LOSS ", str loss=\"trivial\", float loss_scale=1.0"
#define EFFK_WEIGHT ", float depth_weight=1.0"
#define EFFK_RADIUS ", float radius=10000.0"
#define EFFK_SOLVE                                                                             \
  ", int max_iterations=100, float function_tolerance=1e-06, float gradient_tolerance=1e-10, " \
  "float parameter_tolerance=1e-08, float? max_seconds=None, float initial_radius=10000.0, "   \
  "str linear_solver=\"auto\", float linear_tolerance=0.1, int max_linear_iterations=500) -> Tensor"
STABLE_TORCH_LIBRARY_FRAGMENT(effk, m) {
  m.def("ba_residual(" EFFK_PROBLEM ", Tensor? depth=None" EFFK_MODEL EFFK_WEIGHT ") -> (Tensor, Tensor)");
  m.def("ba_jacobian(" EFFK_PROBLEM ", Tensor? depth=None" EFFK_MODEL EFFK_WEIGHT
        ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("ba_cost(" EFFK_PROBLEM ", Tensor? depth=None" EFFK_MODEL EFFK_LOSS EFFK_WEIGHT ") -> Tensor");
  m.def("ba_build(" EFFK_PROBLEM ", Tensor? depth=None" EFFK_MODEL EFFK_LOSS EFFK_WEIGHT
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ba_schur(" EFFK_PROBLEM
      ", Tensor? pairs=None, Tensor? depth=None, Tensor? fixed_points=None" EFFK_MODEL EFFK_LOSS EFFK_WEIGHT EFFK_RADIUS
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("ba_schur_mv(" EFFK_PROBLEM
        ", Tensor x, Tensor? depth=None, Tensor? fixed_points=None" EFFK_MODEL EFFK_LOSS EFFK_WEIGHT EFFK_RADIUS
        ") -> Tensor");
  m.def(
      "ba_backsubstitute(" EFFK_PROBLEM
      ", Tensor camera_step, Tensor? depth=None, Tensor? fixed_points=None" EFFK_MODEL EFFK_LOSS EFFK_WEIGHT EFFK_RADIUS
      ") -> (Tensor, Tensor)");
  m.def("ba_retract(Tensor cameras, Tensor points, Tensor camera_step, Tensor point_step" EFFK_MODEL
        ") -> (Tensor, Tensor)");
  // Made of the others, in Python.
  m.def(
      "ba_pcg(" EFFK_PROBLEM
      ", Tensor rhs, Tensor inverse, Tensor damping, Tensor? depth=None, Tensor? fixed_points=None" EFFK_MODEL EFFK_LOSS
          EFFK_WEIGHT EFFK_RADIUS ", float tolerance=0.1, int max_iterations=500) -> (Tensor, Tensor)");
  m.def(
      "ba_solve(Tensor(a!) cameras, Tensor(b!) points, Tensor observations, Tensor camera_index, Tensor point_index, "
      "Tensor? depth=None, Tensor? fixed_points=None, Tensor? columns=None, Tensor? positions=None" EFFK_MODEL
          EFFK_LOSS EFFK_WEIGHT ", float position_weight=1.0" EFFK_SOLVE);
  m.def(
      "gp_solve(Tensor(a!) cameras, Tensor(b!) points, Tensor observations, Tensor camera_index, Tensor point_index, "
      "Tensor? fixed_points=None, Tensor? columns=None, *, str loss=\"huber\", float loss_scale=0.1" EFFK_SOLVE);
}
#undef EFFK_SOLVE
#undef EFFK_PROBLEM
#undef EFFK_MODEL
#undef EFFK_LOSS
#undef EFFK_WEIGHT
#undef EFFK_RADIUS

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
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
