// Feeds the CPU kernels of w4a8 packed tensors of any contents, without torch, under AddressSanitizer.
//   fuzz_w4a8 LEVEL CASES SEED
// Each buffer has exactly the size that the format or w4a8.h gives it, and no better alignment than csrc/ promises. In
// every other case it ends at an unmapped page (which also catches what the sanitizer doesn't instrument, such as
// masked loads), in the rest the sanitizer's own red zones surround it. Blocks and tokens are shared out in random
// ranges, as threads may do it. What a level computes is compared with the scalar level: integers, scales and weights
// bit for bit, sums of floats within a bound.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "../../kernels/common/cpu_level.h"
#include "../../kernels/common/float_bits.h"
#include "../../kernels/w4a8/w4a8.h"
#include "../kit/fuzzing.h"

using namespace effk::w4a8;
using namespace effk::fuzz;
using effk::Type;
using effk::type_size;

namespace {

constexpr double kUnit = 0x1p-24, kUnderflow = 0x1p-149;

[[noreturn]] void fail(const char* op, const Shape& s, int64_t at, double got, double wanted) {
  std::fprintf(stderr, "%s of n4 %lld, n8 %lld, cols %lld, group %lld: at %lld %.9g, wanted %.9g\n", op,
               static_cast<long long>(s.n4), static_cast<long long>(s.n8), static_cast<long long>(s.cols),
               static_cast<long long>(s.group), static_cast<long long>(at), got, wanted);
  std::exit(1);
}

// All n are equal; NaN, of whatever pattern, is equal to itself.
template <class T>
void expect_equal(const char* op, const Shape& s, const T* got, const T* wanted, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (std::memcmp(&got[i], &wanted[i], sizeof(T)) != 0 && !(got[i] != got[i] && wanted[i] != wanted[i]))
      fail(op, s, i, static_cast<double>(got[i]), static_cast<double>(wanted[i]));
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

// n floats of a type. Tame ones are between -4 and 4; others are any bits, NaN and infinities among them.
void fill_floats(Random& random, Buffer& buffer, Type type, int64_t n, bool tame) {
  buffer.fill(random);
  if (!tame) return;
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(below(random, 8193) - 4096) / 1024;
    if (type == Type::f32) effk::from_float(value, buffer.as<float>() + i);
    if (type == Type::f16) effk::from_float(value, buffer.as<effk::Half>() + i);
    if (type == Type::bf16) effk::from_float(value, buffer.as<effk::BFloat16>() + i);
  }
}

Type float_type(Random& random) { return pick(random, {Type::f32, Type::f16, Type::bf16}); }

// f(begin, end) for parts of [0, n).
template <class F>
void for_ranges(Random& random, int64_t n, const F& f) {
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = begin + 1 + below(random, n - begin);
    f(begin, end);
  }
}

// A packed weight's six buffers.
struct Storage {
  Storage(const Shape& s, bool guarded)
      : shape(s),
        q4(s.blocks4() * s.chunks() * kBlock * 4, 1, guarded),
        scale4(s.blocks4() * s.groups() * kBlock * 4, 4, guarded),
        zero4(s.blocks4() * s.groups() * kBlock, 1, guarded),
        q8(s.n8 * s.cols, 1, guarded),
        scale8(s.blocks8() * s.groups() * kBlock * 4, 4, guarded),
        perm(s.rows() * 4, 4, guarded) {}

  // Anything but for perm, which csrc/ has checked.
  void fill(Random& random, bool tame) {
    q4.fill(random);
    zero4.fill(random);
    q8.fill(random);
    if (below(random, 4) == 0) std::memset(q4.as<char>(), 0xff, shape.blocks4() * shape.chunks() * kBlock * 4);
    if (below(random, 4) == 0) std::memset(q8.as<char>(), below(random, 2) ? 0xff : 0, shape.n8 * shape.cols);
    fill_floats(random, scale4, Type::f32, shape.blocks4() * shape.groups() * kBlock, tame);
    fill_floats(random, scale8, Type::f32, shape.blocks8() * shape.groups() * kBlock, tame);
    shuffle(random);
  }

  void shuffle(Random& random) {
    std::iota(perm.as<int32_t>(), perm.as<int32_t>() + shape.rows(), 0);
    std::shuffle(perm.as<int32_t>(), perm.as<int32_t>() + shape.rows(), random);
  }

  Packed packed() {
    return {shape,
            q4.as<uint8_t>(),
            scale4.as<float>(),
            zero4.as<uint8_t>(),
            q8.as<uint8_t>(),
            scale8.as<float>(),
            perm.as<int32_t>()};
  }

