// w4a8 in plain C++, for any CPU: what the other levels must agree with.
#include "cpu_common.h"

namespace effk::w4a8 {
namespace {

// Calls f(row of the block, sum of q * (w - zero), weight scale) for each row of a block, of one token and group.
template <class F>
void for_rows(const Linear& a, const Block& block, int64_t token, int64_t group, const F& f) {
  const Shape& s = a.w.shape;
  const int64_t k0 = group * s.group, k1 = k0 + s.group < s.cols ? k0 + s.group : s.cols;
  const int8_t* x = a.q + token * a.q_stride;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = block.index * kBlock + i, at = group_at(s, row, group);
    int32_t sum = 0;
    if (block.is8)
      for (int64_t k = k0; k < k1; ++k) sum += x[k] * (a.w.q8[q8_at(s, row, k)] - kZero8);
    else
      for (int64_t k = k0; k < k1; ++k) {
        const uint8_t byte = a.w.q4[q4_at(s, row, k)];
        sum += x[k] * ((k % kChunk < 4 ? byte & 15 : byte >> 4) - a.w.zero4[at]);
      }
    f(i, sum, block.is8 ? a.w.scale8[at] : a.w.scale4[at]);
  }
}

void linear(const Linear& a, int64_t b0, int64_t b1) {
  with_float(a.y_type, [&]<class Y>(Y*) {
    const int64_t groups = a.w.shape.groups();
    for (int64_t b = b0; b < b1; ++b) {
      const Block block = block_at(a.w.shape, b);
      for (int64_t t = 0; t < a.tokens; ++t) {
        float y[kBlock] = {};
        for (int64_t g = 0; g < groups; ++g)
          for_rows(a, block, t, g, [&](int64_t i, int32_t sum, float scale) {
            y[i] += static_cast<float>(sum) * a.x_scale[t * groups + g] * scale;
          });
        finish<Y>(a, block, t, y);
      }
    }
  });
}

void accumulate(const Linear& a, int64_t b0, int64_t b1) {
  const int64_t groups = a.w.shape.groups(), rows = a.w.shape.rows();
  for (int64_t b = b0; b < b1; ++b) {
    const Block block = block_at(a.w.shape, b);
    for (int64_t t = 0; t < a.tokens; ++t)
      for (int64_t g = 0; g < groups; ++g)
        for_rows(a, block, t, g, [&](int64_t i, int32_t sum, float) {
          a.accumulators[(t * groups + g) * rows + a.w.perm[block.first_row + i]] = sum;
        });
  }
}

}  // namespace

constinit const Cpu cpu_scalar = {quantize, linear, accumulate, pack, unpack, salience};

}  // namespace effk::w4a8
