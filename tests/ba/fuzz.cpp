// Feeds the CPU kernels of ba problems of any kind, without torch, under AddressSanitizer.
//   fuzz_ba LEVEL CASES SEED
// Each buffer has exactly the size that ba.h gives it, and no better alignment than csrc/ promises. In every other case
// it ends at an unmapped page (which also catches what the sanitizer doesn't instrument), in the rest the sanitizer's
// own red zones surround it. Observations are shared out in random ranges, in random order, as threads may do it, each
// with sums of its own. Numbers are either tame, and results are compared with a computation in long double that
// follows what double may lose on the way (running error analysis); or any bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "../../kernels/ba/ba.h"
#include "../kit/fuzzing.h"

using namespace effk::ba;
using namespace effk::fuzz;

namespace {

using Real = long double;

constexpr Real kUnit = 0x1p-53L;
constexpr Real kSlack = 16;  // of the kernels, whose formulas aren't these

// A number, and how far off it a double computation may be.
struct Num {
  Real v = 0, e = 0;
};
inline Num rounded(Real v, Real e) { return {v, e + kUnit * std::fabs(v)}; }
inline Num exact(Real v) { return {v, 0}; }
inline Num operator-(Num a) { return {-a.v, a.e}; }
inline Num operator+(Num a, Num b) { return rounded(a.v + b.v, a.e + b.e); }
inline Num operator-(Num a, Num b) { return rounded(a.v - b.v, a.e + b.e); }
inline Num operator*(Num a, Num b) {
  return rounded(a.v * b.v, std::fabs(a.v) * b.e + std::fabs(b.v) * a.e + a.e * b.e);
}
inline Num operator/(Num a, Num b) {
  const Real least = std::fabs(b.v) - b.e;  // where it may be 0, there is no bound
  const Real e = least > 0 ? (a.e + std::fabs(a.v / b.v) * b.e) / least : std::numeric_limits<Real>::infinity();
  return rounded(a.v / b.v, e);
}
inline Num root(Num a) {
  const Real v = std::sqrt(std::max<Real>(a.v, 0));
  return rounded(v, a.v > a.e ? a.e / v : std::numeric_limits<Real>::infinity());
}
inline Num log_plus_one(Num a) { return rounded(std::log1p(a.v), a.e / (1 + a.v) + kUnit * std::log1p(a.v)); }
inline Num absolute(Num a) { return {std::fabs(a.v), a.e}; }

// A sum in any order.
class Sum {
 public:
  void add(Num a) {
    v_ += a.v;
    e_ += a.e;
    size_ += std::fabs(a.v);
    ++terms_;
  }
  operator Num() const { return {v_, e_ + terms_ * kUnit * size_}; }
  Real size() const { return size_; }  // of all terms

 private:
  Real v_ = 0, e_ = 0, size_ = 0;
  int64_t terms_ = 0;
};

// A number and its derivatives, by a camera's tangent and then by the point.
constexpr int kInputs = kMostParameters + 3;
struct Dual {
  Num v;
  Num d[kInputs];
};
inline Dual constant(Num v) {
  Dual out;
  out.v = v;
  return out;
}
inline Dual input(Num v, int i) {
  Dual out = constant(v);
  out.d[i] = exact(1);
  return out;
}
template <class F>
inline Dual each(Num v, const F& f) {
  Dual out;
  out.v = v;
  for (int i = 0; i < kInputs; ++i) out.d[i] = f(i);
  return out;
}
inline Dual operator+(const Dual& a, const Dual& b) {
  return each(a.v + b.v, [&](int i) { return a.d[i] + b.d[i]; });
}
inline Dual operator-(const Dual& a, const Dual& b) {
  return each(a.v - b.v, [&](int i) { return a.d[i] - b.d[i]; });
}
inline Dual operator*(const Dual& a, const Dual& b) {
  return each(a.v * b.v, [&](int i) { return a.v * b.d[i] + a.d[i] * b.v; });
}
inline Dual operator/(const Dual& a, const Dual& b) {
  const Num q = a.v / b.v;
  return each(q, [&](int i) { return (a.d[i] - q * b.d[i]) / b.v; });
}

const Dual kOne = constant(exact(1)), kTwo = constant(exact(2));

// f, with as many components as the model has of each.
void project(Model model, const Dual* k, const Dual& x, const Dual& y, Dual (&pixel)[2]) {
  const Dual n = x * x + y * y;
  switch (model) {
    case Model::snavely: {
      const Dual factor = kOne + n * (k[1] + k[2] * n);
      pixel[0] = k[0] * x * factor, pixel[1] = k[0] * y * factor;
      return;
    }
    case Model::simple_pinhole: pixel[0] = k[0] * x + k[1], pixel[1] = k[0] * y + k[2]; return;
    case Model::pinhole: pixel[0] = k[0] * x + k[2], pixel[1] = k[1] * y + k[3]; return;
    case Model::simple_radial:
    case Model::radial: {
      const Dual factor = kOne + n * (model == Model::radial ? k[3] + k[4] * n : k[3]);
      pixel[0] = k[0] * x * factor + k[1], pixel[1] = k[0] * y * factor + k[2];
      return;
    }
    case Model::opencv: {
      const Dual factor = kOne + n * (k[4] + k[5] * n), xy = kTwo * x * y;
      pixel[0] = k[0] * (x * factor + k[6] * xy + k[7] * (n + kTwo * x * x)) + k[2];
      pixel[1] = k[1] * (y * factor + k[7] * xy + k[6] * (n + kTwo * y * y)) + k[3];
      return;
    }
    case Model::position: std::abort();
  }
}

// By rows, of a vector or a quaternion of any norm.
void rotation_of(bool quaternion, const Real* numbers, Real (&r)[3][3]) {
  Real q[4];
  if (quaternion) {
    Real norm = 0;
    for (int i = 0; i < 4; ++i) norm += numbers[i] * numbers[i];
    for (int i = 0; i < 4; ++i) q[i] = numbers[i] / std::sqrt(norm);
  } else {
    const Real angle = std::sqrt(numbers[0] * numbers[0] + numbers[1] * numbers[1] + numbers[2] * numbers[2]);
    q[0] = std::cos(angle / 2);
    for (int i = 0; i < 3; ++i) q[1 + i] = angle > 0 ? std::sin(angle / 2) / angle * numbers[i] : 0;
  }
  const auto [w, x, y, z] = q;
  const Real rows[3][3] = {{w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)},
                           {2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)},
                           {2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z}};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) r[i][j] = rows[i][j];
}

