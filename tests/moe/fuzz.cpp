// Feeds the CPU kernels of moe rows, weights and pairs of any sizes and strides, without torch, under AddressSanitizer.
//   fuzz_moe LEVEL CASES SEED
// Each buffer has exactly the size that moe.h gives it, and no better alignment than csrc/ promises. In every other
// case it ends at an unmapped page (which also catches what the sanitizer doesn't instrument, such as masked loads),
// in the rest the sanitizer's own red zones surround it. Units, rows and tokens are shared out in random ranges, in
// random order, as threads may do it. What must not be read holds NaN, what must not be written is compared, and
// results are compared with sums in double, within a bound.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../kernels/common/cpu_level.h"
#include "../../kernels/common/float_bits.h"
#include "../../kernels/moe/moe.h"
#include "../../kernels/moe/sort.h"
#include "../kit/fuzzing.h"

using namespace effk::moe;
using namespace effk::fuzz;
using effk::Type;
using effk::type_size;

namespace {

constexpr double kUnit = 0x1p-24, kUnderflow = 0x1p-149, kFlush = 0x1p-126;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr int64_t kSides[] = {0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 24, 31, 32, 33, 47, 64, 65};
constexpr int64_t kCounts[] = {0, 0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 24, 31, 33};
constexpr int64_t kGaps[] = {0, 0, 1, 3, 64};  // between two rows

struct Case {
  Random& random;
  const Cpu& cpu;
  Type type;
  bool tame;  // small numbers, whose sums are checked; or else any bits
  bool guarded;
};

[[noreturn]] void fail(const char* what, const Case& c, int64_t i, int64_t j, double got, double wanted, double error) {
  std::fprintf(stderr, "%s of type %d: at %lld, %lld %.9g; wanted %.9g, give or take %.3g\n", what,
               static_cast<int>(c.type), static_cast<long long>(i), static_cast<long long>(j), got, wanted, error);
  std::exit(1);
}

double value_at(Type type, const void* data, int64_t i) {
  switch (type) {
    case Type::f32: return static_cast<const float*>(data)[i];
    case Type::f16: return effk::to_float(static_cast<const effk::Half*>(data)[i]);
    case Type::bf16: return effk::to_float(static_cast<const effk::BFloat16*>(data)[i]);
    case Type::i8: break;
  }
  std::abort();
}

void set(Type type, void* data, int64_t i, float value) {
  if (type == Type::f32) effk::from_float(value, static_cast<float*>(data) + i);
  if (type == Type::f16) effk::from_float(value, static_cast<effk::Half*>(data) + i);
  if (type == Type::bf16) effk::from_float(value, static_cast<effk::BFloat16*>(data) + i);
}

float tame_float(Random& random) { return static_cast<float>(below(random, 4097) - 2048) / 2048; }
float any_float(Random& random) { return effk::float_of(static_cast<uint32_t>(random())); }
float factor(const Case& c) { return c.tame ? 4 * tame_float(c.random) : any_float(c.random); }

// Numbers of one type: n of them, filled.
class Array {
 public:
  Array(const Case& c, Type type, int64_t n)
      : type_(type), n_(n), buffer_(n * type_size(type), type_size(type), c.guarded) {
    buffer_.fill(c.random);
    if (c.tame)
      for (int64_t i = 0; i < n; ++i) set(type_, data(), i, tame_float(c.random));
  }
  void* data() { return buffer_.as<void>(); }
  double operator[](int64_t i) { return value_at(type_, data(), i); }
  void spoil(int64_t i, int64_t n) {
    for (int64_t end = i + n; i < end; ++i) set(type_, data(), i, kNan);
  }
  std::vector<char> bytes() {
    const char* begin = buffer_.as<char>();
    return {begin, begin + n_ * type_size(type_)};
  }

