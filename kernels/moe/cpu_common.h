// What the CPU levels of moe share, in an anonymous namespace: each level has its own copy, compiled for it.
#pragma once

#include <cmath>
#include <limits>

#include "../common/cpu.h"
#include "moe.h"

namespace effk::moe {
namespace {

// --- Activations ----------------------------------------------------------------------------------------------------
// Without branches or calls, so that the compiler makes vectors of loops over them.

// e^x to about one unit in the last place; 0 below -87.3, where the result would be subnormal, and infinity above 88.7,
// where it is.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // In two steps: 2^128 has no exponent of its own.
  const uint32_t low = bits_of(shifted) - bits_of(kRound), half = static_cast<uint32_t>(static_cast<int32_t>(low) >> 1);
  const float scaled = p * float_of((half + 127) << 23) * float_of((low - half + 127) << 23);
  const float above = x > 88.7228f ? std::numeric_limits<float>::infinity() : scaled;
  return x < -87.3365f ? 0.0f : above;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline float gelu_tanh(float x) {
  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
  return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
}

inline float gelu(float x) {
  // Half of erfc(|x| / sqrt 2) by a Chebyshev fit with a relative error below 1.2e-7 (Numerical Recipes, 6.2).
  const float z = (x < 0 ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = 0.5f * t * exponential(p - z * z);
  return x * (x < 0 ? tail : 1.0f - tail);
}

inline float squared_relu(float x) { return x < 0 ? 0.0f : x * x; }

template <Activation A>
inline float activated(float gate, float up) {
  if constexpr (A == Activation::relu2) {
    return squared_relu(up);
  } else {
    const float g = A == Activation::swiglu ? silu(gate) : A == Activation::geglu ? gelu(gate) : gelu_tanh(gate);
    return g * up;
  }
}

// Calls f with the activation as a constant.
template <class F>
inline void with_activation(Activation a, const F& f) {
  switch (a) {
    case Activation::swiglu: return f(std::integral_constant<Activation, Activation::swiglu>());
    case Activation::geglu: return f(std::integral_constant<Activation, Activation::geglu>());
    case Activation::geglu_tanh: return f(std::integral_constant<Activation, Activation::geglu_tanh>());
    case Activation::relu2: return f(std::integral_constant<Activation, Activation::relu2>());
  }
}

// --- Rows -----------------------------------------------------------------------------------------------------------

template <class T>
inline const T* row_of_x(const Operands& in, int64_t i) {
  return static_cast<const T*>(in.x) + (in.source ? in.source[i] : i) * in.x_stride;
}
template <class T>
inline const T* row_of_w(const Operands& in, int64_t expert, int64_t row) {
  return static_cast<const T*>(in.w) + expert * in.w_expert + row * in.w_stride;
}

// --- Routing and combining ------------------------------------------------------------------------------------------

// NaN is above everything, as in torch.topk; of equals the first stays.
inline bool is_above(float a, float b) { return a > b || (a != a && b == b); }

template <class T>
inline void route_tokens(const Route& p, int64_t token0, int64_t token1) {
  const Buffer<float> logits(p.experts), scores(p.experts), keys(p.experts);
  const Buffer<bool> taken(p.experts);
  float *const l = logits.get(), *const s = scores.get(), *const by = keys.get();
  for (int64_t t = token0; t < token1; ++t) {
    const T* from = static_cast<const T*>(p.logits) + t * p.stride;
    float most = -INFINITY;
    for (int64_t e = 0; e < p.experts; ++e) {
      l[e] = to_float(from[e]);
      most = l[e] > most || l[e] != l[e] ? l[e] : most;  // NaN stays: nothing is above it
    }
    if (p.score == Score::softmax) {
      float sum = 0;
      for (int64_t e = 0; e < p.experts; ++e) s[e] = std::exp(l[e] - most);
      for (int64_t e = 0; e < p.experts; ++e) sum += s[e];
      for (int64_t e = 0; e < p.experts; ++e) s[e] /= sum;
    } else {
      for (int64_t e = 0; e < p.experts; ++e) s[e] = 1.0f / (1.0f + std::exp(-l[e]));
    }
    // Both scores rise with the logit: without a bias it decides, and no rounding makes equals of what differs.
    for (int64_t e = 0; e < p.experts; ++e) by[e] = p.bias ? s[e] + p.bias[e] : l[e];
    float* const weights = p.weights + t * p.k;
    int64_t* const ids = p.ids + t * p.k;
    float total = 0;
    for (int64_t e = 0; e < p.experts; ++e) taken.get()[e] = false;
    for (int64_t j = 0; j < p.k; ++j) {
      int64_t best = -1;
      for (int64_t e = 0; e < p.experts; ++e)
        if (!taken.get()[e] && (best < 0 || is_above(by[e], by[best]))) best = e;
      taken.get()[best] = true;
      ids[j] = best;
      weights[j] = s[best];
      total += s[best];
    }
    if (!p.renormalize) continue;
    total = total < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : total;
    for (int64_t j = 0; j < p.k; ++j) weights[j] /= total;
  }
}

template <class T>
inline void combine_tokens(const Combine& p, int64_t token0, int64_t token1) {
  const Buffer<float> buffer(p.cols);
  float* const sums = buffer.get();
  for (int64_t t = token0; t < token1; ++t) {
    for (int64_t c = 0; c < p.cols; ++c) sums[c] = 0;
    for (int64_t j = 0; j < p.k; ++j) {
      const int64_t row = p.inverse[t * p.k + j];
      if (row < 0) continue;
      const T* y = static_cast<const T*>(p.y) + row * p.y_stride;
      const float weight = p.weights[t * p.k + j];
      for (int64_t c = 0; c < p.cols; ++c) sums[c] += weight * to_float(y[c]);
    }
    T* out = static_cast<T*>(p.out) + t * p.cols;
    for (int64_t c = 0; c < p.cols; ++c) from_float(sums[c], out + c);
  }
}

inline void route(const Route& p, int64_t token0, int64_t token1) {
  with_float(p.type, [&]<class T>(T*) { route_tokens<T>(p, token0, token1); });
}
inline void combine(const Combine& p, int64_t token0, int64_t token1) {
  with_float(p.type, [&]<class T>(T*) { combine_tokens<T>(p, token0, token1); });
}

}  // namespace
}  // namespace effk::moe
