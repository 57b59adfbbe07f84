// Feeds the CPU kernels of vq keys, codes, tables and lists of any sizes and strides, without torch, under
// AddressSanitizer.
//   fuzz_vq LEVEL CASES SEED
// Each buffer has exactly the size that vq.h gives it, and no better alignment than csrc/ promises. In every other
// case it ends at an unmapped page (which also catches what the sanitizer doesn't instrument, such as masked loads),
// in the rest the sanitizer's own red zones surround it. Ranges are shared out in random parts, in random order, as
// threads may do it. What must not be read holds NaN, and results are compared with sums in double, within a bound; of
// 8-bit tables to the bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "../../kernels/common/cpu_level.h"
#include "../../kernels/common/float_bits.h"
#include "../../kernels/vq/vq.h"
#include "../kit/fuzzing.h"

using namespace effk::vq;
using namespace effk::fuzz;
using effk::Type;
using effk::type_size;

namespace {

constexpr double kUnit = 0x1p-24;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

constexpr int64_t kKeys[] = {0, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130};
constexpr int64_t kSubspaces[] = {1, 2, 3, 4, 5, 8, 8, 12, 16, 16, 17, 32, 64};
constexpr int64_t kWords[] = {1, 2, 5, 15, 16, 16, 16, 17, 100, 255, 256, 256, 257, 300, 512};
constexpr int64_t kSizes[] = {1, 2, 3, 4, 7, 8, 16, 17};
constexpr int64_t kDims[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65};
constexpr int64_t kGroups[] = {1, 1, 2, 3, 4, 5, 8, 9};
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

void expect_near(const char* what, const Case& c, int64_t i, int64_t j, double got, double exact, double error) {
  if (!(std::fabs(got - exact) <= error)) fail(what, c, i, j, got, exact, error);
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

// Of an element type, to round to.
double eps(Type type) { return type == Type::f32 ? 0x1p-24 : type == Type::f16 ? 0x1p-11 : 0x1p-8; }

float tame_float(Random& random) { return static_cast<float>(below(random, 4097) - 2048) / 2048; }

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
  float* floats() { return buffer_.as<float>(); }
  double operator[](int64_t i) { return value_at(type_, data(), i); }
  void spoil(int64_t i, int64_t n) {
    for (int64_t end = i + n; i < end; ++i) set(type_, data(), i, kNan);
  }

 private:
  Type type_;
  int64_t n_;
  Buffer buffer_;
};

// [B, heads, rows, cols] with gaps in between, which ends with its last row.
struct Cache : Array {
  Cache(const Case& c, int64_t batch, int64_t heads, int64_t rows, int64_t cols)
      : Cache(c, batch, heads, rows, cols, cols + pick(c.random, kGaps), pick(c.random, kGaps)) {}
  Cache(const Case& c, int64_t batch, int64_t heads, int64_t rows, int64_t cols, int64_t stride, int64_t gap)
      : Array(c, c.type, rows > 0 ? (batch * heads - 1) * (rows * stride + gap) + (rows - 1) * stride + cols : 0),
        cols(cols),
        strides{heads * (rows * stride + gap), rows * stride + gap, stride} {}
  double at(int64_t b, int64_t h, int64_t s, int64_t d) {
    return (*this)[b * strides[0] + h * strides[1] + s * strides[2] + d];
  }
  void spoil_row(int64_t b, int64_t h, int64_t s) { spoil(b * strides[0] + h * strides[1] + s * strides[2], cols); }
  int64_t cols, strides[3];
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

// Relative error of n roundings.
double roundings(int64_t n) { return n * kUnit / (1 - n * kUnit); }

Codes codes_for(const Case& c, int64_t subspaces, int64_t words) {
  if (words <= 16 && subspaces % 2 == 0 && below(c.random, 2)) return Codes::packed4;
  return words <= 256 ? Codes::u8 : Codes::i16;
}

int64_t bytes_of(Codes codes, int64_t subspaces) {
  return codes == Codes::packed4 ? subspaces / 2 : codes == Codes::u8 ? subspaces : 2 * subspaces;
}

int64_t code_at(Codes codes, const char* key, int64_t j) {
  if (codes == Codes::i16) {
    int16_t code;
    std::memcpy(&code, key + 2 * j, 2);
    return code;
  }
  const int byte = static_cast<unsigned char>(key[codes == Codes::u8 ? j : j / 2]);
  return codes == Codes::u8 ? byte : byte >> j % 2 * 4 & 15;
}

void set_code(Codes codes, char* key, int64_t j, int64_t code) {
  const auto narrow = static_cast<int16_t>(code);
  if (codes == Codes::i16) std::memcpy(key + 2 * j, &narrow, 2);
  if (codes == Codes::u8) key[j] = static_cast<char>(code);
  if (codes == Codes::packed4) key[j / 2] = static_cast<char>((key[j / 2] & (j % 2 ? 15 : 240)) | code << j % 2 * 4);
}

bool run_encode(const Case& c) {
  const int64_t batch = 1 + below(c.random, 2), heads = 1 + below(c.random, 2), keys = pick(c.random, kKeys),
                subspaces = pick(c.random, {1, 2, 3, 4, 8}), size = pick(c.random, kSizes), dim = subspaces * size,
                words = pick(c.random, kWords), rows = subspaces * words;
  Cache k(c, batch, heads, keys, dim);
  Array book(c, Type::f32, heads * rows * size), chol(c, Type::f32, heads * dim * dim);
  const Codes codes = codes_for(c, subspaces, words);
  const int64_t bytes = bytes_of(codes, subspaces);
  Buffer out(batch * heads * keys * bytes, codes == Codes::i16 ? 2 : 1, c.guarded);
  Encode args{c.type,   batch, heads,         keys,    dim,   subspaces,     words,
              k.data(), {},    book.floats(), nullptr, codes, out.as<void>()};
  std::copy(k.strides, k.strides + 3, args.k_stride);
  if (below(c.random, 2)) args.chol = chol.floats();
  Buffer prepared(heads * c.cpu.encode_floats(args) * 4, 64, c.guarded);
  prepared.fill(c.random);
  args.prepared = prepared.as<float>();
  for_ranges(c.random, heads, [&](int64_t h0, int64_t h1) { c.cpu.encode_prepare(args, h0, h1); });
  for (int64_t pair = 0; pair < batch * heads; ++pair)
    for_ranges(c.random, keys, [&](int64_t s0, int64_t s1) { c.cpu.encode(args, pair, s0, s1); });
  for (int64_t i = 0; i < batch * heads * keys; ++i) {
    const int64_t b = i / keys / heads, h = i / keys % heads, s = i % keys;
    std::vector<double> x(dim), off(dim);
    for (int64_t d = 0; c.tame && d < dim; ++d) {
      if (!args.chol) x[d] = k.at(b, h, s, d);
      for (int64_t e = 0; args.chol && e < dim; ++e) {
        const double term = k.at(b, h, s, e) * chol[(h * dim + e) * dim + d];
        x[d] += term;
        off[d] += roundings(dim) * std::fabs(term);
      }
    }
    for (int64_t j = 0; j < subspaces; ++j) {
      const int64_t code = code_at(codes, out.as<char>() + i * bytes, j);
      if (code < 0 || code >= words) fail("code", c, i, j, code, 0, 0);
      double least = kInf, own = 0;
      for (int64_t w = 0; c.tame && w < words; ++w) {
        double distance = 0, error = 0;
        for (int64_t d = 0; d < size; ++d) {
          const double word = book[((h * subspaces + j) * words + w) * size + d], number = x[j * size + d];
          distance += word * word - 2 * number * word;
          error += roundings(size + 4) * (word * word + 2 * std::fabs(number * word)) +
                   2 * (1 + roundings(size + 4)) * off[j * size + d] * std::fabs(word);
        }
        least = std::min(least, distance + error);
        if (w == code) own = distance - error;
      }
      if (c.tame && !(own <= least)) fail("nearest", c, i, j, own, least, 0);
    }
  }
  return keys > 0;
}

bool run_lut(const Case& c) {
  const int64_t batch = below(c.random, 3), heads = 1 + below(c.random, 2), group = pick(c.random, kGroups),
                subspaces = pick(c.random, {1, 2, 3, 4, 8}), size = pick(c.random, kSizes), dim = subspaces * size,
                words = pick(c.random, kWords), rows = subspaces * words, queries = batch * heads * group;
  const int64_t stride = dim + pick(c.random, kGaps);
  Array q(c, c.type, queries > 0 ? (queries - 1) * stride + dim : 0);
  Array book(c, Type::f32, heads * rows * size), inv(c, Type::f32, heads * dim * dim);
  Buffer out(queries * rows * 4, 4, c.guarded), query(queries * dim * 4, 64, c.guarded);
  query.fill(c.random);
  const Lut args{c.type,
                 batch,
                 heads * group,
                 group,
                 dim,
                 subspaces,
                 words,
                 q.data(),
                 {heads * group * stride, stride},
                 book.floats(),
                 below(c.random, 2) ? inv.floats() : nullptr,
                 out.as<float>(),
                 query.as<float>()};
  for_ranges(c.random, queries, [&](int64_t q0, int64_t q1) { c.cpu.transform(args, q0, q1); });
  for (int64_t h = 0; h < heads; ++h)
    for_ranges(c.random, rows, [&](int64_t r0, int64_t r1) { c.cpu.lut(args, h, r0, r1); });
  for (int64_t i = 0; c.tame && i < queries; ++i) {
    const int64_t h = i % (heads * group) / group;
    std::vector<double> x(dim), magnitude(dim);
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t e = args.inv ? 0 : d; e < (args.inv ? dim : d + 1); ++e) {
        const double term = q[i * stride + e] * (args.inv ? inv[(h * dim + e) * dim + d] : 1);
        x[d] += term;
        magnitude[d] += std::fabs(term);
      }
    for (int64_t row = 0; row < rows; ++row) {
      double exact = 0, sized = 0;
      for (int64_t d = 0; d < size; ++d) {
        const double word = book[(h * rows + row) * size + d];
        exact += x[row / words * size + d] * word;
        sized += magnitude[row / words * size + d] * std::fabs(word);
      }
      expect_near("lut", c, i, row, out.as<float>()[i * rows + row], exact, roundings(size + dim + 2) * sized);
    }
  }
  return queries > 0;
}

// Tables and codes, those behind lens any, and maybe one that is out of range.
struct Scored {
  int64_t batch, heads, group, keys, subspaces, words, queries, bytes, key_stride;
  Codes codes;
  Array lut;
  Buffer code;
  std::vector<int64_t> lens;
  Score args;
  Buffer table, scale;
  bool wrong = false;  // a key between sink and window, that must be looked at, has a code out of range

