// Feeds damaged packed tensors to the CPU kernels of lscd, without torch, under AddressSanitizer.
//   fuzz_lscd LEVEL CASES SEED
// Each buffer has exactly the size that the format gives it. In every other case it ends at an unmapped page (which
// also catches what the sanitizer doesn't instrument, such as masked loads), in the rest the sanitizer's own red zones
// surround it. What csrc/ checks before it calls a kernel (shapes, both ends of offsets) is checked here too. The
// kernels must stay in bounds, and call a tile corrupt exactly when the format, read bit by bit, says so.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "../../kernels/common/cpu_level.h"
#include "../../kernels/lscd/lscd.h"
#include "../kit/fuzzing.h"

using namespace effk::lscd;
using namespace effk::fuzz;
using effk::Type;
using effk::type_size;

namespace {

// Packed tensors before they get exact buffers.
struct Draft {
  Shape shape;
  Type type;
  std::vector<uint64_t> bitmap;
  std::vector<int64_t> offsets;
  int64_t num_values;
};

bool inside(const Shape& shape, int64_t s, int64_t c, int64_t h, int bit) {
  return s * 16 + h * 8 + bit / 8 < shape.rows && c * 8 + bit % 8 < shape.cols;
}

// The format's rules, read bit by bit.
bool is_valid(const Draft& d) {
  const int64_t sub_cols = d.shape.sub_cols(), tiles = d.shape.tiles();
  for (int64_t s = 0; s < d.shape.strips(); ++s) {
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t ones = 0;
      for (int64_t c = t * 32; c < std::min(t * 32 + 32, sub_cols); ++c)
        for (int64_t h = 0; h < 2; ++h)
          for (int bit = 0; bit < 64; ++bit)
            if (d.bitmap[(s * sub_cols + c) * 2 + h] >> bit & 1) {
              ++ones;
              if (!inside(d.shape, s, c, h, bit)) return false;
            }
      // Unsigned: the difference of two wild offsets may overflow.
      const auto* ends = &d.offsets[s * tiles + t];
      if (static_cast<uint64_t>(ends[1]) - static_cast<uint64_t>(ends[0]) !=
          static_cast<uint64_t>((ones + 15) / 16 * 16))
        return false;
    }
  }
  return true;
}

Draft make(Random& random) {
  constexpr int64_t kRows[] = {1, 7, 8, 9, 15, 16, 17, 33, 48, 70, 530},
                    kCols[] = {1, 8, 9, 16, 31, 250, 256, 257, 300, 520};
  constexpr double kDensity[] = {0, 0.01, 0.3, 0.5, 0.9, 1};
  Draft d{{pick(random, kRows), pick(random, kCols)},
          pick(random, {Type::f32, Type::f16, Type::bf16, Type::i8}),
          {},
          {0},
          0};
  const double density = pick(random, kDensity);
  const auto limit = static_cast<uint64_t>(density * 0xffffffffu);
  const int64_t sub_cols = d.shape.sub_cols();
  for (int64_t s = 0; s < d.shape.strips(); ++s) {
    int64_t ones = 0;
    for (int64_t c = 0; c < sub_cols; ++c) {
      for (int64_t h = 0; h < 2; ++h) {
        uint64_t word = 0;
        for (int bit = 0; bit < 64; ++bit)
          if (inside(d.shape, s, c, h, bit) && (random() & 0xffffffffu) <= limit && density > 0)
            word |= uint64_t{1} << bit;
        d.bitmap.push_back(word);
        ones += __builtin_popcountll(word);
      }
      if (c % 32 == 31 || c == sub_cols - 1) {
        d.offsets.push_back(d.offsets.back() + (ones + 15) / 16 * 16);
        ones = 0;
      }
    }
  }
  d.num_values = d.offsets.back() + 64;
  return d;
}

