// moe: schemas and the CPU side.
#include "../../kernels/common/cpu.h"
#include "../../kernels/common/cpu_level.h"
#include "../../kernels/moe/sort.h"
#include "../common/integers.h"
#include "../common/parallel.h"
#include "args.h"

namespace effk::moe {
namespace {

const Cpu& cpu() { return cpu_kernels<Cpu>("moe", {&cpu_scalar, &cpu_avx2, &cpu_avx512}); }

// What a group's product with a weight takes, in picoseconds of a thread: the calibrated model of both ways.
struct Costs {
  double read;      // grouped: a weight, however few rows there are
  double dot;       // grouped: a weight and a row
  double lay_out;   // dense: a weight, for as many rows as share its copy
  double multiply;  // dense: a weight and a vector of rows
  double pack;      // dense: an element of the rows
};
constexpr int kCosts = sizeof(Costs) / sizeof(double);
constexpr int kFloats = 3;

// By CPU level and type; these are of a Zen 5.
Costs costs[3][kFloats] = {
    {},
    {{260, 33, 250, 130, 4000}, {130, 26, 160, 160, 1000}, {130, 31, 170, 170, 600}},
    {{290, 22, 320, 120, 5000}, {145, 14, 200, 135, 2000}, {130, 9, 165, 55, 2500}},
};

double grouped_cost(const Costs& c, int64_t group_rows, int64_t rows, int64_t cols) {
  return static_cast<double>(rows) * static_cast<double>(cols) *
         std::max(c.read, c.dot * static_cast<double>(group_rows));
}

double dense_cost(const Costs& c, int64_t width, int64_t group_rows, int64_t rows, int64_t cols) {
  const auto vectors = static_cast<double>((group_rows + width - 1) / width);
  return static_cast<double>(rows) * static_cast<double>(cols) * (c.lay_out + c.multiply * vectors) +
         static_cast<double>(group_rows) * static_cast<double>(cols) * c.pack;
}

// Which way of multiplying a group's rows with a weight costs less.
Gemm choose(const Cpu& kernels, Type type, int64_t group_rows, int64_t rows, int64_t cols) {
  const Costs& c = costs[static_cast<int>(cpu_level("moe"))][static_cast<int>(type)];
  return grouped_cost(c, group_rows, rows, cols) <= dense_cost(c, kernels.width, group_rows, rows, cols) ? Gemm::grouped
                                                                                                         : Gemm::dense;
}

// The groups that have rows, and the memory that dense ones need.
struct Groups {
  std::vector<Group> list;
  std::optional<Buffer<char>> x_panels, h_panels;

  // usual: of each group, how many rows the choice is made for, if not for those that there are.
  Groups(const Cpu& kernels, Type type, const int64_t* ends, int64_t experts, std::optional<Gemm> gemm, int64_t rows,
         int64_t cols, int64_t inner = 0, const int64_t* usual = nullptr) {
    int64_t x_bytes = 0, h_bytes = 0;
    for (int64_t e = 0, begin = 0; e < experts; begin = ends[e++])
      if (const int64_t count = ends[e] - begin; count > 0) {
        Group group{e, begin, ends[e]};
        if (kernels.pack) group.gemm = gemm ? *gemm : choose(kernels, type, usual ? usual[e] : count, rows, cols);
        list.push_back(group);
        if (group.gemm == Gemm::grouped) continue;
        x_bytes += kernels.panel_bytes(type, count, cols);
        h_bytes += kernels.panel_bytes(type, count, inner);
      }
    x_panels.emplace(x_bytes);
    h_panels.emplace(h_bytes);
    char *x = x_panels->get(), *h = h_panels->get();
    for (Group& group : list) {
      if (group.gemm == Gemm::grouped) continue;
      group.x_panels = x;
      group.h_panels = h;
      x += kernels.panel_bytes(type, group.end - group.begin, cols);
      h += kernels.panel_bytes(type, group.end - group.begin, inner);
    }
  }
};

// What a thread takes at a time: some units of a group and some of the weight's rows.
struct Part {
  const Group* group;
  int64_t unit0, unit1, row0, row1;
};

// Lays out the rows of dense groups, then calls f(part) until all rows of all groups' weights are through, so many rows
// at a time.
template <class F>
void for_groups(const Cpu& kernels, const Groups& groups, const Operands& in, int64_t rows, int64_t grouped_rows,
                int64_t dense_rows, const F& f) {
  constexpr int64_t kRows = 512, kTiles = 6;  // of a group; as many tiles as share a copy of the weights
  std::vector<Part> packed, parts;
  for (const Group& group : groups.list) {
    const bool dense = group.gemm == Gemm::dense;
    const int64_t count = group.end - group.begin, units = dense ? kernels.tiles(count) : count;
    const int64_t unit_step = dense ? kTiles : kRows, row_step = dense ? dense_rows : grouped_rows;
    if (dense)
      for (int64_t u = 0; u < units; ++u) packed.push_back({&group, u, u + 1, 0, 0});
    for (int64_t u = 0; u < units; u += unit_step)
      for (int64_t row = 0; row < rows; row += row_step)
        parts.push_back({&group, u, std::min(units, u + unit_step), row, std::min(rows, row + row_step)});
  }
  for_parts(static_cast<int64_t>(packed.size()), worthwhile(16 * in.cols), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) kernels.pack(in, *packed[p].group, packed[p].unit0, packed[p].unit1);
  });
  for_parts(static_cast<int64_t>(parts.size()), worthwhile(64 * in.cols), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) f(parts[p]);
  });
}