  explicit Scored(const Case& c)
      : batch(1 + below(c.random, 2)),
        heads(1 + below(c.random, 2)),
        group(pick(c.random, kGroups)),
        keys(pick(c.random, kKeys)),
        subspaces(pick(c.random, kSubspaces)),
        words(pick(c.random, kWords)),
        queries(batch * heads * group),
        bytes(0),
        key_stride(0),
        codes(codes_for(c, subspaces, words)),
        lut(c, Type::f32, queries * subspaces * words),
        code(code_bytes(c), codes == Codes::i16 ? 2 : 1, c.guarded),
        args{batch,   heads * group,           group,  keys, subspaces, words, lut.floats(), codes, code.as<void>(), {},
             nullptr, below(c.random, 2) == 0, nullptr},
        table(queries * c.cpu.table_bytes(args), 64, c.guarded),
        scale(args.int8_table ? queries * 8 : 0, 64, c.guarded) {
    code.fill(c.random);
    const int64_t element = codes == Codes::i16 ? 2 : 1;
    args.code_stride[0] = heads * key_stride / element, args.code_stride[1] = key_stride / element;
    for (int64_t b = 0; b < batch; ++b) lens.push_back(below(c.random, keys + 1));
    const bool ragged = below(c.random, 2);
    for (int64_t b = 0; !ragged && b < batch; ++b) lens[b] = keys;
    if (ragged) args.lens = lens.data();
    for (int64_t pair = 0; pair < batch * heads; ++pair)
      for (int64_t s = 0; s < lens[pair / heads]; ++s)
        for (int64_t j = 0; j < subspaces; ++j) set_code(codes, key(pair, s), j, below(c.random, words));
    if (!c.cpu.table_bytes(args)) return;
    table.fill(c.random);
    args.table = table.as<uint8_t>();
    args.scale = scale.as<float>();
    for_ranges(c.random, queries, [&](int64_t q0, int64_t q1) { c.cpu.table(args, q0, q1); });
  }