void damage(Random& random, Draft& d) {
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  const int64_t wild[] = {kMin,
                          kMax,
                          -1,
                          0,
                          1,
                          16,
                          -16,
                          4096,
                          d.num_values,
                          d.num_values - 64,
                          d.num_values - 4096 - 64,
                          static_cast<int64_t>(random())};
  uint64_t& word = d.bitmap[below(random, d.bitmap.size())];
  int64_t& offset = d.offsets[below(random, d.offsets.size())];
  switch (below(random, 9)) {
    case 0: word ^= uint64_t{1} << below(random, 64); break;
    case 1: word = ~uint64_t{0}; break;
    case 2: std::fill(d.bitmap.begin(), d.bitmap.end(), ~uint64_t{0}); break;
    case 3: word = random(); break;
    case 4: offset = pick(random, wild); break;
    case 5:
      offset = static_cast<int64_t>(static_cast<uint64_t>(offset) + static_cast<uint64_t>(pick(random, wild)));
      break;
    case 6: std::swap(offset, d.offsets[below(random, d.offsets.size())]); break;
    case 7:  // values cut off, with an offset that says so
      d.num_values = 64 + below(random, d.num_values - 63);
      d.offsets.back() = d.num_values - 64;
      break;
    case 8:  // one tile claims all values that follow, far more than a tile can hold
      d.num_values += 6 * kTileWeights;
      std::fill(d.offsets.begin() + 1 + below(random, d.offsets.size() - 1), d.offsets.end(), d.num_values - 64);
      break;
  }
}

// Strips in ranges, as threads may share them out. Whether one was called corrupt.
template <class F>
bool for_ranges(Random& random, int64_t strips, const F& f) {
  bool corrupt = false;
  for (int64_t s0 = 0, s1; s0 < strips; s0 = s1) {
    s1 = s0 + 1 + below(random, strips - s0);
    Status status;
    f(s0, s1, &status);
    corrupt |= status.bad_tile >= 0;
  }
  return corrupt;
}

// x and everything else of a call of linear.
void run_linear(Random& random, const Cpu& cpu, const Packed& packed, bool valid, bool guarded) {
  const Type x_type = packed.type == Type::i8 ? pick(random, {Type::f32, Type::f16, Type::bf16}) : packed.type;
  const int64_t size = type_size(x_type), rows = packed.shape.rows, cols = packed.shape.cols;
  // Those that AVX-512 computes as sparse (32 and 64, where few weights are left), and one past its chunk.
  const int64_t tokens = pick(random, {0, 1, 2, 3, 4, 5, 6, 8, 17, 32, 64, 70, 257});
  const int64_t col_stride = pick(random, {1, 1, 3}), token_stride = cols * col_stride;
  // A strided view ends with its last element.
  const int64_t extent = tokens ? (tokens - 1) * token_stride + (cols - 1) * col_stride + 1 : 0;
  Buffer x(extent * size, size, guarded), y(tokens * rows * size, size, guarded), bias(rows * size, size, guarded),
      scale(rows * 4, 4, guarded);
  x.fill(random);
  bias.fill(random);
  scale.fill(random);
  Linear call{packed,
              x_type,
              tokens,
              x.as<void>(),
              token_stride,
              col_stride,
              y.as<void>(),
              below(random, 2) ? bias.as<void>() : nullptr,
              below(random, 2) ? scale.as<float>() : nullptr,
              static_cast<Activation>(below(random, 5)),
              nullptr};
  Buffer prepared(cpu.prepared_bytes(call), 64, guarded);
  call.prepared = prepared.as<void>();
  cpu.prepare(call, 0, tokens);
  const bool corrupt = for_ranges(random, packed.shape.strips(),
                                  [&](int64_t s0, int64_t s1, Status* status) { cpu.linear(call, s0, s1, status); });
  if (tokens && corrupt == valid) {
    std::fprintf(stderr, "linear calls a %s matrix %s\n", valid ? "valid" : "corrupt", corrupt ? "corrupt" : "valid");
    std::exit(1);
  }
}

