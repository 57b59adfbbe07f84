"""Clocks with cold or warm caches, and the statistics of their samples."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .problem import Call

Sample = Callable[[], float]  # runs a candidate once and returns seconds a call

WARM_UPS = 10  # calls before one that is timed with warm caches
WARM_SECONDS = 0.01  # after which fewer will do
PRODUCTS = 4  # that tell how fast the processors are now
QUIET = {"products": 1.1, "reading": 1.05}  # times as long as at best that fixed work takes on a quiet machine


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Some microseconds: for calls that take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class How:
    """A call is timed.

    Attributes:
        warm: with its inputs in the caches.
        graph: in a CUDA graph.
        own_threads: on CPU threads that aren't torch's.
    """

    warm: bool = False
    graph: bool = True
    own_threads: bool = False


@dataclass(frozen=True)
class Stats:
    """Seconds a call: the least, the quartiles, and the number of samples."""

    n: int
    min: float
    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Stats:
        if len(samples) == 1:
            return cls(1, *(samples[0],) * 4)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(len(samples), min(samples), q1, median, q3)

    @property
    def spread(self) -> float:
        """Distance of the quartiles in units of the median."""
        return (self.q3 - self.q1) / self.median

    @property
    def precision(self) -> float:
        """Relative standard error of the median, as for normal samples (IQR = 1.35 sigma)."""
        return 1.253 * self.spread / 1.349 / math.sqrt(self.n)


class Clock(Protocol):
    caches: str  # what is done about caches, for the report

    def quiet(self) -> bool:
        """Whether fixed work right before the last sample took no longer than it has to."""
        ...

    def copies(self, nbytes: int) -> int:
        """How many copies of inputs of that size are needed."""
        ...

    def sampler(self, calls: Sequence[Call], how: How) -> Sample:
        """Times the calls, one a copy."""
        ...


def last_level_cache() -> int:
    """Bytes of all caches of the last level together, as Linux tells; 64 MiB where it doesn't."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = ((index / f).read_text().strip() for f in ("level", "shared_cpu_list", "size"))
        except OSError:
            continue
        sizes[int(level), shared] = int(size[:-1]) * units[size[-1]]
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or 64 << 20


class CpuClock:
    """Times one call at a time, after all threads have read a buffer of twice the last-level cache.

    Reading leaves no dirty lines whose write-back would fall into the timed call, and wakes the threads up. A loop
    over the call would warm the caches, so there is none; perf_counter resolves well below a microsecond. Where the
    caches shall be warm, the call runs some times right before.

    Threads wait for work by spinning, for milliseconds after their last. For a candidate with threads of its own, the
    others' have to sleep by then and its own to be awake, as torch's are for the others; afterwards its own have to
    sleep.

    The time that the reading and, before it, a few small products take tells whether something else, such as a
    neighbour of a virtual machine, is slowing the memory or the processors down.
    """

    def __init__(self) -> None:
        self.buffer = torch.ones(2 * last_level_cache() // 4)
        self.caches = (
            f"cold: {self.buffer.nbytes >> 20} MiB, twice the last-level cache, are read before every call; "
            f"where said warm: the call runs before, {WARM_UPS} times or for {WARM_SECONDS * 1e3:g} ms"
        )
        self.matrix = torch.ones(256, 256)
        self.product = torch.empty_like(self.matrix)
        self.least: dict[tuple[str, int], float] = {}  # seconds of fixed work, by its name and the number of threads
        self.slowed: dict[str, float] = {}  # by how much it was, last time

    def quiet(self) -> bool:
        return all(self.slowed[name] <= allowed for name, allowed in QUIET.items())

    def read(self) -> None:
        self._fixed("products", lambda: [torch.mm(self.matrix, self.matrix, out=self.product) for _ in range(PRODUCTS)])
        self._fixed("reading", self.buffer.sum)

    def _fixed(self, name: str, work: Call) -> None:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        key = name, torch.get_num_threads()
        self.least[key] = min(seconds, self.least.get(key, seconds))
        self.slowed[name] = seconds / self.least[key]

    def copies(self, nbytes: int) -> int:
        return 1

    def sampler(self, calls: Sequence[Call], how: How) -> Sample:
        (call,) = calls

        def sample() -> float:
            if how.own_threads:
                self.wait_for_quiet()
                call()
                with torch_threads(1):
                    self.read()
            else:
                self.read()
            if how.warm:
                end = time.perf_counter() + WARM_SECONDS
                for _ in range(WARM_UPS):
                    call()
                    if time.perf_counter() > end:
                        break
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
            del result  # freeing it isn't timed
            if how.own_threads:
                self.wait_for_quiet()
            return seconds

        return sample

    @staticmethod
    def wait_for_quiet(longest: float = 0.5) -> None:
        """Until no thread of this process is busy."""
        end = time.perf_counter() + longest
        while time.perf_counter() < end:
            before = time.process_time()
            time.sleep(1e-3)
            if time.process_time() - before < 2e-4:
                return


def captured(call: Call) -> Call:
    """As a CUDA graph, whose result is always in the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


class CudaClock:
    """Replays one CUDA graph of calls on rotating copies of the inputs, between two events.

    Copies of more than twice the L2 cache in all keep every call's weights out of it. Where a call can't be captured,
    the calls are launched one after the other, launch time included. Where the caches shall be warm, calls on one copy
    are repeated.
    """

    def __init__(self) -> None:
        self.l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.caches = (
            f"cold: calls rotate over copies of the inputs, more than {2 * self.l2 >> 20} MiB (2 L2) in all; "
            f"where said warm: calls on one copy, {WARM_UPS} before and {WARM_UPS} timed"
        )

    def quiet(self) -> bool:
        return True  # a GPU is one program's

    def copies(self, nbytes: int) -> int:
        return 2 * self.l2 // max(nbytes, 1 << 16) + 2

    def sampler(self, calls: Sequence[Call], how: How) -> Sample:
        calls = list(calls) * (WARM_UPS if how.warm else 1)

        def launch() -> None:
            for call in calls:
                call()

        run = captured(launch) if how.graph else launch
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def sample() -> float:
            if how.warm:
                run()
            begin.record()
            run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / len(calls)

        return sample


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else CpuClock()
