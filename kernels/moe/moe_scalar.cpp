// moe in plain C++, for any CPU: what the other levels must agree with. There are no dense groups here.
#include "cpu_common.h"

namespace effk::moe {
namespace {

template <class T>
float product(const T* x, const T* w, int64_t cols) {
  float sum = 0;
  for (int64_t k = 0; k < cols; ++k) sum += to_float(x[k]) * to_float(w[k]);
  return sum;
}

void linear(const Linear& p, const Group& group, int64_t unit0, int64_t unit1, int64_t row0, int64_t row1) {
  with_float(p.in.type, [&]<class T>(T*) {
    with_float(p.out_type, [&]<class Y>(Y*) {
      const T* bias = p.bias ? static_cast<const T*>(p.bias) + group.expert * p.rows : nullptr;
      for (int64_t i = group.begin + unit0; i < group.begin + unit1; ++i)
        for (int64_t n = row0; n < row1; ++n) {
          const float sum = product(row_of_x<T>(p.in, i), row_of_w<T>(p.in, group.expert, n), p.in.cols);
          from_float(bias ? sum + to_float(bias[n]) : sum, static_cast<Y*>(p.y) + i * p.rows + n);
        }
    });
  });
}

void up(const Up& p, const Group& group, int64_t unit0, int64_t unit1, int64_t inner0, int64_t inner1) {
  with_float(p.in.type, [&]<class T>(T*) {
    with_activation(p.activation, [&](auto activation) {
      const bool gated = is_gated(p.activation);
      for (int64_t i = group.begin + unit0; i < group.begin + unit1; ++i)
        for (int64_t n = inner0; n < inner1; ++n) {
          const T* x = row_of_x<T>(p.in, i);
          const float gate = gated ? product(x, row_of_w<T>(p.in, group.expert, n), p.in.cols) : 0.0f;
          const float up = product(x, row_of_w<T>(p.in, group.expert, gated ? p.inner + n : n), p.in.cols);
          from_float(activated<activation()>(gate, up), static_cast<T*>(p.h) + i * p.inner + n);
        }
    });
  });
}

void down(const Down& p, int64_t row0, int64_t row1) {
  with_float(p.in.type, [&]<class T>(T*) {
    const int64_t rows = row1 - row0;
    const Buffer<float> sums(p.tokens * rows);
    const auto added = [&](int64_t t) { return static_cast<float*>(p.y) + p.place[t] * p.rows + row0; };
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t n = 0; n < rows; ++n) sums.get()[t * rows + n] = p.place ? added(t)[n] : 0;
    for (int64_t g = 0; g < p.num_groups; ++g)
      for (int64_t i = p.groups[g].begin; i < p.groups[g].end; ++i)
        for (int64_t n = 0; n < rows; ++n)
          sums.get()[p.token[i] * rows + n] +=
              p.weight[i] * product(row_of_x<T>(p.in, i), row_of_w<T>(p.in, p.groups[g].expert, row0 + n), p.in.cols);
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t n = 0; n < rows; ++n)
        if (const float sum = sums.get()[t * rows + n]; p.place)
          added(t)[n] = sum;
        else
          from_float(sum, static_cast<T*>(p.y) + t * p.rows + row0 + n);
  });
}

void wgrad(const Wgrad& p, const Group& group, int64_t row0, int64_t row1) {
  with_float(p.in.type, [&]<class T>(T*) {
    for (int64_t n = row0; n < row1; ++n)
      for (int64_t k = 0; k < p.in.cols; ++k) {
        float sum = 0;
        for (int64_t i = group.begin; i < group.end; ++i)
          sum += to_float(static_cast<const T*>(p.grad)[i * p.grad_stride + n]) * to_float(row_of_x<T>(p.in, i)[k]);
        from_float(sum, static_cast<T*>(p.dw) + (group.expert * p.rows + n) * p.in.cols + k);
      }
  });
}

}  // namespace

constinit const Cpu cpu_scalar = {1, nullptr, nullptr, nullptr, linear, up, down, wgrad, route, combine};

}  // namespace effk::moe
