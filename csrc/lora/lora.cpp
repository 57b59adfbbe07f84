// lora: schemas and the CPU side.
#include "../../kernels/common/cpu.h"
#include "../../kernels/common/cpu_level.h"
#include "../common/integers.h"
#include "../common/parallel.h"
#include "args.h"

namespace effk::lora {
namespace {

const Cpu& cpu() { return cpu_kernels<Cpu>("lora", {&cpu_scalar, &cpu_avx2, &cpu_avx512}); }

// How much of the rank each adapter uses.
class Ranks {
 public:
  Ranks(const char* op, const OptTensor& ranks, int64_t adapters, int64_t rank) : rank_(rank) {
    if (!ranks) return;
    given_.emplace(*ranks);
    for (int64_t i = 0; i < adapters; ++i)
      EFFK_CHECK((*given_)[i] >= 0 && (*given_)[i] <= rank, op, "ranks[", i, "] is ", (*given_)[i], "; wanted 0 to ",
                 rank);
  }
  int64_t operator[](int64_t adapter) const { return given_ ? (*given_)[adapter] : rank_; }

 private:
  std::optional<Integers> given_;
  int64_t rank_;
};

int64_t checked_id(const char* op, const char* arg, int64_t id, int64_t adapters) {
  EFFK_CHECK(id >= -1 && id < adapters, op, arg, " holds ", id, "; wanted -1 to ", adapters - 1);
  return id;
}

// Gates summed up for each adapter, of the pairs of one list or of several.
class Gates {
 public:
  Gates(const char* op, int64_t adapters) : op_(op), adapters_(adapters) {}
  void add(const char* arg, const Tensor& ids, const Tensor& gates, double sign) {
    const Integers id(ids);
    const Tensor gate = as_contiguous(gates);
    const auto* values = static_cast<const float*>(gate.const_data_ptr());
    for (int64_t i = 0; i < ids.size(0); ++i)
      if (checked_id(op_, arg, id[i], adapters_) >= 0) sums_.push_back({id[i], sign * values[i]});
  }
  std::vector<Active> active(const Ranks& ranks, double scale) {
    std::stable_sort(sums_.begin(), sums_.end(), [](const auto& x, const auto& y) { return x.first < y.first; });
    std::vector<Active> found;
    for (size_t i = 0; i < sums_.size();) {
      const int64_t adapter = sums_[i].first;
      double sum = 0;
      for (; i < sums_.size() && sums_[i].first == adapter; ++i) sum += sums_[i].second;
      const float factor = static_cast<float>(sum * scale);
      if (factor != 0 && ranks[adapter] > 0) found.push_back({adapter, ranks[adapter], factor});
    }
    return found;
  }

 private:
  const char* op_;
  int64_t adapters_;
  std::vector<std::pair<int64_t, double>> sums_;
};

void merge(const MergeCall& call, const std::vector<Active>& active) {
  if (active.empty() && !call.with_base) return;
  // Weights that the caches can't hold are better written past them: a line needn't be read first.
  constexpr int64_t kCaches = 16 << 20;
  int64_t elements = 0;
  for (const Layer& layer : call.layers) elements += layer.rows * layer.cols;
  const Merge args{call.type, active.data(), static_cast<int64_t>(active.size()),
                   elements * type_size(call.type) > kCaches};
  const Merge nothing{call.type, nullptr, 0};  // for a layer without rank beside others, to the bit
  constexpr int64_t kRows = 96;                // of a part: what its preparations are shared by
  int64_t total_rank = 1, parts = 0, work = 0;
  for (const Active& one : active) total_rank += one.rank;
  std::vector<int64_t> ends;
  for (const Layer& layer : call.layers) {
    ends.push_back(parts += (layer.rows + kRows - 1) / kRows);
    work = std::max(work, kRows * layer.cols * total_rank);
  }
  for_parts(parts, worthwhile(work), [&](int64_t p0, int64_t p1) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), p0) - ends.begin();
    for (int64_t p = p0; p < p1; ++p) {
      while (p >= ends[i]) ++i;
      const Layer& layer = call.layers[i];
      const int64_t row = (p - (i ? ends[i - 1] : 0)) * kRows;
      cpu().merge(layer.rank > 0 ? args : nothing, layer, row, std::min(layer.rows, row + kRows));
    }
  });
}