double value_at(bool is_double, const void* data, int64_t i) {
  return is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
}
void set(bool is_double, void* data, int64_t i, double value) {
  if (is_double)
    static_cast<double*>(data)[i] = value;
  else
    static_cast<float*>(data)[i] = static_cast<float>(value);
}

double uniform(Random& random) { return static_cast<double>(below(random, 1 << 20)) / (1 << 19) - 1; }  // -1 to 1

struct Case {
  Case(Random& r, const Cpu& c) : random(r), cpu(c) {
    model = static_cast<Model>(below(random, 7));
    loss = static_cast<Loss>(below(random, 5));
    quaternion = model != Model::position && below(random, 2);
    is_double = below(random, 2);
    with_depth = model != Model::position && below(random, 2);
    with_fixed = below(random, 2);
    tame = below(random, 4) != 0;
    guarded = below(random, 2);
    cameras = pick(random, {1, 1, 2, 3, 4, 5});
    const int64_t points = pick(random, {0, 1, 2, 3, 5, 8, 12});
    const bool dense = below(random, 8) == 0;  // beyond a chunk
    for (int64_t p = 0; p < points; ++p) {
      const int64_t length = dense && below(random, 3) == 0 ? pick(random, {33, 63, 64, 65, 127, 128, 129, 150})
                                                            : pick(random, {0, 1, 1, 2, 2, 3, 4, 5, 8, 9, 17});
      for (int64_t i = 0; i < length; ++i) of_point.push_back(static_cast<int32_t>(p));
      lengths.push_back(length);
    }
    n = num_parameters(model);
    rows = with_depth || model == Model::position ? 3 : 2;
    wide = cpu.pitch_of(model);
    row_alignment = 8 * cpu.pitch;
  }

  int64_t size() const { return is_double ? 8 : 4; }
  int64_t points() const { return static_cast<int64_t>(lengths.size()); }
  int64_t observations() const { return static_cast<int64_t>(of_point.size()); }

  Random& random;
  const Cpu& cpu;
  Model model;
  Loss loss;
  bool quaternion, is_double, with_depth, with_fixed, tame, guarded;
  int64_t cameras, n, rows, wide, row_alignment;
  std::vector<int32_t> of_point;
  std::vector<int64_t> lengths;  // of each point's observations
  int64_t checked = 0;           // numbers that were compared, with a bound
};

[[noreturn]] void fail(const char* what, const Case& c, int64_t i, int64_t j, Real got, Real wanted, Real error) {
  std::fprintf(stderr, "%s of model %d, loss %d%s%s%s%s, %lld cameras, %lld points, %lld observations: ", what,
               static_cast<int>(c.model), static_cast<int>(c.loss), c.quaternion ? ", quaternions" : "",
               c.is_double ? ", double" : "", c.with_depth ? ", depth" : "", c.with_fixed ? ", fixed" : "",
               static_cast<long long>(c.cameras), static_cast<long long>(c.points()),
               static_cast<long long>(c.observations()));
  std::fprintf(stderr, "at %lld, %lld %.17Lg; wanted %.17Lg, give or take %.3Lg\n", static_cast<long long>(i),
               static_cast<long long>(j), got, wanted, error);
  std::exit(1);
}

void expect(const char* what, Case& c, int64_t i, int64_t j, double got, Num wanted, bool stored = false) {
  Real bound = kSlack * wanted.e;
  if (stored && !c.is_double) bound += 0x1p-24L * (std::fabs(wanted.v) + bound) + 0x1p-149L;
  if (!std::isfinite(bound)) return;  // what isn't known at all
  if (!(std::fabs(got - wanted.v) <= bound)) fail(what, c, i, j, got, wanted.v, bound);
  c.checked += bound <= 1e-6L * (1 + std::fabs(wanted.v));
}

// Memory for numbers of the storage type, or of another one.
class Numbers {
 public:
  Numbers(Case& c, int64_t count, bool is_double, int64_t alignment)
      : count(count),
        is_double_(is_double),
        bytes_(count * (is_double ? 8 : 4)),
        buffer_(bytes_, alignment, c.guarded) {
    buffer_.fill(c.random);
  }
  Numbers(Case& c, int64_t count) : Numbers(c, count, c.is_double, c.size()) {}

  void* data() { return buffer_.as<void>(); }
  double* doubles() { return buffer_.as<double>(); }
  double operator[](int64_t i) { return value_at(is_double_, data(), i); }
  void put(int64_t i, double value) { set(is_double_, data(), i, value); }
  void clear() { std::memset(data(), 0, bytes_); }
  std::vector<char> bytes() { return {buffer_.as<char>(), buffer_.as<char>() + bytes_}; }

  const int64_t count;

 private:
  bool is_double_;
  int64_t bytes_;
  Buffer buffer_;
};

// An observation's rows, weighted once that was asked for.
struct Observed {
  Dual rows[3];
  Num depth;  // positive in front
};