  int64_t code_bytes(const Case& c) {
    bytes = bytes_of(codes, subspaces);
    key_stride = keys * bytes + pick(c.random, {0, 0, 2, 64});
    return keys > 0 ? (batch * heads - 1) * key_stride + keys * bytes : 0;
  }
  char* key(int64_t pair, int64_t s) { return code.as<char>() + pair * key_stride + s * bytes; }

  // Some code of a key below lens that is out of range, where there is room for one.
  bool spoil(const Case& c) {
    const int64_t most = codes == Codes::packed4 ? 15 : codes == Codes::u8 ? 255 : INT16_MAX;
    const int64_t pair = below(c.random, batch * heads), len = lens[pair / heads];
    if (len == 0 || (words > most && codes != Codes::i16)) return false;
    const int64_t code = codes == Codes::i16 && below(c.random, 2) ? INT16_MIN + below(c.random, 1 << 15)
                                                                   : words + below(c.random, most - words + 1);
    set_code(codes, key(pair, below(c.random, len)), below(c.random, subspaces), code);
    return true;
  }

  // The score as vq.h has it: of a float table exact, with its error; of 8 bits as float32 operations.
  double score(int64_t query, int64_t s, double* error, int64_t* rank) {
    const int64_t pair = query / group;
    const float* own = lut.floats() + query * subspaces * words;
    double sum = 0, sized = 0;
    if (!args.int8_table) {
      for (int64_t j = 0; j < subspaces; ++j) {
        const double term = own[j * words + code_at(codes, key(pair, s), j)];
        sum += term;
        sized += std::fabs(term);
      }
      *error = roundings(subspaces) * sized;
      return sum;
    }
    float base = 0, range = 0;
    bool finite = true;
    std::vector<float> low(subspaces);
    for (int64_t j = 0; j < subspaces; ++j) {
      const float* row = own + j * words;
      for (int64_t w = 0; w < words; ++w) finite &= std::isfinite(row[w]);
      low[j] = *std::min_element(row, row + words);
      range = std::max(range, *std::max_element(row, row + words) - low[j]);
      base += low[j];
    }
    const float step = range / 255;
    *error = *rank = 0;
    if (!finite || !std::isfinite(step)) return kNan;
    for (int64_t j = 0; step > 0 && j < subspaces; ++j) {
      const float t = std::nearbyint((own[j * words + code_at(codes, key(pair, s), j)] - low[j]) / step);
      *rank += static_cast<int64_t>(std::min(255.0f, t));
    }
    const volatile float product = step * static_cast<float>(*rank);
    return product + base;
  }
};

bool run_score(const Case& c) {
  Scored t(c);
  Buffer out(t.queries * t.keys * 4, 4, c.guarded);
  out.fill(c.random);
  t.args.out = out.as<float>();
  const bool wrong = below(c.random, 4) == 0 && t.spoil(c);
  bool right = true;
  for (int64_t pair = 0; pair < t.batch * t.heads; ++pair)
    for_ranges(c.random, t.keys, [&](int64_t s0, int64_t s1) { right &= c.cpu.score(t.args, pair, s0, s1); });
  if (right == wrong) fail("codes seen", c, right, wrong, 0, 0, 0);
  for (int64_t i = 0; right && i < t.queries * t.keys; ++i) {
    const int64_t query = i / t.keys, s = i % t.keys;
    const float got = out.as<float>()[i];
    if (s >= t.lens[query / (t.heads * t.group)]) {
      if (got != -kInf) fail("past lens", c, query, s, got, -kInf, 0);
      continue;
    }
    if (!c.tame && !t.args.int8_table) continue;
    double error;
    int64_t rank;
    const double exact = t.score(query, s, &error, &rank);
    if (std::isnan(exact) ? !std::isnan(got) : !(got == exact || std::fabs(got - exact) <= error))
      fail("score", c, query, s, got, exact, error);
  }
  return t.keys > 0 && right;
}

bool run_topk(const Case& c) {
  Scored t(c);
  TopK top{t.args,
           std::min<int64_t>(t.keys, pick(c.random, {0, 1, 2, 5, 20, 100})),
           std::min<int64_t>(t.keys, pick(c.random, {0, 0, 1, 3, 100})),
           std::min<int64_t>(t.keys, pick(c.random, {0, 0, 1, 4, 64})),
           below(c.random, 2) == 0,
           0,
           nullptr,
           nullptr};
  const int64_t sharers = top.union_group ? t.group : 1, lists = t.queries / sharers;
  top.cap = std::min(t.keys, top.sink + top.window + top.k * sharers);
  Buffer idx(lists * top.cap * 8, 8, c.guarded), count(lists * 8, 8, c.guarded);
  idx.fill(c.random);
  top.idx = idx.as<int64_t>(), top.count = count.as<int64_t>();
  const bool wrong = below(c.random, 4) == 0 && t.spoil(c);
  bool right = true;
  for (int64_t pair = 0; pair < t.batch * t.heads; ++pair) right &= c.cpu.topk(top, pair);
  if (!right && !wrong) fail("right codes", c, 0, 0, 0, 0, 0);
  if (!right || wrong) return false;
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t* const own = top.idx + list * top.cap;
    const int64_t n = top.count[list], len = t.lens[list * sharers / (t.heads * t.group)],
                  first = std::min(top.sink, len), last = std::max(first, len - top.window);
    if (n < 0 || n > top.cap) fail("count", c, list, 0, n, 0, 0);
    for (int64_t i = 0; i < top.cap; ++i)
      if (i < n ? own[i] < (i ? own[i - 1] + 1 : 0) || own[i] >= len : own[i] != -1)
        fail("list", c, list, i, own[i], 0, 0);
    std::vector<bool> taken(len, false), wanted(len, false);
    for (int64_t i = 0; i < n; ++i) taken[own[i]] = true;
    if (!c.tame && !t.args.int8_table) continue;
    // Of 8 bits the list is known; of floats nothing left out is better than what one head takes at least.
    bool sure = t.args.int8_table;
    for (int64_t s = 0; s < len; ++s) wanted[s] = s < first || s >= last;
    for (int64_t query = list * sharers; query < (list + 1) * sharers; ++query) {
      std::vector<std::pair<double, int64_t>> order;
      std::vector<double> errors(len);
      for (int64_t s = first; s < last; ++s) {
        int64_t rank = 0;
        const double score = t.score(query, s, &errors[s], &rank);
        order.emplace_back(t.args.int8_table ? -static_cast<double>(rank) : -score, s);
      }
      std::sort(order.begin(), order.end());
      const auto most = static_cast<int64_t>(order.size());
      for (int64_t i = 0; i < std::min(top.k, most); ++i) {
        const int64_t s = order[i].second;
        wanted[s] = true;
        // Surely among the k best: better than the first that isn't.
        const bool certain = top.k >= most || -order[i].first - errors[s] > -order[top.k].first + 2e-5 * t.subspaces;
        if (!t.args.int8_table && certain && !taken[s]) fail("best", c, query, s, -order[i].first, 0, errors[s]);
      }
    }
    for (int64_t s = 0; s < len; ++s)
      if (sure ? taken[s] != wanted[s] : (s < first || s >= last) && !taken[s])
        fail("taken", c, list, s, taken[s], 0, 0);
  }
  return t.keys > 0;
}

