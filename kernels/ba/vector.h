// The passes over observations, for any width of vectors. Included by ba_<level>.cpp, which has before: V, of kWidth
// doubles; root(V) where V isn't double; transpose(rows, columns) of kWidth vectors.
//
// Observations are taken kChunk at a time, whole points in passes that need them: their numbers by columns, so that
// a vector holds one number of several observations. What is added up by camera or point is turned into rows first.
#pragma once

#include <cstring>

#include "../common/cpu.h"

namespace effk::ba {
namespace {

// Of each lane by itself: there is no instruction for it.
inline V log_plus_one(V v) {
  double numbers[kWidth];
  std::memcpy(numbers, &v, sizeof v);
  for (double& x : numbers) x = ::log1p(x);
  std::memcpy(&v, numbers, sizeof v);
  return v;
}

}  // namespace
}  // namespace effk::ba

#include "model.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // of V as a template's argument, which keep it what it is

namespace effk::ba {
namespace {

// Four doubles, at every level: what a point's system is added up in.
typedef double Quad __attribute__((vector_size(32), aligned(8), may_alias));

constexpr int64_t kChunk = 64;  // keeps a chunk's numbers in the L1 cache

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t kStepPitch = round_up(3, kWidth);  // of points' steps

inline V& vector(double* p) { return *reinterpret_cast<V*>(p); }
inline const V& vector(const double* p) { return *reinterpret_cast<const V*>(p); }

// Of kWidth rows, index * pitch doubles behind `rows`, the first kColumns columns.
template <int64_t kColumns>
inline void load_columns(const double* rows, int64_t pitch, const int32_t* index, V* columns) {
  for (int64_t c = 0; c < kColumns; c += kWidth) {
    V square[kWidth];
    for (int i = 0; i < kWidth; ++i) square[i] = vector(rows + index[i] * pitch + c);
    transpose(square, columns + c);
  }
}

// The opposite, to rows that follow each other.
template <int64_t kColumns>
inline void store_rows(const V* columns, double* rows, int64_t pitch) {
  for (int64_t c = 0; c < kColumns; c += kWidth) {
    V square[kWidth], turned[kWidth];
    for (int i = 0; i < kWidth; ++i) square[i] = columns[c + i];
    transpose(square, turned);
    for (int i = 0; i < kWidth; ++i) vector(rows + i * pitch + c) = turned[i];
  }
}

// Calls f with a null pointer of the storage type.
template <class F>
inline void with_storage(bool is_double, const F& f) {
  is_double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

// Calls f with a null pointer of the model, and whether there is depth as an integral constant.
template <class F>
inline void with_model(const Problem& p, const F& f) {
  const auto by_depth = [&]<class M>(M* m) {
    if constexpr (kIsPosition<M>)
      f(m, std::false_type());
    else if (p.depth)
      f(m, std::true_type());
    else
      f(m, std::false_type());
  };
  switch (p.model) {
    case Model::snavely: return by_depth(static_cast<Snavely*>(nullptr));
    case Model::simple_pinhole: return by_depth(static_cast<SimplePinhole*>(nullptr));
    case Model::pinhole: return by_depth(static_cast<Pinhole*>(nullptr));
    case Model::simple_radial: return by_depth(static_cast<Radial<1>*>(nullptr));
    case Model::radial: return by_depth(static_cast<Radial<2>*>(nullptr));
    case Model::opencv: return by_depth(static_cast<OpenCV*>(nullptr));
    case Model::position: return by_depth(static_cast<Position*>(nullptr));
  }
}

// A chunk's numbers, by columns; behind its end the last observation is repeated up to a whole vector.
template <class M, bool kDepth>
class Chunk {
 public:
  using L = Linear<M, kDepth, V>;
  static constexpr int kRows = L::kRows, n = L::kParameters;
  static constexpr int kUsedRow = kIsPosition<M> ? 3 : 12 + num_intrinsics(M::kModel);
  static constexpr int kObserved = num_columns(M::kModel);
  static constexpr int64_t kCameraColumns = round_up(kUsedRow, kWidth);

  explicit Chunk(const Problem& p, int64_t capacity)
      : p_(p), capacity_(round_up(capacity, kWidth)), numbers_(capacity_ * kNumbers), indices_(capacity_ * 2) {}

  // Of observations [o0, o1).
  void fill(int64_t o0, int64_t o1) { p_.is_double ? fill_of<double>(o0, o1) : fill_of<float>(o0, o1); }

  // Of the kWidth observations from the i-th on.
  template <bool kDerivatives = true>
  inline void linear(int64_t i, L& out) const {
    V camera[kCameraColumns];
    load_columns<kCameraColumns>(p_.camera_rows, kCameraRow, cameras() + i, camera);
    const V point[3] = {at(0, i), at(1, i), at(2, i)};
    V observed[kObserved], inverse_depth{}, weight{};
    for (int c = 0; c < kObserved; ++c) observed[c] = at(3 + c, i);
    if constexpr (kDepth) inverse_depth = at(6, i), weight = at(7, i);
    linearize<M, kDepth, kDerivatives>(camera, point, observed, inverse_depth, weight, out);
  }

  int32_t* cameras() const { return indices_.get(); }
  int32_t* points() const { return indices_.get() + capacity_; }  // counted from the chunk's first
  int64_t capacity() const { return capacity_; }

 private:
  static constexpr int kNumbers = 8;
  double* column(int c) const { return numbers_.get() + c * capacity_; }
  V at(int c, int64_t i) const { return vector(column(c) + i); }

  template <class T>
  void fill_of(int64_t o0, int64_t o1) {
    const T* point = static_cast<const T*>(p_.point);
    const T* observed = static_cast<const T*>(p_.observed);
    const T* depth = static_cast<const T*>(p_.depth);
    int32_t number = -1, last = -1;
    for (int64_t i = 0; i < round_up(o1 - o0, kWidth); ++i) {
      const int64_t o = o0 + i < o1 ? o0 + i : o1 - 1;
      const int32_t of = p_.of_point[o];
      number += of != last;
      last = of;
      cameras()[i] = p_.camera[o];
      points()[i] = number;
      for (int c = 0; c < 3; ++c) column(c)[i] = static_cast<double>(point[int64_t{of} * 3 + c]);
      for (int c = 0; c < kObserved; ++c) column(3 + c)[i] = static_cast<double>(observed[o * kObserved + c]);
      if constexpr (kDepth) {
        const double z = static_cast<double>(depth[o]);
        const bool is_there = z > 0;
        column(6)[i] = is_there ? 1 / z : 0;
        column(7)[i] = is_there ? p_.depth_weight : 0;
      }
    }
  }

  const Problem& p_;
  int64_t capacity_;
  Buffer<double> numbers_;
  Buffer<int32_t> indices_;
};

// --- In any order ---

template <class T>
inline void scatter(const V& v, int64_t valid, T* to, int64_t step) {
  double numbers[kWidth];
  std::memcpy(numbers, &v, sizeof v);
  for (int64_t i = 0; i < valid; ++i) to[i * step] = static_cast<T>(numbers[i]);
}

void residual(const Problem& p, int64_t o0, int64_t o1, void* residual, bool* valid, void* jac_camera,
              void* jac_point) {
  with_model(p, [&]<class M, bool kDepth>(M*, std::bool_constant<kDepth>) {
    using C = Chunk<M, kDepth>;
    C chunk(p, kChunk);
    const auto write = [&]<class T>(T*) {
      for (int64_t begin = o0; begin < o1; begin += kChunk) {
        const int64_t end = begin + kChunk < o1 ? begin + kChunk : o1;
        chunk.fill(begin, end);
        for (int64_t i = 0; i < end - begin; i += kWidth) {
          typename C::L l;
          const int64_t o = begin + i, count = end - o < kWidth ? end - o : kWidth;
          jac_camera ? chunk.linear(i, l) : chunk.template linear<false>(i, l);
          double depth[kWidth];
          std::memcpy(depth, &l.depth, sizeof depth);
          for (int64_t k = 0; k < count; ++k) valid[o + k] = depth[k] > 0;
          for (int r = 0; r < C::kRows; ++r) {
            scatter(l.residual[r], count, static_cast<T*>(residual) + o * C::kRows + r, C::kRows);
            if (!jac_camera) continue;
            for (int c = 0; c < C::n; ++c)
              scatter(l.by_camera[r][c], count, static_cast<T*>(jac_camera) + (o * C::kRows + r) * C::n + c,
                      C::kRows * C::n);
            for (int c = 0; c < 3; ++c)
              scatter(l.by_point[r][c], count, static_cast<T*>(jac_point) + (o * C::kRows + r) * 3 + c, C::kRows * 3);
          }
        }
      }
    };
    with_storage(p.is_double, write);
  });
}

inline double sum_of(const V& v, int64_t count) {
  double numbers[kWidth], sum = 0;
  std::memcpy(numbers, &v, sizeof v);
  for (int64_t i = 0; i < count; ++i) sum += numbers[i];
  return sum;
}

double cost(const Problem& p, int64_t o0, int64_t o1) {
  double total = 0;
  with_model(p, [&]<class M, bool kDepth>(M*, std::bool_constant<kDepth>) {
    using C = Chunk<M, kDepth>;
    C chunk(p, kChunk);
    for (int64_t begin = o0; begin < o1; begin += kChunk) {
      const int64_t end = begin + kChunk < o1 ? begin + kChunk : o1;
      chunk.fill(begin, end);
      V sum{};
      int64_t i = 0;
      for (; i < end - begin; i += kWidth) {
        typename C::L l;
        chunk.template linear<false>(i, l);
        const V one = weigh<false>(p.loss, p.loss_scale, l);
        if (end - begin - i >= kWidth)
          sum += one;
        else
          total += sum_of(one, end - begin - i);
      }
      total += sum_of(sum, kWidth);
    }
  });
  return total;
}

// --- By points ---

// The end of the last point that begins a chunk's size behind o, or of the first one.
inline int64_t end_of_chunk(const Problem& p, int64_t o, int64_t end) {
  int64_t last = o + kChunk;
  if (last >= end) return end;
  while (last > o && p.of_point[last - 1] == p.of_point[last]) --last;
  if (last > o) return last;
  last = o + kChunk;
  while (last < end && p.of_point[last - 1] == p.of_point[last]) ++last;
  return last;
}

// Calls f(o, end) for whole points, at most kChunk observations at a time unless one point has more.
template <class F>
inline void each_chunk(const Problem& p, int64_t o0, int64_t o1, const F& f) {
  for (int64_t o = o0, end; o < o1; o = end) f(o, end = end_of_chunk(p, o, o1));
}

inline int64_t largest_chunk(const Problem& p, int64_t o0, int64_t o1) {
  int64_t most = kChunk;
  each_chunk(p, o0, o1, [&](int64_t o, int64_t end) { most = end - o > most ? end - o : most; });
  return most;
}

// Calls f(begin, end, point) for each point of observations [o, end), counted from o.
template <class F>
inline void each_point(const Problem& p, int64_t o, int64_t end, const F& f) {
  for (int64_t begin = o, last; begin < end; begin = last) {
    last = begin + 1;
    while (last < end && p.of_point[last] == p.of_point[begin]) ++last;
    f(begin - o, last - o, int64_t{p.of_point[begin]});
  }
}

// J_p^T [J_p | r] of a point, by rows.
struct PointSystem {
  Quad rows[3] = {};
  // p0, p1, p2, r of a row.
  void add(const double* row) {
    const Quad v = *reinterpret_cast<const Quad*>(row);
    for (int i = 0; i < 3; ++i) rows[i] += row[i] * v;
  }
  // Damped by radius.
  void damp(double radius) {
    for (int i = 0; i < 3; ++i) {
      const double d = rows[i][i];
      rows[i][i] += (d < kMinDiagonal ? kMinDiagonal : d) / radius;
    }
  }
};

// The inverse of the lower Cholesky factor of a damped point's matrix.
struct Factor {
  double a = 0, b = 0, c = 0, d = 0, e = 0, f = 0;  // [a 0 0; b c 0; d e f]

  Factor() = default;
  explicit Factor(const PointSystem& s) {
    const double l00 = root(s.rows[0][0]);
    a = 1 / l00;
    const double l10 = s.rows[1][0] * a, l20 = s.rows[2][0] * a;
    c = 1 / root(s.rows[1][1] - l10 * l10);
    const double l21 = (s.rows[2][1] - l20 * l10) * c;
    f = 1 / root(s.rows[2][2] - l20 * l20 - l21 * l21);
    b = -l10 * a * c;
    e = -l21 * c * f;
    d = -(l20 * a + l21 * b) * f;
  }
  void times(const double* x, double (&y)[3]) const {
    y[0] = a * x[0], y[1] = b * x[0] + c * x[1], y[2] = d * x[0] + e * x[1] + f * x[2];
  }
  void transposed_times(const double* x, double (&y)[3]) const {
    y[0] = a * x[0] + b * x[1] + d * x[2], y[1] = c * x[1] + e * x[2], y[2] = f * x[2];
  }
};

inline Factor factor_of(const Problem& p, PointSystem& s) {
  s.damp(p.radius);
  return Factor(s);
}

// Rows of one observation behind each other: of each of its residual's the camera's derivatives, the point's, and the
// residual.
template <class C>
constexpr int64_t kRecordPitch = round_up(C::n + 4, kWidth);

// Of a chunk, all its records. The costs are added up; those of repeated observations aren't.
template <class C>
inline double store_records(const Problem& p, const C& chunk, int64_t count, double* records) {
  double total = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    typename C::L l;
    chunk.linear(i, l);
    const V cost = weigh(p.loss, p.loss_scale, l);
    total += sum_of(cost, count - i < kWidth ? count - i : kWidth);
    // Row by row, since a vector of observations is kWidth records.
    constexpr int64_t pitch = kRecordPitch<C>;
    for (int r = 0; r < C::kRows; ++r) {
      V columns[pitch] = {};
      for (int c = 0; c < C::n; ++c) columns[c] = l.by_camera[r][c];
      for (int c = 0; c < 3; ++c) columns[C::n + c] = l.by_point[r][c];
      columns[C::n + 3] = l.residual[r];
      store_rows<pitch>(columns, records + (i * C::kRows + r) * pitch, C::kRows * pitch);
    }
  }
  return total;
}

// Of n columns, those that aren't worth a vector of their own in each row of a block.
constexpr int64_t tail_of(int64_t n) {
  const int64_t tail = n % kWidth, wide = round_up(n, kWidth);
  return n * (n - tail) + tail * wide < n * wide ? tail : 0;
}

// A camera's sums of n numbers take kWide. Its blocks are n rows of kFull, and then kTail columns as rows of kWide.
template <class C>
constexpr int64_t kWide = round_up(C::n, kWidth);
template <class C>
constexpr int64_t kTail = tail_of(C::n);
template <class C>
constexpr int64_t kFull = kTail<C> > 0 ? C::n - kTail<C> : kWide<C>;
template <class C>
constexpr int64_t kBlock = C::n * kFull<C> + kTail<C> * kWide<C>;

int64_t block_size(Model m) {
  const int64_t n = num_parameters(m), tail = tail_of(n), wide = round_up(n, kWidth);
  return n * (tail > 0 ? n - tail : wide) + tail * wide;
}

void add_blocks(Model m, const double* from, int64_t count, double* to) {
  const int64_t n = num_parameters(m), tail = tail_of(n), wide = round_up(n, kWidth), full = tail > 0 ? n - tail : wide;
  for (int64_t b = 0; b < count; ++b, from += block_size(m), to += n * n)
    for (int64_t row = 0; row < n; ++row)
      for (int64_t column = 0; column < n; ++column)
        to[row * n + column] +=
            column < full ? from[row * full + column] : from[n * full + (column - full) * wide + row];
}

// block += of_i^T m of_j, of two observations' records
template <class C>
inline void add_product(const double* of_i, const double* of_j, const double (&m)[C::kRows][C::kRows], double* block) {
  constexpr int64_t pitch = kRecordPitch<C>, full = kFull<C>, wide = kWide<C>, vectors = full / kWidth;
  V right[C::kRows][vectors > 0 ? vectors : 1];
  double tail[C::kRows][kTail<C> > 0 ? kTail<C> : 1];
  for (int r = 0; r < C::kRows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      right[r][v] = m[r][0] * vector(of_j + v * kWidth);
      for (int s = 1; s < C::kRows; ++s) right[r][v] += m[r][s] * vector(of_j + s * pitch + v * kWidth);
    }
    for (int t = 0; t < kTail<C>; ++t) {
      tail[r][t] = 0;
      for (int s = 0; s < C::kRows; ++s) tail[r][t] += m[r][s] * of_j[s * pitch + full + t];
    }
  }
  const auto add = [](double* to, const auto& term) {
    V sum = vector(to);
    EFFK_UNROLL
    for (int r = 0; r < C::kRows; ++r) sum += term(r);
    vector(to) = sum;
  };
  EFFK_UNROLL
  for (int k = 0; k < C::n; ++k) EFFK_UNROLL
  for (int v = 0; v < vectors; ++v)
    add(block + k * full + v * kWidth, [&](int r) { return of_i[r * pitch + k] * right[r][v]; });
  block += C::n * full;
  EFFK_UNROLL
  for (int t = 0; t < kTail<C>; ++t) EFFK_UNROLL
  for (int64_t v = 0; v < wide; v += kWidth)
    add(block + t * wide + v, [&](int r) { return tail[r][t] * vector(of_i + r * pitch + v); });
}

void build(const Problem& p, int64_t o0, int64_t o1, CameraSums& sums, double* point_gradient, double* point_hessian) {
  with_model(p, [&]<class M, bool kDepth>(M*, std::bool_constant<kDepth>) {
    using C = Chunk<M, kDepth>;
    constexpr int64_t pitch = kRecordPitch<C>;
    C chunk(p, largest_chunk(p, o0, o1));
    const Buffer<double> buffer(chunk.capacity() * C::kRows * pitch);
    double* const records = buffer.get();
    double one[C::kRows][C::kRows] = {};
    for (int r = 0; r < C::kRows; ++r) one[r][r] = 1;
    each_chunk(p, o0, o1, [&](int64_t o, int64_t end) {
      chunk.fill(o, end);
      sums.cost += store_records(p, chunk, end - o, records);
      for (int64_t i = 0; i < end - o; ++i) {
        const double* const record = records + i * C::kRows * pitch;
        const int64_t camera = chunk.cameras()[i];
        add_product<C>(record, record, one, sums.blocks + camera * kBlock<C>);
        for (int64_t v = 0; v < kWide<C>; v += kWidth)
          for (int r = 0; r < C::kRows; ++r)
            vector(sums.gradient + camera * kWide<C> + v) +=
                record[r * pitch + C::n + 3] * vector(record + r * pitch + v);
      }
      each_point(p, o, end, [&](int64_t begin, int64_t last, int64_t point) {
        PointSystem s;
        for (int64_t row = begin * C::kRows; row < last * C::kRows; ++row) s.add(records + row * pitch + C::n);
        for (int i = 0; i < 3; ++i) {
          point_gradient[point * 3 + i] = s.rows[i][3];
          for (int j = 0; j < 3; ++j) point_hessian[point * 9 + i * 3 + j] = s.rows[i][j];
        }
      });
    });
  });
}

void schur(const Problem& p, int64_t o0, int64_t o1, CameraSums& sums) {
  with_model(p, [&]<class M, bool kDepth>(M*, std::bool_constant<kDepth>) {
    using C = Chunk<M, kDepth>;
    constexpr int kRows = C::kRows;
    constexpr int64_t pitch = kRecordPitch<C>;
    C chunk(p, largest_chunk(p, o0, o1));
    const Buffer<double> buffer(chunk.capacity() * kRows * pitch), eliminated(chunk.capacity() * kRows * 3);
    double* const records = buffer.get();
    double* const q = eliminated.get();
    each_chunk(p, o0, o1, [&](int64_t o, int64_t end) {
      chunk.fill(o, end);
      sums.cost += store_records(p, chunk, end - o, records);
      const int32_t* const cameras = chunk.cameras();
      each_point(p, o, end, [&](int64_t begin, int64_t last, int64_t point) {
        PointSystem system;
        for (int64_t row = begin * kRows; row < last * kRows; ++row) system.add(records + row * pitch + C::n);
        const double gradient[3] = {system.rows[0][3], system.rows[1][3], system.rows[2][3]};
        const bool fixed = p.fixed && p.fixed[point];
        for (int i = 0; i < 3 && !fixed; ++i) {
          const double size = gradient[i] < 0 ? -gradient[i] : gradient[i];
          if (size > sums.most || size != size) sums.most = size;  // NaN stays: nothing is more
        }
        // With J_p V^-1 J_p^T = Q Q^T, S = sum of J_c^T (1 - Q Q^T) J_c.
        // Of a fixed point Q is 0, whatever its numbers.
        const Factor factor = fixed ? Factor() : factor_of(p, system);
        double z[3] = {};
        if (!fixed) factor.times(gradient, z);
        for (int64_t i = begin; i < last; ++i) {
          const double* const record = records + i * kRows * pitch;
          double rest[kRows];
          for (int r = 0; r < kRows; ++r) {
            double y[3] = {};
            if (!fixed) factor.times(record + r * pitch + C::n, y);
            double* const qr = q + (i * kRows + r) * 3;
            qr[0] = y[0], qr[1] = y[1], qr[2] = y[2];
            rest[r] = record[r * pitch + C::n + 3] - (y[0] * z[0] + y[1] * z[1] + y[2] * z[2]);
          }
          for (int64_t v = 0; v < kWide<C>; v += kWidth) {
            V of_gradient{}, of_diagonal{}, of_rhs{};
            for (int r = 0; r < kRows; ++r) {
              const V of_row = vector(record + r * pitch + v);
              of_gradient += record[r * pitch + C::n + 3] * of_row;
              of_diagonal += of_row * of_row;
              of_rhs += rest[r] * of_row;
            }
            vector(sums.gradient + cameras[i] * kWide<C> + v) += of_gradient;
            vector(sums.diagonal + cameras[i] * kWide<C> + v) += of_diagonal;
            vector(sums.rhs + cameras[i] * kWide<C> + v) -= of_rhs;
          }
        }
        const auto pair = [&](int64_t i, int64_t j, int64_t block) {
          const double *qi = q + i * kRows * 3, *qj = q + j * kRows * 3;
          double m[kRows][kRows];
          for (int r = 0; r < kRows; ++r)
            for (int s = 0; s < kRows; ++s)
              m[r][s] = (i == j && r == s) -
                        (qi[r * 3] * qj[s * 3] + qi[r * 3 + 1] * qj[s * 3 + 1] + qi[r * 3 + 2] * qj[s * 3 + 2]);
          add_product<C>(records + i * kRows * pitch, records + j * kRows * pitch, m, sums.blocks + block * kBlock<C>);
        };
        for (int64_t i = begin; i < last; ++i) {
          const int64_t a = cameras[i];
          const int32_t* const block_of = sums.block_of ? sums.block_of + a * p.cameras : nullptr;
          const int64_t own = block_of ? block_of[a] : a;
          if (own >= 0) pair(i, i, own);
          if (fixed) continue;
          // A camera may see a point more than once.
          for (int64_t j = begin; j < last; ++j) {
            if (j == i || cameras[j] > a || (!block_of && cameras[j] != a)) continue;
            if (const int64_t block = block_of ? block_of[cameras[j]] : a; block >= 0) pair(i, j, block);
          }
        }
      });
    });
  });
}

// What both passes with a step of the cameras begin with: of a chunk, J_c and J_p by columns in `jacobian`, of each
// row n + 3 columns of `capacity`, and `u` = (kResidual: r +) J_c x, by columns too; and rows [J_p u] in `records`.
template <bool kResidual, class C>
inline void apply_cameras(const Problem& p, const C& chunk, int64_t count, const double* x, double* jacobian, double* u,
                          double* records) {
  constexpr int64_t wide = round_up(C::n, kWidth), four = round_up(4, kWidth);
  const int64_t capacity = chunk.capacity();
  for (int64_t i = 0; i < count; i += kWidth) {
    typename C::L l;
    chunk.linear(i, l);
    weigh(p.loss, p.loss_scale, l);
    V of_camera[wide];
    load_columns<wide>(x, wide, chunk.cameras() + i, of_camera);
    for (int r = 0; r < C::kRows; ++r) {
      V sum = kResidual ? l.residual[r] : V{};
      for (int c = 0; c < C::n; ++c) {
        sum += l.by_camera[r][c] * of_camera[c];
        if (!kResidual) vector(jacobian + (r * (C::n + 3) + c) * capacity + i) = l.by_camera[r][c];
      }
      for (int c = 0; c < 3; ++c) vector(jacobian + (r * (C::n + 3) + C::n + c) * capacity + i) = l.by_point[r][c];
      vector(u + r * capacity + i) = sum;
      if (kResidual) vector(u + (C::kRows + r) * capacity + i) = l.residual[r];
      V columns[four] = {l.by_point[r][0], l.by_point[r][1], l.by_point[r][2], sum};
      store_rows<four>(columns, records + (i * C::kRows + r) * four, C::kRows * four);
    }
  }
}

// Each point's V^-1 J_p^T u, in steps[number of the point in the chunk].
template <class C>
inline void solve_points(const Problem& p, int64_t o, int64_t end, const double* records, double* steps) {
  constexpr int64_t four = round_up(4, kWidth);
  each_point(p, o, end, [&](int64_t begin, int64_t last, int64_t point) {
    double half[3], step[3] = {};
    if (!(p.fixed && p.fixed[point])) {
      PointSystem system;
      for (int64_t row = begin * C::kRows; row < last * C::kRows; ++row) system.add(records + row * four);
      const double right[3] = {system.rows[0][3], system.rows[1][3], system.rows[2][3]};
      const Factor factor = factor_of(p, system);
      factor.times(right, half);
      factor.transposed_times(half, step);
    }
    for (int c = 0; c < 3; ++c) steps[c] = step[c];
    steps += kStepPitch;
  });
}

void schur_mv(const Problem& p, int64_t o0, int64_t o1, const double* x, double* y) {
  with_model(p, [&]<class M, bool kDepth>(M*, std::bool_constant<kDepth>) {
    using C = Chunk<M, kDepth>;
    constexpr int kRows = C::kRows, n = C::n;
    constexpr int64_t wide = round_up(n, kWidth), four = round_up(4, kWidth);
    C chunk(p, largest_chunk(p, o0, o1));
    const int64_t capacity = chunk.capacity();
    const Buffer<double> jacobian(capacity * kRows * (n + 3)), u(capacity * kRows), records(capacity * kRows * four),
        steps(capacity * kStepPitch), rows(kWidth * wide);
    each_chunk(p, o0, o1, [&](int64_t o, int64_t end) {
      chunk.fill(o, end);
      apply_cameras<false>(p, chunk, end - o, x, jacobian.get(), u.get(), records.get());
      solve_points<C>(p, o, end, records.get(), steps.get());
      for (int64_t i = 0; i < end - o; i += kWidth) {
        V step[kStepPitch], columns[wide] = {};
        load_columns<kStepPitch>(steps.get(), kStepPitch, chunk.points() + i, step);
        for (int r = 0; r < kRows; ++r) {
          const double* const of_row = jacobian.get() + r * (n + 3) * capacity + i;
          V rest = vector(u.get() + r * capacity + i);
          for (int c = 0; c < 3; ++c) rest -= vector(of_row + (n + c) * capacity) * step[c];
          for (int c = 0; c < n; ++c) columns[c] += vector(of_row + c * capacity) * rest;
        }
        store_rows<wide>(columns, rows.get(), wide);
        for (int64_t k = 0; k < kWidth && i + k < end - o; ++k) {
          double* const to = y + chunk.cameras()[i + k] * wide;
          for (int64_t v = 0; v < wide; v += kWidth) vector(to + v) += vector(rows.get() + k * wide + v);
        }
      }
    });
  });
}

double backsubstitute(const Problem& p, int64_t o0, int64_t o1, const double* step, double* point_step) {
  double change = 0;
  with_model(p, [&]<class M, bool kDepth>(M*, std::bool_constant<kDepth>) {
    using C = Chunk<M, kDepth>;
    constexpr int kRows = C::kRows, n = C::n;
    constexpr int64_t four = round_up(4, kWidth);
    C chunk(p, largest_chunk(p, o0, o1));
    const int64_t capacity = chunk.capacity();
    const Buffer<double> jacobian(capacity * kRows * (n + 3)), u(capacity * kRows * 2),
        records(capacity * kRows * four), steps(capacity * kStepPitch);
    each_chunk(p, o0, o1, [&](int64_t o, int64_t end) {
      chunk.fill(o, end);
      apply_cameras<true>(p, chunk, end - o, step, jacobian.get(), u.get(), records.get());
      solve_points<C>(p, o, end, records.get(), steps.get());
      const double* from = steps.get();
      each_point(p, o, end, [&](int64_t, int64_t, int64_t point) {
        for (int c = 0; c < 3; ++c) point_step[point * 3 + c] = -from[c];
        from += kStepPitch;
      });
      for (int64_t i = 0; i < end - o; i += kWidth) {
        V of_point[kStepPitch], sum{};
        load_columns<kStepPitch>(steps.get(), kStepPitch, chunk.points() + i, of_point);
        for (int r = 0; r < kRows; ++r) {
          const double* const of_row = jacobian.get() + (r * (n + 3) + n) * capacity + i;
          const V before = vector(u.get() + (kRows + r) * capacity + i);
          V after = vector(u.get() + r * capacity + i);
          for (int c = 0; c < 3; ++c) after -= vector(of_row + c * capacity) * of_point[c];
          sum += (before - after) * (before + after);
        }
        change += 0.5 * sum_of(sum, end - o - i < kWidth ? end - o - i : kWidth);
      }
    });
  });
  return change;
}

// Without an end before the last, so that compilers make vectors of it.
bool in_range(const uint32_t* index, int64_t count, uint32_t limit) {
  uint32_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= index[i] >= limit;
  return !wrong;
}

bool ascending(const int32_t* index, int64_t count) {
  int32_t wrong = 0;
  for (int64_t i = 1; i < count; ++i) wrong |= index[i] < index[i - 1];
  return !wrong;
}

void prepare(Model model, bool quaternion, bool is_double, const void* cameras, int64_t count, double* rows) {
  const int64_t width = num_numbers(model, quaternion);
  with_storage(is_double, [&]<class T>(T*) {
    for (int64_t i = 0; i < count; ++i)
      camera_row(model, quaternion, static_cast<const T*>(cameras) + i * width, rows + i * kCameraRow);
  });
}

void retract(Model model, bool quaternion, bool is_double, const void* cameras, const double* steps, int64_t count,
             void* out) {
  const int64_t width = num_numbers(model, quaternion), n = num_parameters(model);
  with_storage(is_double, [&]<class T>(T*) {
    for (int64_t i = 0; i < count; ++i)
      retract_camera(model, quaternion, static_cast<const T*>(cameras) + i * width, steps + i * n,
                     static_cast<T*>(out) + i * width);
  });
}

constexpr Cpu kPasses = {in_range, ascending,      prepare, residual,   cost,       build, schur,
                         schur_mv, backsubstitute, retract, block_size, add_blocks, kWidth};

}  // namespace
}  // namespace effk::ba

#pragma GCC diagnostic pop
