// The launchers of vq for Python. Compiled with the checker's hooks; csrc/vq/vq.cu is what it stands for.
#include "../../kernels/vq/attend.cuh"
#include "../../kernels/vq/encode.cuh"
#include "../../kernels/vq/lut.cuh"
#include "../../kernels/vq/topk.cuh"
#include "../../kernels/vq/wrope.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

template <class T = void>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

effk::Indices indices(const Indices& v) { return {pointer<const void>(std::get<0>(v)), std::get<1>(v)}; }

template <size_t N>
void copy_strides(const std::vector<int64_t>& from, int64_t (&to)[N]) {
  for (size_t i = 0; i < N; ++i) to[i] = from[i];
}

vq::ScoreArgs scores(const VqScores& s) {
  const auto& [sizes, lut, codes, code, strides, lens, int8_table] = s;
  vq::ScoreArgs p{};
  p.a.batch = sizes[0], p.a.heads = sizes[1], p.a.group = sizes[2], p.a.keys = sizes[3];
  p.a.subspaces = sizes[4], p.a.words = sizes[5];
  p.a.lut = pointer<const float>(lut);
  p.a.codes = static_cast<vq::Codes>(codes);
  p.a.code = pointer<const void>(code);
  copy_strides(strides, p.a.code_stride);
  p.a.int8_table = int8_table;
  p.lens = indices(lens);
  return p;
}

}  // namespace

gpu::Error vq_encode(int type, std::vector<int64_t> sizes, Address keys, std::vector<int64_t> strides, Address codebook,
                     Address chol, int codes, Address out) {
  vq::Encode p{};
  p.type = static_cast<Type>(type);
  p.batch = sizes[0], p.heads = sizes[1], p.keys = sizes[2], p.dim = sizes[3];
  p.subspaces = sizes[4], p.words = sizes[5];
  p.k = pointer<const void>(keys);
  copy_strides(strides, p.k_stride);
  p.codebook = pointer<const float>(codebook);
  p.chol = pointer<const float>(chol);
  p.codes = static_cast<vq::Codes>(codes);
  p.out = pointer(out);
  return vq::launch_encode(p, 0);
}

gpu::Error vq_lut(int type, std::vector<int64_t> sizes, Address q, std::vector<int64_t> strides, Address codebook,
                  Address inv, Address out) {
  vq::Lut p{};
  p.type = static_cast<Type>(type);
  p.batch = sizes[0], p.heads = sizes[1], p.group = sizes[2], p.dim = sizes[3];
  p.subspaces = sizes[4], p.words = sizes[5];
  p.q = pointer<const void>(q);
  copy_strides(strides, p.q_stride);
  p.codebook = pointer<const float>(codebook);
  p.inv = pointer<const float>(inv);
  p.out = pointer<float>(out);
  return vq::launch_lut(p, 0);
}

gpu::Error vq_score(VqScores s, Address out, int num_sms) {
  vq::ScoreArgs p = scores(s);
  p.a.out = pointer<float>(out);
  const Memory scratch("scratch", nullptr, vq::place_scores(p, nullptr, num_sms), Memory::Kind::output);
  vq::place_scores(p, scratch.data(), num_sms);
  return vq::launch_scores(p, 0);
}

gpu::Error vq_topk(VqScores s, int64_t k, int64_t sink, int64_t window, bool union_group, int64_t cap, Address idx,
                   Address count, int num_sms) {
  vq::TopKArgs p{};
  p.s = scores(s);
  p.s.sink = sink;
  p.s.window = window;
  p.k = k;
  p.union_group = union_group;
  p.cap = cap;
  p.idx = pointer<int64_t>(idx);
  p.count = pointer<int64_t>(count);
  const Memory scratch("scratch", nullptr, vq::place_topk(p, nullptr, num_sms), Memory::Kind::output);
  vq::place_topk(p, scratch.data(), num_sms);
  return vq::launch_topk(p, 0);
}

gpu::Error vq_attend(int type, std::vector<int64_t> sizes, VqRows q, VqRows k, VqRows v, Indices idx, Indices count,
                     double scale, Address out, Address lse, int num_sms) {
  vq::AttendArgs p{};
  p.a.type = static_cast<Type>(type);
  p.a.batch = sizes[0], p.a.heads = sizes[1], p.a.group = sizes[2], p.a.keys = sizes[3];
  p.a.dim = sizes[4], p.a.value_dim = sizes[5], p.a.lists = sizes[6], p.a.cap = sizes[7];
  p.a.q = pointer<const void>(q.first);
  p.a.k = pointer<const void>(k.first);
  p.a.v = pointer<const void>(v.first);
  copy_strides(q.second, p.a.q_stride);
  copy_strides(k.second, p.a.k_stride);
  copy_strides(v.second, p.a.v_stride);
  p.a.scale = static_cast<float>(scale);
  p.a.out = pointer(out);
  p.a.lse = pointer<float>(lse);
  p.idx = indices(idx);
  p.count = indices(count);
  const Memory scratch("scratch", nullptr, vq::place_attend(p, nullptr, num_sms), Memory::Kind::output);
  vq::place_attend(p, scratch.data(), num_sms);
  return vq::launch_attend(p, 0);
}

gpu::Error vq_wrope(int type, int64_t rows, int64_t dim, Address q, int64_t stride, Address cos, bool cos_float,
                    Address sin, bool sin_float, Address out) {
  const vq::Wrope a{static_cast<Type>(type), rows, dim, pointer<const void>(q), stride, nullptr, nullptr, pointer(out)};
  return vq::launch_wrope({a, cos_float, sin_float, pointer<const void>(cos), pointer<const void>(sin)}, 0);
}

}  // namespace effk::simt
