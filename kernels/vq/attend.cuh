// vq_attend on CUDA. Keys of a list are split among blocks, and in a block among teams of lanes: a team takes a few
// keys at a time, a lane 16 bytes of each row, for all queries that share them, and keeps a softmax of its own. Teams
// are joined in shared memory, blocks by a second kernel, both in the order of the keys. Limited by the bytes of the
// rows: 27 cycles a multiprocessor for 512 bytes a key on GPUs with 4 TB/s, of which 4 queries use about 16.
#pragma once

#include "load.cuh"

namespace effk::vq {

constexpr int kAttendThreads = 128, kTeamKeys = 4;  // keys of a team at a time
constexpr int kJoinThreads = 128;

struct AttendArgs {
  Attend a;  // without idx and count
  Indices idx, count;
  bool k_wide, v_wide;  // rows are pieces of 16 aligned bytes
  int64_t splits;       // blocks that share a list
  // With several splits: [B, H, splits, 2], the largest exponent and the sum, and [B, H, splits, Dv].
  float *partial, *sums;

  EFFK_HD int64_t queries() const { return a.heads / a.lists; }  // that share a list
};

// What a softmax has come to.
struct Softmax {
  float most, sum;
};

// e to the power of x - most, where -infinity less itself is -infinity.
EFFK_DEVICE float exponential(float x, float most) { return expf(x - (most == -INFINITY ? 0 : most)); }

// Writes a query's results: factor times the weighted sum of values, and lse.
template <class X>
EFFK_DEVICE void store_value(const Attend& a, int64_t head, int64_t col, float value, float sum) {
  from_float(sum == 0 ? 0 : value / sum, static_cast<X*>(a.out) + head * a.value_dim + col);
}
EFFK_DEVICE void store_lse(const Attend& a, int64_t head, Softmax s) {
  a.lse[head] = s.sum == 0 ? -INFINITY : s.most + logf(s.sum);
}

// Scores of a team's keys, for each of them those of all queries. Each lane has a part of every sum at first; once
// these are added up, a lane has kOwn scores, which follow each other, of one key. If there are fewer scores than
// lanes, several lanes have the same.
template <int kTeam, int kQueries>
struct TeamScores {
  static constexpr int kCount = kTeamKeys * kQueries, kOwn = kCount > kTeam ? kCount / kTeam : 1;

  // Adds up: lanes that differ in a bit send each other half of what they have, and keep the sums of the other half.
  template <int kBy = 1>
  EFFK_DEVICE static void add_up(float (&v)[kCount]) {
    if constexpr (kBy < kTeam) {
      constexpr int kHalf = kCount / kBy / 2;
      if constexpr (kHalf > 0) {
        const bool is_upper = threadIdx.x & kBy;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
          const float low = v[i], high = v[i + kHalf];
          v[i] = (is_upper ? high : low) + gpu::shuffle_xor(is_upper ? low : high, kBy);
        }
      } else {
        v[0] += gpu::shuffle_xor(v[0], kBy);
      }
      add_up<2 * kBy>(v);
    }
  }
  // The number of a lane's first score.
  EFFK_DEVICE static int first(int lane) {
    int at = 0;
#pragma unroll
    for (int by = 1; by < kTeam && by < kCount; by *= 2) at += lane & by ? kCount / by / 2 : 0;
    return at;
  }
  // Score i, or what goes with it, for all lanes of the team.
  EFFK_DEVICE static float get(const float (&own)[kOwn], int i) {
    int lane = 0;
#pragma unroll
    for (int by = 1; by < kTeam && by < kCount; by *= 2) lane += i / (kCount / by / 2) % 2 ? by : 0;
    const int team = threadIdx.x % gpu::kWarp / kTeam * kTeam;
    return float_of(gpu::shuffle(bits_of(own[i % kOwn]), team + lane));
  }
  // Over the keys, whose number is in the two lowest bits of lanes.
  template <class F>
  EFFK_DEVICE static float join_keys(float v, const F& f) {
    v = f(v, gpu::shuffle_xor(v, 1));
    return f(v, gpu::shuffle_xor(v, 2));
  }
};

// Four values of a piece, from the d-th on.
template <class X>
EFFK_DEVICE void quad_of(const uint4& piece, int d, float (&out)[4]) {
  if constexpr (sizeof(X) == 4) {
    to_floats<X>(piece, out);
  } else {
    gpu::unpack_pair<X>(d == 0 ? piece.x : piece.z, out[0], out[1]);
    gpu::unpack_pair<X>(d == 0 ? piece.y : piece.w, out[2], out[3]);
  }
}