void merge_(TensorList w, TensorList a, TensorList b, Tensor ids, Tensor gates, std::optional<TensorList> base,
            OptTensor ranks, double scale) {
  constexpr const char* op = "lora_merge_";
  check_list(op, "ids", ids, "gates", gates, ids);
  const MergeCall call = check_merge(op, w, a, b, ids, base, ranks, {{"ids", ids}, {"gates", gates}});
  Gates sums(op, call.adapters);
  if (!w.empty()) sums.add("ids", ids, gates, 1);
  merge(call, sums.active(Ranks(op, ranks, call.adapters, call.rank), scale));
}

void unmerge_(TensorList w, TensorList a, TensorList b, Tensor ids, Tensor gates, std::optional<TensorList> base,
              OptTensor ranks, double scale) {
  constexpr const char* op = "lora_unmerge_";
  check_list(op, "ids", ids, "gates", gates, ids);
  const MergeCall call = check_merge(op, w, a, b, ids, base, ranks, {{"ids", ids}, {"gates", gates}});
  Gates sums(op, call.adapters);
  if (!w.empty()) sums.add("ids", ids, gates, -1);
  const std::vector<Active> active = sums.active(Ranks(op, ranks, call.adapters, call.rank), scale);
  merge(call, base ? std::vector<Active>() : active);
}

void switch_(TensorList w, TensorList a, TensorList b, Tensor old_ids, Tensor old_gates, Tensor new_ids,
             Tensor new_gates, std::optional<TensorList> base, OptTensor ranks, double scale) {
  constexpr const char* op = "lora_switch_";
  check_list(op, "old_ids", old_ids, "old_gates", old_gates, old_ids);
  check_list(op, "new_ids", new_ids, "new_gates", new_gates, old_ids);
  const MergeCall call =
      check_merge(op, w, a, b, old_ids, base, ranks,
                  {{"old_ids", old_ids}, {"old_gates", old_gates}, {"new_ids", new_ids}, {"new_gates", new_gates}});
  const Ranks used(op, ranks, call.adapters, call.rank);
  Gates sums(op, call.adapters);
  if (!w.empty()) {
    sums.add("old_ids", old_ids, old_gates, -1);
    if (base) sums = Gates(op, call.adapters);  // they are checked; the result doesn't need them
    sums.add("new_ids", new_ids, new_gates, 1);
  }
  merge(call, sums.active(used, scale));
}

// The pairs of all tokens sorted by adapter.
struct Groups {
  std::vector<Apply::Group> groups;
  std::vector<int64_t> token;
  std::vector<float> factor;
};

