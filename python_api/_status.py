"""What effk found on this machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _library, _registry


def status() -> dict[str, Any]:
    """What was found, and what wasn't and why.

    Returns:
        A dict with `version`, `torch`, `cpu` (processor), `cpu_level`, `cpu_levels`, `cpu_bf16` (whether all
        families can run at level avx512, or only those that need no BF16 instructions), `threads`, `libraries` (path,
        or the reason why one is missing), `triton`, `devices` (names of the GPUs) and `backends` (op -> names).
    """
    from . import __version__

    loaded = _library.cpu.loaded
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cpu": _processor(),
        "cpu_level": _library.current_cpu_level() if loaded else None,
        "cpu_levels": _library.supported_cpu_levels() if loaded else (),
        "cpu_bf16": loaded and _library.has_bf16(),
        "threads": torch.get_num_threads(),
        "libraries": {"cpu": str(_library.cpu), "cuda": str(_library.cuda)},
        "triton": _triton(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {name: _registry.backends(name) for name in _registry.OPS},
    }


def _triton() -> str:
    if not _registry.has_triton():
        return "missing: not installed"
    try:
        import triton
    except Exception as error:  # whatever a broken installation raises is a fact to tell
        return f"missing: {error}"
    return triton.__version__


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
