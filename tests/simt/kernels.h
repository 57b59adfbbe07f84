// What module.cpp hands to Python: null or an error comes back. Addresses are those of Memory, 0 for none.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "runtime.h"

namespace effk::simt {

using Address = uintptr_t;

const char* lscd_count(int64_t rows, int64_t cols, int type, Address w, int64_t row_stride, int64_t col_stride,
                       Address bitmap, Address sizes);
const char* lscd_fill(int64_t rows, int64_t cols, int type, Address w, int64_t row_stride, int64_t col_stride,
                      Address values, int64_t num_values, Address bitmap, Address offsets);
const char* lscd_unpack(int64_t rows, int64_t cols, int type, Address values, int64_t num_values, Address bitmap,
                        Address offsets, Address scale, Address out, int out_type);
const char* lscd_linear(int64_t rows, int64_t cols, int type, Address values, int64_t num_values, Address bitmap,
                        Address offsets, int x_type, int64_t tokens, Address x, int64_t token_stride,
                        int64_t col_stride, Address y, Address bias, Address scale, int activation, int num_sms);
// y from sums [splits, tokens, rows].
const char* lscd_finish(int64_t rows, int64_t tokens, int x_type, Address sums, int splits, Address y, Address bias,
                        Address scale, int activation);

// n4, n8, cols, group; q4, scale4, zero4, q8, scale8, perm.
using W4a8Packed = std::tuple<int64_t, int64_t, int64_t, int64_t, Address, Address, Address, Address, Address, Address>;
const char* w4a8_quantize(int type, int64_t tokens, int64_t cols, int64_t group, Address x, int64_t token_stride,
                          int64_t col_stride, Address q, Address scale);
// perm from how many of the features up to each one have 8 bits; 0 for none.
const char* w4a8_order(Address ends, int64_t rows, Address perm);
const char* w4a8_pack(W4a8Packed p, int type, Address w, int64_t row_stride, int64_t col_stride);
const char* w4a8_unpack(W4a8Packed p, Address out);
// kernel: a LinearPlan::Kernel, or -1 for what is planned.
const char* w4a8_linear(W4a8Packed p, int x_type, int64_t tokens, Address x, int64_t token_stride, int64_t col_stride,
                        Address y, int y_type, Address bias, int num_sms, int kernel);
const char* w4a8_accumulate(W4a8Packed p, int64_t tokens, Address q, int64_t token_stride, int64_t col_stride,
                            Address out);
const char* w4a8_salience(int64_t samples, int64_t rows, int64_t cols, int grad_type, Address grad, int w_type,
                          Address w, int w4_type, Address w4, Address out);

// An index tensor and whether it is int64.
using Indices = std::tuple<Address, bool>;
// w, base or 0, a, b; rows, cols, rank; strides of w and base.
using LoraLayer = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t, int64_t>;
// ids, gates, how many, and the sign of the gates.
using LoraPairs = std::tuple<Indices, Address, int64_t, float>;
const char* lora_merge(int type, std::vector<LoraLayer> layers, std::vector<LoraPairs> lists, Indices ranks,
                       double scale, int64_t adapters, int64_t rank, int num_sms, int most_shared);
// adapters, rank, cols, rows; y_in may be 0.
const char* lora_apply(int type, int64_t tokens, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, Address x,
                       int64_t x_stride, Address a, Address b, Indices ids, Address gates, int64_t pairs, Indices ranks,
                       double scale, Address y_in, int64_t y_stride, Address y, int64_t most_blocks);

// rows, cols, address, elements between two rows.
using MoeMatrix = std::tuple<int64_t, int64_t, Address, int64_t>;
// experts, rows, address, elements between two experts and between two rows.
using MoeWeights = std::tuple<int64_t, int64_t, Address, int64_t, int64_t>;
// bias may be 0.
const char* moe_route(int type, int64_t tokens, int64_t experts, int64_t k, Address logits, int64_t stride,
                      Address bias, int score, bool renormalize, Address weights, Address ids, int num_sms);
const char* moe_sort(Indices ids, int64_t pairs, int64_t experts, Address perm, Address inverse, Address offsets);
// gemm: a moe::Gemm, or -1 for what is chosen. The address of gather may be 0, and bias.
const char* moe_grouped_gemm(int type, MoeMatrix x, MoeWeights w, Indices offsets, int64_t rows, Indices gather,
                             Address bias, int out_type, Address y, int gemm, int num_sms);
const char* moe_grouped_wgrad(int type, MoeMatrix grad, MoeMatrix x, Indices offsets, int64_t experts, Indices gather,
                              Address dw, int num_sms);
const char* moe_combine(int type, MoeMatrix y, int64_t tokens, int64_t k, Indices inverse, Address weights,
                        Address out);
const char* moe_mlp(int type, MoeMatrix x, MoeWeights w13, MoeWeights w2, int64_t k, Indices ids, Address weights,
                    int activation, int gemm, Address y, bool adds, int num_sms);

// Sizes in the order of vq.h's structs; codes: a vq::Codes.
const char* vq_encode(int type, std::vector<int64_t> sizes, Address keys, std::vector<int64_t> strides,
                      Address codebook, Address chol, int codes, Address out);
const char* vq_lut(int type, std::vector<int64_t> sizes, Address q, std::vector<int64_t> strides, Address codebook,
                   Address inv, Address out);
// sizes, lut, codes: which and where and strides, lens, whether tables have 8 bits.
using VqScores = std::tuple<std::vector<int64_t>, Address, int, Address, std::vector<int64_t>, Indices, bool>;
const char* vq_score(VqScores s, Address out, int num_sms);
const char* vq_topk(VqScores s, int64_t k, int64_t sink, int64_t window, bool union_group, int64_t cap, Address idx,
                    Address count, int num_sms);
// Address and strides.
using VqRows = std::pair<Address, std::vector<int64_t>>;
const char* vq_attend(int type, std::vector<int64_t> sizes, VqRows q, VqRows k, VqRows v, Indices idx, Indices count,
                      double scale, Address out, Address lse, int num_sms);
const char* vq_wrope(int type, int64_t rows, int64_t dim, Address q, int64_t stride, Address cos, bool cos_float,
                     Address sin, bool sin_float, Address out);

// Model, loss, whether numbers are float64, whether rotations are quaternions, cameras, points, observations, number of
// multiprocessors, most blocks; scale of the loss, weight of depth, radius; addresses of cameras, points, observations,
// depth, fixed points, step of cameras, and of the sorted keys and where they were, of which the last five may be 0;
// indices.
using BaProblem = std::tuple<std::vector<int64_t>, std::vector<double>, std::vector<Address>, Indices, Indices>;
const char* ba_keys(BaProblem p, Address keys);
const char* ba_residual(BaProblem p, Address residual, Address valid, Address jac_camera, Address jac_point);
const char* ba_cost(BaProblem p, Address cost);
// What they return, in order.
const char* ba_build(BaProblem p, std::vector<Address> to);
// pairs: whether there are any, which, how many.
const char* ba_schur(BaProblem p, std::tuple<bool, Indices, int64_t> pairs, std::vector<Address> to);
const char* ba_schur_mv(BaProblem p, Address y);
const char* ba_backsubstitute(BaProblem p, std::vector<Address> to);
// Model, whether numbers are float64, whether rotations are quaternions, cameras, points, most blocks; cameras, points,
// steps of both, and what they become.
const char* ba_retract(std::vector<int64_t> sizes, std::vector<Address> addresses);

// The kernels of wrappers.cpp and planted.cpp, by name.
const char* wrappers(const std::string& name, Address a, Address b, Address c);
const char* planted(const std::string& name, Address in, Address out);
std::vector<std::string> planted_names();

}  // namespace effk::simt