// The ends of groups as numbers, and which row of x each sorted row is, if not the same.
struct Sorted {
  std::vector<int64_t> ends;
  std::optional<std::vector<int64_t>> source;
};

Sorted check_contents(const char* op, const Rows& rows, const Tensor& offsets, int64_t x_rows, Operands& in) {
  Sorted out;
  const Integers given(offsets);
  int64_t last = 0;
  for (int64_t e = 0; e < given.size(); ++e) {
    EFFK_CHECK(given[e] >= last && given[e] <= rows.rows, op, "offsets[", e, "] is ", given[e],
               "; wanted ascending numbers up to ", rows.rows, " rows");
    out.ends.push_back(last = given[e]);
  }
  if (!rows.gather) return out;
  const Integers gather(*rows.gather);
  out.source.emplace();
  for (int64_t i = 0; i < gather.size(); ++i) {
    EFFK_CHECK(gather[i] >= 0 && gather[i] < x_rows, op, "gather[", i, "] is ", gather[i], "; wanted 0 to ",
               x_rows - 1);
    out.source->push_back(gather[i]);
  }
  in.source = out.source->data();  // stays where it is when `out` is moved
  return out;
}

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets, const OptTensor& bias,
                    const OptTensor& gather, std::optional<ScalarType> out_dtype) {
  LinearCall call = check_linear(x, w, offsets, bias, gather, out_dtype);
  Linear& args = call.args;
  const Sorted sorted = check_contents("moe_grouped_gemm", call.x, offsets, x.size(0), args.in);
  const int64_t kept = sorted.ends.empty() ? 0 : sorted.ends.back();
  const int64_t bytes = args.rows * type_size(args.out_type);
  std::memset(static_cast<char*>(args.y) + kept * bytes, 0, (call.x.rows - kept) * bytes);
  const Cpu& kernels = cpu();
  const Groups groups(kernels, args.in.type, sorted.ends.data(), w.size(0), std::nullopt, args.rows, args.in.cols);
  for_groups(kernels, groups, args.in, args.rows, 96, 192, [&](const Part& part) {
    kernels.linear(args, *part.group, part.unit0, part.unit1, part.row0, part.row1);
  });
  return call.y;
}

Tensor grouped_wgrad(const Tensor& grad, const Tensor& x, const Tensor& offsets, const OptTensor& gather) {
  WgradCall call = check_wgrad(grad, x, offsets, gather);
  Wgrad& args = call.args;
  const Sorted sorted = check_contents("moe_grouped_wgrad", call.x, offsets, x.size(0), args.in);
  if (call.dw.numel() == 0) return call.dw;
  constexpr int64_t kRows = 32;
  const int64_t blocks = (args.rows + kRows - 1) / kRows;
  for_parts(offsets.size(0) * blocks, 1, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t e = p / blocks, row = p % blocks * kRows;
      const Group group{e, e ? sorted.ends[e - 1] : 0, sorted.ends[e], Gemm::grouped};
      cpu().wgrad(args, group, row, std::min(args.rows, row + kRows));
    }
  });
  return call.dw;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k, const OptTensor& bias, std::string score,
                                 bool renormalize) {
  const RouteCall call = check_route(logits, k, bias, score, renormalize);
  for_parts(call.args.tokens, worthwhile((16 + k) * call.args.experts),
            [&](int64_t t0, int64_t t1) { cpu().route(call.args, t0, t1); });
  return {call.weights, call.ids};
}