 private:
  Type type_;
  int64_t n_;
  Buffer buffer_;
};

// Rows that a stride is between, in an array that ends with the last.
struct Matrix : Array {
  Matrix(const Case& c, Type type, int64_t rows, int64_t cols, int64_t gap)
      : Array(c, type, rows > 0 && cols > 0 ? (rows - 1) * (cols + gap) + cols : 0),
        rows(rows),
        cols(cols),
        stride(cols + gap) {}
  double at(int64_t row, int64_t col) { return (*this)[row * stride + col]; }
  void spoil_row(int64_t row) { spoil(row * stride, cols); }
  int64_t rows, cols, stride;
};

// Weights of all experts, likewise.
struct Weights : Array {
  Weights(const Case& c, int64_t experts, int64_t rows, int64_t cols)
      : Weights(c, experts, rows, cols, cols + pick(c.random, kGaps), pick(c.random, kGaps)) {}
  Weights(const Case& c, int64_t experts, int64_t rows, int64_t cols, int64_t stride, int64_t gap)
      : Array(c, c.type,
              experts > 0 && rows > 0 && cols > 0 ? (experts - 1) * (rows * stride + gap) + (rows - 1) * stride + cols
                                                  : 0),
        rows(rows),
        cols(cols),
        stride(stride),
        expert(rows * stride + gap) {}
  double at(int64_t e, int64_t row, int64_t col) { return (*this)[e * expert + row * stride + col]; }
  void spoil_expert(int64_t e) {
    for (int64_t row = 0; row < rows; ++row) spoil(e * expert + row * stride, cols);
  }
  void into(Operands& in) { in.w = data(), in.w_expert = expert, in.w_stride = stride; }
  int64_t rows, cols, stride, expert;
};

// f(begin, end) for parts of [0, n), in any order, that begin at multiples of `step`.
template <class F>
void for_ranges(Random& random, int64_t n, const F& f, int64_t step = 1) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  const int64_t steps = (n + step - 1) / step;
  for (int64_t begin = 0, end; begin < steps; begin = end) {
    end = begin + 1 + below(random, steps - begin);
    ranges.emplace_back(begin * step, std::min(n, end * step));
  }
  std::shuffle(ranges.begin(), ranges.end(), random);
  for (const auto& [begin, end] : ranges) f(begin, end);
}

double rounded(Type type, double magnitude) {
  const double last = type == Type::f32 ? 0x1p-24 : type == Type::f16 ? 0x1p-11 : 0x1p-8;
  return last * magnitude + (type == Type::f16 ? 0x1p-25 : type == Type::bf16 ? 0x1p-134 : kUnderflow);
}

// got is a number within `error` of exact, rounded once to the type.
void expect_near(const char* what, const Case& c, int64_t i, int64_t j, double got, double exact, double error,
                 Type type) {
  if (type == Type::f16 && std::fabs(exact) + error > 65000) return;  // may round to infinity
  const double all = error + (type == Type::f32 ? 0 : rounded(type, std::fabs(exact) + error));
  if (!(std::fabs(got - exact) <= all)) fail(what, c, i, j, got, exact, all);
}

// Relative error of n roundings.
double roundings(int64_t n) { return n * kUnit / (1 - n * kUnit); }

// A sum of products, and how much float32 may lose of it.
struct Sum {
  double value = 0, size = 0, moved = 0;
  int64_t terms = 0;
  void add(double a, double b, double a_error = 0) {
    value += a * b;
    size += (std::fabs(a) + a_error) * std::fabs(b);
    moved += a_error * std::fabs(b);
    ++terms;
  }
  double error(int64_t more = 0) const { return moved + roundings(terms + more) * size; }
};

// Groups of rows, some dense where the level has that, with memory of exactly the size that it asks for.
struct Groups {
  std::vector<Group> list;
  std::vector<std::unique_ptr<Buffer>> panels;