class Scene {
 public:
  explicit Scene(Case& c)
      : c(c),
        cameras(c, c.cameras * num_numbers(c.model, c.quaternion)),
        camera_rows(c, c.cameras * kCameraRow, true, 64),
        points(c, c.points() * 3),
        observed(c, c.observations() * num_columns(c.model)),
        depth(c, c.with_depth ? c.observations() : 0),
        camera_(c.observations() * 4, 4, c.guarded),
        of_point_(c.observations() * 4, 4, c.guarded),
        fixed_(c.points(), 1, c.guarded) {
    for (int64_t o = 0; o < c.observations(); ++o) {
      camera_.as<int32_t>()[o] = static_cast<int32_t>(below(c.random, c.cameras));
      of_point_.as<int32_t>()[o] = c.of_point[o];
    }
    for (int64_t p = 0; p < c.points(); ++p) fixed_.as<uint8_t>()[p] = below(c.random, 4) == 0;
    const double focal = pick(c.random, {1.0, 600.0});
    noise = c.model == Model::position ? 0.02 : 0.02 * focal;
    if (c.tame) place(focal);
    problem.model = c.model;
    problem.loss = c.loss;
    problem.loss_scale = c.tame ? noise * pick(c.random, {0.3, 1.0, 3.0}) : pick(c.random, {1e-300, 1.0, 1e300});
    problem.is_double = c.is_double;
    problem.cameras = c.cameras;
    problem.points = c.points();
    problem.observations = c.observations();
    problem.camera_rows = camera_rows.doubles();
    problem.point = points.data();
    problem.observed = observed.data();
    problem.camera = camera_.as<int32_t>();
    problem.of_point = of_point_.as<int32_t>();
    problem.depth = c.with_depth ? depth.data() : nullptr;
    problem.depth_weight = pick(c.random, {0.0, 0.3, 1.0});
    problem.fixed = c.with_fixed ? fixed_.as<uint8_t>() : nullptr;
    problem.radius = c.tame ? pick(c.random, {1e4, 1e4, 1.0, 1e-3, 1e8}) : pick(c.random, {1e-300, 1.0, HUGE_VAL});
    prepare();
    if (c.tame) look();
  }

  int32_t camera(int64_t o) const { return problem.camera[o]; }
  bool is_fixed(int64_t p) const { return problem.fixed && problem.fixed[p]; }

  Observed observe(int64_t o, bool empty = false) {
    Real numbers[4], turn[3][3];
    const int64_t width = num_numbers(c.model, c.quaternion), first = camera(o) * width, p = c.of_point[o];
    Observed out;
    Dual x[3], y[3], seen[3];
    const int by_point = static_cast<int>(c.n);
    for (int i = 0; i < 3; ++i) x[i] = input(exact(points[3 * p + i]), by_point + i);
    for (int i = 0; i < num_columns(c.model); ++i)
      seen[i] = constant(exact(empty ? 0 : observed[o * num_columns(c.model) + i]));
    if (c.model == Model::position) {
      Dual along = constant({}), square = constant({});
      for (int i = 0; i < 3; ++i) {
        y[i] = x[i] - input(exact(cameras[first + i]), i);
        along = along + seen[i] * y[i];
        square = square + y[i] * y[i];
      }
      Dual scale = along / square;
      out.depth = scale.v - exact(kMinScale);
      if (!(scale.v.v > kMinScale)) scale = constant(exact(kMinScale));
      for (int i = 0; i < 3; ++i) out.rows[i] = seen[i] - scale * y[i];
      return out;
    }
    const int used = c.quaternion ? 4 : 3;
    for (int i = 0; i < used; ++i) numbers[i] = cameras[first + i];
    rotation_of(c.quaternion, numbers, turn);
    Dual k[kMostIntrinsics], turned[3], pixel[2];
    // An entry of the matrix is off by some roundings of numbers up to 1.
    for (int i = 0; i < 3; ++i) {
      turned[i] = constant({});
      for (int j = 0; j < 3; ++j) turned[i] = turned[i] + constant({turn[i][j], 4 * kUnit}) * x[j];
    }
    for (int i = 0; i < 3; ++i) {
      const Dual w1 = input({}, (i + 1) % 3), w2 = input({}, (i + 2) % 3);
      y[i] = turned[i] + (w1 * turned[(i + 2) % 3] - w2 * turned[(i + 1) % 3]) +
             input(exact(cameras[first + used + i]), 3 + i);
    }
    for (int i = 0; i < num_intrinsics(c.model); ++i) k[i] = input(exact(cameras[first + used + 3 + i]), 6 + i);
    const Dual z = c.model == Model::snavely ? constant({}) - y[2] : y[2];
    out.depth = z.v;
    project(c.model, k, y[0] / z, y[1] / z, pixel);
    for (int i = 0; i < 2; ++i) out.rows[i] = pixel[i] - seen[i];
    if (c.with_depth && !empty && depth[o] > 0) {
      const Dual weight = constant(exact(problem.depth_weight));
      out.rows[2] = weight * (kOne / z - kOne / constant(exact(depth[o])));
    }
    return out;
  }

  // Its cost; and its rows are weighted.
  Num weigh(Observed& out) const {
    const int with_loss = c.model == Model::position ? 3 : 2;
    Num s;
    for (int r = 0; r < with_loss; ++r) s = s + out.rows[r].v * out.rows[r].v;
    const Num a = exact(problem.loss_scale), square = a * a, one = exact(1), two = exact(2);
    Num rho = s, factor = one;
    switch (c.loss) {
      case Loss::trivial: break;
      case Loss::huber:
        if (s.v > square.v) rho = two * a * root(s) - square, factor = root(a / root(s));
        break;
      case Loss::cauchy:
        rho = square * log_plus_one(s / square);
        factor = one / root(one + s / square);
        break;
      case Loss::soft_l1: {
        const Num norm = root(one + s / square);
        rho = two * square * (norm - one);
        factor = one / root(norm);
        break;
      }
      case Loss::tukey: {
        const Num rest = one - s / square;
        const bool in = s.v <= square.v;
        rho = in ? square / exact(3) * (one - rest * rest * rest) : square / exact(3);
        factor = in ? absolute(rest) : Num{0, s.v < (1 + 1e-9L) * square.v ? rest.e : 0};
        break;
      }
    }
    for (int r = 0; r < with_loss; ++r) {
      out.rows[r].v = factor * out.rows[r].v;
      for (Num& d : out.rows[r].d) d = factor * d;
    }
    Num cost = rho;
    if (c.with_depth) cost = cost + out.rows[2].v * out.rows[2].v;
    return exact(0.5L) * cost;
  }

