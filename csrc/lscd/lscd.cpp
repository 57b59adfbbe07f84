// lscd: schemas and the CPU side.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>

#include "../../kernels/common/cpu.h"
#include "../../kernels/common/cpu_level.h"
#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "args.h"

namespace effk::lscd {
namespace {

const Cpu& cpu() { return cpu_kernels<Cpu>("lscd", {&cpu_scalar, &cpu_avx2, &cpu_avx512}); }

// Runs f(strip begin, strip end, status) on all threads; `work` is the operations of a strip. Throws when a tile
// is corrupt.
template <class F>
void for_strips(const char* op, const Shape& shape, int64_t work, const F& f) {
  constexpr int64_t kPart = 8;  // strips that share a block of x while it is in the cache
  std::atomic<int64_t> bad_tile{-1};
  for_parts(shape.strips(), std::max(kPart, worthwhile(work)), [&](int64_t s0, int64_t s1) {
    Status status;
    f(s0, s1, &status);
    if (status.bad_tile >= 0) bad_tile = status.bad_tile;
  });
  EFFK_CHECK(bad_tile < 0, op, "the packed tensors are corrupt: bitmap, offsets and values disagree at tile ",
             bad_tile.load());
}

// What the kernels don't look at, tile by tile.
void check_ends(const char* op, const Packed& p) {
  const int64_t end = p.num_values - kValuePad;
  EFFK_CHECK(p.offsets[0] == 0 && p.offsets[p.shape.offsets() - 1] == end, op,
             "the packed tensors are corrupt: offsets go from ", p.offsets[0], " to ", p.offsets[p.shape.offsets() - 1],
             "; wanted 0 to ", end, " (values less ", kValuePad, " of padding)");
}

std::tuple<Tensor, Tensor, Tensor> pack(const Tensor& w, std::optional<ScalarType> dtype) {
  Tensor source = check_pack(w, dtype);
  // Columns that don't follow each other would be read one by one; a copy costs less.
  if (source.stride(1) != 1) source = as_contiguous(source);
  const Type type = type_of(source.scalar_type());
  const Shape shape{source.size(0), source.size(1)};
  const Dense dense{const_cast<void*>(source.const_data_ptr()), source.stride(0), source.stride(1)};
  const int64_t work = shape.padded_cols() * kStripRows;

  Tensor bitmap = torch::stable::new_empty(w, {shape.strips(), shape.sub_cols(), kStripSubs}, ScalarType::Long);
  Tensor offsets = torch::stable::new_empty(w, {shape.offsets()}, ScalarType::Long);
  auto* words = static_cast<uint64_t*>(bitmap.mutable_data_ptr());
  auto* ends = static_cast<int64_t*>(offsets.mutable_data_ptr());
  ask_for_huge_pages(words, bitmap.numel() * 8);
  ends[0] = 0;
  for_strips("lscd_pack", shape, work,
             [&](int64_t s0, int64_t s1, Status*) { cpu().count(shape, type, dense, words, ends + 1, s0, s1); });
  for (int64_t i = 1; i < shape.offsets(); ++i) ends[i] = ends[i - 1] + align_values(ends[i]);

  const int64_t num_values = ends[shape.offsets() - 1] + kValuePad;
  Tensor values = torch::stable::new_empty(source, {num_values});
  auto* bytes = static_cast<char*>(values.mutable_data_ptr());
  ask_for_huge_pages(bytes, num_values * type_size(type));
  std::fill_n(bytes + (num_values - kValuePad) * type_size(type), kValuePad * type_size(type), 0);
  const Packed packed{shape, type, bytes, num_values, words, ends};
  for_strips("lscd_pack", shape, work, [&](int64_t s0, int64_t s1, Status*) { cpu().fill(packed, dense, s0, s1); });
  return {values, bitmap, offsets};
}

Tensor unpack(const Tensor& values, const Tensor& bitmap, const Tensor& offsets, int64_t rows, int64_t cols,
              const OptTensor& scale) {
  constexpr const char* op = "lscd_unpack";
  const Packed packed = check_packed(op, values, bitmap, offsets, rows, cols);
  const float* scales = check_scale(op, scale, values, rows);
  check_ends(op, packed);
  Tensor out = torch::stable::new_empty(values, {rows, cols}, unpacked_dtype(values, scale));
  const Type out_type = type_of(out.scalar_type());
  ask_for_huge_pages(out.mutable_data_ptr(), rows * cols * type_size(out_type));
  for_strips(op, packed.shape, packed.shape.padded_cols() * kStripRows, [&](int64_t s0, int64_t s1, Status* status) {
    cpu().unpack(packed, scales, out.mutable_data_ptr(), out_type, s0, s1, status);
  });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& bitmap, const Tensor& offsets, int64_t rows,
              int64_t cols, const OptTensor& bias, const OptTensor& scale, const std::string& activation) {
  LinearCall call = check_linear(x, values, bitmap, offsets, rows, cols, bias, scale, activation);
  Linear& args = call.args;
  check_ends("lscd_linear", args.w);
  const Cpu& kernels = cpu();
  // Not a tensor: at one token, making one costs as much as a tenth of the product.
  const Buffer<char> prepared(kernels.prepared_bytes(args));
  args.prepared = prepared.get();
  for_parts(args.tokens, worthwhile(cols), [&](int64_t t0, int64_t t1) { kernels.prepare(args, t0, t1); });
  for_strips("lscd_linear", args.w.shape, args.w.shape.padded_cols() * kStripRows * std::max<int64_t>(1, args.tokens),
             [&](int64_t s0, int64_t s1, Status* status) { kernels.linear(args, s0, s1, status); });
  return call.y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(effk, m) {
  m.def("lscd_pack(Tensor w, *, ScalarType? dtype=None) -> (Tensor values, Tensor bitmap, Tensor offsets)");
  m.def(
      "lscd_unpack(Tensor values, Tensor bitmap, Tensor offsets, SymInt rows, SymInt cols, Tensor? scale=None) -> "
      "Tensor");
  m.def(
      "lscd_linear(Tensor x, Tensor values, Tensor bitmap, Tensor offsets, SymInt rows, SymInt cols, "
      "Tensor? bias=None, Tensor? scale=None, *, str activation=\"none\") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  m.impl("lscd_pack", TORCH_BOX(&pack));
  m.impl("lscd_unpack", TORCH_BOX(&unpack));
  m.impl("lscd_linear", TORCH_BOX(&linear));
}

}  // namespace
}  // namespace effk::lscd
