"""Loads the compiled libraries and remembers what was found."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import _nvrtc

log = logging.getLogger("effk")

CPU_LEVELS = ("scalar", "avx2", "avx512")


class Library:
    """A compiled library: its path, and why it isn't there if it isn't."""

    def __init__(self, pattern: str):
        folder = Path(__file__).parent
        self.path = next(folder.glob(pattern), folder / pattern)
        self.missing = ""
        self._handle: ctypes.CDLL | None = None

    @property
    def loaded(self) -> bool:
        return self._handle is not None

    @property
    def handle(self) -> ctypes.CDLL:
        if self._handle is None:
            raise RuntimeError(f"effk: {self.path.name} isn't loaded: {self.missing}")
        return self._handle

    def load(self) -> None:
        if not self.path.exists():
            self.missing = "not built"
            return
        try:
            torch.ops.load_library(str(self.path))
            self._handle = ctypes.CDLL(str(self.path))
        except OSError as error:
            self.missing = str(error)

    def __str__(self) -> str:
        return str(self.path) if self.loaded else f"missing: {self.missing}"


cpu = Library("lib/libeffk_cpu.so")
cuda = Library("lib/libeffk_cuda.so")


def load() -> None:
    """Loads both libraries. A missing one is a fact for `effk.status()`, not an error."""
    cpu.load()
    if not cpu.loaded:
        log.warning("effk has no kernels for CPUs: its library is missing (%s); slow references answer", cpu.missing)
        cuda.missing = "needs the CPU library"
        return
    cuda.load()
    if cuda.loaded:
        _nvrtc.offer(cuda.handle)
    for function in ("effk_cpu_level", "effk_supported_cpu_level"):
        getattr(cpu.handle, function).restype = ctypes.c_char_p
        getattr(cpu.handle, function).argtypes = [ctypes.c_char_p]
    cpu.handle.effk_set_cpu_level.argtypes = [ctypes.c_char_p]
    if forced := os.environ.get("EFFK_CPU_LEVEL"):
        set_cpu_level(forced)


def current_cpu_level(family: str = "") -> str:
    """The instruction set that CPU kernels use now: one of `CPU_LEVELS`.

    Args:
        family: whose kernels. Those of some families need more of AVX-512 than others, the BF16 instructions, and use
            "avx2" on machines that lack them. Without a family: the level that is allowed to all.
    """
    return cpu.handle.effk_cpu_level(family.encode()).decode()


def supported_cpu_levels(family: str = "") -> tuple[str, ...]:
    """The levels that this machine can run, from the slowest on; without a family, of any family's kernels."""
    best = cpu.handle.effk_supported_cpu_level(family.encode()).decode()
    return CPU_LEVELS[: CPU_LEVELS.index(best) + 1]


def has_bf16() -> bool:
    """Whether this machine has level "avx512" and the BF16 instructions, so that every family runs at that level."""
    return bool(cpu.handle.effk_has_bf16())


def set_cpu_level(level: str | None) -> None:
    """Forces the instruction set of the CPU kernels, for the whole process.

    A family whose kernels can't run at the level on this machine, as those that need BF16 instructions at "avx512",
    uses the best below it: `effk.backends(op)` tells.

    Args:
        level: "scalar", "avx2" or "avx512"; None goes back to the best.

    Raises:
        ValueError: not a level.
        RuntimeError: this machine can't run it, whatever the family.
    """
    code = cpu.handle.effk_set_cpu_level((level or "").encode())
    if code == 1:
        raise ValueError(f"effk: CPU level {level!r}; wanted one of {', '.join(CPU_LEVELS)}")
    if code == 2:
        raise RuntimeError(f"effk: CPU level {level!r} is not on this machine (it has {supported_cpu_levels()})")


@contextmanager
def cpu_level(level: str) -> Iterator[None]:
    """Forces a CPU level inside a `with` block. Process-wide: not for use from several threads at once."""
    before = current_cpu_level()
    set_cpu_level(level)
    try:
        yield
    finally:
        set_cpu_level(before)