  void add(const Case& c, int64_t expert, int64_t begin, int64_t end, int64_t cols, int64_t inner) {
    list.push_back({expert, begin, end});
    if (!c.cpu.pack || below(c.random, 2)) return;
    Group& group = list.back();
    group.gemm = Gemm::dense;
    group.x_panels = panel(c, end - begin, cols);
    group.h_panels = panel(c, end - begin, inner);
  }
  char* panel(const Case& c, int64_t rows, int64_t cols) {
    panels.push_back(std::make_unique<Buffer>(c.cpu.panel_bytes(c.type, rows, cols), 64, c.guarded));
    panels.back()->fill(c.random);
    return panels.back()->as<char>();
  }
  // Lays out rows, then calls f(group, unit0, unit1).
  template <class F>
  void each(const Case& c, const Operands& in, const F& f) const {
    for (const Group& group : list) {
      const bool dense = group.gemm == Gemm::dense;
      const int64_t count = group.end - group.begin, units = dense ? c.cpu.tiles(count) : count;
      if (dense) for_ranges(c.random, units, [&](int64_t t0, int64_t t1) { c.cpu.pack(in, group, t0, t1); });
      for_ranges(c.random, units, [&](int64_t u0, int64_t u1) { f(group, u0, u1); });
    }
  }
};

// Sorted rows: those of each expert, and of which rows of x they are, some more than once.
struct Sorted {
  std::vector<int64_t> begin, end, source;
  bool gathered;
  int64_t rows, x_rows;

  explicit Sorted(const Case& c) {
    int64_t at = 0;
    for (int64_t e = pick(c.random, {0, 1, 2, 2, 3, 5}); e > 0; --e) {
      begin.push_back(at);
      end.push_back(at += pick(c.random, kCounts));
    }
    rows = at + below(c.random, 3);
    gathered = below(c.random, 2);
    x_rows = gathered ? 1 + below(c.random, rows + 1) : rows;
    for (int64_t i = 0; i < rows; ++i) source.push_back(gathered ? below(c.random, x_rows) : i);
  }
  int64_t experts() const { return static_cast<int64_t>(end.size()); }
  int64_t kept() const { return end.empty() ? 0 : end.back(); }
  // NaN in rows that no expert has.
  void spoil(Matrix& x) const {
    for (int64_t row = 0; row < x.rows; ++row)
      if (std::find(source.begin(), source.begin() + kept(), row) == source.begin() + kept()) x.spoil_row(row);
  }
  Operands operands(const Case& c, Matrix& x) const {
    return {c.type, x.cols, x.data(), x.stride, gathered ? source.data() : nullptr, nullptr, 0, 0};
  }
};

bool run_linear(const Case& c) {
  const Sorted sorted(c);
  const int64_t rows = pick(c.random, kSides), cols = pick(c.random, kSides) + (below(c.random, 200) ? 0 : 1030);
  Matrix x(c, c.type, sorted.x_rows, cols, pick(c.random, kGaps));
  Weights w(c, sorted.experts(), rows, cols);
  const bool with_bias = below(c.random, 2);
  Matrix bias(c, c.type, with_bias ? sorted.experts() : 0, rows, 0);
  const Type out_type = pick(c.random, {c.type, Type::f32, Type::f16, Type::bf16});
  Matrix y(c, out_type, sorted.rows, rows, 0);
  sorted.spoil(x);
  Groups groups;
  for (int64_t e = 0; e < sorted.experts(); ++e)
    if (sorted.end[e] > sorted.begin[e]) {
      groups.add(c, e, sorted.begin[e], sorted.end[e], cols, 0);
    } else {
      w.spoil_expert(e);
      if (with_bias) bias.spoil_row(e);
    }
  const auto x_before = x.bytes(), w_before = w.bytes(), bias_before = bias.bytes(), y_before = y.bytes();
  Operands in = sorted.operands(c, x);
  w.into(in);
  const Linear args{in, rows, with_bias ? bias.data() : nullptr, out_type, y.data()};
  groups.each(c, in, [&](const Group& group, int64_t u0, int64_t u1) {
    for_ranges(c.random, rows, [&](int64_t r0, int64_t r1) { c.cpu.linear(args, group, u0, u1, r0, r1); });
  });
  for (const Group& group : groups.list)
    for (int64_t i = group.begin; c.tame && i < group.end; ++i)
      for (int64_t n = 0; n < rows; ++n) {
        Sum sum;
        for (int64_t k = 0; k < cols; ++k) sum.add(x.at(sorted.source[i], k), w.at(group.expert, n, k));
        if (with_bias) sum.add(bias.at(group.expert, n), 1);
        expect_near("linear", c, i, n, y.at(i, n), sum.value, sum.error(1), out_type);
      }
  const auto y_after = y.bytes();  // of rows that no expert has: as they were
  if (!std::equal(y_after.begin() + sorted.kept() * rows * type_size(out_type), y_after.end(),
                  y_before.begin() + sorted.kept() * rows * type_size(out_type)))
    fail("rows past linear", c, 0, 0, 0, 0, 0);
  if (x.bytes() != x_before || w.bytes() != w_before || bias.bytes() != bias_before)
    fail("inputs of linear", c, 0, 0, 0, 0, 0);
  return sorted.kept() > 0 && rows > 0 && cols > 0;
}

