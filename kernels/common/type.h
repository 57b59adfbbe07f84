// The element types that kernels are told of.
#pragma once

#include <cstdint>

namespace effk {

enum class Type : int { f32, f16, bf16, i8 };

constexpr int64_t type_size(Type t) { return t == Type::f32 ? 4 : t == Type::i8 ? 1 : 2; }

}  // namespace effk
