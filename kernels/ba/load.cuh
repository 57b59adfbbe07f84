// What ba's CUDA kernels share: a problem as it comes, its observations by camera and by point, and how one of them is
// loaded and linearized. Everything is summed in an order that depends on nothing but the sizes: the same bits from run
// to run.
#pragma once

#include "../common/indices.cuh"
#include "model.h"

namespace effk::ba {

constexpr int kEachThreads = 256;      // of kernels that do a little for each of many
constexpr int64_t kMostBlocks = 4096;  // of such, and of those whose blocks leave a sum each
constexpr int kTotalThreads = 256;

// A problem and its indices, of which a stranger's aren't in range: such observations are left out.
struct Given {
  Problem a;  // without indices
  Indices camera, point;
};

EFFK_DEVICE bool is_in(int64_t i, int64_t count) { return i >= 0 && i < count; }

// Numbers that follow each other, of the storage type.
template <int kCount>
EFFK_DEVICE void load_numbers(const void* from, bool is_double, int64_t at, double (&out)[kCount]) {
  if (is_double) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = static_cast<const double*>(from)[at + i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = static_cast<const float*>(from)[at + i];
  }
}

EFFK_DEVICE void store_number(double v, bool is_double, void* to, int64_t at) {
  if (is_double)
    static_cast<double*>(to)[at] = v;
  else
    static_cast<float*>(to)[at] = static_cast<float>(v);
}

EFFK_DEVICE double double_of(uint32_t low, uint32_t high) {
  const uint64_t bits = low | static_cast<uint64_t>(high) << 32;
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}

// The first kCount doubles of a row that begins at 16 aligned bytes, and one more where that is odd.
template <int kCount>
EFFK_DEVICE void load_row(const double* row, double* out) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint4 v = gpu::load_reused(row + i);
    out[i] = double_of(v.x, v.y);
    out[i + 1] = double_of(v.z, v.w);
  }
}

EFFK_HD constexpr int even(int n) { return n + n % 2; }

// Of a camera's row.
template <class M>
constexpr int kUsedRow = even(kIsPosition<M> ? 3 : 12 + num_intrinsics(M::kModel));

// An observation of a point by a camera, whose row is anywhere.
template <bool kDerivatives = true, class M, bool kDepth>
EFFK_DEVICE void linearize_at(const Problem& p, const double* camera, const double (&point)[3], int64_t o,
                              Linear<M, kDepth, double>& out) {
  double observed[num_columns(M::kModel)], inverse_depth = 0, weight = 0;
  load_numbers(p.observed, p.is_double, o * num_columns(M::kModel), observed);
  if constexpr (kDepth) {
    double depth[1];
    load_numbers(p.depth, p.is_double, o, depth);
    const bool is_there = depth[0] > 0;
    inverse_depth = is_there ? 1 / depth[0] : 0;
    weight = is_there ? p.depth_weight : 0;
  }
  linearize<M, kDepth, kDerivatives>(camera, point, observed, inverse_depth, weight, out);
}

// One of many, each with its own camera and point; false where it is left out.
template <bool kDerivatives = true, class M, bool kDepth>
EFFK_DEVICE bool linearize_one(const Given& p, int64_t o, Linear<M, kDepth, double>& out, int64_t& camera,
                               int64_t& point) {
  camera = index_at(p.camera, o);
  point = index_at(p.point, o);
  if (!is_in(camera, p.a.cameras) || !is_in(point, p.a.points)) return false;
  double row[kUsedRow<M>], at[3];
  load_row<kUsedRow<M>>(p.a.camera_rows + camera * kCameraRow, row);
  load_numbers(p.a.point, p.a.is_double, point * 3, at);
  linearize_at<kDerivatives>(p.a, row, at, o, out);
  return true;
}

EFFK_DEVICE double sum_of(double a, double b) { return a + b; }
// NaN if there is one.
EFFK_DEVICE double most_of(double a, double b) { return a > b || a != a ? a : b; }

// Joins a value of each thread of a block; thread 0 has the result, and `shared` is free again.
template <int kThreads, class F>
EFFK_DEVICE double join_block(double v, double (&shared)[kThreads], const F& join) {
  const int thread = threadIdx.x;
  shared[thread] = v;
  gpu::sync_block();
#pragma unroll
  for (int by = kThreads / 2; by > 0; by /= 2) {
    if (thread < by) shared[thread] = v = join(v, shared[thread + by]);
    gpu::sync_block();
  }
  return v;
}

// What blocks have left, by one block: the sum of all, or the largest.
struct TotalArgs {
  const double* parts;
  int64_t count;
  bool is_sum;  // or the largest one, from 0 on
  double* to;
};

EFFK_KERNEL(kTotalThreads, 2) total_kernel(TotalArgs a) {
  EFFK_SHARED(double[kTotalThreads], shared);
  double v = 0;
  for (int64_t i = threadIdx.x; i < a.count; i += kTotalThreads)
    v = a.is_sum ? sum_of(v, a.parts[i]) : most_of(v, a.parts[i]);
  v = join_block(v, shared, [&](double x, double y) { return a.is_sum ? sum_of(x, y) : most_of(x, y); });
  if (threadIdx.x == 0) *a.to = v;
}

// --- Cameras, and observations by camera and by point ---