bool run_attend(const Case& c) {
  const int64_t batch = 1 + below(c.random, 2), heads = 1 + below(c.random, 2), group = pick(c.random, kGroups),
                keys = pick(c.random, kKeys), dim = pick(c.random, kDims), values = pick(c.random, kDims),
                queries = batch * heads * group, stride = dim + pick(c.random, kGaps);
  Array q(c, c.type, (queries - 1) * stride + dim);
  Cache k(c, batch, heads, keys, dim), v(c, batch, heads, keys, values);
  const bool listed = below(c.random, 3) != 0, by_head = listed && below(c.random, 2);
  const int64_t lists = by_head ? heads * group : heads, cap = !listed ? keys : keys ? pick(c.random, kKeys) : 0;
  Buffer idx(listed ? batch * lists * cap * 8 : 0, 8, c.guarded);
  for (int64_t i = 0; listed && i < batch * lists * cap; ++i) idx.as<int64_t>()[i] = below(c.random, keys);
  std::vector<int64_t> ends(batch * lists);  // of parts; csrc/ gives none past count
  for (int64_t& end : ends) end = below(c.random, 4) ? cap : below(c.random, cap + 1);
  std::vector<bool> read(batch * heads * keys, false);
  for (int64_t unit = 0; unit < batch * lists; ++unit)
    for (int64_t i = 0; i < cap; ++i) {
      const int64_t pair = unit / lists * heads + unit % lists * heads / lists;
      if (i < ends[unit])
        read[pair * keys + (listed ? idx.as<int64_t>()[unit * cap + i] : i)] = true;
      else if (listed)
        idx.as<int64_t>()[unit * cap + i] = -1;
    }
  for (int64_t i = 0; i < batch * heads * keys; ++i)
    if (!read[i]) {
      k.spoil_row(i / keys / heads, i / keys % heads, i % keys);
      v.spoil_row(i / keys / heads, i / keys % heads, i % keys);
    }
  Buffer out(queries * values * type_size(c.type), type_size(c.type), c.guarded), lse(queries * 4, 4, c.guarded);
  Attend args{c.type,
              batch,
              heads * group,
              group,
              keys,
              dim,
              values,
              q.data(),
              {heads * group * stride, stride},
              k.data(),
              {},
              v.data(),
              {},
              listed ? idx.as<int64_t>() : nullptr,
              lists,
              cap,
              nullptr,
              pick(c.random, {0.5f, 1.0f, -0.25f, 0.0f}),
              out.as<void>(),
              lse.as<float>()};
  std::copy(k.strides, k.strides + 3, args.k_stride);
  std::copy(v.strides, v.strides + 3, args.v_stride);
  const int64_t sharers = heads * group / lists, step = sharers * (values + 2);
  for (int64_t unit = 0; unit < batch * lists; ++unit) {
    std::vector<std::pair<int64_t, int64_t>> parts;
    for_ranges(c.random, ends[unit], [&](int64_t begin, int64_t end) { parts.emplace_back(begin, end); });
    Buffer partials(static_cast<int64_t>(parts.size()) * step * 4, 4, c.guarded);
    partials.fill(c.random);
    for (size_t p = 0; p < parts.size(); ++p)
      c.cpu.attend(args, unit, parts[p].first, parts[p].second, partials.as<float>() + p * step);
    c.cpu.attend_join(args, unit, partials.as<float>(), static_cast<int64_t>(parts.size()));
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t b = i / (heads * group), h = i % (heads * group) / group, unit = by_head ? i : b * lists + h,
                  n = ends[unit];
    if (n == 0) {
      if (lse.as<float>()[i] != -kInf) fail("lse of nothing", c, i, 0, lse.as<float>()[i], -kInf, 0);
      for (int64_t d = 0; d < values; ++d)
        if (value_at(c.type, out.as<void>(), i * values + d) != 0) fail("out of nothing", c, i, d, 1, 0, 0);
    }
    if (!c.tame || n == 0) continue;
    std::vector<double> scores(n), sums(values), sized(values);
    double most = -kInf, total = 0, off = 0;
    for (int64_t e = 0; e < n; ++e) {
      const int64_t s = listed ? args.idx[unit * cap + e] : e;
      double magnitude = 0;
      for (int64_t d = 0; d < dim; ++d) {
        scores[e] += args.scale * q[i * stride + d] * k.at(b, h, s, d);
        magnitude += std::fabs(args.scale * q[i * stride + d] * k.at(b, h, s, d));
      }
      most = std::max(most, scores[e]);
      // Of a score, of the exponential's argument and of its value.
      off = std::max(off, roundings(dim + 4) * magnitude + kUnit * (8 * magnitude + 16));
    }
    off += 8 * kUnit * std::fabs(most);
    for (int64_t e = 0; e < n; ++e) {
      const double weight = std::exp(scores[e] - most);
      total += weight;
      for (int64_t d = 0; d < values; ++d) {
        const double value = v.at(b, h, listed ? args.idx[unit * cap + e] : e, d);
        sums[d] += weight * value;
        sized[d] += weight * std::fabs(value);
      }
    }
    const double relative = 3 * off + roundings(2 * n + 16);
    expect_near("lse", c, i, 0, lse.as<float>()[i], most + std::log(total),
                relative + kUnit * (4 * std::fabs(most) + 4 * std::log(total) + 8));
    for (int64_t d = 0; d < values; ++d)
      expect_near("out", c, i, d, value_at(c.type, out.as<void>(), i * values + d), sums[d] / total,
                  (2 * relative + 1.1 * eps(c.type)) * sized[d] / total + 0x1p-25 * (c.type == Type::f16));
  }
  return keys > 0 && cap > 0;
}