// Ids as sort_pairs() reads them.
struct Ids {
  const std::vector<int64_t>& ids;
  int64_t operator[](int64_t i) const { return ids[i]; }
};

double activation(Activation a, double x) {
  switch (a) {
    case Activation::swiglu: return x / (1 + std::exp(-x));
    case Activation::geglu: return x * std::erfc(-x * std::sqrt(0.5)) / 2;
    case Activation::geglu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu2: return std::max(0.0, x);
  }
  std::abort();
}

// Sorting pairs, the product before the activation and the one after it.
bool run_mlp(const Case& c) {
  const int64_t experts = pick(c.random, {0, 1, 2, 3, 5, 8}), tokens = pick(c.random, {0, 1, 2, 3, 5, 8, 16, 17, 33}),
                k = pick(c.random, {0, 1, 2, 3}), cols = pick(c.random, kSides), inner = pick(c.random, kSides);
  const Activation a =
      pick(c.random, {Activation::swiglu, Activation::geglu, Activation::geglu_tanh, Activation::relu2});
  const int64_t pairs = tokens * k, none = pick(c.random, {0, 1, 4});
  std::vector<int64_t> ids(pairs);
  for (int64_t& id : ids) id = experts == 0 || below(c.random, 8) < none ? -1 : below(c.random, experts);
  Buffer perm(pairs * 8, 8, c.guarded), inverse(pairs * 8, 8, c.guarded), ends(experts * 8, 8, c.guarded);
  if (pairs > 0 && below(c.random, 4) == 0) {
    std::vector<int64_t> wrong = ids;
    const int64_t at = below(c.random, pairs);
    wrong[at] = pick(c.random, {experts, experts + 1, int64_t{-2}, INT64_MAX, INT64_MIN});
    if (sort_pairs(Ids{wrong}, pairs, experts, perm.as<int64_t>(), inverse.as<int64_t>(), ends.as<int64_t>()) != at)
      fail("wrong ids", c, at, wrong[at], 0, 0, 0);
  }
  if (sort_pairs(Ids{ids}, pairs, experts, perm.as<int64_t>(), inverse.as<int64_t>(), ends.as<int64_t>()) != -1)
    fail("right ids", c, 0, 0, 0, 0, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t pair = perm.as<int64_t>()[i];
    if (pair < 0 || pair >= pairs || inverse.as<int64_t>()[pair] != i) fail("perm", c, i, pair, 0, 0, 0);
  }
  const int64_t kept = experts > 0 ? ends.as<int64_t>()[experts - 1] : 0;

  Matrix x(c, c.type, tokens, cols, pick(c.random, kGaps)), h(c, c.type, kept, inner, 0), y(c, c.type, tokens, cols, 0);
  Weights w13(c, experts, is_gated(a) ? 2 * inner : inner, cols), w2(c, experts, cols, inner);
  std::vector<int64_t> token(kept);
  std::vector<float> weight(kept);
  std::vector<bool> has(tokens, false);
  Groups groups;
  for (int64_t e = 0, i = 0; e < experts; ++e) {
    const int64_t begin = i, end = ends.as<int64_t>()[e];
    if (begin == end) {
      w13.spoil_expert(e);
      w2.spoil_expert(e);
    } else {
      groups.add(c, e, begin, end, cols, inner);
    }
    for (; i < end; ++i) {
      token[i] = perm.as<int64_t>()[i] / k;
      has[token[i]] = true;
      weight[i] = factor(c);
      if (ids[perm.as<int64_t>()[i]] != e || (i > begin && perm.as<int64_t>()[i] < perm.as<int64_t>()[i - 1]))
        fail("order", c, i, e, 0, 0, 0);
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    if (!has[t]) x.spoil_row(t);
  const auto x_before = x.bytes(), w13_before = w13.bytes(), w2_before = w2.bytes();

  Operands first{c.type, cols, x.data(), x.stride, token.data(), nullptr, 0, 0};
  w13.into(first);
  const Up up{first, a, inner, h.data()};
  groups.each(c, first, [&](const Group& group, int64_t u0, int64_t u1) {
    for_ranges(c.random, inner, [&](int64_t n0, int64_t n1) { c.cpu.up(up, group, u0, u1, n0, n1); }, 2);
  });
  Operands second{c.type, inner, h.data(), inner, nullptr, nullptr, 0, 0};
  w2.into(second);
  // To y in float32, as often as not, of which some tokens have rows, in any order.
  const bool adds = below(c.random, 2) == 0;
  Matrix sum(c, Type::f32, tokens + 2, cols, 0);
  std::vector<int64_t> number(tokens, -1), place, slot = token;
  for (int64_t i = 0; i < kept && adds; ++i) {
    int64_t& n = number[token[i]];
    if (n < 0) {
      n = static_cast<int64_t>(place.size());
      place.push_back(tokens + 1 - token[i]);
    }
    slot[i] = n;
  }
  std::vector<double> start;
  for (int64_t i = 0; i < (tokens + 2) * cols; ++i) start.push_back(sum.at(i / cols, i % cols));
  const Down down{second,
                  cols,
                  groups.list.data(),
                  static_cast<int64_t>(groups.list.size()),
                  slot.data(),
                  weight.data(),
                  adds ? static_cast<int64_t>(place.size()) : tokens,
                  adds ? sum.data() : y.data(),
                  adds ? place.data() : nullptr};
  for_ranges(c.random, cols, [&](int64_t r0, int64_t r1) { c.cpu.down(down, r0, r1); });

  std::vector<Sum> sums(c.tame ? tokens * cols : 0);
  bool huge = false;  // h doesn't fit float16
  for (const Group& group : groups.list)
    for (int64_t i = group.begin; c.tame && i < group.end; ++i) {
      std::vector<double> exact(inner), error(inner);
      for (int64_t n = 0; n < inner; ++n) {
        Sum gate, other;
        for (int64_t j = 0; j < cols; ++j) {
          gate.add(x.at(token[i], j), w13.at(group.expert, n, j));
          if (is_gated(a)) other.add(x.at(token[i], j), w13.at(group.expert, inner + n, j));
        }
        // Of an activation: its slope is at most 1.13, and it rounds a few times.
        const double f = activation(a, gate.value), own = std::fabs(gate.value) + gate.error();
        const double f_error = 1.13 * gate.error() + (is_gated(a) ? 8 * kUnit * own : 0) + kUnderflow;
        const double g = is_gated(a) ? other.value : f, g_error = is_gated(a) ? other.error() : f_error;
        exact[n] = f * g;
        error[n] = f_error * std::fabs(g) + (std::fabs(f) + f_error) * g_error;
        error[n] += kUnit * (std::fabs(exact[n]) + error[n]) + kUnderflow;
        huge |= c.type == Type::f16 && std::fabs(exact[n]) + error[n] > 65000;
        if (group.gemm == Gemm::grouped) expect_near("up", c, i, n, h.at(i, n), exact[n], error[n], c.type);
        if (c.type != Type::f32) error[n] += rounded(c.type, std::fabs(exact[n]) + error[n]);
        if (c.type == Type::bf16) error[n] += kFlush;  // bfloat16 instructions take subnormal numbers for 0
      }
      for (int64_t n = 0; n < cols; ++n)
        for (int64_t j = 0; j < inner; ++j)
          sums[token[i] * cols + n].add(weight[i] * exact[j], w2.at(group.expert, n, j),
                                        std::fabs(weight[i]) * error[j]);
    }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < cols; ++n) {
      const int64_t row = tokens + 1 - t;
      const double got = adds ? sum.at(row, n) : y.at(t, n);
      if (!has[t] && !adds && got != 0) fail("down of nothing", c, t, n, got, 0, 0);
      if (!c.tame || huge) continue;
      if (adds) {
        Sum& s = sums[t * cols + n];
        s.add(start[row * cols + n], 1);
        expect_near("down, added", c, t, n, got, s.value, has[t] ? s.error(2) + s.terms * 4 * kFlush : 0, Type::f32);
        continue;
      }
      const Sum& sum = sums[t * cols + n];
      expect_near("down", c, t, n, got, sum.value, sum.error(2) + sum.terms * 4 * kFlush, c.type);
    }
  if (x.bytes() != x_before || w13.bytes() != w13_before || w2.bytes() != w2_before)
    fail("inputs of mlp", c, 0, 0, 0, 0, 0);
  return kept > 0 && cols > 0 && inner > 0;
}

bool run_wgrad(const Case& c) {
  const Sorted sorted(c);
  const int64_t rows = pick(c.random, kSides), cols = pick(c.random, kSides);
  Matrix x(c, c.type, sorted.x_rows, cols, pick(c.random, kGaps)),
      grad(c, c.type, sorted.rows, rows, pick(c.random, kGaps));
  Matrix dw(c, c.type, sorted.experts() * rows, cols, 0);
  sorted.spoil(x);
  for (int64_t i = sorted.kept(); i < sorted.rows; ++i) grad.spoil_row(i);
  const auto x_before = x.bytes(), grad_before = grad.bytes();
  const Wgrad args{sorted.operands(c, x), rows, grad.data(), grad.stride, dw.data()};
  for (int64_t e = 0; e < sorted.experts(); ++e) {
    const Group group{e, sorted.begin[e], sorted.end[e]};
    for_ranges(c.random, rows, [&](int64_t r0, int64_t r1) { c.cpu.wgrad(args, group, r0, r1); });
  }
  for (int64_t e = 0; e < sorted.experts(); ++e)
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t k = 0; k < cols; ++k) {
        Sum sum;
        if (!c.tame && sorted.end[e] > sorted.begin[e]) continue;
        for (int64_t i = sorted.begin[e]; i < sorted.end[e]; ++i) sum.add(grad.at(i, n), x.at(sorted.source[i], k));
        expect_near("wgrad", c, e * rows + n, k, dw.at(e * rows + n, k), sum.value, sum.error(), c.type);
      }
  if (x.bytes() != x_before || grad.bytes() != grad_before) fail("inputs of wgrad", c, 0, 0, 0, 0, 0);
  return sorted.kept() > 0 && rows > 0 && cols > 0;
}