Groups group(const ApplyCall& call, const Ranks& ranks, double scale) {
  constexpr const char* op = "lora_apply";
  struct Entry {
    int64_t adapter, token;
    float factor;
  };
  if (call.pairs == 0 || call.args.rows == 0) return {};  // however many tokens
  const Integers ids(call.ids);
  const auto* gates = static_cast<const float*>(call.gates.const_data_ptr());
  std::vector<Entry> entries;
  entries.reserve(call.args.tokens * call.pairs);
  std::vector<std::pair<int64_t, double>> of_token;
  for (int64_t t = 0; t < call.args.tokens; ++t) {
    of_token.clear();
    for (int64_t i = t * call.pairs; i < (t + 1) * call.pairs; ++i) {
      const int64_t id = checked_id(op, "ids", ids[i], call.adapters);
      if (id < 0) continue;
      const auto found = std::find_if(of_token.begin(), of_token.end(), [&](const auto& e) { return e.first == id; });
      if (found == of_token.end())
        of_token.push_back({id, double{gates[i]}});
      else
        found->second += gates[i];
    }
    for (const auto& [adapter, sum] : of_token) {
      const float factor = static_cast<float>(sum * scale);
      if (factor != 0 && ranks[adapter] > 0) entries.push_back({adapter, t, factor});
    }
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& x, const Entry& y) { return x.adapter < y.adapter; });
  Groups out;
  out.token.reserve(entries.size());
  out.factor.reserve(entries.size());
  for (const Entry& e : entries) {
    const auto i = static_cast<int64_t>(out.token.size());
    if (out.groups.empty() || out.groups.back().adapter != e.adapter)
      out.groups.push_back({e.adapter, ranks[e.adapter], i, i});
    out.groups.back().end = i + 1;
    out.token.push_back(e.token);
    out.factor.push_back(e.factor);
  }
  return out;
}

Tensor apply(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& ids, const Tensor& gates,
             const OptTensor& y, const OptTensor& ranks, double scale) {
  const Cpu& kernels = cpu();
  ApplyCall call = check_apply(x, a, b, ids, gates, y, ranks);
  Apply& args = call.args;
  const Groups found = group(call, Ranks("lora_apply", ranks, call.adapters, args.rank), scale);
  const Buffer<float> inner(found.token.size() * args.rank);
  args.groups = found.groups.data();
  args.num_groups = static_cast<int64_t>(found.groups.size());
  args.token = found.token.data();
  args.factor = found.factor.data();
  args.inner = inner.get();
  constexpr int64_t kRanks = 4, kRows = 64;  // of a part
  const int64_t rank_parts = (args.rank + kRanks - 1) / kRanks;
  const auto entries = static_cast<int64_t>(found.token.size());
  for_parts(args.num_groups * rank_parts, worthwhile(kRanks * args.cols), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      const Apply::Group& one = args.groups[p / rank_parts];
      const int64_t r = p % rank_parts * kRanks;
      if (r < one.rank) kernels.shrink(args, one, r, std::min(one.rank, r + kRanks));
    }
  });
  const int64_t work = args.tokens + entries * args.rank;
  for_parts((args.rows + kRows - 1) / kRows, worthwhile(kRows * work), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) kernels.expand(args, p * kRows, std::min(args.rows, (p + 1) * kRows));
  });
  return call.y;
}

#define EFFK_LAYERS "Tensor(a!)[] w, Tensor[] a, Tensor[] b, "
#define EFFK_OPTIONS ", Tensor[]? base=None, Tensor? ranks=None, *, float scale=1.0) -> ()"
STABLE_TORCH_LIBRARY_FRAGMENT(effk, m) {
  m.def("lora_merge_(" EFFK_LAYERS "Tensor ids, Tensor gates" EFFK_OPTIONS);
  m.def("lora_unmerge_(" EFFK_LAYERS "Tensor ids, Tensor gates" EFFK_OPTIONS);
  m.def("lora_switch_(" EFFK_LAYERS "Tensor old_ids, Tensor old_gates, Tensor new_ids, Tensor new_gates" EFFK_OPTIONS);
  m.def(
      "lora_apply(Tensor x, Tensor a, Tensor b, Tensor ids, Tensor gates, Tensor? y=None, Tensor? ranks=None, *, "
      "float scale=1.0) -> Tensor");
}
#undef EFFK_LAYERS
#undef EFFK_OPTIONS

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  m.impl("lora_merge_", TORCH_BOX(&merge_));
  m.impl("lora_unmerge_", TORCH_BOX(&unmerge_));
  m.impl("lora_switch_", TORCH_BOX(&switch_));
  m.impl("lora_apply", TORCH_BOX(&apply));
}

}  // namespace
}  // namespace effk::lora