  std::vector<std::vector<char>> inputs() {
    const auto bytes = [](const Buffer& b, int64_t size) {
      const char* begin = const_cast<Buffer&>(b).as<char>();
      return std::vector<char>(begin, begin + size);
    };
    return {cameras.bytes(),
            camera_rows.bytes(),
            points.bytes(),
            observed.bytes(),
            depth.bytes(),
            bytes(camera_, c.observations() * 4),
            bytes(of_point_, c.observations() * 4),
            bytes(fixed_, c.points())};
  }

  Case& c;
  Numbers cameras, camera_rows, points, observed, depth;
  Problem problem{};
  double noise = 0;

 private:
  // Points around the origin, and cameras some 5 away that have them in front or behind.
  void place(double focal) {
    for (int64_t i = 0; i < points.count; ++i) points.put(i, 0.55 * uniform(c.random));
    const int64_t width = num_numbers(c.model, c.quaternion);
    for (int64_t i = 0; i < c.cameras; ++i) {
      std::vector<double> own;
      if (c.model == Model::position) {
        for (int j = 0; j < 3; ++j) own.push_back(5 * (j == 2 ? 1 : 0.3 * uniform(c.random)));
      } else {
        const double size = c.quaternion ? 1 : pick(c.random, {0.0, 1e-200, 1e-9, 1e-3, 1.0, 3.0, 5.0});
        for (int j = 0; j < (c.quaternion ? 4 : 3); ++j) own.push_back(size * uniform(c.random));
        if (c.quaternion) own[0] += 1.5;
        const double sign = (c.model == Model::snavely ? -1 : 1) * (below(c.random, 4) ? 1 : -1);
        for (int j = 0; j < 2; ++j) own.push_back(0.3 * uniform(c.random));
        own.push_back(sign * (5 + uniform(c.random)));
        const bool two = c.model == Model::pinhole || c.model == Model::opencv;
        for (int j = 0; j < (two ? 2 : 1); ++j) own.push_back(focal * (1.5 + 0.3 * uniform(c.random)));
        if (c.model != Model::snavely)
          for (int j = 0; j < 2; ++j) own.push_back(0.3 * focal * uniform(c.random));
        while (static_cast<int64_t>(own.size()) < width) own.push_back(0.05 * uniform(c.random));
      }
      for (int64_t j = 0; j < width; ++j) cameras.put(i * width + j, own[j]);
    }
  }

  // Observations: what is seen, and noise, and some outliers.
  void look() {
    for (int64_t o = 0; o < c.observations(); ++o) {
      double seen[3];
      if (c.model == Model::position) {
        double square = 0;
        for (int i = 0; i < 3; ++i) {
          seen[i] = points[c.of_point[o] * 3 + i] - cameras[camera(o) * 3 + i];
          square += seen[i] * seen[i];
        }
        const double sign = below(c.random, 5) ? 1 : -1;
        for (double& v : seen) v *= sign / std::sqrt(square);
      } else {
        const Observed there = observe(o, true);
        for (int i = 0; i < 2; ++i) seen[i] = static_cast<double>(there.rows[i].v.v);
        if (c.with_depth) {
          const double z = static_cast<double>(std::fabs(there.depth.v));
          depth.put(o, pick(c.random, {z, 1.05 * z, 0.9 * z, 0.0, -1.0, std::nan("")}));
        }
      }
      const double size = noise * (below(c.random, 7) ? 1 : 30);
      for (int i = 0; i < num_columns(c.model); ++i)
        observed.put(o * num_columns(c.model) + i, seen[i] + size * uniform(c.random));
    }
  }

  // Some cameras at a time.
  void prepare() {
    const int64_t width = num_numbers(c.model, c.quaternion) * c.size();
    for (int64_t begin = 0, end; begin < c.cameras; begin = end) {
      end = begin + 1 + below(c.random, c.cameras - begin);
      c.cpu.prepare(c.model, c.quaternion, c.is_double, static_cast<char*>(cameras.data()) + begin * width, end - begin,
                    camera_rows.doubles() + begin * kCameraRow);
    }
  }

  Buffer camera_, of_point_, fixed_;
};

using Ranges = std::vector<std::pair<int64_t, int64_t>>;

// Of [0, n), cut anywhere or at some of the ends of points, in any order.
Ranges ranges_of(const Case& c, bool at_points) {
  std::vector<int64_t> ends;
  if (at_points) {
    for (int64_t p = 0, o = 0; p < c.points(); ++p) ends.push_back(o += c.lengths[p]);
  } else {
    for (int64_t o = 1; o <= c.observations(); ++o) ends.push_back(o);
  }
  Ranges found;
  const int64_t chance = pick(c.random, {0, 1, 4, 8});
  int64_t begin = 0;
  for (int64_t end : ends)
    if (end > begin && (end == c.observations() || below(c.random, 8) < chance)) {
      found.emplace_back(begin, end);
      begin = end;
    }
  std::shuffle(found.begin(), found.end(), c.random);
  return found;
}

