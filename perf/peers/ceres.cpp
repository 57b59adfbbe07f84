// Ceres Solver on BAL problems, as a peer of the benchmark: compiled by perf/ba.py where Ceres is installed.
// The residual is that of Ceres' own example of bundle adjustment, by automatic differentiation; pixels differ from the
// model's only by the sign that snavely has.
#include <ceres/ceres.h>
#include <ceres/rotation.h>

#include <cstdint>
#include <cstring>
#include <memory>

namespace {

struct Reprojection {
  double x, y;
  template <class T>
  bool operator()(const T* camera, const T* point, T* residual) const {
    T p[3];
    ceres::AngleAxisRotatePoint(camera, point, p);
    p[0] += camera[3];
    p[1] += camera[4];
    p[2] += camera[5];
    const T u = -p[0] / p[2], v = -p[1] / p[2], n = u * u + v * v;
    const T distortion = 1.0 + n * (camera[7] + camera[8] * n);
    residual[0] = camera[6] * distortion * u - x;
    residual[1] = camera[6] * distortion * v - y;
    return true;
  }
};

struct State {
  ceres::Problem problem;
  double* parameters;
};

}  // namespace

extern "C" {

// parameters: cameras [C, 9], then points [P, 3]; each solve changes them. observations [O, 2]; huber: 0 for none.
void* effk_ceres_problem(double* parameters, int64_t cameras, int64_t count, const double* observations,
                         const int32_t* camera, const int32_t* point, double huber) {
  auto* const state = new State{{}, parameters};
  for (int64_t o = 0; o < count; ++o)
    state->problem.AddResidualBlock(new ceres::AutoDiffCostFunction<Reprojection, 2, 9, 3>(
                                        new Reprojection{observations[2 * o], observations[2 * o + 1]}),
                                    huber > 0 ? new ceres::HuberLoss(huber) : nullptr, parameters + 9 * camera[o],
                                    parameters + 9 * cameras + 3 * point[o]);
  return state;
}

void effk_ceres_free(void* state) { delete static_cast<State*>(state); }

// solver: 0 DENSE_SCHUR, 1 SPARSE_SCHUR, 2 ITERATIVE_SCHUR with JACOBI, 3 with SCHUR_JACOBI. Returns the final cost;
// iterations gets how many steps there were.
double effk_ceres_solve(void* state, int solver, int threads, int max_iterations, double function_tolerance,
                        int* iterations) {
  ceres::Solver::Options options;
  options.linear_solver_type = solver == 0   ? ceres::DENSE_SCHUR
                               : solver == 1 ? ceres::SPARSE_SCHUR
                                             : ceres::ITERATIVE_SCHUR;
  options.preconditioner_type = solver == 3 ? ceres::SCHUR_JACOBI : ceres::JACOBI;
  options.num_threads = threads;
  options.max_num_iterations = max_iterations;
  options.function_tolerance = function_tolerance;
  options.logging_type = ceres::SILENT;
  ceres::Solver::Summary summary;
  ceres::Solve(options, &static_cast<State*>(state)->problem, &summary);
  *iterations = static_cast<int>(summary.iterations.size()) - 1;
  return summary.final_cost;
}
}
