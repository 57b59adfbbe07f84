// w4a8: schemas and the CPU side.
#include <cstring>

#include "../../kernels/common/cpu.h"
#include "../../kernels/common/cpu_level.h"
#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "args.h"

namespace effk::w4a8 {
namespace {

const Cpu& cpu() { return cpu_kernels<Cpu>("w4a8", {&cpu_scalar, &cpu_avx2, &cpu_avx512}); }

// Kernels write where perm says.
void check_perm(const char* op, const Packed& w) {
  const int64_t n = w.shape.rows();
  const Buffer<uint8_t> seen(n + 1);  // the last for whatever is outside
  std::memset(seen.get(), 0, n + 1);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t at = static_cast<uint32_t>(w.perm[i]);
    seen.get()[at < n ? at : n] = 1;
  }
  EFFK_CHECK(std::memchr(seen.get(), 0, n) == nullptr, op, "perm is corrupt: it isn't a permutation of 0 to ", n - 1);
}

// An odd number of cache lines between two tokens' beginnings: a tile's tokens shouldn't all want the same few places
// in the cache.
int64_t padded(int64_t cols) { return ((cols + 63) / 64 | 1) * 64; }

std::tuple<Tensor, Tensor> quantize(const Tensor& x, int64_t group) {
  QuantizeCall call = check_quantize("w4a8_quantize", x, group);
  const int64_t cols = call.args.cols;
  const Tensor q = empty_like_device(x, sizes_of(x, cols), ScalarType::Char),
               scale = empty_like_device(x, sizes_of(x, (cols + group - 1) / group), ScalarType::Float);
  call.args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  call.args.q_stride = cols;
  call.args.scale = static_cast<float*>(scale.mutable_data_ptr());
  for_parts(call.tokens, worthwhile(cols), [&](int64_t t0, int64_t t1) { cpu().quantize(call.args, t0, t1); });
  return {q, scale};
}

SixTensors pack(const Tensor& w, const OptTensor& is8, int64_t group) {
  check_pack(w, is8, group);
  const int64_t n = w.size(0);
  // Columns that don't follow each other would be read one by one; a copy costs less.
  const Tensor source = w.stride(1) == 1 ? w : as_contiguous(w);
  const Tensor perm = empty_like_device(w, {n}, ScalarType::Int);
  auto* const order = static_cast<int32_t*>(perm.mutable_data_ptr());
  int64_t n4 = n;
  if (is8) {
    const auto* flag = static_cast<const bool*>(is8->const_data_ptr());
    const int64_t stride = is8->stride(0);
    int64_t next = 0;
    for (int64_t i = 0; i < n; ++i)
      if (!flag[i * stride]) order[next++] = static_cast<int32_t>(i);
    n4 = next;
    for (int64_t i = 0; i < n; ++i)
      if (flag[i * stride]) order[next++] = static_cast<int32_t>(i);
  } else {
    for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  }
  const PackCall call = new_packed(source, {n4, n - n4, w.size(1), group}, perm);
  const Packed& packed = call.args.w;
  ask_for_huge_pages(const_cast<uint8_t*>(packed.q4), packed.shape.blocks4() * packed.shape.chunks() * kBlock * 4);
  ask_for_huge_pages(const_cast<uint8_t*>(packed.q8), packed.shape.n8 * packed.shape.cols);
  for_parts(packed.shape.blocks(), worthwhile(kBlock * packed.shape.cols),
            [&](int64_t b0, int64_t b1) { cpu().pack(call.args, b0, b1); });
  return call.packed;
}

Tensor unpack(const Tensor& q4, const Tensor& scale4, const Tensor& zero4, const Tensor& q8, const Tensor& scale8,
              const Tensor& perm, int64_t group) {
  constexpr const char* op = "w4a8_unpack";
  const Packed w = check_packed(op, {q4, scale4, zero4, q8, scale8, perm}, group);
  check_perm(op, w);
  const Tensor out = empty_like_device(q8, {w.shape.rows(), w.shape.cols}, ScalarType::Float);
  auto* const dense = static_cast<float*>(out.mutable_data_ptr());
  ask_for_huge_pages(dense, out.numel() * 4);
  for_parts(w.shape.blocks(), worthwhile(kBlock * w.shape.cols),
            [&](int64_t b0, int64_t b1) { cpu().unpack(w, dense, b0, b1); });
  return out;
}

Tensor accumulate(const Tensor& q, const Tensor& q4, const Tensor& scale4, const Tensor& zero4, const Tensor& q8,
                  const Tensor& scale8, const Tensor& perm, int64_t group) {
  constexpr const char* op = "w4a8_accumulate";
  Linear args = check_accumulate(q, {q4, scale4, zero4, q8, scale8, perm}, group);
  check_perm(op, args.w);
  const Shape& shape = args.w.shape;
  const int64_t cols = shape.cols, groups = shape.groups(), tokens = args.tokens;
  args.q_stride = padded(cols);
  const Buffer<int8_t> copy(tokens * args.q_stride);
  const Buffer<int32_t> sums(tokens * groups);
  const Tensor source = as_contiguous(q);
  const auto* from = static_cast<const int8_t*>(source.const_data_ptr());
  std::memset(copy.get(), 0, tokens * args.q_stride);
  std::fill_n(sums.get(), tokens * groups, 0);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < cols; ++k) {
      copy.get()[t * args.q_stride + k] = from[t * cols + k];
      sums.get()[t * groups + k / group] += from[t * cols + k];
    }
  const Tensor out = empty_like_device(q, {tokens, groups, shape.rows()}, ScalarType::Int);
  args.q = copy.get();
  args.sums = sums.get();
  args.accumulators = static_cast<int32_t*>(out.mutable_data_ptr());
  for_parts(shape.blocks(), worthwhile(kBlock * cols * std::max<int64_t>(1, tokens)),
            [&](int64_t b0, int64_t b1) { cpu().accumulate(args, b0, b1); });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& q4, const Tensor& scale4, const Tensor& zero4, const Tensor& q8,
              const Tensor& scale8, const Tensor& perm, int64_t group, const OptTensor& bias,
              std::optional<ScalarType> out_dtype) {
  LinearCall call = check_linear(x, {q4, scale4, zero4, q8, scale8, perm}, group, bias, out_dtype);
  check_perm("w4a8_linear", call.args.w);
  const Cpu& kernels = cpu();
  Linear& args = call.args;
  Quantize& quantize = call.x.args;
  const int64_t cols = quantize.cols, tokens = args.tokens, groups = args.w.shape.groups();
  const int64_t stride = padded(cols);
  // Not tensors: at one token, making them costs as much as a tenth of the product.
  const Buffer<int8_t> q(tokens * stride);
  const Buffer<float> scale(tokens * groups);
  const Buffer<int32_t> sums(tokens * groups);
  args.q = quantize.q = q.get();
  args.q_stride = quantize.q_stride = stride;
  args.x_scale = quantize.scale = scale.get();
  args.sums = quantize.sums = sums.get();
  for_parts(tokens, worthwhile(cols), [&](int64_t t0, int64_t t1) { kernels.quantize(quantize, t0, t1); });
  constexpr int64_t kPart = 8;  // blocks that share an activation's read
  const int64_t work = kBlock * cols * std::max<int64_t>(1, tokens);
  for_parts(args.w.shape.blocks(), std::max(kPart, worthwhile(work)),
            [&](int64_t b0, int64_t b1) { kernels.linear(args, b0, b1); });
  return call.y;
}

