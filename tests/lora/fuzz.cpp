// Feeds the CPU kernels of lora weights, adapters and tokens of any shapes, without torch, under AddressSanitizer.
//   fuzz_lora LEVEL CASES SEED
// Each buffer has exactly the size that lora.h gives it, and no better alignment than csrc/ promises. In every other
// case it ends at an unmapped page (which also catches what the sanitizer doesn't instrument, such as masked loads),
// in the rest the sanitizer's own red zones surround it. Rows, ranks and outputs are shared out in random ranges, in
// random order, as threads may do it. What must not be read holds NaN, what must not be written is compared, and
// results are compared with sums in double, within a bound.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "../../kernels/common/cpu_level.h"
#include "../../kernels/common/float_bits.h"
#include "../../kernels/lora/lora.h"
#include "../kit/fuzzing.h"

using namespace effk::lora;
using namespace effk::fuzz;
using effk::Type;
using effk::type_size;

namespace {

constexpr double kUnit = 0x1p-24, kUnderflow = 0x1p-149;

constexpr int64_t kRows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65};
constexpr int64_t kCols[] = {0,  1,  2,  3,  5,  7,  8,  9,  15, 16, 17,  30,  31,
                             32, 33, 47, 48, 49, 63, 64, 65, 80, 95, 100, 127, 130};
constexpr int64_t kRanks[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 32, 33};

struct Case {
  Random& random;
  const Cpu& cpu;
  Type type;
  int64_t adapters, rows, cols, rank;
  bool tame;  // small numbers, whose sums are checked; or else any bits
  bool guarded;

  int64_t size() const { return type_size(type); }
};

[[noreturn]] void fail(const char* what, const Case& c, int64_t i, int64_t j, double got, double wanted, double error) {
  std::fprintf(stderr, "%s of type %d, %lld adapters, %lld rows, %lld cols, rank %lld: at %lld, %lld %.9g; ", what,
               static_cast<int>(c.type), static_cast<long long>(c.adapters), static_cast<long long>(c.rows),
               static_cast<long long>(c.cols), static_cast<long long>(c.rank), static_cast<long long>(i),
               static_cast<long long>(j), got);
  std::fprintf(stderr, "wanted %.9g, give or take %.3g\n", wanted, error);
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
float tame_factor(Random& random) { return static_cast<float>(below(random, 512) + 1) / (below(random, 2) ? 64 : -64); }

// A matrix of rows that a stride is between, filled.
class Matrix {
 public:
  Matrix(const Case& c, int64_t rows, int64_t cols, int64_t stride)
      : type_(c.type),
        extent_(rows > 0 && cols > 0 ? (rows - 1) * stride + cols : 0),
        buffer_(extent_ * c.size(), c.size(), c.guarded) {
    buffer_.fill(c.random);
    if (c.tame)
      for (int64_t i = 0; i < extent_; ++i) set(type_, data(), i, tame_float(c.random));
  }
  void* data() { return buffer_.as<void>(); }
  double operator[](int64_t i) { return value_at(type_, data(), i); }
  void spoil(int64_t i) { set(type_, data(), i, std::numeric_limits<float>::quiet_NaN()); }
  std::vector<char> bytes() {
    const char* begin = buffer_.as<char>();
    return {begin, begin + extent_ * type_size(type_)};
  }

 private:
  Type type_;
  int64_t extent_;
  Buffer buffer_;
};

// Both factors of all adapters, with NaN where `ranks` says that nothing is read.
struct Adapters {
  Adapters(const Case& c, const std::vector<int64_t>& ranks)
      : a(c, c.adapters * c.rank, c.cols, c.cols), b(c, c.adapters * c.rows, c.rank, c.rank) {
    for (int64_t e = 0; e < c.adapters; ++e)
      for (int64_t r = ranks[e]; r < c.rank; ++r) {
        for (int64_t k = 0; k < c.cols; ++k) a.spoil((e * c.rank + r) * c.cols + k);
        for (int64_t n = 0; n < c.rows; ++n) b.spoil((e * c.rows + n) * c.rank + r);
      }
  }
  Matrix a, b;
};

// f(begin, end) for parts of [0, n), in any order.
template <class F>
void for_ranges(Random& random, int64_t n, const F& f) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = begin + 1 + below(random, n - begin);
    ranges.emplace_back(begin, end);
  }
  std::shuffle(ranges.begin(), ranges.end(), random);
  for (const auto& [begin, end] : ranges) f(begin, end);
}

