// vq in plain C++, for any CPU: what the other levels must agree with.
#include "cpu_common.h"

namespace effk::vq {
namespace {

// x m, of a row and a matrix [dim, dim]; without one the row itself.
template <class T>
void times(const T* x, const float* matrix, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = matrix ? 0 : to_float(x[d]);
  if (!matrix) return;
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t d = 0; d < dim; ++d) out[d] += to_float(x[i]) * matrix[i * dim + d];
}

float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// --- Encoding: the squared lengths of the words are what is prepared.
// -------------------------------------------------

int64_t encode_floats(const Encode& p) { return p.subspaces * p.words; }

void encode_prepare(const Encode& p, int64_t head0, int64_t head1) {
  const int64_t size = p.dim / p.subspaces;
  for (int64_t i = head0 * encode_floats(p); i < head1 * encode_floats(p); ++i)
    p.prepared[i] = dot(p.codebook + i * size, p.codebook + i * size, size);
}

uint32_t nearest(const Encode& p, const float* x, int64_t head, int64_t j) {
  const int64_t size = p.dim / p.subspaces, first = (head * p.subspaces + j) * p.words;
  float least = INFINITY;
  uint32_t code = 0;
  for (int64_t c = 0; c < p.words; ++c) {
    const float distance = p.prepared[first + c] - 2 * dot(x, p.codebook + (first + c) * size, size);
    if (distance < least) {
      least = distance;
      code = static_cast<uint32_t>(c);
    }
  }
  return code;
}

void encode(const Encode& p, int64_t pair, int64_t key0, int64_t key1) {
  const int64_t b = pair / p.heads, head = pair % p.heads, size = p.dim / p.subspaces;
  const float* const chol = p.chol ? p.chol + head * p.dim * p.dim : nullptr;
  const Buffer<float> x(p.dim);
  with_float(p.type, [&]<class T>(T*) {
    for (int64_t s = key0; s < key1; ++s) {
      times(static_cast<const T*>(p.k) + b * p.k_stride[0] + head * p.k_stride[1] + s * p.k_stride[2], chol, p.dim,
            x.get());
      char* const out = static_cast<char*>(p.out) + (pair * p.keys + s) * code_bytes(p.codes, p.subspaces);
      for (int64_t j = 0; j < p.subspaces; ++j) {
        const uint32_t code = nearest(p, x.get() + j * size, head, j);
        if (p.codes == Codes::i16)
          reinterpret_cast<int16_t*>(out)[j] = static_cast<int16_t>(code);
        else if (p.codes == Codes::u8 || j % 2 == 0)
          out[p.codes == Codes::u8 ? j : j / 2] = static_cast<char>(code);
        else
          out[j / 2] = static_cast<char>(out[j / 2] | code << 4);
      }
    }
  });
}

// --- Tables ---------------------------------------------------------------------------------------------------------

void transform(const Lut& p, int64_t query0, int64_t query1) {
  with_float(p.type, [&]<class T>(T*) {
    for (int64_t i = query0; i < query1; ++i) {
      const int64_t b = i / p.heads, h = i % p.heads;
      const float* const inv = p.inv ? p.inv + h / p.group * p.dim * p.dim : nullptr;
      times(static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1], inv, p.dim, p.query + i * p.dim);
    }
  });
}

void lut(const Lut& p, int64_t head, int64_t row0, int64_t row1) {
  const int64_t rows = p.subspaces * p.words, size = p.dim / p.subspaces;
  for (int64_t row = row0; row < row1; ++row) {
    const float* const word = p.codebook + (head * rows + row) * size;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t g = 0; g < p.group; ++g) {
        const int64_t query = b * p.heads + head * p.group + g;
        p.out[query * rows + row] = dot(p.query + query * p.dim + row / p.words * size, word, size);
      }
  }
}

// --- Scores ---------------------------------------------------------------------------------------------------------

int64_t table_bytes(const Score& p) { return p.int8_table ? (p.subspaces * p.words + 63) / 64 * 64 : 0; }

void table(const Score& p, int64_t query0, int64_t query1) {
  for (int64_t i = query0; i < query1; ++i)
    quantize_table(p.lut + i * p.subspaces * p.words, p.subspaces, p.words, p.table + i * table_bytes(p), p.words,
                   p.scale + 2 * i);
}

