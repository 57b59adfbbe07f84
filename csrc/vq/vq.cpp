// vq: schemas and the CPU side.
#include "../../kernels/common/cpu.h"
#include "../../kernels/common/cpu_level.h"
#include "../common/integers.h"
#include "../common/parallel.h"
#include "args.h"

namespace effk::vq {
namespace {

const Cpu& cpu() { return cpu_kernels<Cpu>("vq", {&cpu_scalar, &cpu_avx2, &cpu_avx512}); }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i, begin, end) for each of n things and each range of `step` of its `size` items; shared out, as many at a
// time as are worth a thread, of `work` operations an item.
template <class F>
void for_ranges(int64_t n, int64_t size, int64_t step, int64_t work, const F& f) {
  const int64_t ranges = ceil_div(size, step);
  for_parts(n * ranges, worthwhile(step * work), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t begin = p % ranges * step;
      f(p / ranges, begin, std::min(size, begin + step));
    }
  });
}

// A tensor of numbers from `least` to `most` as int64; none without one.
std::vector<int64_t> numbers(const char* op, const char* arg, const OptTensor& t, int64_t least, int64_t most) {
  std::vector<int64_t> out;
  if (!t) return out;
  const Integers given(*t);
  out.reserve(given.size());
  for (int64_t i = 0; i < given.size(); ++i) {
    EFFK_CHECK(given[i] >= least && given[i] <= most, op, arg, " holds ", given[i], "; wanted ", least, " to ", most);
    out.push_back(given[i]);
  }
  return out;
}

Tensor encode(const Tensor& keys, const Tensor& codebook, const OptTensor& chol, bool pack) {
  EncodeCall call = check_encode(keys, codebook, chol, pack);
  Encode& args = call.args;
  if (call.codes.numel() == 0) return call.codes;
  const Cpu& kernels = cpu();
  const Buffer<float> prepared(args.heads * kernels.encode_floats(args));
  args.prepared = prepared.get();
  for_parts(args.heads, worthwhile(args.words * args.dim),
            [&](int64_t h0, int64_t h1) { kernels.encode_prepare(args, h0, h1); });
  for_ranges(args.batch * args.heads, args.keys, 128, args.words * args.dim,
             [&](int64_t pair, int64_t s0, int64_t s1) { kernels.encode(args, pair, s0, s1); });
  return call.codes;
}

Tensor lut(const Tensor& q, const Tensor& codebook, const OptTensor& inv) {
  LutCall call = check_lut(q, codebook, inv);
  Lut& args = call.args;
  const Cpu& kernels = cpu();
  const int64_t queries = args.batch * args.heads;
  const Buffer<float> query(queries * args.dim);
  args.query = query.get();
  for_parts(queries, worthwhile(args.dim * (args.inv ? args.dim : 1)),
            [&](int64_t q0, int64_t q1) { kernels.transform(args, q0, q1); });
  for_ranges(args.heads / args.group, args.subspaces * args.words, 256,
             args.batch * args.group * (args.dim / args.subspaces),
             [&](int64_t head, int64_t row0, int64_t row1) { kernels.lut(args, head, row0, row1); });
  return call.out;
}

// What vq_score and vq_topk need beside their arguments: checked lengths, and tables as the level reads them.
class Prepared {
 public:
  Prepared(const char* op, const Cpu& kernels, const OptTensor& lens, Score& args)
      : lens_(numbers(op, "lens", lens, 0, args.keys)),
        tables_(args.batch * args.heads * kernels.table_bytes(args)),
        scales_(args.int8_table ? args.batch * args.heads * 2 : 0) {
    if (lens) args.lens = lens_.data();
    if (!kernels.table_bytes(args)) return;
    args.table = tables_.get();
    args.scale = scales_.get();
    for_parts(args.batch * args.heads, worthwhile(2 * args.subspaces * args.words),
              [&](int64_t q0, int64_t q1) { kernels.table(args, q0, q1); });
  }

 private:
  std::vector<int64_t> lens_;
  Buffer<uint8_t> tables_;
  Buffer<float> scales_;
};

// After a kernel met a code that is out of range: says which.
void fail_at_codes(const char* op, const Score& args) {
  const int64_t heads = args.heads / args.group;
  for (int64_t pair = 0; pair < args.batch * heads; ++pair) {
    const int64_t b = pair / heads, h = pair % heads, at = b * args.code_stride[0] + h * args.code_stride[1];
    const int64_t keys = args.lens ? args.lens[b] : args.keys;
    for (int64_t i = 0; i < keys * args.subspaces; ++i) {
      const auto* bytes = static_cast<const uint8_t*>(args.code);
      const int64_t code = args.codes == Codes::i16  ? static_cast<const int16_t*>(args.code)[at + i]
                           : args.codes == Codes::u8 ? bytes[at + i]
                                                     : bytes[at + i / 2] >> i % 2 * 4 & 15;
      EFFK_CHECK(code >= 0 && code < args.words, op, "codes holds ", code, "; wanted 0 to ", args.words - 1);
    }
  }
  EFFK_CHECK(false, op, "codes was changed while it was read");
}

Tensor score(const Tensor& lut, const Tensor& codes, const OptTensor& lens, std::string table) {
  ScoreCall call = check_score(lut, codes, lens, table);
  const Cpu& kernels = cpu();
  const Prepared prepared("vq_score", kernels, lens, call.args);
  std::atomic<bool> right{true};
  for_ranges(call.args.batch * (call.args.heads / call.args.group), call.args.keys, 2048,
             call.args.group * call.args.subspaces, [&](int64_t pair, int64_t s0, int64_t s1) {
               if (!kernels.score(call.args, pair, s0, s1)) right = false;
             });
  if (!right) fail_at_codes("vq_score", call.args);
  return call.out;
}

