"""Grouped or dense: the cost model of a CPU's GEMMs, measured once on a machine and kept in a file.

The model is of one expert with m rows and a weight of n elements, K a row, in picoseconds of a thread:

    grouped: n * max(read, dot * m)
    dense:   n * (lay_out + multiply * vectors of rows) + m * K * pack

`torch.ops.effk.moe_mlp(gemm="auto")` and `moe_grouped_gemm` evaluate it for each expert that has rows, so that it sees
the skew of a batch as it is. Without a calibration the numbers are those of the machine that effk was measured on.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import torch

from .. import _library
from .._checks import FLOATS
from .._progress import progress_bar

log = logging.getLogger("effk")

NAMES = ("read", "dot", "lay_out", "multiply", "pack")
Costs = tuple[float, ...]
ROWS = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96)  # of an expert, of timed calls
SIZES = ((32, 1024, 256), (8, 2048, 768), (4, 2048, 2048))  # experts, K, I: more than second caches hold


def exchange_costs(dtype: torch.dtype, costs: Costs) -> Costs:
    """Sets the costs of a dtype at the CPU level in force, and gives those that were there.

    Not while ops run in other threads.

    Raises:
        RuntimeError: the scalar level has no choice.
    """
    values = (ctypes.c_double * len(NAMES))(*costs)
    if _library.cpu.handle.effk_moe_exchange_costs(FLOATS.index(dtype), values):
        level = _library.current_cpu_level("moe")
        raise RuntimeError(f"effk: CPU level {level!r} has one way to multiply; nothing to choose")
    return tuple(values)


def cache_file() -> Path:
    """Where calibrations are kept: $XDG_CACHE_HOME/effk/moe.json, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effk" / "moe.json"


def machine() -> str:
    """What a calibration is for, beside the level and the dtype."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def calibrate(
    dtypes: Sequence[torch.dtype] = FLOATS, *, save: bool = True, runs: int = 5, progress: bool = True
) -> dict[str, Costs]:
    """Measures the cost model on this machine, at the CPU level and the number of threads in force, and uses it.

    Takes some seconds for each dtype, on an otherwise idle machine. From then on the choice, and with it the rounding
    of results, may be another than before.

    Args:
        dtypes: of float32, float16 and bfloat16.
        save: whether to keep the result in `cache_file()`, where later processes find it.
        runs: of each timed call; the median counts.
        progress: whether to show a bar.

    Returns:
        The costs (read, dot, lay_out, multiply, pack, as in this module's description) by the dtype's name.

    Raises:
        RuntimeError: the CPU level in force has no choice to make.
    """
    level = _library.current_cpu_level("moe")
    found = {}
    for dtype in dtypes:
        exchange_costs(dtype, exchange_costs(dtype, (1.0,) * len(NAMES)))  # raises before anything is measured
    for dtype in dtypes:
        costs = fit(measure(dtype, runs, progress))
        exchange_costs(dtype, costs)
        found[str(dtype).removeprefix("torch.")] = costs
        log.info("effk: moe costs of %s at %s: %s", dtype, level, dict(zip(NAMES, costs, strict=True)))
    if save:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read(path)
        kept.setdefault(machine(), {}).setdefault(level, {}).update({name: list(c) for name, c in found.items()})
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(kept, indent=2))
        partial.replace(path)  # at once: nobody reads half a file
    return found


Point = tuple[str, int, float, float, float]  # gemm, rows, elements of weights, of x, picoseconds


def measure(dtype: torch.dtype, runs: int, progress: bool) -> list[Point]:
    """Times moe_mlp with as many rows for each expert, and both ways in turn."""
    points = []
    with torch.inference_mode(), progress_bar(f"calibrate {dtype}", len(SIZES) * len(ROWS), progress) as advance:
        for experts, cols, inner in SIZES:
            w13 = torch.randn(experts, 2 * inner, cols).to(dtype)
            w2 = torch.randn(experts, cols, inner).to(dtype)
            for rows in ROWS:
                x = torch.randn(experts * rows, cols).to(dtype)
                ids = (torch.arange(experts * rows) % experts)[:, None]
                weights = torch.ones(experts * rows, 1)
                times: dict[str, list[float]] = {"grouped": [], "dense": []}
                for _ in range(runs + 1):
                    for gemm, of_gemm in times.items():
                        start = time.perf_counter()
                        torch.ops.effk.moe_mlp(x, w13, w2, weights, ids, gemm=gemm)
                        of_gemm.append(time.perf_counter() - start)
                for gemm, of_gemm in times.items():
                    seconds = statistics.median(of_gemm[1:])  # the first fills caches
                    size = float(w13.numel() + w2.numel()), float(x.numel())
                    points.append((gemm, rows, *size, seconds * torch.get_num_threads() * 1e12))
                advance()
    return points


def fit(points: Sequence[Point]) -> Costs:
    """The costs that explain measured times best, in relative terms."""
    grouped = [(rows, t / n) for gemm, rows, n, _, t in points if gemm == "grouped"]
    read = statistics.median(t for rows, t in grouped if rows == min(r for r, _ in grouped))
    most = max(rows for rows, _ in grouped)
    dot = statistics.median(t / rows for rows, t in grouped if 4 * rows > most)
    width = {"avx2": 8, "avx512": 16}.get(_library.current_cpu_level("moe"), 1)
    dense = [p for p in points if p[0] == "dense"]
    times = torch.tensor([t for *_, t in dense], dtype=torch.float64)
    terms = torch.tensor([[n, n * math.ceil(rows / width), x] for _, rows, n, x, _ in dense], dtype=torch.float64)
    solution = torch.linalg.lstsq(terms / times[:, None], torch.ones(len(dense), 1, dtype=torch.float64)).solution
    lay_out, multiply, pack = (max(float(c), 0.0) for c in solution[:, 0])
    return read, dot, lay_out, multiply, pack


def read(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    """A file's calibrations by machine, level and dtype; none where it can't be read."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}

    def entries(level: object) -> dict[str, object]:
        return level if isinstance(level, dict) else {}

    return {m: {name: entries(of) for name, of in entries(levels).items()} for m, levels in entries(kept).items()}


def load() -> None:
    """Uses what was calibrated on this machine, for every level that it has."""
    if not _library.cpu.loaded:
        return
    try:
        levels = read(cache_file()).get(machine(), {})
    except RuntimeError:  # there is no home
        return
    for level in _library.supported_cpu_levels("moe")[1:]:  # the scalar one has no choice
        for dtype in FLOATS:
            costs = levels.get(level, {}).get(str(dtype).removeprefix("torch."))
            if costs is None:
                continue
            if not is_valid(costs):
                log.warning("effk: %s has no valid costs for %s at %s", cache_file(), dtype, level)
                continue
            with _library.cpu_level(level):
                exchange_costs(dtype, tuple(costs))


def is_valid(costs: object) -> TypeGuard[list[float]]:
    return (
        isinstance(costs, list)
        and len(costs) == len(NAMES)
        and all(type(c) in (int, float) and 0 <= c < 1e300 for c in costs)
    )