std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& ids, int64_t num_experts) {
  const auto [perm, inverse, offsets] = check_sort(ids, num_experts);
  const Integers given(ids);
  std::vector<int64_t> ends(num_experts);
  const int64_t bad = sort_pairs(given, given.size(), num_experts, static_cast<int64_t*>(perm.mutable_data_ptr()),
                                 static_cast<int64_t*>(inverse.mutable_data_ptr()), ends.data());
  EFFK_CHECK(bad < 0, "moe_sort", "ids holds ", given[bad], "; wanted -1 to ", num_experts - 1);
  std::copy(ends.begin(), ends.end(), static_cast<int32_t*>(offsets.mutable_data_ptr()));
  return {perm, inverse, offsets};
}

Tensor combine(const Tensor& y, const Tensor& inverse, const Tensor& weights) {
  CombineCall call = check_combine(y, inverse, weights);
  const Integers given(inverse);
  const Buffer<int64_t> places(given.size());
  for (int64_t i = 0; i < given.size(); ++i) {
    EFFK_CHECK(given[i] >= -1 && given[i] < y.size(0), "moe_combine", "inverse holds ", given[i], "; wanted -1 to ",
               y.size(0) - 1);
    places.get()[i] = given[i];
  }
  call.args.inverse = places.get();
  for_parts(call.args.tokens, worthwhile((1 + call.args.k) * call.args.cols),
            [&](int64_t t0, int64_t t1) { cpu().combine(call.args, t0, t1); });
  return call.out;
}

// Numbers the tokens of sorted rows in the order of their first ones, to `number`; the tokens come back.
std::vector<int64_t> number_tokens(const int64_t* token, int64_t rows, int64_t tokens, int64_t* number) {
  std::vector<int64_t> numbers(tokens, -1), found;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t& n = numbers[token[i]];
    if (n < 0) {
      n = static_cast<int64_t>(found.size());
      found.push_back(token[i]);
    }
    number[i] = n;
  }
  return found;
}

// Tokens [t0, t1) of a call.
void mlp_tokens(const MlpCall& call, const Integers& ids, int64_t t0, int64_t t1, const int64_t* usual) {
  const Cpu& kernels = cpu();
  const int64_t k = call.pairs, pairs = (t1 - t0) * k, esize = type_size(call.first.type);
  const Buffer<int64_t> perm(pairs), token(pairs), ends(call.experts);
  const Buffer<float> weight(pairs);
  struct {
    const Integers& all;
    int64_t first;
    int64_t operator[](int64_t i) const { return all[first + i]; }
  } const chunk{ids, t0 * k};
  const int64_t bad = sort_pairs(chunk, pairs, call.experts, perm.get(), nullptr, ends.get());
  EFFK_CHECK(bad < 0, call.op, "ids holds ", chunk[bad], "; wanted -1 to ", call.experts - 1);
  const int64_t kept = call.experts ? ends.get()[call.experts - 1] : 0;
  const auto* weights = static_cast<const float*>(call.weights.const_data_ptr()) + t0 * k;
  for (int64_t i = 0; i < kept; ++i) {
    token.get()[i] = perm.get()[i] / k;
    weight.get()[i] = weights[perm.get()[i]];
  }
  const Buffer<char> h(kept * call.inner * esize);
  Up up{call.first, call.activation, call.inner, h.get()};
  up.in.x = static_cast<const char*>(up.in.x) + t0 * up.in.x_stride * esize;
  up.in.source = token.get();
  const Groups groups(kernels, up.in.type, ends.get(), call.experts, call.gemm,
                      call.inner * (is_gated(call.activation) ? 3 : 2), up.in.cols, call.inner, usual);
  for_groups(kernels, groups, up.in, call.inner, 48, 96,
             [&](const Part& part) { kernels.up(up, *part.group, part.unit0, part.unit1, part.row0, part.row1); });
  Down down{call.second,
            call.rows,
            groups.list.data(),
            static_cast<int64_t>(groups.list.size()),
            token.get(),
            weight.get(),
            t1 - t0,
            static_cast<char*>(call.y.mutable_data_ptr()) + t0 * call.rows * (call.adds ? type_size(Type::f32) : esize),
            nullptr};
  down.in.x = h.get();
  std::vector<int64_t> place;
  if (call.adds) {  // to the tokens that have something to add
    place = number_tokens(token.get(), kept, t1 - t0, token.get());
    down.tokens = static_cast<int64_t>(place.size());
    down.place = place.data();
    if (place.empty()) return;
  }
  // Parts of rows for every thread, several of them, but wide ones: each reads all of h.
  const int64_t share = call.rows / (8 * std::max<int64_t>(1, torch::stable::get_num_threads()));
  const int64_t step = std::clamp<int64_t>(share / 32 * 32, 32, 128);
  for_parts((call.rows + step - 1) / step, worthwhile(step * (kept * call.inner + down.tokens)),
            [&](int64_t p0, int64_t p1) {
              for (int64_t p = p0; p < p1; ++p) kernels.down(down, p * step, std::min(call.rows, (p + 1) * step));
            });
}