bool run_wrope(const Case& c) {
  const int64_t rows = pick(c.random, {0, 1, 2, 5, 17}), half = pick(c.random, kDims), dim = 2 * half,
                stride = dim + pick(c.random, kGaps);
  Array q(c, c.type, rows > 0 ? (rows - 1) * stride + dim : 0), cos(c, Type::f32, half), sin(c, Type::f32, half);
  Buffer out(rows * dim * type_size(c.type), type_size(c.type), c.guarded);
  const Wrope args{c.type, rows, dim, q.data(), stride, cos.floats(), sin.floats(), out.as<void>()};
  for_ranges(c.random, rows, [&](int64_t r0, int64_t r1) { c.cpu.wrope(args, r0, r1); });
  for (int64_t i = 0; c.tame && i < rows * half; ++i) {
    const int64_t row = i / half, d = i % half;
    const double a = q[row * stride + d], b = q[row * stride + half + d];
    const double first = a * cos[d] - b * sin[d], second = b * cos[d] + a * sin[d];
    const double sized = std::fabs(a * cos[d]) + std::fabs(b * sin[d]) + std::fabs(b * cos[d]) + std::fabs(a * sin[d]);
    const double error = (roundings(3) + 1.1 * eps(c.type)) * sized + 0x1p-25 * (c.type == Type::f16);
    expect_near("wrope", c, row, d, value_at(c.type, out.as<void>(), row * dim + d), first, error);
    expect_near("wrope", c, row, half + d, value_at(c.type, out.as<void>(), row * dim + half + d), second, error);
  }
  return rows > 0;
}

}  // namespace

int main(int argc, char** argv) {
  auto [cpu, cases, random] = effk::fuzz::arguments<Cpu>("vq", argc, argv, {&cpu_scalar, &cpu_avx2, &cpu_avx512});
  int64_t encode = 0, lut = 0, score = 0, topk = 0, attend = 0, wrope = 0, tame = 0;
  for (int64_t i = 0; i < cases; ++i) {
    const Case c{random, *cpu, pick(random, {Type::f32, Type::f16, Type::bf16}), below(random, 4) != 0,
                 below(random, 2) != 0};
    tame += c.tame;
    encode += run_encode(c);
    lut += run_lut(c);
    score += run_score(c);
    topk += run_topk(c);
    attend += run_attend(c);
    wrope += run_wrope(c);
  }
  const auto number = [](int64_t n) { return static_cast<long long>(n); };
  std::printf("encode %lld lut %lld score %lld topk %lld attend %lld wrope %lld tame %lld\n", number(encode),
              number(lut), number(score), number(topk), number(attend), number(wrope), number(tame));
}
