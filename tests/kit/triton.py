"""Compiling a family's Triton kernels ahead of time, for GPUs that needn't be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType

from effk.kernels.common.triton_aot import SHARED_MEMORY, Resources, table


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: this one may have interpreted kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def assert_compiles_without_spills(kernels: ModuleType) -> None:
    """Every variant of a module's kernels, for every architecture."""
    done = compiling("-m", "effk.kernels.common.triton_aot", "--json", kernels.__name__)
    assert done.stdout, done.stderr
    rows = [Resources(**row) for row in json.loads(done.stdout)]
    print(table(rows))
    compiled = {(row.kernel, row.capability) for row in rows}
    assert compiled == {(str(v), capability) for v in kernels.variants() for capability in SHARED_MEMORY}
    assert all(row.registers > 0 for row in rows)
    bad = [row for row in rows if not row.good]
    assert not bad, f"spills, or too much shared memory:\n{table(bad)}"
    assert done.returncode == 0
