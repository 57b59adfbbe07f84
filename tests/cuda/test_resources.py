"""What CUDA kernels take of a multiprocessor, on every architecture that the library was compiled for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from effk import _library

REGISTERS = 65536  # of a multiprocessor, from sm_80 to sm_100
REGISTER_UNIT = 8  # registers a thread are given in such steps
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(path) if path and path.exists() else None


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    stack: int  # bytes
    local: int
    threads: int  # of a block, and blocks of a multiprocessor: its launch bounds
    blocks: int

    @property
    def share(self) -> float:
        """Of a multiprocessor's registers, with as many blocks as the bounds promise."""
        return -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT * self.threads * self.blocks / REGISTERS


def usage(library: Path, tool: str) -> list[Kernel]:
    """Every kernel in the library, once for each architecture."""
    ptx, text = (
        subprocess.run([tool, what, library], capture_output=True, text=True, check=True).stdout
        for what in ("-ptx", "-res-usage")
    )
    head = r"\.entry (\w+)\([^{]*?\.maxntid (\d+)[^{]*?\.minnctapersm (\d+)"
    bounds = {name: (int(threads), int(blocks)) for name, threads, blocks in re.findall(head, ptx)}
    kernels, arch = [], ""
    for line in text.replace(":\n", ": ").splitlines():
        if found := re.search(r"arch = (\S+)", line):
            arch = found[1]
        if found := USAGE.search(line):
            assert found[1] in bounds, f"{found[1]} has no launch bounds"
            kernels.append(Kernel(arch, found[1], int(found[2]), int(found[3]), int(found[5]), *bounds[found[1]]))
    return kernels


def generations(architectures: Iterable[str]) -> set[int]:
    """sm_90a, 90a-real -> 9"""
    return {int(re.search(r"\d+", a)[0]) // 10 for a in architectures}  # type: ignore[index]


def wanted_architectures() -> list[str]:
    """Those that CMakeLists.txt names, unless the build was for others."""
    cmake = (Path(__file__).parents[2] / "CMakeLists.txt").read_text()
    default = re.search(r'set\(EFFK_CUDA_ARCHITECTURES "([^"]+)"', cmake)[1]  # type: ignore[index]
    return os.environ.get("EFFK_CUDA_ARCHITECTURES", default).split(";")


def table(kernels: Iterable[Kernel]) -> str:
    rows = [f"{k.arch:8} {k.registers:9} {k.share:8.0%} {k.stack:6} {k.local:6}  {k.name}" for k in kernels]
    return "\n".join(["", "arch     registers   of all  stack  local  kernel", *rows])


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if not _library.cuda.path.exists():
        assert not (os.environ.get("CI") and shutil.which("nvcc")), "nvcc is here, but the CUDA library wasn't built"
        pytest.skip("the CUDA library isn't built")
    tool = cuobjdump()
    assert tool, "no cuobjdump, neither of the CUDA toolkit nor of Triton"
    found = usage(_library.cuda.path, tool)
    print(table(found))
    return found


def test_architectures(kernels: list[Kernel]) -> None:
    assert generations(k.arch for k in kernels) == generations(wanted_architectures())


def test_no_spills(kernels: list[Kernel]) -> None:
    spilling = [k for k in kernels if k.stack or k.local]
    assert not spilling, table(spilling)


def test_registers_fit_the_launch_bounds(kernels: list[Kernel]) -> None:
    """As many blocks as a kernel declares run on one multiprocessor."""
    too_many = [k for k in kernels if k.share > 1]
    assert not too_many, table(too_many)