  Shape shape;
  Buffer q4, scale4, zero4, q8, scale8, perm;
};

// What csrc/ hands to linear and accumulate: activations in rows of a multiple of 8, zero from cols on.
struct Tokens {
  Tokens(Random& random, const Shape& s, int64_t n, bool guarded)
      : shape(s),
        count(n),
        least(pick(random, {-128, -kMaxQuantized, -kMaxQuantized})),
        stride((s.cols + 7) / 8 * 8 + 8 * pick(random, {0, 0, 1, 7})),
        q(n * stride, 64, guarded),
        sums(n * s.groups() * 4, 64, guarded) {
    q.fill(random);
    std::fill_n(sums.as<int32_t>(), n * s.groups(), 0);
    for (int64_t t = 0; t < n; ++t) {
      int8_t* row = q.as<int8_t>() + t * stride;
      if (below(random, 4) == 0) std::memset(row, pick(random, {least, 127}), s.cols);
      std::memset(row + s.cols, 0, stride - s.cols);
      for (int64_t k = 0; k < s.cols; ++k) {
        row[k] = static_cast<int8_t>(std::max<int>(row[k], least));
        sums.as<int32_t>()[t * s.groups() + k / s.group] += row[k];
      }
    }
  }

  Shape shape;
  int64_t count;
  int least;  // -128 only where w4a8_accumulate is asked; quantized activations are never below -127
  int64_t stride;
  Buffer q, sums;
};

void run_quantize(Random& random, const Cpu& cpu, const Shape& s, bool guarded) {
  const Type type = float_type(random);
  const int64_t size = type_size(type), tokens = pick(random, {0, 1, 2, 3, 7, 20});
  const int64_t col_stride = pick(random, {1, 1, 3}), token_stride = s.cols * col_stride;
  // A strided view ends with its last element.
  const int64_t extent = tokens && s.cols ? (tokens - 1) * token_stride + (s.cols - 1) * col_stride + 1 : 0;
  Buffer x(extent * size, size, guarded);
  fill_floats(random, x, type, extent, below(random, 2));
  const int64_t stride = s.cols + pick(random, {0, 0, 5, 64});
  const bool with_sums = below(random, 2);
  auto run = [&](const Cpu& level, Buffer& q, Buffer& scale, Buffer& sums) {
    Quantize args{type,    x.as<void>(),   token_stride, col_stride,        s.cols,
                  s.group, q.as<int8_t>(), stride,       scale.as<float>(), with_sums ? sums.as<int32_t>() : nullptr};
    for_ranges(random, tokens, [&](int64_t t0, int64_t t1) { level.quantize(args, t0, t1); });
  };
  const int64_t groups = tokens * s.groups();
  Buffer q(tokens * stride, 1, guarded), scale(groups * 4, 4, guarded), sums(groups * 4, 4, guarded);
  Buffer q1(tokens * stride, 1, false), scale1(groups * 4, 4, false), sums1(groups * 4, 4, false);
  q.fill(random);  // what isn't written is seen
  run(cpu, q, scale, sums);
  run(cpu_scalar, q1, scale1, sums1);
  expect_equal("quantize", s, q.as<int8_t>(), q1.as<int8_t>(), tokens * stride);
  expect_equal("scale of quantize", s, scale.as<float>(), scale1.as<float>(), groups);
  if (!with_sums) return;
  expect_equal("sums of quantize", s, sums.as<int32_t>(), sums1.as<int32_t>(), groups);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < s.groups(); ++g) {
      const int8_t* row = q.as<int8_t>() + t * stride;
      const int32_t sum = std::accumulate(row + g * s.group, row + std::min(s.cols, (g + 1) * s.group), 0);
      if (sum != sums.as<int32_t>()[t * s.groups() + g])
        fail("sums of quantize", s, t, sums.as<int32_t>()[t * s.groups() + g], sum);
    }
}

