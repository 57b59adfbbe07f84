// What module.cpp hands to Python: null or an error comes back. Addresses are those of Memory, 0 for none.
#pragma once

#include <cstdint>

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

// The kernels of wrappers.cpp and planted.cpp, by name.
const char* wrappers(const std::string& name, Address a, Address b, Address c);
const char* planted(const std::string& name, Address in, Address out);
std::vector<std::string> planted_names();

}  // namespace effk::simt
