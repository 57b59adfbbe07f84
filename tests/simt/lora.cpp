// The launchers of lora for Python. Compiled with the checker's hooks; csrc/lora/lora.cu is what it stands for.
#include "../../kernels/lora/apply.cuh"
#include "../../kernels/lora/merge.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

template <class T = void>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

effk::Indices indices(const Indices& v) { return {pointer<const void>(std::get<0>(v)), std::get<1>(v)}; }

}  // namespace

gpu::Error lora_merge(int type, std::vector<LoraLayer> layers, std::vector<LoraPairs> lists, Indices ranks,
                      double scale, int64_t adapters, int64_t rank, int num_sms, int most_shared) {
  std::vector<lora::Layer> all;
  for (const auto& [w, base, a, b, rows, cols, layer_rank, w_stride, base_stride] : layers)
    all.push_back({pointer(w), pointer(base), pointer(a), pointer(b), rows, cols, layer_rank, w_stride, base_stride});
  lora::MergeArgs args{};
  for (size_t i = 0; i < lists.size(); ++i) {
    const auto& [ids, gates, count, sign] = lists[i];
    args.lists[i] = {indices(ids), pointer<const float>(gates), static_cast<int>(count), sign};
  }
  args.ranks = indices(ranks);
  args.scale = scale;
  args.adapters = static_cast<int>(adapters);
  args.rank = static_cast<int>(rank);
  args.in_place = !all.empty() && !all[0].base;
  return launch_merge(args, static_cast<Type>(type), all.data(), static_cast<int64_t>(all.size()), num_sms, most_shared,
                      0);
}

gpu::Error lora_apply(int type, int64_t tokens, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, Address x,
                      int64_t x_stride, Address a, Address b, Indices ids, Address gates, int64_t pairs, Indices ranks,
                      double scale, Address y_in, int64_t y_stride, Address y, int64_t most_blocks) {
  const auto [adapters, rank, cols, rows] = sizes;
  lora::ApplyArgs args{};
  args.a.type = static_cast<Type>(type);
  args.a.tokens = tokens;
  args.a.cols = cols;
  args.a.rows = rows;
  args.a.rank = rank;
  args.a.x = pointer(x);
  args.a.x_stride = x_stride;
  args.a.a = pointer(a);
  args.a.b = pointer(b);
  args.a.y_in = pointer(y_in);
  args.a.y_stride = y_stride;
  args.a.y = pointer(y);
  args.ids = indices(ids);
  args.gates = pointer<const float>(gates);
  args.ranks = indices(ranks);
  args.scale = scale;
  args.adapters = static_cast<int>(adapters);
  args.pairs = static_cast<int>(pairs);
  const Memory workspace("workspace", nullptr, apply_workspace(args), Memory::Kind::output);
  return launch_apply(args, workspace.data(), 0, most_blocks);
}

}  // namespace effk::simt
