// lora in plain C++, for any CPU: what the other levels must agree with.
#include "cpu_common.h"

namespace effk::lora {
namespace {

void merge(const Merge& m, const Layer& layer, int64_t row0, int64_t row1) {
  with_float(m.type, [&]<class T>(T*) {
    if (m.num_active == 0) return copy_rows<T>(layer, row0, row1);
    for (int64_t n = row0; n < row1; ++n) {
      T* w = static_cast<T*>(layer.w) + n * layer.w_stride;
      const T* base = layer.base ? static_cast<const T*>(layer.base) + n * layer.base_stride : w;
      for (int64_t k = 0; k < layer.cols; ++k) {
        float sum = to_float(base[k]);
        for (int64_t i = 0; i < m.num_active; ++i) {
          const Active& one = m.active[i];
          const int64_t rank = used_rank(one, layer);
          const T* a = static_cast<const T*>(layer.a) + one.adapter * layer.rank * layer.cols + k;
          const T* b = static_cast<const T*>(layer.b) + (one.adapter * layer.rows + n) * layer.rank;
          float product = 0;
          for (int64_t r = 0; r < rank; ++r) product += to_float(b[r]) * to_float(a[r * layer.cols]);
          sum += one.factor * product;
        }
        from_float(sum, &w[k]);
      }
    }
  });
}

void shrink(const Apply& p, const Apply::Group& group, int64_t r0, int64_t r1) {
  with_float(p.type, [&]<class T>(T*) {
    for (int64_t r = r0; r < r1; ++r) {
      const T* a = static_cast<const T*>(p.a) + (group.adapter * p.rank + r) * p.cols;
      for (int64_t i = group.begin; i < group.end; ++i) {
        const T* x = static_cast<const T*>(p.x) + p.token[i] * p.x_stride;
        float sum = 0;
        for (int64_t k = 0; k < p.cols; ++k) sum += to_float(a[k]) * to_float(x[k]);
        p.inner[i * p.rank + r] = sum;
      }
    }
  });
}

void expand(const Apply& p, int64_t row0, int64_t row1) {
  with_float(p.type, [&]<class T>(T*) {
    const int64_t rows = row1 - row0;
    const Buffer<float> sums(p.tokens * rows);
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t n = 0; n < rows; ++n)
        sums.get()[t * rows + n] = p.y_in ? to_float(static_cast<const T*>(p.y_in)[t * p.y_stride + row0 + n]) : 0.0f;
    for (int64_t g = 0; g < p.num_groups; ++g) {
      const Apply::Group& group = p.groups[g];
      for (int64_t i = group.begin; i < group.end; ++i)
        for (int64_t n = 0; n < rows; ++n) {
          const T* b = static_cast<const T*>(p.b) + (group.adapter * p.rows + row0 + n) * p.rank;
          float sum = 0;
          for (int64_t r = 0; r < group.rank; ++r) sum += to_float(b[r]) * p.inner[i * p.rank + r];
          sums.get()[p.token[i] * rows + n] += p.factor[i] * sum;
        }
    }
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t n = 0; n < rows; ++n)
        from_float(sums.get()[t * rows + n], static_cast<T*>(p.y) + t * p.rows + row0 + n);
  });
}

}  // namespace

constinit const Cpu cpu_scalar = {merge, shrink, expand};

}  // namespace effk::lora
