// lora: the CUDA side.
#include "../../kernels/lora/apply.cuh"
#include "../../kernels/lora/merge.cuh"
#include "../common/cuda.h"
#include "args.h"

namespace effk::lora {
namespace {

// A checked list of pairs, and what keeps it alive.
struct Pairs {
  Tensor ids, gates;
  MergeList args;
};

Pairs pairs_of(const Tensor& ids, const Tensor& gates, float sign) {
  const cuda::IndexTensor index = cuda::indices(ids);
  const Tensor contiguous = as_contiguous(gates);
  return {*index.tensor,
          contiguous,
          {index.args, static_cast<const float*>(contiguous.const_data_ptr()), static_cast<int>(ids.size(0)), sign}};
}

// w = base or w, plus the updates of the pairs.
void merge(const char* op, const MergeCall& call, const Tensor& ids, const std::vector<Pairs>& lists,
           const OptTensor& ranks, double scale) {
  if (call.layers.empty()) return;
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const Layer& layer = call.layers[i];
    if (layer.rows <= 1) continue;
    EFFK_CHECK(layer.w_stride < kMostStride, op, at("w", i), " has rows ", layer.w_stride,
               " elements apart; wanted less than 2^32");
    EFFK_CHECK(layer.base_stride < kMostStride, op, at("base", i), " has rows ", layer.base_stride,
               " elements apart; wanted less than 2^32");
  }
  const cuda::DeviceGuard guard(ids.get_device_index());
  const cuda::IndexTensor rank = cuda::indices(ranks);
  MergeArgs args{};
  for (size_t i = 0; i < lists.size(); ++i) args.lists[i] = lists[i].args;
  args.ranks = rank.args;
  args.scale = scale;
  args.adapters = static_cast<int>(call.adapters);
  args.rank = static_cast<int>(call.rank);
  args.in_place = !call.with_base;
  cuda::check(op, launch_merge(args, call.type, call.layers.data(), static_cast<int64_t>(call.layers.size()),
                               cuda::num_sms(op, ids), cuda::most_shared_bytes(op, ids), cuda::current_stream(ids)));
}

void merge_(TensorList w, TensorList a, TensorList b, Tensor ids, Tensor gates, std::optional<TensorList> base,
            OptTensor ranks, double scale) {
  constexpr const char* op = "lora_merge_";
  check_list(op, "ids", ids, "gates", gates, ids);
  const MergeCall call = check_merge(op, w, a, b, ids, base, ranks, {{"ids", ids}, {"gates", gates}});
  merge(op, call, ids, {pairs_of(ids, gates, 1)}, ranks, scale);
}

void unmerge_(TensorList w, TensorList a, TensorList b, Tensor ids, Tensor gates, std::optional<TensorList> base,
              OptTensor ranks, double scale) {
  constexpr const char* op = "lora_unmerge_";
  check_list(op, "ids", ids, "gates", gates, ids);
  const MergeCall call = check_merge(op, w, a, b, ids, base, ranks, {{"ids", ids}, {"gates", gates}});
  std::vector<Pairs> lists;
  if (!base) lists.push_back(pairs_of(ids, gates, -1));
  merge(op, call, ids, lists, ranks, scale);
}

void switch_(TensorList w, TensorList a, TensorList b, Tensor old_ids, Tensor old_gates, Tensor new_ids,
             Tensor new_gates, std::optional<TensorList> base, OptTensor ranks, double scale) {
  constexpr const char* op = "lora_switch_";
  check_list(op, "old_ids", old_ids, "old_gates", old_gates, old_ids);
  check_list(op, "new_ids", new_ids, "new_gates", new_gates, old_ids);
  const MergeCall call =
      check_merge(op, w, a, b, old_ids, base, ranks,
                  {{"old_ids", old_ids}, {"old_gates", old_gates}, {"new_ids", new_ids}, {"new_gates", new_gates}});
  std::vector<Pairs> lists;
  if (!base) lists.push_back(pairs_of(old_ids, old_gates, -1));
  lists.push_back(pairs_of(new_ids, new_gates, 1));
  merge(op, call, old_ids, lists, ranks, scale);
}

Tensor apply(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& ids, const Tensor& gates,
             const OptTensor& y, const OptTensor& ranks, double scale) {
  constexpr const char* op = "lora_apply";
  const cuda::DeviceGuard guard(x.get_device_index());
  const ApplyCall call = check_apply(x, a, b, ids, gates, y, ranks);
  const cuda::IndexTensor rank = cuda::indices(ranks);
  const ApplyArgs args{call.args,
                       {call.ids.const_data_ptr(), ids.scalar_type() == ScalarType::Long},
                       static_cast<const float*>(call.gates.const_data_ptr()),
                       rank.args,
                       scale,
                       static_cast<int>(call.adapters),
                       static_cast<int>(call.pairs)};
  const Tensor workspace = empty_like_device(x, {apply_workspace(args)}, ScalarType::Byte);
  cuda::check(op, launch_apply(args, workspace.mutable_data_ptr(), cuda::current_stream(x)));
  return call.y;
}

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  m.impl("lora_merge_", TORCH_BOX(&merge_));
  m.impl("lora_unmerge_", TORCH_BOX(&unmerge_));
  m.impl("lora_switch_", TORCH_BOX(&switch_));
  m.impl("lora_apply", TORCH_BOX(&apply));
}

}  // namespace
}  // namespace effk::lora