// Calls f(s, sum) with the table's sum for keys [key0, key1): of floats, or of an 8-bit table's entries.
template <Codes C, class F>
bool for_sums(const Score& p, int64_t pair, int64_t query, int64_t key0, int64_t key1, const F& f) {
  const int64_t bytes = code_bytes(C, p.subspaces);
  const char* const codes = codes_of(p, pair);
  const float* const floats = p.lut + query * p.subspaces * p.words;
  const uint8_t* const entries = p.int8_table ? p.table + query * table_bytes(p) : nullptr;
  for (int64_t s = key0; s < key1; ++s) {
    float sum = 0;
    uint32_t sum8 = 0;
    for (int64_t j = 0; j < p.subspaces; ++j) {
      const uint32_t code = code_at<C>(codes + s * bytes, j);
      if (code >= p.words) return false;
      if (entries)
        sum8 += entries[j * p.words + code];
      else
        sum += floats[j * p.words + code];
    }
    if (entries)
      f(s, sum8);
    else
      f(s, sum);
  }
  return true;
}

bool score(const Score& p, int64_t pair, int64_t key0, int64_t key1) {
  const int64_t len = length(p, pair / (p.heads / p.group)), end = key1 < len ? key1 : len;
  return with_codes(p.codes, [&](auto codes) {
    for (int64_t query = first_query(p, pair); query < first_query(p, pair + 1); ++query) {
      float* const out = p.out + query * p.keys;
      const bool right = for_sums<codes()>(p, pair, query, key0, end, [&]<class Sum>(int64_t s, Sum sum) {
        if constexpr (std::is_same_v<Sum, float>)
          out[s] = sum;
        else
          out[s] = score_of(sum, p.scale + 2 * query);
      });
      if (!right) return false;
      for (int64_t s = key0 > end ? key0 : end; s < key1; ++s) out[s] = -INFINITY;
    }
    return true;
  });
}

bool topk(const TopK& top, int64_t pair) {
  const Score& p = top.score;
  const int64_t len = length(p, pair / (p.heads / p.group));
  const int64_t first = top.sink < len ? top.sink : len, last = len - top.window > first ? len - top.window : first;
  const Buffer<uint32_t> ranks(last - first);
  const Buffer<bool> taken(len);
  return with_codes(p.codes, [&](auto codes) {
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t query = first_query(p, pair) + g;
      if (g == 0 || !top.union_group)
        for (int64_t s = 0; s < len; ++s) taken.get()[s] = s < first || s >= last;
      const bool right = for_sums<codes()>(p, pair, query, first, last, [&]<class Sum>(int64_t s, Sum sum) {
        if constexpr (std::is_same_v<Sum, float>)
          ranks.get()[s - first] = rank_of(sum);
        else
          ranks.get()[s - first] = p.scale[2 * query] > 0 ? sum : 0;
      });
      if (!right) return false;
      mark_best(ranks.get(), last - first, top.k, taken.get() + first);
      if (top.union_group && g + 1 < p.group) continue;
      const int64_t list = top.union_group ? pair : query;
      write_list(taken.get(), len, top.cap, top.idx + list * top.cap, top.count + list);
    }
    return true;
  });
}

// --- Attention ------------------------------------------------------------------------------------------------------

void attend(const Attend& p, int64_t unit, int64_t begin, int64_t end, float* partial) {
  const Unit u(p, unit);
  const Buffer<float> buffer(end - begin);
  float* const weights = buffer.get();
  with_float(p.type, [&]<class T>(T*) {
    for (int64_t i = 0; i < u.heads; ++i) {
      const T* const q = query_at<T>(p, u.b, u.first + i);
      float* const sums = partial + i * (p.value_dim + 2);
      float most = -INFINITY, total = 0;
      for (int64_t e = begin; e < end; ++e) {
        const T* const k = key_at<T>(p, u, entry_at(p, unit, e));
        float sum = 0;
        for (int64_t d = 0; d < p.dim; ++d) sum += to_float(q[d]) * to_float(k[d]);
        weights[e - begin] = p.scale * sum;
        most = p.scale * sum > most ? p.scale * sum : most;
      }
      for (int64_t d = 0; d < p.value_dim; ++d) sums[d] = 0;
      for (int64_t e = begin; e < end; ++e) {
        if (weights[e - begin] == -INFINITY) continue;
        const float weight = std::exp(weights[e - begin] - most);
        const T* const v = value_at<T>(p, u, entry_at(p, unit, e));
        total += weight;
        for (int64_t d = 0; d < p.value_dim; ++d) sums[d] += weight * to_float(v[d]);
      }
      sums[p.value_dim] = total;
      sums[p.value_dim + 1] = most;
    }
  });
}

}  // namespace

constinit const Cpu cpu_scalar = {encode_floats, encode_prepare, encode, transform, lut,         table_bytes,
                                  table,         score,          topk,   attend,    attend_join, wrope};

}  // namespace effk::vq