std::tuple<Tensor, Tensor> topk(const Tensor& lut, const Tensor& codes, int64_t k, const OptTensor& lens, int64_t sink,
                                int64_t window, bool union_group, std::string table) {
  TopKCall call = check_topk(lut, codes, k, lens, sink, window, union_group, table);
  const Cpu& kernels = cpu();
  Score& args = call.args.score;
  const Prepared prepared("vq_topk", kernels, lens, args);
  std::atomic<bool> right{true};
  for_parts(args.batch * (args.heads / args.group), worthwhile(args.group * args.keys * args.subspaces),
            [&](int64_t p0, int64_t p1) {
              for (int64_t pair = p0; pair < p1; ++pair)
                if (!kernels.topk(call.args, pair)) right = false;
            });
  if (!right) fail_at_codes("vq_topk", args);
  return {call.idx, call.count};
}

// Keys that one thread attends to at a time. How a list is cut into parts depends on its length alone, and so does
// every bit of the result.
constexpr int64_t kPart = 2048;

struct Part {
  int64_t unit, begin, end;
};

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& idx,
                                  const OptTensor& count, std::optional<double> scale) {
  constexpr const char* op = "vq_attend";
  AttendCall call = check_attend(q, k, v, idx, count, scale);
  Attend& args = call.args;
  const int64_t units = args.batch * args.lists;
  const std::vector<int64_t> counts = numbers(op, "count", count, 0, args.cap);
  if (count) args.count = counts.data();
  std::vector<Part> parts;
  std::vector<int64_t> first(units + 1);
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t n = !count ? args.cap : counts[idx ? unit : unit / args.lists];
    for (int64_t i = 0; i < n; i += kPart) parts.push_back({unit, i, std::min(n, i + kPart)});
    first[unit + 1] = static_cast<int64_t>(parts.size());
  }

  const Buffer<int64_t> checked(idx ? units * args.cap : 0);
  if (idx) {
    const Integers given(*idx);
    for (const Part& part : parts)
      for (int64_t i = part.unit * args.cap + part.begin; i < part.unit * args.cap + part.end; ++i) {
        EFFK_CHECK(given[i] >= 0 && given[i] < args.keys, op, "idx holds ", given[i], "; wanted 0 to ", args.keys - 1);
        checked.get()[i] = given[i];
      }
    args.idx = checked.get();
  }

  const Cpu& kernels = cpu();
  const int64_t heads = args.heads / args.lists, step = heads * (args.value_dim + 2);
  const Buffer<float> partials(static_cast<int64_t>(parts.size()) * step);
  for_parts(static_cast<int64_t>(parts.size()), 1, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p)
      kernels.attend(args, parts[p].unit, parts[p].begin, parts[p].end, partials.get() + p * step);
  });
  for_parts(units, worthwhile(step), [&](int64_t u0, int64_t u1) {
    for (int64_t u = u0; u < u1; ++u)
      kernels.attend_join(args, u, partials.get() + first[u] * step, first[u + 1] - first[u]);
  });
  return {call.out, call.lse};
}

// As floats, of any float type.
void widen(const Tensor& t, float* out) {
  with_float(type_of(t.scalar_type()), [&]<class T>(T*) {
    for (int64_t i = 0; i < t.numel(); ++i) out[i] = to_float(static_cast<const T*>(t.const_data_ptr())[i]);
  });
}

Tensor wrope(const Tensor& q, const Tensor& cos, const Tensor& sin) {
  WropeCall call = check_wrope(q, cos, sin);
  const Buffer<float> factors(call.args.dim);
  widen(call.cos, factors.get());
  widen(call.sin, factors.get() + call.args.dim / 2);
  call.args.cos = factors.get();
  call.args.sin = factors.get() + call.args.dim / 2;
  for_parts(call.args.rows, worthwhile(2 * call.args.dim),
            [&](int64_t r0, int64_t r1) { cpu().wrope(call.args, r0, r1); });
  return call.out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(effk, m) {
  m.def("vq_metric(Tensor q, *, float eps=1e-6) -> (Tensor chol, Tensor inv)");
  m.def(
      "vq_train(Tensor keys, int num_codes, Tensor? chol=None, *, int num_subspaces=1, int iters=20, int seed=0) "
      "-> Tensor");
  m.def("vq_encode(Tensor keys, Tensor codebook, Tensor? chol=None, *, bool pack=False) -> Tensor");
  m.def("vq_lut(Tensor q, Tensor codebook, Tensor? inv=None) -> Tensor");
  m.def("vq_score(Tensor lut, Tensor codes, Tensor? lens=None, *, str table='float32') -> Tensor");
  m.def(
      "vq_topk(Tensor lut, Tensor codes, SymInt k, Tensor? lens=None, *, int sink=8, int window=64, bool "
      "union_group=True, str table='float32') -> (Tensor idx, Tensor count)");
  m.def(
      "vq_attend(Tensor q, Tensor k, Tensor v, Tensor? idx=None, Tensor? count=None, *, float? scale=None) -> (Tensor "
      "out, Tensor lse)");
  m.def("vq_wrope(Tensor q, Tensor cos, Tensor sin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  m.impl("vq_encode", TORCH_BOX(&encode));
  m.impl("vq_lut", TORCH_BOX(&lut));
  m.impl("vq_score", TORCH_BOX(&score));
  m.impl("vq_topk", TORCH_BOX(&topk));
  m.impl("vq_attend", TORCH_BOX(&attend));
  m.impl("vq_wrope", TORCH_BOX(&wrope));
}

}  // namespace
}  // namespace effk::vq