Tensor run_mlp(const MlpCall& call) {
  const Integers given(call.ids);
  // So many tokens at a time that what is between the two products stays in the last cache.
  constexpr int64_t kPairs = 8192;
  const int64_t step = std::max<int64_t>(1, kPairs / std::max<int64_t>(1, call.pairs));
  // An expert's rows are multiplied in the same way in all parts, so that their order doesn't matter.
  std::vector<int64_t> usual;
  if (call.tokens > step) {
    const int64_t parts = (call.tokens + step - 1) / step;
    usual.resize(call.experts);
    for (int64_t i = 0; i < given.size(); ++i)
      if (given[i] >= 0 && given[i] < call.experts) ++usual[given[i]];
    for (int64_t& rows : usual) rows = (rows + parts - 1) / parts;
  }
  for (int64_t t = 0; t < call.tokens; t += step)
    mlp_tokens(call, given, t, std::min(call.tokens, t + step), usual.empty() ? nullptr : usual.data());
  return call.y;
}

Tensor mlp(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& weights, const Tensor& ids,
           std::string activation, std::string gemm) {
  return run_mlp(check_mlp(std::nullopt, x, w13, w2, weights, ids, activation, gemm));
}

void mlp_(const Tensor& y, const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& weights,
          const Tensor& ids, std::string activation, std::string gemm) {
  run_mlp(check_mlp(y, x, w13, w2, weights, ids, activation, gemm));
}

STABLE_TORCH_LIBRARY_FRAGMENT(effk, m) {
  m.def(
      "moe_route(Tensor logits, SymInt k, Tensor? bias=None, *, str score='softmax', bool renormalize=True) -> "
      "(Tensor weights, Tensor ids)");
  m.def("moe_sort(Tensor ids, SymInt num_experts) -> (Tensor perm, Tensor inverse, Tensor offsets)");
  m.def(
      "moe_grouped_gemm(Tensor x, Tensor w, Tensor offsets, Tensor? bias=None, Tensor? gather=None, *, ScalarType? "
      "out_dtype=None) -> Tensor");
  m.def("moe_grouped_wgrad(Tensor grad, Tensor x, Tensor offsets, Tensor? gather=None) -> Tensor");
  m.def("moe_combine(Tensor y, Tensor inverse, Tensor weights) -> Tensor");
  m.def(
      "moe_mlp(Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor ids, *, str activation='swiglu', str "
      "gemm='auto') -> Tensor");
  m.def(
      "moe_mlp_(Tensor(a!) y, Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor ids, *, str "
      "activation='swiglu', str gemm='auto') -> ()");
  m.def(
      "moe_mlp_ep(Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor ids, str group, *, str activation='swiglu', "
      "int stages=0, str gemm='auto') -> Tensor");
  m.def(
      "moe_mlp_ep_backward(Tensor grad, Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor ids, str group, *, str "
      "activation='swiglu', int stages=0) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&route));
  m.impl("moe_sort", TORCH_BOX(&sort));
  m.impl("moe_grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("moe_grouped_wgrad", TORCH_BOX(&grouped_wgrad));
  m.impl("moe_combine", TORCH_BOX(&combine));
  m.impl("moe_mlp", TORCH_BOX(&mlp));
  m.impl("moe_mlp_", TORCH_BOX(&mlp_));
}

}  // namespace
}  // namespace effk::moe

// For the calibration: replaces the costs of a float type (its number in Type) at the CPU level in force, and gives
// those that were there. Not while ops run.
extern "C" __attribute__((visibility("default"))) int effk_moe_exchange_costs(int type, double* values) {
  using namespace effk;
  const int level = static_cast<int>(cpu_level("moe"));
  if (type < 0 || type >= moe::kFloats || level == 0) return 1;
  double old[moe::kCosts];
  std::memcpy(old, &moe::costs[level][type], sizeof(old));
  std::memcpy(&moe::costs[level][type], values, sizeof(old));
  std::memcpy(values, old, sizeof(old));
  return 0;
}
