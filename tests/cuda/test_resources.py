"""No CUDA kernel spills registers to memory, on any architecture it was compiled for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from effk import _library

USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(path) if path and path.exists() else None


def usage(library: Path, tool: str) -> list[tuple[str, str, int, int, int]]:
    """Architecture, kernel, registers, bytes of stack and bytes of local memory, for each kernel in the library."""
    text = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    rows, arch = [], ""
    for line in text.replace(":\n", ": ").splitlines():
        if found := re.search(r"arch = (\S+)", line):
            arch = found[1]
        if found := USAGE.search(line):
            rows.append((arch, found[1], int(found[2]), int(found[3]), int(found[5])))
    return rows


def generations(architectures: Iterable[str]) -> set[int]:
    """sm_90a, 90a-real -> 9"""
    return {int(re.search(r"\d+", a)[0]) // 10 for a in architectures}  # type: ignore[index]


def wanted_architectures() -> list[str]:
    """Those that CMakeLists.txt names, unless the build was for others."""
    cmake = (Path(__file__).parents[2] / "CMakeLists.txt").read_text()
    default = re.search(r'set\(EFFK_CUDA_ARCHITECTURES "([^"]+)"', cmake)[1]  # type: ignore[index]
    return os.environ.get("EFFK_CUDA_ARCHITECTURES", default).split(";")


def test_no_spills() -> None:
    if not _library.cuda.path.exists():
        assert not (os.environ.get("CI") and shutil.which("nvcc")), "nvcc is here, but the CUDA library wasn't built"
        pytest.skip("the CUDA library isn't built")
    tool = cuobjdump()
    assert tool, "no cuobjdump, neither of the CUDA toolkit nor of Triton"
    rows = usage(_library.cuda.path, tool)
    assert generations(row[0] for row in rows) == generations(wanted_architectures())
    spilling = [
        f"{arch:8} {registers:4} registers {stack:5} stack {local:5} local  {kernel}"
        for arch, kernel, registers, stack, local in rows
        if stack or local
    ]
    assert not spilling, "\n".join([f"{len(spilling)} of {len(rows)} kernels use stack or local memory:", *spilling])
