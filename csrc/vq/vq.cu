// vq: the CUDA side. vq_metric and vq_train are made of other ops on every device.
#include "../../kernels/vq/attend.cuh"
#include "../../kernels/vq/encode.cuh"
#include "../../kernels/vq/lut.cuh"
#include "../../kernels/vq/topk.cuh"
#include "../../kernels/vq/wrope.cuh"
#include "../common/cuda.h"
#include "args.h"

namespace effk::vq {
namespace {

// Where the GPU finds a tensor: on it, or in pinned memory of the CPU. `given` is what `t` may be a copy of.
const void* seen_by_gpu(const char* op, const char* arg, const Tensor& t, const Tensor& given, const Tensor& q) {
  if (t.is_cuda()) {
    check::device(op, arg, t, "q", q);
    return t.const_data_ptr();
  }
  if (t.numel() == 0) return nullptr;
  EFFK_CHECK(given.stride(3) == 1 || given.size(3) == 1, op, arg,
             " is on the CPU with columns apart; wanted a last stride of 1");
  cudaPointerAttributes seen{};
  const cudaError_t e = cudaPointerGetAttributes(&seen, t.const_data_ptr());
  EFFK_CHECK(e == cudaSuccess, op, "CUDA: ", cudaGetErrorString(e));
  EFFK_CHECK(seen.type == cudaMemoryTypeHost && seen.devicePointer, op, arg,
             " is on the CPU in memory that isn't pinned; wanted q's device, or pinned memory");
  return seen.devicePointer;
}

Tensor encode(const Tensor& keys, const Tensor& codebook, const OptTensor& chol, bool pack) {
  const cuda::DeviceGuard guard(keys.get_device_index());
  const EncodeCall call = check_encode(keys, codebook, chol, pack);
  cuda::check("vq_encode", launch_encode(call.args, cuda::current_stream(keys)));
  return call.codes;
}

Tensor lut(const Tensor& q, const Tensor& codebook, const OptTensor& inv) {
  const cuda::DeviceGuard guard(q.get_device_index());
  const LutCall call = check_lut(q, codebook, inv);
  cuda::check("vq_lut", launch_lut(call.args, cuda::current_stream(q)));
  return call.out;
}

Tensor score(const Tensor& lut, const Tensor& codes, const OptTensor& lens, std::string table) {
  constexpr const char* op = "vq_score";
  const cuda::DeviceGuard guard(lut.get_device_index());
  const ScoreCall call = check_score(lut, codes, lens, table);
  const cuda::IndexTensor ends = cuda::indices(lens);
  ScoreArgs p{};
  p.a = call.args;
  p.lens = ends.args;
  const int num_sms = cuda::num_sms(op, lut);
  const Tensor scratch = cuda::workspace(lut, place_scores(p, nullptr, num_sms));
  place_scores(p, scratch.mutable_data_ptr(), num_sms);
  cuda::check(op, launch_scores(p, cuda::current_stream(lut)));
  return call.out;
}

std::tuple<Tensor, Tensor> topk(const Tensor& lut, const Tensor& codes, int64_t k, const OptTensor& lens, int64_t sink,
                                int64_t window, bool union_group, std::string table) {
  constexpr const char* op = "vq_topk";
  const cuda::DeviceGuard guard(lut.get_device_index());
  const TopKCall call = check_topk(lut, codes, k, lens, sink, window, union_group, table);
  const cuda::IndexTensor ends = cuda::indices(lens);
  TopKArgs p{};
  p.s.a = call.scored.args;
  p.s.lens = ends.args;
  p.s.sink = call.args.sink;
  p.s.window = call.args.window;
  p.k = call.args.k;
  p.union_group = union_group;
  p.cap = call.args.cap;
  p.idx = call.args.idx;
  p.count = call.args.count;
  const int num_sms = cuda::num_sms(op, lut);
  const Tensor scratch = cuda::workspace(lut, place_topk(p, nullptr, num_sms));
  place_topk(p, scratch.mutable_data_ptr(), num_sms);
  cuda::check(op, launch_topk(p, cuda::current_stream(lut)));
  return {call.idx, call.count};
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& idx,
                                  const OptTensor& count, std::optional<double> scale) {
  constexpr const char* op = "vq_attend";
  const cuda::DeviceGuard guard(q.get_device_index());
  const AttendCall call = check_attend(q, k, v, idx, count, scale, true);
  const cuda::IndexTensor chosen = cuda::indices(idx), counts = cuda::indices(count);
  AttendArgs p{};
  p.a = call.args;
  p.a.k = seen_by_gpu(op, "k", call.k, k, q);
  p.a.v = seen_by_gpu(op, "v", call.v, v, q);
  p.idx = chosen.args;
  p.count = counts.args;
  const int num_sms = cuda::num_sms(op, q);
  const Tensor scratch = cuda::workspace(q, place_attend(p, nullptr, num_sms));
  place_attend(p, scratch.mutable_data_ptr(), num_sms);
  cuda::check(op, launch_attend(p, cuda::current_stream(q)));
  return {call.out, call.lse};
}

Tensor wrope(const Tensor& q, const Tensor& cos, const Tensor& sin) {
  const cuda::DeviceGuard guard(q.get_device_index());
  const WropeCall call = check_wrope(q, cos, sin);
  const auto is_float = [](const Tensor& t) { return t.scalar_type() == ScalarType::Float; };
  const WropeArgs p{call.args, is_float(cos), is_float(sin), call.cos.const_data_ptr(), call.sin.const_data_ptr()};
  cuda::check("vq_wrope", launch_wrope(p, cuda::current_stream(q)));
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  m.impl("vq_encode", TORCH_BOX(&encode));
  m.impl("vq_lut", TORCH_BOX(&lut));
  m.impl("vq_score", TORCH_BOX(&score));
  m.impl("vq_topk", TORCH_BOX(&topk));
  m.impl("vq_attend", TORCH_BOX(&attend));
  m.impl("vq_wrope", TORCH_BOX(&wrope));
}

}  // namespace
}  // namespace effk::vq