void run_in_any_order(Case& c, Scene& scene) {
  const int64_t count = c.observations(), rows = c.rows, n = c.n;
  const bool with_jacobian = below(c.random, 2);
  Numbers residual(c, count * rows), jac_camera(c, with_jacobian ? count * rows * n : 0),
      jac_point(c, with_jacobian ? count * rows * 3 : 0);
  Buffer valid(count, 1, c.guarded);
  for (const auto& [o0, o1] : ranges_of(c, false))
    c.cpu.residual(scene.problem, o0, o1, residual.data(), valid.as<bool>(),
                   with_jacobian ? jac_camera.data() : nullptr, with_jacobian ? jac_point.data() : nullptr);
  double cost = c.cpu.cost(scene.problem, 0, 0);
  if (cost != 0) fail("cost of nothing", c, 0, 0, cost, 0, 0);
  for (const auto& [o0, o1] : ranges_of(c, false)) cost += c.cpu.cost(scene.problem, o0, o1);
  Sum wanted;
  for (int64_t o = 0; o < count; ++o) {
    const bool is_valid = valid.as<bool>()[o];
    if (valid.as<uint8_t>()[o] > 1) fail("a valid that is no bool", c, o, 0, valid.as<uint8_t>()[o], 1, 0);
    if (!c.tame) continue;
    Observed one = scene.observe(o);
    if (is_valid != (one.depth.v > 0)) fail("valid", c, o, 0, is_valid, one.depth.v, 0);
    for (int64_t r = 0; r < rows; ++r) {
      expect("residual", c, o, r, residual[o * rows + r], one.rows[r].v, true);
      if (!with_jacobian) continue;
      for (int64_t i = 0; i < n; ++i)
        expect("by camera", c, o, r * n + i, jac_camera[(o * rows + r) * n + i], one.rows[r].d[i], true);
      for (int64_t i = 0; i < 3; ++i)
        expect("by point", c, o, r * 3 + i, jac_point[(o * rows + r) * 3 + i], one.rows[r].d[n + i], true);
    }
    wanted.add(scene.weigh(one));
  }
  if (c.tame) expect("cost", c, 0, 0, cost, wanted);
}

// The normal equations, of tame numbers.
struct System {
  System(Case& c, Scene& scene)
      : gradient(c.cameras * c.n),
        hessian(c.cameras * c.n * c.n),
        point_gradient(c.points() * 3),
        point_hessian(c.points() * 9),
        coupling(c.cameras * c.points() * c.n * 3) {
    const int64_t n = c.n;
    for (int64_t o = 0; o < c.observations(); ++o) {
      Observed one = scene.observe(o);
      cost.add(scene.weigh(one));
      const int64_t a = scene.camera(o), p = c.of_point[o];
      for (int64_t r = 0; r < c.rows; ++r) {
        const Dual& row = one.rows[r];
        for (int64_t i = 0; i < n; ++i) {
          gradient[a * n + i].add(row.d[i] * row.v);
          for (int64_t j = 0; j < n; ++j) hessian[(a * n + i) * n + j].add(row.d[i] * row.d[j]);
          for (int64_t j = 0; j < 3; ++j) coupling[((a * c.points() + p) * n + i) * 3 + j].add(row.d[i] * row.d[n + j]);
        }
        for (int64_t i = 0; i < 3; ++i) {
          point_gradient[p * 3 + i].add(row.d[n + i] * row.v);
          for (int64_t j = 0; j < 3; ++j) point_hessian[p * 9 + i * 3 + j].add(row.d[n + i] * row.d[n + j]);
        }
      }
      observed.push_back(one);
    }
    for (int64_t p = 0; p < c.points(); ++p) invert(c, scene, p);
  }

  // V^-1 of a damped point, by its Cholesky factor; zero for one that makes no step.
  void invert(const Case& c, const Scene& scene, int64_t p) {
    std::vector<Num> out(9);
    if (c.lengths[p] > 0 && !scene.is_fixed(p)) {
      Num l[3][3], f[3][3];
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j <= i; ++j) {
          Num left = point_hessian[p * 9 + i * 3 + j];
          if (i == j) left = left + (left.v < kMinDiagonal ? exact(kMinDiagonal) : left) / exact(scene.problem.radius);
          for (int k = 0; k < j; ++k) left = left - l[i][k] * l[j][k];
          l[i][j] = i == j ? root(left) : left / l[j][j];
        }
      for (int j = 0; j < 3; ++j)
        for (int i = j; i < 3; ++i) {
          Num left = exact(i == j);
          for (int k = j; k < i; ++k) left = left - l[i][k] * f[k][j];
          f[i][j] = left / l[i][i];
        }
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
          for (int k = std::max(i, j); k < 3; ++k) out[i * 3 + j] = out[i * 3 + j] + f[k][i] * f[k][j];
    }
    inverse.insert(inverse.end(), out.begin(), out.end());
  }

  Num w(const Case& c, int64_t a, int64_t p, int64_t i, int64_t j) const {
    return coupling[((a * c.points() + p) * c.n + i) * 3 + j];
  }
  Real size_of_w(const Case& c, int64_t a, int64_t p, int64_t i, int64_t j) const {
    return coupling[((a * c.points() + p) * c.n + i) * 3 + j].size();
  }
  Num v_inverse(int64_t p, int64_t i, int64_t j) const { return inverse[p * 9 + i * 3 + j]; }

  // V^-1 b of a point.
  void solve(int64_t p, const Num (&b)[3], Num (&x)[3]) const {
    for (int i = 0; i < 3; ++i)
      x[i] = v_inverse(p, i, 0) * b[0] + v_inverse(p, i, 1) * b[1] + v_inverse(p, i, 2) * b[2];
  }

  // W^T x of a point.
  void transposed(const Case& c, int64_t p, Numbers& x, Num (&out)[3]) const {
    for (int j = 0; j < 3; ++j) {
      Sum sum;
      for (int64_t a = 0; a < c.cameras; ++a)
        for (int64_t i = 0; i < c.n; ++i) sum.add(w(c, a, p, i, j) * exact(x[a * c.wide + i]));
      out[j] = sum;
    }
  }

  Sum cost;
  std::vector<Sum> gradient, hessian, point_gradient, point_hessian, coupling;
  std::vector<Num> inverse;
  std::vector<Observed> observed;  // weighted
};