struct PrepareArgs {
  Model model;
  bool quaternion, is_double;
  int64_t count;
  const void* cameras;
  double* rows;        // [count, kCameraRow]
  const double* step;  // [count, n], or null
  double* step_rows;   // [count, even(n)]
};

// A thread a camera.
EFFK_KERNEL(kEachThreads, 2) prepare_kernel(EFFK_GRID_CONSTANT(PrepareArgs) a) {
  const int width = num_numbers(a.model, a.quaternion), n = num_parameters(a.model), wide = n + n % 2;
  for (int64_t i = int64_t{blockIdx.x} * kEachThreads + threadIdx.x; i < a.count;
       i += int64_t{gridDim.x} * kEachThreads) {
    if (a.is_double)
      camera_row(a.model, a.quaternion, static_cast<const double*>(a.cameras) + i * width, a.rows + i * kCameraRow);
    else
      camera_row(a.model, a.quaternion, static_cast<const float*>(a.cameras) + i * width, a.rows + i * kCameraRow);
    if (!a.step) continue;
    for (int k = 0; k < wide; ++k) a.step_rows[i * wide + k] = k < n ? a.step[i * n + k] : 0;
  }
}

struct KeysArgs {
  Indices camera;
  int64_t count, cameras;
  int32_t* keys;
};

// What observations are sorted by: the camera, or a number behind all of them.
EFFK_KERNEL(kEachThreads, 4) keys_kernel(KeysArgs a) {
  for (int64_t o = int64_t{blockIdx.x} * kEachThreads + threadIdx.x; o < a.count;
       o += int64_t{gridDim.x} * kEachThreads) {
    const int64_t camera = index_at(a.camera, o);
    a.keys[o] = static_cast<int32_t>(is_in(camera, a.cameras) ? camera : a.cameras);
  }
}

// Where the first number is that isn't less than `key`, of ascending ones; somewhere from low to high of others.
template <class F>
EFFK_DEVICE int64_t lower_bound(int64_t low, int64_t high, int64_t key, const F& number_at) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (number_at(middle) < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

struct BeginsArgs {
  Indices keys;  // [count]
  int64_t count, groups;
  int32_t* begins;  // [groups + 1]
};

// A thread a group: where its keys begin, of ascending ones.
EFFK_KERNEL(kEachThreads, 4) begins_kernel(BeginsArgs a) {
  for (int64_t g = int64_t{blockIdx.x} * kEachThreads + threadIdx.x; g <= a.groups;
       g += int64_t{gridDim.x} * kEachThreads)
    a.begins[g] = static_cast<int32_t>(lower_bound(0, a.count, g, [&](int64_t i) { return index_at(a.keys, i); }));
}

// Observations by camera, and those of a camera by point.
struct ByCamera {
  int32_t* begin;  // [cameras + 1]
  int32_t* order;  // [observations]: which they are; behind the last camera those without
  int32_t* point;  // [observations]: their points; -1 or `points` for one that isn't in range
};

struct ArrangeArgs {
  const int64_t* order;
  Indices point;
  int64_t count, points;
  ByCamera to;
};

EFFK_KERNEL(kEachThreads, 4) arrange_kernel(ArrangeArgs a) {
  for (int64_t i = int64_t{blockIdx.x} * kEachThreads + threadIdx.x; i < a.count;
       i += int64_t{gridDim.x} * kEachThreads) {
    const int64_t o = a.order[i], point = index_at(a.point, o);
    a.to.order[i] = static_cast<int32_t>(o);
    a.to.point[i] = static_cast<int32_t>(point < 0 ? -1 : min_of(point, a.points));
  }
}

// --- Host side ---

// Pointers into one block of memory, aligned to 16 bytes.
struct Scratch {
  char* at;

  template <class T>
  void take(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(at);
    at += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
  }
};

// How many blocks of `threads` threads stride over `count`; one at least, since some leave a sum.
inline int64_t blocks_of(int64_t count, int threads, int64_t most_blocks) {
  return max_of(1, min_of(ceil_div(count, threads), most_blocks));
}

template <class Args>
gpu::Error launch_each(void (*kernel)(Args), int64_t count, int64_t most_blocks, gpu::Stream stream,
                       const std::type_identity_t<Args>& a) {
  if (count == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(blocks_of(count, kEachThreads, most_blocks)));
  return gpu::launch(kernel, grid, kEachThreads, 0, stream, a);
}

inline gpu::Error launch_total(const TotalArgs& a, gpu::Stream stream) {
  return gpu::launch(total_kernel, dim3(1), kTotalThreads, 0, stream, a);
}

// Calls f.template operator()<M, kDepth>().
template <class F>
gpu::Error by_model(const Problem& p, const F& f) {
  const auto of = [&]<class M>() -> gpu::Error {
    if constexpr (!kIsPosition<M>)
      if (p.depth) return f.template operator()<M, true>();
    return f.template operator()<M, false>();
  };
  switch (p.model) {
    case Model::snavely: return of.template operator()<Snavely>();
    case Model::simple_pinhole: return of.template operator()<SimplePinhole>();
    case Model::pinhole: return of.template operator()<Pinhole>();
    case Model::simple_radial: return of.template operator()<Radial<1>>();
    case Model::radial: return of.template operator()<Radial<2>>();
    case Model::opencv: return of.template operator()<OpenCV>();
    default: return of.template operator()<Position>();
  }
}

}  // namespace effk::ba