void run_unpack(Random& random, const Cpu& cpu, const Packed& packed, bool valid, bool guarded) {
  const bool scaled = below(random, 2);
  const Type out_type = packed.type == Type::i8 && scaled ? Type::f32 : packed.type;
  Buffer out(packed.shape.rows * packed.shape.cols * type_size(out_type), type_size(out_type), guarded),
      scale(packed.shape.rows * 4, 4, guarded);
  scale.fill(random);
  const bool corrupt = for_ranges(random, packed.shape.strips(), [&](int64_t s0, int64_t s1, Status* status) {
    cpu.unpack(packed, scaled ? scale.as<float>() : nullptr, out.as<void>(), out_type, s0, s1, status);
  });
  if (corrupt == valid) {
    std::fprintf(stderr, "unpack calls a %s matrix %s\n", valid ? "valid" : "corrupt", corrupt ? "corrupt" : "valid");
    std::exit(1);
  }
}

// Packing an exact buffer, contiguous or transposed.
void run_pack(Random& random, const Cpu& cpu, const Shape& shape, Type type, bool guarded) {
  Buffer w(shape.rows * shape.cols * type_size(type), type_size(type), guarded);
  w.fill(random);
  const bool transposed = below(random, 2);
  const Dense dense{w.as<void>(), transposed ? 1 : shape.cols, transposed ? shape.rows : 1};
  Buffer bitmap(shape.words() * 8, 8, guarded), offsets(shape.offsets() * 8, 8, guarded);
  int64_t* ends = offsets.as<int64_t>();
  ends[0] = 0;
  cpu.count(shape, type, dense, bitmap.as<uint64_t>(), ends + 1, 0, shape.strips());
  for (int64_t i = 1; i < shape.offsets(); ++i) ends[i] = ends[i - 1] + align_values(ends[i]);
  const int64_t num_values = ends[shape.offsets() - 1] + kValuePad;
  // The padding is csrc's to write: here it isn't even there.
  Buffer values((num_values - kValuePad) * type_size(type), type_size(type), guarded);
  cpu.fill({shape, type, values.as<void>(), num_values, bitmap.as<uint64_t>(), ends}, dense, 0, shape.strips());
}

}  // namespace

int main(int argc, char** argv) {
  auto [cpu, cases, random] = effk::fuzz::arguments<Cpu>("lscd", argc, argv, {&cpu_scalar, &cpu_avx2, &cpu_avx512});
  int64_t valid_cases = 0, corrupt_cases = 0, refused = 0;
  while (valid_cases + corrupt_cases < cases) {
    const bool guarded = random() & 1;
    Draft d = make(random);
    if (below(random, 8) == 0) run_pack(random, *cpu, d.shape, d.type, guarded);
    for (int64_t n = below(random, 4); n > 0; --n) damage(random, d);
    if (d.offsets.front() != 0 || d.offsets.back() != d.num_values - kValuePad || d.num_values < kValuePad) {
      ++refused;  // csrc raises before any kernel runs
      continue;
    }
    const bool valid = is_valid(d);
    ++(valid ? valid_cases : corrupt_cases);
    Buffer values(d.num_values * type_size(d.type), type_size(d.type), guarded),
        bitmap(d.bitmap.size() * 8, 8, guarded), offsets(d.offsets.size() * 8, 8, guarded);
    values.fill(random);
    std::copy(d.bitmap.begin(), d.bitmap.end(), bitmap.as<uint64_t>());
    std::copy(d.offsets.begin(), d.offsets.end(), offsets.as<int64_t>());
    const Packed packed{d.shape, d.type, values.as<void>(), d.num_values, bitmap.as<uint64_t>(), offsets.as<int64_t>()};
    run_unpack(random, *cpu, packed, valid, guarded);
    run_linear(random, *cpu, packed, valid, guarded);
  }
  std::printf("valid %lld corrupt %lld refused %lld\n", static_cast<long long>(valid_cases),
              static_cast<long long>(corrupt_cases), static_cast<long long>(refused));
}