// kTeam lanes are a team, kQueries queries share rows.
template <class X, int kTeam, int kQueries>
EFFK_KERNEL(kAttendThreads, kQueries > 4 ? 2 : 3)
attend_kernel(EFFK_GRID_CONSTANT(AttendArgs) p) {
  constexpr int kValues = kPieceValues<X>, kCols = kTeam * kValues, kTeams = kAttendThreads / kTeam;
  EFFK_SHARED(Softmax[kTeams][kQueries], softmaxes);
  EFFK_SHARED(Softmax[kQueries], joined);
  EFFK_SHARED(float[kTeams][kQueries], factors);
  const Attend& a = p.a;
  const int64_t slices = max_of(1, ceil_div(a.value_dim, kCols)), tiles = ceil_div(p.queries(), kQueries);
  int64_t at = blockIdx.x;
  const int64_t split = at % p.splits;
  at /= p.splits;
  const int64_t slice = at % slices;
  at /= slices;
  const int64_t tile = at % tiles, list = at / tiles, batch = list / a.lists;
  const int64_t first = batch * a.heads + list % a.lists * p.queries() + tile * kQueries;  // of the queries
  const int queries = static_cast<int>(min_of(kQueries, p.queries() - tile * kQueries));
  const int64_t key_head = first % a.heads / a.group;
  const int team = threadIdx.x / kTeam, lane = threadIdx.x % kTeam, dim = static_cast<int>(a.dim);
  const int pieces = (dim + kValues - 1) / kValues, pitch = pieces * kValues;

  // Queries, times the scale, and room for what teams have come to.
  float* const given = reinterpret_cast<float*>(gpu::shared_memory());  // [kQueries, pitch]
  float* const team_sums = given + kQueries * pitch;                    // [kTeams, kQueries, kCols]
#pragma unroll
  for (int h = 0; h < kQueries; ++h) {
    const X* const from = static_cast<const X*>(a.q) + batch * a.q_stride[0] + (first + h) % a.heads * a.q_stride[1];
    for (int d = threadIdx.x; d < pitch; d += kAttendThreads)
      given[h * pitch + d] = h < queries && d < dim ? to_float(from[d]) : 0;
  }
  gpu::sync_block();

  const X* const keys = static_cast<const X*>(a.k) + batch * a.k_stride[0] + key_head * a.k_stride[1];
  const int64_t col = slice * kCols + lane * kValues;
  const X* const values = static_cast<const X*>(a.v) + batch * a.v_stride[0] + key_head * a.v_stride[1] + col;
  const int64_t count = count_at(p.count, p.idx.data ? list : batch, a.cap);
  const int64_t share = round_up(ceil_div(count, p.splits), kTeams * kTeamKeys);
  const int64_t begin = split * share, end = min_of(begin + share, count);

  // Of each query the weighted sum of values, and what a lane's own scores have come to.
  using Scores = TeamScores<kTeam, kQueries>;
  constexpr int kOwn = Scores::kOwn;
  const int own_score = Scores::first(lane), own_key = own_score / kQueries, own_query = own_score % kQueries;
  float most[kOwn], sum[kOwn], sums[kQueries][kValues] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    most[i] = -INFINITY;
    sum[i] = 0;
  }
  const auto load_key = [&](int32_t key, int piece) {
    return load_piece(keys + key * a.k_stride[2] + piece * kValues, key >= 0 ? dim - piece * kValues : 0, p.k_wide);
  };
  // A team's keys are neighbours in the list; -1 where there is none.
  int32_t next[kTeamKeys];
  const auto look = [&](int64_t from) {
#pragma unroll
    for (int i = 0; i < kTeamKeys; ++i) {
      const int64_t place = from + team * kTeamKeys + i;
      next[i] = -1;
      if (place >= end) continue;
      const int64_t key = p.idx.data ? index_at(p.idx, list * a.cap + place) : place;
      if (key >= 0 && key < a.keys) next[i] = static_cast<int32_t>(key);
    }
  };
  look(begin);