// got is a number within `error` of exact, rounded once to the type.
void expect_near(const char* what, const Case& c, int64_t i, int64_t j, double got, double exact, double error,
                 Type type) {
  if (type == Type::f16 && std::fabs(exact) + error > 65000) return;  // may round to infinity
  const double last = type == Type::f32 ? 0 : type == Type::f16 ? 0x1p-11 : 0x1p-8;
  const double smallest = type == Type::f16 ? 0x1p-25 : type == Type::bf16 ? 0x1p-134 : 0;
  const double all = error + last * (std::fabs(exact) + error) + smallest;
  if (!(std::fabs(got - exact) <= all)) fail(what, c, i, j, got, exact, all);
}

// Relative error of n roundings. What bfloat16 instructions lose of subnormal numbers is no matter: none are here.
double roundings(int64_t n) { return n * kUnit / (1 - n * kUnit); }

// Adapters that take part, by ascending number; the others have a rank of 0 in `ranks`.
std::vector<int64_t> draw_active(const Case& c, std::vector<int64_t>& ranks) {
  std::vector<int64_t> found;
  const int64_t chance = pick(c.random, {0, 1, 2, 3, 4, 4});
  for (int64_t e = 0; e < c.adapters; ++e) {
    if (below(c.random, 4) < chance) {
      found.push_back(e);
      // csrc/ hands on no rank of 0, but one that is larger than the layer's.
      ranks[e] = below(c.random, 2) ? c.rank : 1 + below(c.random, c.rank + 3);
    }
  }
  return found;
}

int64_t run_merge(const Case& c) {
  std::vector<int64_t> ranks(c.adapters, 0);
  std::vector<Active> active;
  for (int64_t e : draw_active(c, ranks)) {
    float factor = tame_factor(c.random);
    if (!c.tame && below(c.random, 2)) factor = effk::float_of(static_cast<uint32_t>(c.random()));
    if (factor != 0) active.push_back({e, std::max<int64_t>(1, ranks[e]), factor});
  }
  std::vector<int64_t> read(c.adapters, 0);
  for (const Active& one : active) read[one.adapter] = std::min(one.rank, c.rank);
  Adapters adapters(c, read);
  const int64_t w_stride = c.cols + pick(c.random, {0, 0, 1, 3, 64}),
                base_stride = c.cols + pick(c.random, {0, 0, 1, 3, 64});
  const bool with_base = below(c.random, 2);
  Matrix w(c, c.rows, c.cols, w_stride), base(c, c.rows, c.cols, base_stride);
  const auto a_before = adapters.a.bytes(), b_before = adapters.b.bytes(), base_before = base.bytes();
  auto wanted = w.bytes();
  std::vector<double> exact(c.rows * c.cols), error(c.rows * c.cols);
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t k = 0; k < c.cols; ++k) {
      // Each product has two roundings, and goes through at most one addition for each term.
      double sum = with_base ? base[n * base_stride + k] : w[n * w_stride + k], size = std::fabs(sum);
      int64_t terms = 0;
      if (c.tame)
        for (const Active& one : active)
          for (int64_t r = 0; r < read[one.adapter]; ++r) {
            const double term = one.factor * adapters.b[(one.adapter * c.rows + n) * c.rank + r] *
                                adapters.a[(one.adapter * c.rank + r) * c.cols + k];
            sum += term;
            size += std::fabs(term);
            ++terms;
          }
      exact[n * c.cols + k] = sum;
      error[n * c.cols + k] = roundings(terms + 2) * size;
      if (with_base && active.empty())
        std::memcpy(&wanted[(n * w_stride + k) * c.size()], &base_before[(n * base_stride + k) * c.size()], c.size());
    }

  const Merge args{c.type, active.data(), static_cast<int64_t>(active.size()), below(c.random, 2) != 0};
  const Layer layer{w.data(),
                    with_base ? base.data() : nullptr,
                    adapters.a.data(),
                    adapters.b.data(),
                    c.rows,
                    c.cols,
                    c.rank,
                    w_stride,
                    base_stride};
  for_ranges(c.random, c.rows, [&](int64_t row0, int64_t row1) { c.cpu.merge(args, layer, row0, row1); });

  if (c.tame && !active.empty())
    for (int64_t n = 0; n < c.rows; ++n)
      for (int64_t k = 0; k < c.cols; ++k)
        expect_near("merge", c, n, k, w[n * w_stride + k], exact[n * c.cols + k], error[n * c.cols + k], c.type);
  // The rest, and all where nothing is merged, to the bit.
  const auto after = w.bytes();
  for (int64_t i = 0; i < static_cast<int64_t>(after.size()); ++i)
    if (after[i] != wanted[i] && (active.empty() || i / c.size() % w_stride >= c.cols))
      fail("bytes of merge", c, i / c.size() / w_stride, i / c.size() % w_stride, after[i], wanted[i], 0);
  if (adapters.a.bytes() != a_before || adapters.b.bytes() != b_before || base.bytes() != base_before)
    fail("inputs of merge", c, 0, 0, 0, 0, 0);
  return c.rows > 0 && c.cols > 0 ? static_cast<int64_t>(active.size()) : 0;
}

