"""What effk costs where there is nothing to compute: `python -m effk.perf.harness.overhead`.

Ops on empty inputs, with gradients possible and in inference mode, beside torch.add through the same path, torch.ops;
and the seconds that `import effk` adds to `import torch`, in processes of their own.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from typing import Any

import torch
from effk import _registry

from .table import Cell, Printer, Table, duration, three_digits
from .timing import torch_threads

CALLS, REPEATS, IMPORTS = 2000, 25, 7

IMPORT = "import time, torch; start = time.perf_counter(); import effk; print(time.perf_counter() - start)"


def empty_calls() -> dict[str, tuple[Any, ...]]:
    """Of an op of each kind, a call of no tokens, observations or layers."""
    floats, ids = torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64)
    gates, index = torch.empty(0, 2), torch.empty(0, dtype=torch.int64)
    w = torch.randn(64, 64).relu()
    return {
        "lscd_linear": (floats, *torch.ops.effk.lscd_pack(w), 64, 64),
        "w4a8_quantize": (floats,),
        "w4a8_linear": (floats, *torch.ops.effk.w4a8_pack(w, None, 32), 32),
        "lora_apply": (floats, torch.randn(4, 8, 64), torch.randn(4, 64, 8), ids, gates),
        "lora_merge_": ([], [], [], index, torch.empty(0)),
        "moe_route": (torch.empty(0, 8), 2),
        "moe_sort": (ids, 8),
        "moe_mlp": (floats, torch.randn(8, 64, 64), torch.randn(8, 64, 32), gates, ids),
        "vq_score": (torch.empty(0, 2, 2, 16), torch.empty(0, 2, 3, 2, dtype=torch.uint8)),
        "ba_residual": (torch.zeros(1, 9), torch.zeros(1, 3), torch.empty(0, 2), index, index),
    }


def seconds(call: Callable[[], Any]) -> float:
    """The fastest of many runs: whatever else the machine does only adds."""
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS


def import_seconds() -> float:
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(IMPORTS)]
    return statistics.median(float(run.stdout) for run in runs)


def both(call: Callable[[], Any]) -> list[float]:
    """Seconds with gradients possible, and in inference mode."""
    usual = seconds(call)
    with torch.inference_mode():
        return [usual, seconds(call)]


def main() -> None:
    x = torch.empty(0)
    with torch_threads(1):
        times = {"torch.add": both(lambda: torch.ops.aten.add.Tensor(x, x))}
        for name, args in empty_calls().items():
            times[name] = both(functools.partial(_registry.find(name).overload, *args))
    add = times["torch.add"]
    rows = [
        [Cell(name), *(Cell(text) for s, a in zip(of, add, strict=True) for text in (duration(s), three_digits(s / a)))]
        for name, of in times.items()
    ]
    printer = Printer()
    printer.table(Table("On empty inputs", ["op", "time", "of torch.add", "in inference mode", "of torch.add"], rows))
    printer.line(f"import effk after import torch: {duration(import_seconds())} (median of {IMPORTS})")


if __name__ == "__main__":
    main()