#pragma unroll 1
  for (int64_t from = begin; from < end; from += kTeams * kTeamKeys) {
    uint4 row[kTeamKeys], value[kTeamKeys];
    int32_t key[kTeamKeys];
#pragma unroll
    for (int i = 0; i < kTeamKeys; ++i) {
      key[i] = next[i];
      row[i] = load_key(key[i], lane);
    }
#pragma unroll
    for (int i = 0; i < kTeamKeys; ++i)
      value[i] = load_piece(values + key[i] * a.v_stride[2], key[i] >= 0 ? a.value_dim - col : 0, p.v_wide);
    look(from + kTeams * kTeamKeys);

    float scores[Scores::kCount] = {};
#pragma unroll 1
    for (int piece = lane;;) {
      if (piece < pieces) {
        // Half of a piece of 16-bit values at a time: all of it takes too many registers.
#pragma unroll
        for (int d = 0; d < kValues; d += 4) {
          float x[kTeamKeys][4];
#pragma unroll
          for (int i = 0; i < kTeamKeys; ++i) quad_of<X>(row[i], d, x[i]);
#pragma unroll
          for (int h = 0; h < kQueries; ++h) {
            const float4 y = *reinterpret_cast<const float4*>(given + h * pitch + piece * kValues + d);
#pragma unroll
            for (int i = 0; i < kTeamKeys; ++i) {
              float& score = scores[i * kQueries + h];
              score = fmaf(x[i][0], y.x, score);
              score = fmaf(x[i][1], y.y, score);
              score = fmaf(x[i][2], y.z, score);
              score = fmaf(x[i][3], y.w, score);
            }
          }
        }
      }
      piece += kTeam;
      if (piece - lane >= pieces) break;
#pragma unroll
      for (int i = 0; i < kTeamKeys; ++i) row[i] = load_key(key[i], piece);
    }
    Scores::add_up(scores);
    bool is_there = false;
#pragma unroll
    for (int i = 0; i < kTeamKeys; ++i) is_there = i == own_key ? key[i] >= 0 : is_there;
    float weight[kOwn], factor[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float score = is_there ? scores[i] * a.scale : -INFINITY;
      const auto larger = [](float u, float v) { return v > u ? v : u; };
      const float higher = larger(most[i], Scores::join_keys(score > -INFINITY ? score : -INFINITY, larger));
      weight[i] = exponential(score, higher);
      factor[i] = exponential(most[i], higher);
      sum[i] = fmaf(sum[i], factor[i], weight[i]);
      most[i] = higher;
    }
#pragma unroll
    for (int h = 0; h < kQueries; ++h) {
      const float by = Scores::get(factor, h);
#pragma unroll
      for (int i = 0; i < kValues; ++i) sums[h][i] *= by;
    }
#pragma unroll
    for (int i = 0; i < kTeamKeys; ++i) {
      float x[kValues];
      to_floats<X>(value[i], x);
#pragma unroll
      for (int h = 0; h < kQueries; ++h) {
        const float by = Scores::get(weight, i * kQueries + h);
#pragma unroll
        for (int d = 0; d < kValues; ++d) sums[h][d] = fmaf(by, x[d], sums[h][d]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float all = Scores::join_keys(sum[i], [](float u, float v) { return u + v; });
    if (own_key == 0 && lane < Scores::kCount) softmaxes[team][own_query + i] = {most[i], all};
  }
#pragma unroll
  for (int h = 0; h < kQueries; ++h) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) team_sums[(team * kQueries + h) * kCols + lane * kValues + i] = sums[h][i];
  }
  gpu::sync_block();
  if (threadIdx.x < kQueries) {
    const int h = threadIdx.x;
    Softmax s{-INFINITY, 0};
    for (int t = 0; t < kTeams; ++t) s.most = softmaxes[t][h].most > s.most ? softmaxes[t][h].most : s.most;
    for (int t = 0; t < kTeams; ++t) {
      factors[t][h] = exponential(softmaxes[t][h].most, s.most);
      s.sum = fmaf(softmaxes[t][h].sum, factors[t][h], s.sum);
    }
    joined[h] = s;
  }
  gpu::sync_block();
  for (int h = 0; h < queries; ++h) {
    const int64_t head = first + h;
    if (threadIdx.x == 0 && slice == 0) {
      if (p.splits == 1)
        store_lse(a, head, joined[h]);
      else
        *reinterpret_cast<float2*>(p.partial + (head * p.splits + split) * 2) = {joined[h].most, joined[h].sum};
    }
    for (int i = threadIdx.x; i < kCols; i += kAttendThreads) {
      const int64_t to = slice * kCols + i;
      if (to >= a.value_dim) break;
      float v = 0;
      for (int t = 0; t < kTeams; ++t) v = fmaf(team_sums[(t * kQueries + h) * kCols + i], factors[t][h], v);
      if (p.splits == 1)
        store_value<X>(a, head, to, v, joined[h].sum);
      else
        p.sums[(head * p.splits + split) * a.value_dim + to] = v;
    }
  }
}