// What each part adds up, and all of them together.
class Parts {
 public:
  Parts(Case& c, size_t parts, int64_t rows, int64_t width) : rows_(rows), width_(width), total(rows * width) {
    for (size_t i = 0; i < parts; ++i) {
      memory_.push_back(new Numbers(c, rows * width, true, c.row_alignment));
      memory_.back()->clear();
    }
  }
  ~Parts() {
    for (Numbers* m : memory_) delete m;
  }
  Parts(const Parts&) = delete;
  double* part(size_t i) { return memory_[i]->doubles(); }
  void add_up() {
    for (Numbers* m : memory_)
      for (int64_t i = 0; i < rows_ * width_; ++i) total[i] += (*m)[i];
  }
  double at(int64_t row, int64_t i) const { return total[row * width_ + i]; }

 private:
  int64_t rows_, width_;
  std::vector<Numbers*> memory_;

 public:
  std::vector<double> total;
};

// Blocks [count, n, n] of all parts.
std::vector<double> unpacked(Case& c, Parts& blocks, size_t parts, int64_t count) {
  std::vector<double> out(count * c.n * c.n);
  for (size_t i = 0; i < parts; ++i) {
    Numbers to(c, count * c.n * c.n, true, 8);
    to.clear();
    const int64_t some = below(c.random, count + 1), size = c.cpu.block_size(c.model);
    c.cpu.add_blocks(c.model, blocks.part(i), some, to.doubles());
    c.cpu.add_blocks(c.model, blocks.part(i) + some * size, count - some, to.doubles() + some * c.n * c.n);
    for (size_t j = 0; j < out.size(); ++j) out[j] += to[static_cast<int64_t>(j)];
  }
  return out;
}

void run_build(Case& c, Scene& scene, const System* system) {
  const Ranges ranges = ranges_of(c, true);
  const size_t parts = ranges.size();
  Parts gradients(c, parts, c.cameras, c.wide), hessians(c, parts, c.cameras, c.cpu.block_size(c.model));
  Numbers point_gradient(c, c.points() * 3, true, 8), point_hessian(c, c.points() * 9, true, 8);
  point_gradient.clear(), point_hessian.clear();
  double cost = 0;
  for (size_t i = 0; i < parts; ++i) {
    CameraSums sums{};
    sums.gradient = gradients.part(i), sums.blocks = hessians.part(i);
    c.cpu.build(scene.problem, ranges[i].first, ranges[i].second, sums, point_gradient.doubles(),
                point_hessian.doubles());
    cost += sums.cost;
  }
  gradients.add_up();
  const std::vector<double> hessian = unpacked(c, hessians, parts, c.cameras);
  if (!system) return;
  expect("cost of build", c, 0, 0, cost, system->cost);
  for (int64_t a = 0; a < c.cameras; ++a)
    for (int64_t i = 0; i < c.n; ++i) {
      expect("gradient of build", c, a, i, gradients.at(a, i), system->gradient[a * c.n + i]);
      for (int64_t j = 0; j < c.n; ++j) {
        const int64_t at = (a * c.n + i) * c.n + j;
        expect("hessian of build", c, a, i * c.n + j, hessian[at], system->hessian[at]);
      }
    }
  for (int64_t i = 0; i < c.points() * 3; ++i)
    expect("point's gradient", c, i / 3, i % 3, point_gradient[i], system->point_gradient[i]);
  for (int64_t i = 0; i < c.points() * 9; ++i)
    expect("point's hessian", c, i / 9, i % 9, point_hessian[i], system->point_hessian[i]);
}