int64_t run_apply(const Case& c) {
  const int64_t tokens = pick(c.random, {0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33});
  // csrc/ hands on ranks from 1 to rank.
  std::vector<int64_t> ranks(c.adapters, 0), read(c.adapters, 0);
  std::vector<Apply::Group> groups;
  std::vector<int64_t> token;
  std::vector<float> factor;
  for (int64_t e : draw_active(c, ranks)) {
    if (c.rank == 0) break;
    const int64_t rank = std::min(c.rank, ranks[e]), begin = static_cast<int64_t>(token.size());
    const int64_t chance = pick(c.random, {1, 4, 8});
    for (int64_t t = 0; t < tokens; ++t)
      if (below(c.random, 8) < chance) {
        token.push_back(t);
        const float any = effk::float_of(static_cast<uint32_t>(c.random()));
        factor.push_back(c.tame || any == 0 || below(c.random, 2) ? tame_factor(c.random) : any);
      }
    const auto end = static_cast<int64_t>(token.size());
    if (end == begin) continue;
    groups.push_back({e, rank, begin, end});
    read[e] = rank;
  }
  Adapters adapters(c, read);
  // A token may be broadcast to all, too.
  const int64_t x_stride = pick(c.random, {c.cols, c.cols, c.cols + 1, c.cols + 64, int64_t{0}}),
                y_stride = pick(c.random, {c.rows, c.rows, c.rows + 1, c.rows + 64, int64_t{0}});
  const bool with_y = below(c.random, 2);
  Matrix x(c, tokens, c.cols, x_stride), y_in(c, tokens, c.rows, y_stride), y(c, tokens, c.rows, c.rows);
  const auto x_before = x.bytes(), y_before = y_in.bytes();
  const auto entries = static_cast<int64_t>(token.size());
  effk::fuzz::Buffer inner(entries * c.rank * 4, 64, c.guarded);
  const float poison = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(inner.as<float>(), entries * c.rank, poison);

  const Apply args{c.type,
                   tokens,
                   c.cols,
                   c.rows,
                   c.rank,
                   x.data(),
                   x_stride,
                   adapters.a.data(),
                   adapters.b.data(),
                   with_y ? y_in.data() : nullptr,
                   y_stride,
                   y.data(),
                   groups.data(),
                   static_cast<int64_t>(groups.size()),
                   token.data(),
                   factor.data(),
                   inner.as<float>()};
  for_ranges(c.random, args.num_groups, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g)
      for_ranges(c.random, groups[g].rank, [&](int64_t r0, int64_t r1) { c.cpu.shrink(args, groups[g], r0, r1); });
  });

  std::vector<double> exact(tokens * c.rows), size(tokens * c.rows), error(tokens * c.rows);
  std::vector<int64_t> terms(tokens, 0);
  for (const Apply::Group& group : groups)
    for (int64_t i = group.begin; i < group.end; ++i) {
      const int64_t t = token[i];
      terms[t] += group.rank;
      for (int64_t r = 0; r < c.rank; ++r) {
        const float got = inner.as<float>()[i * c.rank + r];
        if (r >= group.rank) {
          // Nobody asked for those.
          if (effk::bits_of(got) != effk::bits_of(poison)) fail("rest of shrink", c, i, r, got, poison, 0);
          continue;
        }
        if (!c.tame) continue;
        double sum = 0, sum_size = 0;
        for (int64_t k = 0; k < c.cols; ++k) {
          const double term = adapters.a[(group.adapter * c.rank + r) * c.cols + k] * x[t * x_stride + k];
          sum += term;
          sum_size += std::fabs(term);
        }
        const double moved = roundings(c.cols) * sum_size;
        expect_near("shrink", c, i, r, got, sum, moved, Type::f32);
        for (int64_t n = 0; n < c.rows; ++n) {
          const double one = factor[i] * adapters.b[(group.adapter * c.rows + n) * c.rank + r];
          exact[t * c.rows + n] += one * sum;
          size[t * c.rows + n] += std::fabs(one) * (std::fabs(sum) + moved);
          error[t * c.rows + n] += std::fabs(one) * moved;
        }
      }
    }

  for_ranges(c.random, c.rows, [&](int64_t row0, int64_t row1) { c.cpu.expand(args, row0, row1); });

  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < c.rows; ++n) {
      const double before = with_y ? y_in[t * y_stride + n] : 0, got = y[t * c.rows + n];
      if (terms[t] == 0) {
        if (got != before && !(std::isnan(got) && std::isnan(before)))
          fail("expand of nothing", c, t, n, got, before, 0);
      } else if (c.tame) {
        const int64_t i = t * c.rows + n;
        expect_near("expand", c, t, n, got, exact[i] + before,
                    error[i] + roundings(terms[t] + 2) * (size[i] + std::fabs(before)) + kUnderflow, c.type);
      }
    }
  if (x.bytes() != x_before || y_in.bytes() != y_before) fail("inputs of expand", c, 0, 0, 0, 0, 0);
  return c.rows > 0 && c.cols > 0 ? entries : 0;
}

}  // namespace

