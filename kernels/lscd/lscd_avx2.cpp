#include "cpu_common.h"
#include "lscd.h"
namespace effk::lscd { const Cpu cpu_avx2 = cpu_scalar; }