void run_schur(Case& c, Scene& scene, const System* system) {
  const Ranges ranges = ranges_of(c, true);
  const size_t parts = ranges.size();
  // Some pairs, or the diagonal ones. Above the diagonal nobody looks.
  const bool with_pairs = below(c.random, 3) != 0;
  std::vector<std::pair<int64_t, int64_t>> pairs;
  Buffer table(with_pairs ? c.cameras * c.cameras * 4 : 0, 4, c.guarded);
  const int64_t chance = pick(c.random, {0, 4, 8, 8});
  for (int64_t a = 0; a < c.cameras; ++a)
    for (int64_t b = 0; b < c.cameras; ++b) {
      const bool wanted = with_pairs ? b <= a && below(c.random, 8) < chance : a == b;
      if (with_pairs)
        table.as<int32_t>()[a * c.cameras + b] = b > a ? INT32_MAX : wanted ? static_cast<int32_t>(pairs.size()) : -1;
      if (wanted) pairs.emplace_back(a, b);
    }
  const auto count = static_cast<int64_t>(pairs.size());
  Parts gradients(c, parts, c.cameras, c.wide), rhs(c, parts, c.cameras, c.wide),
      diagonals(c, parts, c.cameras, c.wide), blocks(c, parts, count, c.cpu.block_size(c.model));
  double cost = 0, most = 0;
  for (size_t i = 0; i < parts; ++i) {
    CameraSums sums{};
    sums.gradient = gradients.part(i), sums.rhs = rhs.part(i), sums.diagonal = diagonals.part(i);
    sums.blocks = blocks.part(i);
    sums.block_of = with_pairs ? table.as<int32_t>() : nullptr;
    c.cpu.schur(scene.problem, ranges[i].first, ranges[i].second, sums);
    cost += sums.cost;
    if (!(sums.most <= most)) most = sums.most;
  }
  gradients.add_up(), rhs.add_up(), diagonals.add_up();
  const std::vector<double> values = unpacked(c, blocks, parts, count);
  if (!system) return;
  const int64_t n = c.n;
  expect("cost of schur", c, 0, 0, cost, system->cost);
  Num largest;
  for (int64_t p = 0; p < c.points(); ++p)
    for (int64_t i = 0; i < 3 && !scene.is_fixed(p); ++i) {
      const Num size = absolute(system->point_gradient[p * 3 + i]);
      largest = {std::max(largest.v, size.v), std::max(largest.e, size.e)};
    }
  expect("largest gradient", c, 0, 0, most, largest);
  for (int64_t a = 0; a < c.cameras; ++a)
    for (int64_t i = 0; i < n; ++i) {
      const Num gradient = system->gradient[a * n + i];
      expect("gradient of schur", c, a, i, gradients.at(a, i), gradient);
      expect("diagonal", c, a, i, diagonals.at(a, i), system->hessian[(a * n + i) * n + i]);
      Sum right;
      right.add(-gradient);
      for (int64_t p = 0; p < c.points(); ++p) {
        const Num b[3] = {system->point_gradient[p * 3], system->point_gradient[p * 3 + 1],
                          system->point_gradient[p * 3 + 2]};
        Num x[3];
        system->solve(p, b, x);
        for (int j = 0; j < 3; ++j) right.add(system->w(c, a, p, i, j) * x[j]);
      }
      expect("rhs", c, a, i, rhs.at(a, i), right);
    }
  for (int64_t block = 0; block < count; ++block) {
    const auto [a, b] = pairs[block];
    std::vector<Sum> s(n * n);
    std::vector<Real> size(n * n);  // of all terms
    int64_t terms = 0;              // as the kernels have them: one for each pair of a point's observations
    for (int64_t i = 0; i < n * n && a == b; ++i) {
      s[i].add(system->hessian[a * n * n + i]);
      size[i] = system->hessian[a * n * n + i].size();
    }
    for (int64_t p = 0; p < c.points(); ++p) {
      terms += c.lengths[p] * c.lengths[p];
      for (int64_t i = 0; i < n; ++i) {
        const Num of_row[3] = {system->w(c, a, p, i, 0), system->w(c, a, p, i, 1), system->w(c, a, p, i, 2)};
        Num x[3];
        Real of_x[3] = {};
        system->solve(p, of_row, x);
        for (int k = 0; k < 3; ++k)
          for (int l = 0; l < 3; ++l)
            of_x[k] += std::fabs(system->v_inverse(p, k, l).v) * system->size_of_w(c, a, p, i, l);
        for (int64_t j = 0; j < n; ++j)
          for (int k = 0; k < 3; ++k) {
            s[i * n + j].add(-(x[k] * system->w(c, b, p, j, k)));
            size[i * n + j] += of_x[k] * system->size_of_w(c, b, p, j, k);
          }
      }
    }
    for (int64_t i = 0; i < n * n; ++i) {
      const Num sum = s[i];
      expect("block of S", c, block, i, values[block * n * n + i], {sum.v, sum.e + terms * kUnit / kSlack * size[i]});
    }
  }
}

void run_with_step(Case& c, Scene& scene, const System* system) {
  const Ranges ranges = ranges_of(c, true);
  const int64_t n = c.n;
  Numbers x(c, c.cameras * c.wide, true, c.row_alignment), point_step(c, c.points() * 3, true, 8);
  for (int64_t i = 0; i < c.cameras * c.wide; ++i)
    if (c.tame || i % c.wide >= n) x.put(i, i % c.wide < n ? 0.01 * uniform(c.random) : 0);
  const auto before = x.bytes();
  Parts sums(c, ranges.size(), c.cameras, c.wide);
  point_step.clear();
  double change = 0;
  for (size_t i = 0; i < ranges.size(); ++i) {
    c.cpu.schur_mv(scene.problem, ranges[i].first, ranges[i].second, x.doubles(), sums.part(i));
    change += c.cpu.backsubstitute(scene.problem, ranges[i].first, ranges[i].second, x.doubles(), point_step.doubles());
  }
  if (x.bytes() != before) fail("step that was read", c, 0, 0, 0, 0, 0);
  sums.add_up();
  if (!system) return;
  std::vector<Sum> y(c.cameras * n);
  std::vector<Num> steps(c.points() * 3);
  for (int64_t a = 0; a < c.cameras; ++a)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) y[a * n + i].add(system->hessian[(a * n + i) * n + j] * exact(x[a * c.wide + j]));
  for (int64_t p = 0; p < c.points(); ++p) {
    Num b[3], solved[3], right[3];
    system->transposed(c, p, x, b);
    system->solve(p, b, solved);
    for (int64_t a = 0; a < c.cameras; ++a)
      for (int64_t i = 0; i < n; ++i)
        for (int j = 0; j < 3; ++j) y[a * n + i].add(-(system->w(c, a, p, i, j) * solved[j]));
    for (int j = 0; j < 3; ++j) right[j] = b[j] + system->point_gradient[p * 3 + j];
    system->solve(p, right, solved);
    for (int j = 0; j < 3; ++j) {
      steps[p * 3 + j] = -solved[j];
      expect("step of a point", c, p, j, point_step[p * 3 + j], steps[p * 3 + j]);
    }
  }
  for (int64_t i = 0; i < c.cameras * n; ++i) expect("S x", c, i / n, i % n, sums.at(i / n, i % n), y[i]);
  Sum promised;
  for (int64_t o = 0; o < c.observations(); ++o)
    for (int64_t r = 0; r < c.rows; ++r) {
      const Dual& row = system->observed[o].rows[r];
      Num after = row.v;
      for (int64_t i = 0; i < n; ++i) after = after + row.d[i] * exact(x[scene.camera(o) * c.wide + i]);
      for (int64_t i = 0; i < 3; ++i) after = after + row.d[n + i] * steps[c.of_point[o] * 3 + i];
      promised.add(exact(0.5L) * (row.v - after) * (row.v + after));
    }
  expect("change of the model", c, 0, 0, change, promised);
}

