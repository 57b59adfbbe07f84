"""CUDA kernels on the CPU, under a checker: the back end "simt". docs/simt.md."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SOURCE = Path(__file__).parent
BUILD = SOURCE.parents[1] / "build" / "simt" / str(sys.implementation.cache_tag)


def missing() -> str | None:
    """Why the back end isn't here, if it isn't."""
    if os.environ.get("EFFK_SIMT") == "0":
        return "EFFK_SIMT=0"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 isn't installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers aren't installed"
    tools = [tool for tool in ("g++", "cmake", "ninja") if shutil.which(tool) is None]
    return f"{', '.join(tools)} not found" if tools else None


@functools.cache
def module() -> ModuleType:
    """The module effk_simt, built first where its sources or the kernels have changed."""
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    options = {
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_CXX_COMPILER": "g++",
    }
    configure = ["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configured = (BUILD / "build.ninja").exists()  # ninja itself sees whether that is out of date
        for command in (*([] if configured else [configure]), ["cmake", "--build", BUILD]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"the build of tests/simt failed (EFFK_SIMT=0 does without):\n{done.stdout}")
    path = next(BUILD.glob("effk_simt*.so"))
    loader = importlib.machinery.ExtensionFileLoader("effk_simt", str(path))
    spec = importlib.util.spec_from_file_location("effk_simt", path, loader=loader)
    assert spec
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Another order of blocks and threads."""
    before = module().seed()
    module().set_seed(seed)
    try:
        yield
    finally:
        module().set_seed(before)


class Device:
    """Tensors of one call in the emulated device's memory. On leaving, results are copied back.

    >>> with Device() as device:
    ...     module().some_launcher(device.input("x", x), device.output("y", y))
    """

    def __enter__(self) -> Device:
        self._memories = []
        self._results = []
        return self

    def __exit__(self, *error: object) -> None:
        for memory, tensor in self._results:
            memory.copy_to(tensor.data_ptr())
        self._memories.clear()
        self._results.clear()

    def _put(self, name: str, t: Tensor, kind: object) -> int:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        size = (last + 1) * t.element_size() if t.numel() else 0
        self._memories.append(module().Memory(name, t.data_ptr(), size, kind))
        return self._memories[-1].address

    def input(self, name: str, t: Tensor | None) -> int:
        """Address of what the kernels may only read; 0 for None. Any strides."""
        return 0 if t is None else self._put(name, t, module().Kind.input)

    def output(self, name: str, t: Tensor) -> int:
        """Address of contiguous t, whose contents the kernels must write first."""
        address = self._put(name, t, module().Kind.output)
        self._results.append((self._memories[-1], t))
        return address

    def inout(self, name: str, t: Tensor) -> int:
        """Address of contiguous t, whose contents are there already."""
        address = self._put(name, t, module().Kind.inout)
        self._results.append((self._memories[-1], t))
        return address


def register() -> None:
    """Adds the back end to `effk.backends`."""
    from effk import _registry

    from . import ba, lora, lscd, moe, vq, w4a8

    module()
    _registry.EXTRA_BACKENDS["simt"] = {**lscd.OPS, **w4a8.OPS, **lora.OPS, **moe.OPS, **vq.OPS, **ba.OPS}


def number_of_type(t: Tensor) -> int:
    """As in the families' enum Type."""
    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}[t.dtype]
