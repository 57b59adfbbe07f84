"""What this machine is, and what it can do at most: measured, in the run whose times are set beside it."""

from __future__ import annotations

import ctypes
import datetime
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import effk
import torch
import torch.nn.functional as F
from effk import _library

from .timing import last_level_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Limits:
    """The best rates seen: bytes/s of reading and of copying (read plus written), flop/s of matmul by dtype.

    int8's are operations with 32-bit sums. On a CPU with VNNI they are those of its instruction on registers alone.
    """

    read: float
    copy: float
    matmul: dict[str, float]

    @property
    def bandwidth(self) -> float:
        return max(self.read, self.copy)

    def rate(self, dtype: str) -> float:
        """A narrow type can be widened, so float32's rate is always there to be had."""
        return max(self.matmul.get(dtype, 0.0), self.matmul["float32"])

    def memory_seconds(self, nbytes: int) -> float:
        return nbytes / self.bandwidth

    def seconds(self, nbytes: int, flops: float, dtype: str) -> float:
        """The roofline: the least time that these limits allow."""
        return max(self.memory_seconds(nbytes), flops / self.rate(dtype))


def measure_limits(device: torch.device) -> Limits:
    """Reads and copies buffers far larger than the caches, and multiplies square matrices."""
    cuda = device.type == "cuda"
    floats = (1 << 28) if cuda else max(1 << 26, last_level_cache())
    a, b = torch.ones(floats, device=device), torch.ones(floats, device=device)
    best = _best_cuda if cuda else _best_cpu
    read = max(a.nbytes / best(a.sum), (a.nbytes + b.nbytes) / best(lambda: a.dot(b)))
    copy = 2 * a.nbytes / best(lambda: b.copy_(a))
    n = 8192 if cuda else 2048
    matmul = {}
    for dtype in DTYPES:
        # Drawn as inputs are: on a GPU the power, and so the clock, depends on the bits.
        x, w = (torch.randint(-255, 256, (n, n), device=device).to(dtype) / 128 for _ in range(2))
        matmul[dtype_name(dtype)] = 2 * n**3 / best(functools.partial(F.linear, x, w))
    x, w = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    int8 = 2 * n**3 / best(lambda: torch._int_mm(x, w.T))
    matmul["int8"] = int8 if cuda else max(int8, _vnni_rate())
    return Limits(read, copy, matmul)


def _vnni_rate(repeats: int = 20, rounds: int = 1 << 21) -> float:
    """Operations/s of torch's number of threads together, none of them touching memory; 0 without VNNI."""
    operations = _library.cpu.handle.effk_int8_operations
    operations.argtypes, operations.restype = [ctypes.c_int64], ctypes.c_int64
    threads = torch.get_num_threads()
    together = threading.Barrier(threads)

    def run(_: int) -> tuple[float, float, int]:
        together.wait()
        start = time.perf_counter()
        count = operations(rounds)
        return start, time.perf_counter(), count

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            starts, ends, counts = zip(*pool.map(run, range(threads)), strict=True)
            best = max(best, sum(counts) / (max(ends) - min(starts)))
    return best


def _best_cpu(call: Callable[[], Any], seconds: float = 0.25) -> float:
    call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _best_cuda(call: Callable[[], Any], repeats: int = 20) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else effk.status()["cpu"]


def facts(device: torch.device, caches: str) -> dict[str, Any]:
    """What a reader needs to know to judge, and to repeat, a measurement."""
    status = json.loads(json.dumps(effk.status()))
    # Names, not paths: results are published.
    status["libraries"] = {name: text.rsplit("/", 1)[-1] for name, text in status["libraries"].items()}
    versions = {}
    for package in ("numpy", "scipy", "onnxruntime", "faiss-cpu", "peft", "pycolmap", "vllm", "triton", "cupy-cuda13x"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # before the run: what else keeps the processors busy
        "processors": len(os.sched_getaffinity(0)),
        "last_level_cache": last_level_cache(),
        "caches": caches,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "versions": versions,
        "effk": status,
    }