Tensor salience(const Tensor& grad, const Tensor& w, const Tensor& w4) {
  const SalienceCall call = check_salience(grad, w, w4);
  for_parts(call.args.rows, worthwhile(call.args.samples * call.args.cols),
            [&](int64_t r0, int64_t r1) { cpu().salience(call.args, r0, r1); });
  return call.out;
}

#define EFFK_PACKED "Tensor q4, Tensor scale4, Tensor zero4, Tensor q8, Tensor scale8, Tensor perm"
STABLE_TORCH_LIBRARY_FRAGMENT(effk, m) {
  m.def("w4a8_quantize(Tensor x, int group_size=128) -> (Tensor q, Tensor scale)");
  m.def("w4a8_pack(Tensor w, Tensor? is8=None, int group_size=128) -> (" EFFK_PACKED ")");
  m.def("w4a8_unpack(" EFFK_PACKED ", int group_size) -> Tensor");
  m.def("w4a8_linear(Tensor x, " EFFK_PACKED
        ", int group_size, Tensor? bias=None, *, ScalarType? out_dtype=None) -> Tensor");
  m.def("w4a8_accumulate(Tensor q, " EFFK_PACKED ", int group_size) -> Tensor");
  m.def("w4a8_salience(Tensor grad, Tensor w, Tensor w4) -> Tensor");
}
#undef EFFK_PACKED

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  m.impl("w4a8_quantize", TORCH_BOX(&quantize));
  m.impl("w4a8_pack", TORCH_BOX(&pack));
  m.impl("w4a8_unpack", TORCH_BOX(&unpack));
  m.impl("w4a8_linear", TORCH_BOX(&linear));
  m.impl("w4a8_accumulate", TORCH_BOX(&accumulate));
  m.impl("w4a8_salience", TORCH_BOX(&salience));
}

}  // namespace
}  // namespace effk::w4a8