void run_pack(Random& random, const Cpu& cpu, const Shape& s, bool guarded) {
  const Type type = float_type(random);
  Buffer dense(s.rows() * s.cols * type_size(type), type_size(type), guarded);
  fill_floats(random, dense, type, s.rows() * s.cols, below(random, 2));
  const bool transposed = below(random, 4) == 0;
  Storage to(s, guarded), wanted(s, false);
  to.fill(random, false);
  wanted.fill(random, false);
  std::copy_n(to.perm.as<int32_t>(), s.rows(), wanted.perm.as<int32_t>());
  auto run = [&](const Cpu& level, Storage& storage) {
    const Pack args{storage.packed(), type, dense.as<void>(), transposed ? 1 : s.cols, transposed ? s.rows() : 1};
    for_ranges(random, s.blocks(), [&](int64_t b0, int64_t b1) { level.pack(args, b0, b1); });
  };
  run(cpu, to);
  run(cpu_scalar, wanted);
  const Packed a = to.packed(), b = wanted.packed();
  expect_equal("q4 of pack", s, a.q4, b.q4, s.blocks4() * s.chunks() * kBlock * 4);
  expect_equal("scale4 of pack", s, a.scale4, b.scale4, s.blocks4() * s.groups() * kBlock);
  expect_equal("zero4 of pack", s, a.zero4, b.zero4, s.blocks4() * s.groups() * kBlock);
  expect_equal("q8 of pack", s, a.q8, b.q8, s.n8 * s.cols);
  expect_equal("scale8 of pack", s, a.scale8, b.scale8, s.blocks8() * s.groups() * kBlock);
}

void run_unpack(Random& random, const Cpu& cpu, Storage& w, bool guarded) {
  const Shape& s = w.shape;
  const int64_t n = s.rows() * s.cols;
  Buffer dense(n * 4, 4, guarded), wanted(n * 4, 4, false);
  dense.fill(random);
  for_ranges(random, s.blocks(), [&](int64_t b0, int64_t b1) { cpu.unpack(w.packed(), dense.as<float>(), b0, b1); });
  cpu_scalar.unpack(w.packed(), wanted.as<float>(), 0, s.blocks());
  expect_equal("unpack", s, dense.as<float>(), wanted.as<float>(), n);
}

// Both steps of the product, on the same activations.
void run_linear(Random& random, const Cpu& cpu, Storage& w, bool tame, bool guarded) {
  const Shape& s = w.shape;
  const int64_t tokens = pick(random, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 24, 33, 50});
  Tokens x(random, s, tokens, guarded);
  const int64_t groups = s.groups(), n = tokens * s.rows();

  Linear args{};
  args.w = w.packed();
  args.tokens = tokens;
  args.q = x.q.as<int8_t>();
  args.q_stride = x.stride;
  args.sums = x.sums.as<int32_t>();
  Buffer accumulators(n * groups * 4, 4, guarded), wanted(n * groups * 4, 4, false);
  accumulators.fill(random);
  args.accumulators = accumulators.as<int32_t>();
  for_ranges(random, s.blocks(), [&](int64_t b0, int64_t b1) { cpu.accumulate(args, b0, b1); });
  args.accumulators = wanted.as<int32_t>();
  cpu_scalar.accumulate(args, 0, s.blocks());
  expect_equal("accumulate", s, accumulators.as<int32_t>(), wanted.as<int32_t>(), n * groups);
  args.accumulators = nullptr;

  if (x.least < -kMaxQuantized) return;
  const Type type = float_type(random);
  Buffer x_scale(tokens * groups * 4, 64, guarded), bias(s.rows() * 4, 4, guarded),
      y(n * type_size(type), type_size(type), guarded);
  fill_floats(random, x_scale, Type::f32, tokens * groups, tame);
  fill_floats(random, bias, Type::f32, s.rows(), tame);
  y.fill(random);
  args.x_scale = x_scale.as<float>();
  args.bias = below(random, 2) ? bias.as<float>() : nullptr;
  args.y = y.as<void>();
  args.y_type = type;
  for_ranges(random, s.blocks(), [&](int64_t b0, int64_t b1) { cpu.linear(args, b0, b1); });
  if (!tame) return;
  // Half of a unit in the last place of y, for numbers of size 1.
  const double last = type == Type::f32 ? kUnit : type == Type::f16 ? 0x1p-11 : 0x1p-8;
  for (int64_t row = 0; row < s.rows(); ++row) {
    const bool is8 = row >= s.n4;
    const int64_t feature = args.w.perm[row], of_kind = is8 ? row - s.n4 : row;
    for (int64_t t = 0; t < tokens; ++t) {
      double sum = 0, size = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = group_at(s, of_kind, g);
        const double term = static_cast<double>(wanted.as<int32_t>()[(t * groups + g) * s.rows() + feature]) *
                            args.x_scale[t * groups + g] * (is8 ? args.w.scale8[at] : args.w.scale4[at]);
        sum += term;
        size += std::fabs(term);
      }
      const double exact = sum + (args.bias ? args.bias[feature] : 0);
      if (type == Type::f16 && std::fabs(exact) > 65000) continue;  // may round to infinity
      const double size_of_all = size + (args.bias ? std::fabs(args.bias[feature]) : 0);
      const double error = (static_cast<double>(groups) + 4) * kUnit * size_of_all;
      const double got = value_at(type, args.y, t * s.rows() + feature);
      const double smallest = type == Type::f16 ? 0x1p-25 : kUnderflow;
      if (!(std::fabs(got - exact) <= error + last * (std::fabs(exact) + error) + smallest))
        fail("linear", s, t * s.rows() + feature, got, exact);
    }
  }
}