bool run_route(const Case& c) {
  const int64_t experts = pick(c.random, kSides), tokens = pick(c.random, {0, 1, 2, 5}),
                k = below(c.random, experts + 1);
  Matrix logits(c, c.type, tokens, experts, pick(c.random, kGaps));
  const bool with_bias = below(c.random, 3) == 0, renormalize = below(c.random, 2);
  const Score score = pick(c.random, {Score::softmax, Score::sigmoid});
  Array bias(c, Type::f32, with_bias ? experts : 0);
  Buffer weights(tokens * k * 4, 4, c.guarded), ids(tokens * k * 8, 8, c.guarded);
  const Route args{c.type,
                   tokens,
                   experts,
                   k,
                   logits.data(),
                   logits.stride,
                   with_bias ? static_cast<const float*>(bias.data()) : nullptr,
                   score,
                   renormalize,
                   weights.as<float>(),
                   ids.as<int64_t>()};
  for_ranges(c.random, tokens, [&](int64_t t0, int64_t t1) { c.cpu.route(args, t0, t1); });
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t* chosen = ids.as<int64_t>() + t * k;
    std::vector<bool> taken(experts, false);
    double most = -1, all = 0, total = 0;
    for (int64_t e = 0; e < experts; ++e) most = std::max(most, logits.at(t, e));
    for (int64_t e = 0; e < experts; ++e) all += std::exp(logits.at(t, e) - most);
    const auto score_of = [&](int64_t e) {
      const double l = logits.at(t, e);
      return score == Score::softmax ? std::exp(l - most) / all : 1 / (1 + std::exp(-l));
    };
    for (int64_t j = 0; j < k; ++j) {
      if (chosen[j] < 0 || chosen[j] >= experts || taken[chosen[j]]) fail("ids", c, t, j, chosen[j], 0, 0);
      taken[chosen[j]] = true;
      total += score_of(chosen[j]);
      const double l = logits.at(t, chosen[j]);
      for (int64_t e = 0; !with_bias && e < experts; ++e) {
        const double other = logits.at(t, e);
        const bool above = other > l || (std::isnan(other) && !std::isnan(l)),
                   equal = other == l || (std::isnan(other) && std::isnan(l));
        if (!taken[e] && (above || (equal && e < chosen[j]))) fail("choice", c, t, e, other, l, 0);
      }
    }
    // Of an exponential: its argument, up to 2 here, is rounded, and it is off by a few units; then there are sums.
    const double relative = roundings(2 * (2 * 2 + 8) + 2 * experts + 8);
    for (int64_t j = 0; c.tame && j < k; ++j) {
      const double exact = score_of(chosen[j]) / (renormalize ? total : 1);
      expect_near("weights", c, t, j, weights.as<float>()[t * k + j], exact, relative * exact, Type::f32);
    }
  }
  return tokens > 0 && k > 0;
}

