#include "cpu_common.h"
#include "lscd.h"
namespace effk::lscd { const Cpu cpu_avx512 = cpu_scalar; }