void run_salience(Random& random, const Cpu& cpu, const Shape& s, bool tame, bool guarded) {
  const int64_t samples = pick(random, {0, 1, 3}), n = s.rows() * s.cols;
  const Type types[] = {float_type(random), float_type(random), float_type(random)};
  Buffer grad(samples * n * type_size(types[0]), type_size(types[0]), guarded),
      w(n * type_size(types[1]), type_size(types[1]), guarded),
      w4(n * type_size(types[2]), type_size(types[2]), guarded), out(s.rows() * 4, 4, guarded);
  fill_floats(random, grad, types[0], samples * n, tame);
  fill_floats(random, w, types[1], n, tame);
  fill_floats(random, w4, types[2], n, tame);
  out.fill(random);
  const Salience args{samples,  s.rows(),        s.cols,       types[0],      types[1],
                      types[2], grad.as<void>(), w.as<void>(), w4.as<void>(), out.as<float>()};
  for_ranges(random, s.rows(), [&](int64_t r0, int64_t r1) { cpu.salience(args, r0, r1); });
  if (!tame) return;
  for (int64_t r = 0; r < s.rows(); ++r) {
    double total = 0, error = 0;
    for (int64_t sample = 0; sample < samples; ++sample) {
      double d = 0, size = 0;
      for (int64_t k = 0; k < s.cols; ++k) {
        const double term = value_at(types[0], args.grad, (sample * s.rows() + r) * s.cols + k) *
                            (value_at(types[2], args.w4, r * s.cols + k) - value_at(types[1], args.w, r * s.cols + k));
        d += term;
        size += std::fabs(term);
      }
      const double moved = (static_cast<double>(s.cols) + 2) * kUnit * size;
      total += std::fabs(d + d * d / 2);
      const double most = std::fabs(d) + moved;
      error += moved * (1 + most) + (4 + static_cast<double>(samples)) * kUnit * (most + most * most) + kUnderflow;
    }
    if (!(std::fabs(out.as<float>()[r] - total) <= error)) fail("salience", s, r, out.as<float>()[r], total);
  }
}

}  // namespace

int main(int argc, char** argv) {
  auto [cpu, cases, random] = effk::fuzz::arguments<Cpu>("w4a8", argc, argv, {&cpu_scalar, &cpu_avx2, &cpu_avx512});
  constexpr int64_t kRows[] = {0, 1, 2, 15, 16, 17, 31, 33, 50, 70},
                    kCols[] = {0,  1,  3,  4,  5,   7,   8,   9,   12,  31,  32, 33,
                               60, 63, 64, 65, 100, 127, 128, 129, 200, 257, 300},
                    kGroups[] = {32, 64, 128, 256};
  int64_t mixed = 0, of_tame = 0;
  for (int64_t i = 0; i < cases; ++i) {
    // Now and then large, since kernels take blocks and groups several at a time.
    const bool large = below(random, 1000) == 0;
    const Shape s = large ? Shape{150, 145, pick(random, {600, 4131}), pick(random, kGroups)}
                          : Shape{pick(random, kRows), pick(random, kRows), pick(random, kCols), pick(random, kGroups)};
    const bool guarded = random() & 1, tame = random() & 1;
    mixed += s.n4 > 0 && s.n8 > 0 && s.cols > 0;
    of_tame += tame;
    Storage w(s, guarded);
    w.fill(random, tame);
    run_unpack(random, *cpu, w, guarded);
    run_linear(random, *cpu, w, tame, guarded);
    if (i % 2) run_quantize(random, *cpu, s, guarded);
    if (i % 4 == 0) run_pack(random, *cpu, s, guarded);
    if (i % 4 == 2) run_salience(random, *cpu, s, tame, guarded);
  }
  std::printf("mixed %lld tame %lld\n", static_cast<long long>(mixed), static_cast<long long>(of_tame));
}
