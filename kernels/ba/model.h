// Camera models: where a point is seen, and how that changes with camera and point. Written once for any kind of
// number: double on a GPU, vectors of them on a CPU.
#pragma once

#include <math.h>

#include "../common/host_device.h"
#include "ba.h"

namespace effk::ba {
namespace {

EFFK_HD double root(double x) { return ::sqrt(x); }
#if defined(__CUDACC__) || defined(EFFK_SIMT)
EFFK_HD double log_plus_one(double x) { return ::log1p(x); }  // vector.h has that of a CPU's vectors
#endif
#if defined(__CUDA_ARCH__)
// x over pi, less a multiple of 2. CUDA's sin and cos, unlike sinpi and cospi, take local memory for large angles.
EFFK_HD double half_turns(double x) {
  constexpr double kHigh = 0x1.45f306dc9c883p-2, kLow = -0x1.6b01ec5417056p-56;  // of 1 / pi
  const double turns = x * kHigh;
  return turns - 2 * ::rint(0.5 * turns) + (::fma(x, kHigh, -turns) + x * kLow);
}
EFFK_HD double sine(double x) { return ::sinpi(half_turns(x)); }
EFFK_HD double cosine(double x) { return ::cospi(half_turns(x)); }
#else
EFFK_HD double sine(double x) { return ::sin(x); }
EFFK_HD double cosine(double x) { return ::cos(x); }
#endif

// x, y: of the point over its depth. Writes the pixel, its derivative by x and y, and by the intrinsics k.
struct Snavely {
  static constexpr Model kModel = Model::snavely;
  static constexpr double kSign = -1;  // cameras look along -z
  template <class N>
  EFFK_HD static void project(const N* k, N x, N y, N (&pixel)[2], N (&by_xy)[2][2], N (&by_k)[2][3]) {
    const N n = x * x + y * y;
    const N factor = 1.0 + n * (k[1] + k[2] * n), slope = 2.0 * (k[1] + 2.0 * k[2] * n);
    const N fx = k[0] * x, fy = k[0] * y, cross = fx * y * slope;
    pixel[0] = fx * factor, pixel[1] = fy * factor;
    by_xy[0][0] = k[0] * factor + fx * x * slope, by_xy[0][1] = cross;
    by_xy[1][0] = cross, by_xy[1][1] = k[0] * factor + fy * y * slope;
    by_k[0][0] = x * factor, by_k[0][1] = fx * n, by_k[0][2] = fx * n * n;
    by_k[1][0] = y * factor, by_k[1][1] = fy * n, by_k[1][2] = fy * n * n;
  }
};

struct SimplePinhole {
  static constexpr Model kModel = Model::simple_pinhole;
  static constexpr double kSign = 1;
  template <class N>
  EFFK_HD static void project(const N* k, N x, N y, N (&pixel)[2], N (&by_xy)[2][2], N (&by_k)[2][3]) {
    const N zero{}, one = zero + 1.0;
    pixel[0] = k[0] * x + k[1], pixel[1] = k[0] * y + k[2];
    by_xy[0][0] = k[0], by_xy[0][1] = zero, by_xy[1][0] = zero, by_xy[1][1] = k[0];
    by_k[0][0] = x, by_k[0][1] = one, by_k[0][2] = zero;
    by_k[1][0] = y, by_k[1][1] = zero, by_k[1][2] = one;
  }
};

struct Pinhole {
  static constexpr Model kModel = Model::pinhole;
  static constexpr double kSign = 1;
  template <class N>
  EFFK_HD static void project(const N* k, N x, N y, N (&pixel)[2], N (&by_xy)[2][2], N (&by_k)[2][4]) {
    const N zero{}, one = zero + 1.0;
    pixel[0] = k[0] * x + k[2], pixel[1] = k[1] * y + k[3];
    by_xy[0][0] = k[0], by_xy[0][1] = zero, by_xy[1][0] = zero, by_xy[1][1] = k[1];
    by_k[0][0] = x, by_k[0][1] = zero, by_k[0][2] = one, by_k[0][3] = zero;
    by_k[1][0] = zero, by_k[1][1] = y, by_k[1][2] = zero, by_k[1][3] = one;
  }
};

// SIMPLE_RADIAL has one coefficient, RADIAL two.
template <int kCoefficients>
struct Radial {
  static constexpr Model kModel = kCoefficients == 1 ? Model::simple_radial : Model::radial;
  static constexpr double kSign = 1;
  template <class N>
  EFFK_HD static void project(const N* k, N x, N y, N (&pixel)[2], N (&by_xy)[2][2], N (&by_k)[2][3 + kCoefficients]) {
    const N n = x * x + y * y, zero{}, one = zero + 1.0;
    N factor = 1.0 + n * k[3], slope = 2.0 * k[3];
    if constexpr (kCoefficients == 2) {
      factor = 1.0 + n * (k[3] + k[4] * n);
      slope = 2.0 * (k[3] + 2.0 * k[4] * n);
    }
    const N fx = k[0] * x, fy = k[0] * y, cross = fx * y * slope;
    pixel[0] = fx * factor + k[1], pixel[1] = fy * factor + k[2];
    by_xy[0][0] = k[0] * factor + fx * x * slope, by_xy[0][1] = cross;
    by_xy[1][0] = cross, by_xy[1][1] = k[0] * factor + fy * y * slope;
    by_k[0][0] = x * factor, by_k[0][1] = one, by_k[0][2] = zero, by_k[0][3] = fx * n;
    by_k[1][0] = y * factor, by_k[1][1] = zero, by_k[1][2] = one, by_k[1][3] = fy * n;
    if constexpr (kCoefficients == 2) by_k[0][4] = fx * n * n, by_k[1][4] = fy * n * n;
  }
};

struct OpenCV {
  static constexpr Model kModel = Model::opencv;
  static constexpr double kSign = 1;
  template <class N>
  EFFK_HD static void project(const N* k, N x, N y, N (&pixel)[2], N (&by_xy)[2][2], N (&by_k)[2][8]) {
    const N xx = x * x, yy = y * y, xy = x * y, n = xx + yy, zero{}, one = zero + 1.0;
    const N factor = 1.0 + n * (k[4] + k[5] * n), slope = 2.0 * (k[4] + 2.0 * k[5] * n);
    const N u = x * factor + 2.0 * k[6] * xy + k[7] * (n + 2.0 * xx);
    const N v = y * factor + 2.0 * k[7] * xy + k[6] * (n + 2.0 * yy);
    const N cross = xy * slope + 2.0 * (k[6] * x + k[7] * y);
    pixel[0] = k[0] * u + k[2], pixel[1] = k[1] * v + k[3];
    by_xy[0][0] = k[0] * (factor + xx * slope + 2.0 * k[6] * y + 6.0 * k[7] * x), by_xy[0][1] = k[0] * cross;
    by_xy[1][0] = k[1] * cross, by_xy[1][1] = k[1] * (factor + yy * slope + 2.0 * k[7] * x + 6.0 * k[6] * y);
    by_k[0][0] = u, by_k[0][1] = zero, by_k[0][2] = one, by_k[0][3] = zero;
    by_k[0][4] = k[0] * x * n, by_k[0][5] = k[0] * x * n * n;
    by_k[0][6] = 2.0 * k[0] * xy, by_k[0][7] = k[0] * (n + 2.0 * xx);
    by_k[1][0] = zero, by_k[1][1] = v, by_k[1][2] = zero, by_k[1][3] = one;
    by_k[1][4] = k[1] * y * n, by_k[1][5] = k[1] * y * n * n;
    by_k[1][6] = k[1] * (n + 2.0 * yy), by_k[1][7] = 2.0 * k[1] * xy;
  }
};

struct Position {
  static constexpr Model kModel = Model::position;
};

template <class M>
constexpr bool kIsPosition = M::kModel == Model::position;

// An observation's residual, and its derivatives by the camera's tangent and the point.
template <class M, bool kDepth, class N>
struct Linear {
  static constexpr int kRows = kDepth || kIsPosition<M> ? 3 : 2;
  static constexpr int kLossRows = kIsPosition<M> ? 3 : 2;
  static constexpr int kParameters = num_parameters(M::kModel);
  N residual[kRows];
  N by_camera[kRows][kParameters];
  N by_point[kRows][3];
  N depth;  // positive where the observation is valid
};

// camera: as in ba.h. inverse_depth and weight: of the row of depth, if there is one.
template <class M, bool kDepth, bool kDerivatives = true, class N>
EFFK_HD void linearize(const N* camera, const N (&point)[3], const N* observed, N inverse_depth, N weight,
                       Linear<M, kDepth, N>& out) {
  if constexpr (kIsPosition<M>) {
    N d[3], dd{}, vd{};
    EFFK_UNROLL
    for (int i = 0; i < 3; ++i) {
      d[i] = point[i] - camera[i];
      dd += d[i] * d[i];
      vd += d[i] * observed[i];
    }
    const N free = vd / dd, least = N{} + kMinScale;
    const auto is_free = free > kMinScale;
    const N s = is_free ? free : least, slope = is_free ? 1.0 / dd : N{};
    out.depth = free - kMinScale;
    EFFK_UNROLL
    for (int i = 0; i < 3; ++i) {
      out.residual[i] = observed[i] - s * d[i];
      if constexpr (kDerivatives) EFFK_UNROLL
      for (int j = 0; j < 3; ++j) {
        N e = d[i] * (observed[j] - 2.0 * s * d[j]) * slope;
        if (i == j) e += s;
        out.by_point[i][j] = -e;
        out.by_camera[i][j] = e;
      }
    }
  } else {
    constexpr int kIntrinsics = num_intrinsics(M::kModel);
    N turned[3];
    EFFK_UNROLL
    for (int i = 0; i < 3; ++i)
      turned[i] = camera[3 * i] * point[0] + camera[3 * i + 1] * point[1] + camera[3 * i + 2] * point[2];
    const N z = turned[2] + camera[11], over = 1.0 / z, scale = M::kSign * over;
    const N x = (turned[0] + camera[9]) * scale, y = (turned[1] + camera[10]) * scale;
    N pixel[2], by_xy[2][2], by_k[2][kIntrinsics];
    M::project(camera + 12, x, y, pixel, by_xy, by_k);
    out.depth = M::kSign * z;
    EFFK_UNROLL
    for (int r = 0; r < 2; ++r) out.residual[r] = pixel[r] - observed[r];
    if constexpr (kDepth) out.residual[2] = weight * (scale - inverse_depth);
    if constexpr (kDerivatives) {
      // By the point in the camera's frame; the rest follows from that.
      EFFK_UNROLL
      for (int r = 0; r < Linear<M, kDepth, N>::kRows; ++r) {
        N a[3];
        if (r < 2) {
          a[0] = by_xy[r][0] * scale, a[1] = by_xy[r][1] * scale;
          a[2] = -(by_xy[r][0] * x + by_xy[r][1] * y) * over;
        } else {
          a[0] = a[1] = N{}, a[2] = -weight * scale * over;
        }
        out.by_camera[r][0] = turned[1] * a[2] - turned[2] * a[1];
        out.by_camera[r][1] = turned[2] * a[0] - turned[0] * a[2];
        out.by_camera[r][2] = turned[0] * a[1] - turned[1] * a[0];
        EFFK_UNROLL
        for (int i = 0; i < 3; ++i) {
          out.by_camera[r][3 + i] = a[i];
          out.by_point[r][i] = a[0] * camera[i] + a[1] * camera[3 + i] + a[2] * camera[6 + i];
        }
        EFFK_UNROLL
        for (int i = 0; i < kIntrinsics; ++i) out.by_camera[r][6 + i] = r < 2 ? by_k[r < 2 ? r : 0][i] : N{};
      }
    }
  }
}

// Of s, the squared norm of the rows that it is for: rho(s) comes back, and rho'(s).
template <class N>
EFFK_HD N loss_of(Loss loss, double scale, N s, N& slope) {
  const double square = scale * scale;
  const N zero{}, one = zero + 1.0;
  switch (loss) {
    case Loss::trivial: break;
    case Loss::huber: {
      const N norm = root(s), in = scale / norm;
      slope = s > square ? in : one;
      return s > square ? 2.0 * scale * norm - square : s;
    }
    case Loss::cauchy: slope = 1.0 / (1.0 + s / square); return square * log_plus_one(s / square);
    case Loss::soft_l1: {
      const N norm = root(1.0 + s / square);
      slope = 1.0 / norm;
      return 2.0 * s / (norm + 1.0);  // 2 a^2 (norm - 1), which would cancel
    }
    case Loss::tukey: {
      const N rest = 1.0 - s / square;
      slope = s > square ? zero : rest * rest;
      return s > square ? zero + square / 3 : s * (1.0 + rest + rest * rest) / 3.0;  // a^2 / 3 (1 - rest^3)
    }
  }
  slope = one;
  return s;
}

// The cost of a linearized observation; its rows are weighted as the normal equations want them.
template <bool kDerivatives = true, class M, bool kDepth, class N>
EFFK_HD N weigh(Loss loss, double scale, Linear<M, kDepth, N>& out) {
  using L = Linear<M, kDepth, N>;
  N s = out.residual[0] * out.residual[0];
  EFFK_UNROLL
  for (int r = 1; r < L::kLossRows; ++r) s += out.residual[r] * out.residual[r];
  N slope;
  N cost = loss_of(loss, scale, s, slope);
  if constexpr (L::kRows > L::kLossRows) cost += out.residual[2] * out.residual[2];
  if (kDerivatives && loss != Loss::trivial) {
    const N factor = root(slope);
    EFFK_UNROLL
    for (int r = 0; r < L::kLossRows; ++r) {
      out.residual[r] *= factor;
      EFFK_UNROLL
      for (int i = 0; i < L::kParameters; ++i) out.by_camera[r][i] *= factor;
      EFFK_UNROLL
      for (int i = 0; i < 3; ++i) out.by_point[r][i] *= factor;
    }
  }
  return 0.5 * cost;
}

EFFK_HD void rotation_of_quaternion(const double (&q)[4], double* r) {
  const double scale = 2 / (q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  const double xx = q[1] * q[1] * scale, yy = q[2] * q[2] * scale, zz = q[3] * q[3] * scale;
  const double xy = q[1] * q[2] * scale, xz = q[1] * q[3] * scale, yz = q[2] * q[3] * scale;
  const double wx = q[0] * q[1] * scale, wy = q[0] * q[2] * scale, wz = q[0] * q[3] * scale;
  r[0] = 1 - yy - zz, r[1] = xy - wz, r[2] = xz + wy;
  r[3] = xy + wz, r[4] = 1 - xx - zz, r[5] = yz - wx;
  r[6] = xz - wy, r[7] = yz + wx, r[8] = 1 - xx - yy;
}

// The quaternion of a rotation by |w| about w.
EFFK_HD void quaternion_of_vector(const double* w, double (&q)[4]) {
  const double square = w[0] * w[0] + w[1] * w[1] + w[2] * w[2], angle = root(square);
  const double half = 0.5 * angle;
  // sin(half) / angle, whose series is exact to double below.
  const double factor = angle < 1e-4 ? 0.5 - square / 48 : sine(half) / angle;
  q[0] = cosine(half);
  for (int i = 0; i < 3; ++i) q[1 + i] = factor * w[i];
}

// The rotation of a camera's tensor as a quaternion; the numbers used come back.
template <class T>
EFFK_HD int quaternion_of(bool quaternion, const T* camera, double (&q)[4]) {
  if (quaternion) {
    for (int i = 0; i < 4; ++i) q[i] = static_cast<double>(camera[i]);
    return 4;
  }
  const double w[3] = {static_cast<double>(camera[0]), static_cast<double>(camera[1]), static_cast<double>(camera[2])};
  quaternion_of_vector(w, q);
  return 3;
}

// Of a camera, as its tensor has it, a row as ba.h has it.
template <class T>
EFFK_HD void camera_row(Model model, bool quaternion, const T* camera, double* row) {
  int filled = 0;
  if (model != Model::position) {
    double q[4];
    camera += quaternion_of(quaternion, camera, q);
    rotation_of_quaternion(q, row);
    filled = 9;
  }
  const int rest = 3 + num_intrinsics(model);
  for (int i = 0; i < rest; ++i) row[filled + i] = static_cast<double>(camera[i]);
  for (int i = filled + rest; i < kCameraRow; ++i) row[i] = 0;
}

// out: camera moved by step, in the tangent.
template <class T>
EFFK_HD void retract_camera(Model model, bool quaternion, const T* camera, const double* step, T* out) {
  if (model != Model::position) {
    double p[4], q[4];
    quaternion_of_vector(step, p);
    const int used = quaternion_of(quaternion, camera, q);
    double r[4] = {
        p[0] * q[0] - p[1] * q[1] - p[2] * q[2] - p[3] * q[3], p[0] * q[1] + p[1] * q[0] + p[2] * q[3] - p[3] * q[2],
        p[0] * q[2] + p[2] * q[0] + p[3] * q[1] - p[1] * q[3], p[0] * q[3] + p[3] * q[0] + p[1] * q[2] - p[2] * q[1]};
    const double square = r[1] * r[1] + r[2] * r[2] + r[3] * r[3];
    if (quaternion) {
      const double factor = 1 / root(r[0] * r[0] + square);
      for (int i = 0; i < 4; ++i) out[i] = static_cast<T>(factor * r[i]);
    } else {
      const double sign = r[0] < 0 ? -1 : 1, sine_of_half = root(square);
      const double factor = sine_of_half < 1e-9 ? 2 : 2 * ::atan2(sine_of_half, sign * r[0]) / sine_of_half;
      for (int i = 0; i < 3; ++i) out[i] = static_cast<T>(sign * factor * r[1 + i]);
    }
    camera += used, out += used, step += 3;
  }
  const int rest = 3 + num_intrinsics(model);
  for (int i = 0; i < rest; ++i) out[i] = static_cast<T>(static_cast<double>(camera[i]) + step[i]);
}

}  // namespace
}  // namespace effk::ba
