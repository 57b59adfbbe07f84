// ba in plain C++, for any CPU.
#include <math.h>

#include <cstdint>

namespace effk::ba {
namespace {

using V = double;
constexpr int kWidth = 1;

inline void transpose(const V (&rows)[1], V* columns) { columns[0] = rows[0]; }

}  // namespace
}  // namespace effk::ba

#include "vector.h"

namespace effk::ba {

constinit const Cpu cpu_scalar = kPasses;

}  // namespace effk::ba