int main(int argc, char** argv) {
  auto [cpu, cases, random] = effk::fuzz::arguments<Cpu>("lora", argc, argv, {&cpu_scalar, &cpu_avx2, &cpu_avx512});
  int64_t merged = 0, applied = 0, of_tame = 0;
  for (int64_t i = 0; i < cases; ++i) {
    Case c{random,
           *cpu,
           pick(random, {Type::f32, Type::f16, Type::bf16}),
           pick(random, {0, 1, 2, 2, 3, 5, 8}),
           pick(random, kRows),
           pick(random, kCols),
           pick(random, kRanks),
           below(random, 4) != 0,
           below(random, 2) != 0};
    if (below(random, 500) == 0) {  // now and then large, since kernels take rows, columns and ranks many at a time
      c.adapters = 4;
      c.rows = pick(random, {1, 70, 130, 200});
      c.cols = pick(random, {1, 260, 513, 1030});
      c.rank = pick(random, {20, 65, 130});
      if (c.rows * c.cols * c.rank > 2'000'000) c.rows = 3;
    }
    of_tame += c.tame;
    merged += run_merge(c) > 0;
    applied += run_apply(c) > 0;
  }
  std::printf("merged %lld applied %lld tame %lld\n", static_cast<long long>(merged), static_cast<long long>(applied),
              static_cast<long long>(of_tame));
}