void run_retract(Case& c, Scene& scene) {
  const int64_t n = c.n, width = num_numbers(c.model, c.quaternion);
  const bool in_place = below(c.random, 2);
  Numbers steps(c, c.cameras * n, true, 8), from(c, c.cameras * width), to(c, in_place ? 0 : c.cameras * width);
  std::memcpy(from.data(), scene.cameras.data(), c.cameras * width * c.size());
  if (c.tame)
    for (int64_t i = 0; i < steps.count; ++i)
      steps.put(i, pick(c.random, {0.0, 1e-200, 1e-9, 1e-5, 0.3, 2.0}) * uniform(c.random));
  Numbers& out = in_place ? from : to;
  for (int64_t begin = 0, end; begin < c.cameras; begin = end) {
    end = begin + 1 + below(c.random, c.cameras - begin);
    c.cpu.retract(c.model, c.quaternion, c.is_double, static_cast<char*>(from.data()) + begin * width * c.size(),
                  steps.doubles() + begin * n, end - begin, static_cast<char*>(out.data()) + begin * width * c.size());
  }
  if (!c.tame) return;
  // A rotation is off by some roundings of numbers up to 1, and by that of what is stored, up to pi.
  const Real off = 64 * kUnit + (c.is_double ? 0 : 8 * 0x1p-24L);
  const int64_t used = width - n + 3 - (c.model == Model::position ? 3 : 0);
  for (int64_t a = 0; a < c.cameras; ++a) {
    if (c.model != Model::position) {
      Real before[4], step[3], after[4], r[3][3], w[3][3], found[3][3];
      for (int64_t i = 0; i < used; ++i) before[i] = scene.cameras[a * width + i], after[i] = out[a * width + i];
      for (int i = 0; i < 3; ++i) step[i] = steps[a * n + i];
      rotation_of(c.quaternion, before, r);
      rotation_of(false, step, w);
      rotation_of(c.quaternion, after, found);
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
          const Real wanted = w[i][0] * r[0][j] + w[i][1] * r[1][j] + w[i][2] * r[2][j];
          if (!(std::fabs(found[i][j] - wanted) <= off)) fail("rotation", c, a, i * 3 + j, found[i][j], wanted, off);
        }
      Real norm = 0;
      for (int64_t i = 0; i < used; ++i) norm += after[i] * after[i];
      norm = std::sqrt(norm);
      const Real most = c.quaternion ? 1 : 3.14159265358979323846L;
      if (!(norm <= most + off) || (c.quaternion && norm < 1 - off)) fail("norm", c, a, 0, norm, most, off);
    }
    const int64_t rest = width - used, of_step = n - rest;
    for (int64_t i = 0; i < rest; ++i) {
      const Num sum = exact(scene.cameras[a * width + used + i]) + exact(steps[a * n + of_step + i]);
      expect("rest of a camera", c, a, i, out[a * width + used + i], sum, true);
    }
  }
}

// What csrc/ asks of indices before it hands them on.
void run_checks(Case& c) {
  const int64_t count = below(c.random, 200);
  Buffer index(count * 4, 4, c.guarded);
  index.fill(c.random);
  auto* const number = index.as<uint32_t>();
  const uint32_t limit = pick(c.random, {1u, 7u, 1u << 30});
  bool inside = true, rises = true;
  int32_t before = INT32_MIN;
  const bool wild = below(c.random, 2), sorted = below(c.random, 2);
  for (int64_t i = 0; i < count; ++i)
    if (!wild) number[i] %= limit;
  if (sorted)
    std::sort(index.as<int32_t>(), index.as<int32_t>() + count);
  else if (count > 0 && below(c.random, 2))
    std::fill_n(number, count, limit - 1), number[below(c.random, count)] = pick(c.random, {limit, limit - 1, ~0u});
  for (int64_t i = 0; i < count; ++i) {
    const int32_t now = index.as<int32_t>()[i];
    inside &= now >= 0 && static_cast<uint32_t>(now) < limit;
    rises &= now >= before;
    before = now;
  }
  if (c.cpu.in_range(number, count, limit) != inside) fail("in_range", c, count, limit, !inside, inside, 0);
  if (c.cpu.ascending(index.as<int32_t>(), count) != rises) fail("ascending", c, count, 0, !rises, rises, 0);
}

}  // namespace

int main(int argc, char** argv) {
  auto [cpu, cases, random] = effk::fuzz::arguments<Cpu>("ba", argc, argv, {&cpu_scalar, &cpu_avx2, &cpu_avx512});
  int64_t seen = 0, of_tame = 0, dense = 0, numbers = 0;
  for (int64_t i = 0; i < cases; ++i) {
    Case c(random, *cpu);
    Scene scene(c);
    const auto before = scene.inputs();
    run_in_any_order(c, scene);
    const System* const system = c.tame ? new System(c, scene) : nullptr;
    run_build(c, scene, system);
    run_schur(c, scene, system);
    run_with_step(c, scene, system);
    delete system;
    run_retract(c, scene);
    run_checks(c);
    if (scene.inputs() != before) fail("inputs", c, 0, 0, 0, 0, 0);
    seen += c.observations() > 0;
    of_tame += c.tame;
    dense += std::any_of(c.lengths.begin(), c.lengths.end(), [](int64_t length) { return length > 64; });
    numbers += c.checked;
  }
  std::printf("observed %lld tame %lld dense %lld numbers %lld\n", static_cast<long long>(seen),
              static_cast<long long>(of_tame), static_cast<long long>(dense), static_cast<long long>(numbers));
}