bool run_combine(const Case& c) {
  const int64_t rows = pick(c.random, {0, 1, 2, 7}), cols = pick(c.random, kSides),
                tokens = pick(c.random, {0, 1, 2, 5, 17}), k = pick(c.random, {0, 1, 2, 3, 8});
  Matrix y(c, c.type, rows, cols, pick(c.random, kGaps)), out(c, c.type, tokens, cols, 0);
  Buffer inverse(tokens * k * 8, 8, c.guarded), weights(tokens * k * 4, 4, c.guarded);
  std::vector<bool> named(rows, false);
  for (int64_t i = 0; i < tokens * k; ++i) {
    const int64_t place = below(c.random, rows + 1) - 1;
    inverse.as<int64_t>()[i] = place;
    weights.as<float>()[i] = place < 0 ? kNan : factor(c);
    if (place >= 0) named[place] = true;
  }
  for (int64_t i = 0; i < rows; ++i)
    if (!named[i]) y.spoil_row(i);
  const auto y_before = y.bytes();
  const Combine args{c.type,    tokens, k, cols, y.data(), y.stride, inverse.as<int64_t>(), weights.as<float>(),
                     out.data()};
  for_ranges(c.random, tokens, [&](int64_t t0, int64_t t1) { c.cpu.combine(args, t0, t1); });
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < cols; ++n) {
      Sum sum;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t place = inverse.as<int64_t>()[t * k + j];
        if (place >= 0) sum.add(weights.as<float>()[t * k + j], y.at(place, n));
      }
      if (c.tame || sum.terms == 0) expect_near("combine", c, t, n, out.at(t, n), sum.value, sum.error(), c.type);
    }
  if (y.bytes() != y_before) fail("inputs of combine", c, 0, 0, 0, 0, 0);
  return rows > 0 && cols > 0 && tokens > 0 && k > 0;
}

}  // namespace

int main(int argc, char** argv) {
  auto [cpu, cases, random] = effk::fuzz::arguments<Cpu>("moe", argc, argv, {&cpu_scalar, &cpu_avx2, &cpu_avx512});
  int64_t linear = 0, mlp = 0, wgrad = 0, route = 0, combine = 0, tame = 0;
  for (int64_t i = 0; i < cases; ++i) {
    const Case c{random, *cpu, pick(random, {Type::f32, Type::f16, Type::bf16}), below(random, 4) != 0,
                 below(random, 2) != 0};
    tame += c.tame;
    linear += run_linear(c);
    mlp += run_mlp(c);
    wgrad += run_wgrad(c);
    route += run_route(c);
    combine += run_combine(c);
  }
  std::printf("linear %lld mlp %lld wgrad %lld route %lld combine %lld tame %lld\n", static_cast<long long>(linear),
              static_cast<long long>(mlp), static_cast<long long>(wgrad), static_cast<long long>(route),
              static_cast<long long>(combine), static_cast<long long>(tame));
}
