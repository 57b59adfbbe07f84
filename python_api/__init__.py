"""effk: efficient kernels for PyTorch, called as `torch.ops.effk.*`.

Each family is a submodule with documented functions, modules and a readable reference: `effk.ba`, `effk.lora`,
`effk.lscd`, `effk.moe`, `effk.vq`, `effk.w4a8`.
"""

from . import _library

_library.load()

from . import ba, lora, lscd, moe, vq, w4a8  # noqa: E402
from ._library import cpu_level, set_cpu_level  # noqa: E402
from ._registry import backends, check_forced_backend, implementation  # noqa: E402
from ._status import status  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "ba",
    "backends",
    "cpu_level",
    "implementation",
    "lora",
    "lscd",
    "moe",
    "set_cpu_level",
    "status",
    "vq",
    "w4a8",
]

check_forced_backend()