// Joins the splits of a query, a block each.
template <class X>
EFFK_KERNEL(kJoinThreads, 4)
join_kernel(EFFK_GRID_CONSTANT(AttendArgs) p) {
  const Attend& a = p.a;
  const int64_t head = blockIdx.x;
  const float* const partial = p.partial + head * p.splits * 2;
  Softmax s{-INFINITY, 0};
#pragma unroll 4
  for (int64_t i = 0; i < p.splits; ++i) s.most = partial[2 * i] > s.most ? partial[2 * i] : s.most;
#pragma unroll 4
  for (int64_t i = 0; i < p.splits; ++i) s.sum = fmaf(partial[2 * i + 1], exponential(partial[2 * i], s.most), s.sum);
  if (threadIdx.x == 0) store_lse(a, head, s);
  for (int64_t col = threadIdx.x; col < a.value_dim; col += kJoinThreads) {
    float v = 0;
#pragma unroll 4
    for (int64_t i = 0; i < p.splits; ++i)
      v = fmaf(p.sums[(head * p.splits + i) * a.value_dim + col], exponential(partial[2 * i], s.most), v);
    store_value<X>(a, head, col, v, s.sum);
  }
}

// --- Host side ---

constexpr int kSplitKeys = 256;  // at least so many of a block, where there are several

// Sets the fields of p that follow from others, and places scratch in one block of memory, aligned to 16 bytes; its
// size comes back.
inline int64_t place_attend(AttendArgs& p, void* memory, int num_sms) {
  const Attend& a = p.a;
  const int64_t size = type_size(a.type), units = a.batch * a.lists * ceil_div(p.queries(), 8);
  const auto is_wide = [&](const void* from, const int64_t (&stride)[3], int64_t cols) {
    return reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride[0] * size % 16 == 0 && stride[1] * size % 16 == 0 &&
           stride[2] * size % 16 == 0 && cols * size % 16 == 0;
  };
  p.k_wide = is_wide(a.k, a.k_stride, a.dim);
  p.v_wide = is_wide(a.v, a.v_stride, a.value_dim);
  p.splits = max_of(1, min_of(ceil_div(a.cap, kSplitKeys), 4 * num_sms / max_of(1, units)));
  const int64_t parts = p.splits > 1 ? a.batch * a.heads * p.splits : 0, bytes = round_up(parts * 8, 16);
  p.partial = static_cast<float*>(memory);
  p.sums = reinterpret_cast<float*>(static_cast<char*>(memory) + bytes);
  return bytes + parts * a.value_dim * 4;
}

template <class X, int kTeam, int kQueries>
gpu::Error launch_attend_of(const AttendArgs& p, gpu::Stream stream) {
  constexpr int kCols = kTeam * kPieceValues<X>, kTeams = kAttendThreads / kTeam;
  const Attend& a = p.a;
  const int64_t slices = max_of(1, ceil_div(a.value_dim, kCols)), tiles = ceil_div(p.queries(), kQueries);
  const int64_t blocks = a.batch * a.lists * tiles * slices * p.splits;
  const int64_t bytes = kQueries * (round_up(a.dim, kPieceValues<X>) + kTeams * kCols) * 4;
  if (gpu::Error e = gpu::launch(attend_kernel<X, kTeam, kQueries>, dim3(static_cast<unsigned>(blocks)), kAttendThreads,
                                 static_cast<int>(bytes), stream, p))
    return e;
  if (p.splits == 1) return nullptr;
  return gpu::launch(join_kernel<X>, dim3(static_cast<unsigned>(a.batch * a.heads)), kJoinThreads, 0, stream, p);
}

// p has been placed.
inline gpu::Error launch_attend(const AttendArgs& p, gpu::Stream stream) {
  if (p.a.batch * p.a.heads == 0) return nullptr;
  if (p.a.dim > 12288) return "q's dimension is more than shared memory holds (12288)";
  return by_type(p.a.type, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    const int64_t pieces = ceil_div(max_of(p.a.dim, p.a.value_dim), kPieceValues<X>), queries = p.queries();
    const auto of_queries = [&]<int kTeam>() {
      if (queries == 1 || p.a.dim > 1024) return launch_attend_of<X, kTeam, 1>(p, stream);
      if (queries <= 4) return launch_attend_of<X, kTeam, 4>(p, stream);
      return launch_attend_of<X, kTeam, 8>(p, stream);
    };
    if constexpr (sizeof(X) == 2)
      if (pieces <= 8) return of_queries.template operator()<8>();
    if (pieces <= 16) return of_queries.template operator()<16>();
    return of_queries.template operator()<32>();
  });
}

}  // namespace effk::vq
