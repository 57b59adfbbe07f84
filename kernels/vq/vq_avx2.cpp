// The plain level under this name, until there is better.
#include "vq.h"

namespace effk::vq {

extern const Cpu cpu_scalar;
const Cpu cpu_avx2 = cpu_scalar;

}  // namespace effk::vq
