"""How long a layer takes whose experts are shared out over ranks, by its number of stages: a model and its measurement.

As EPS-MoE's (Qian et al., 2024, arXiv:2410.12247) the model weighs what a further stage costs against what it hides.
With C the time that could be hidden and k the cost of a stage, theirs comes to N* = sqrt(C / k); that is the case here
where each visit of a token at a rank is for one expert. Visits for several begin with their first stage and end with
their last, which leaves more to wait for at both ends: so the stages are played through, and the best number counts.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from . import exchanges

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger("effk")

MOST_STAGES = 32
WORTHWHILE = 0.005  # of the time: a gain that is worth more stages than one
RUNS = 3


@dataclass(frozen=True)
class Costs:
    """Of a rank, in seconds.

    Attributes:
        call: of a call with one stage, beside its products and its rows: agreement, sorting, latencies.
        stage: of a stage more.
        byte: of a byte of rows that goes to another rank.
        hidden: share of a row's way that doesn't slow products down which are made meanwhile; 1 where they run on
            something else, less where the same processor does both.
        products: how many rows an expert has, ascending, and seconds for an element of its weights.
    """

    call: float
    stage: float
    byte: float
    hidden: float
    products: tuple[tuple[float, float], ...]

    def of_element(self, rows: float) -> float:
        """For so many rows: between those that are known, or in proportion to the last."""
        before = self.products[0]
        if rows <= before[0]:
            return before[1]
        for after in self.products[1:]:
            if rows <= after[0]:
                share = (rows - before[0]) / (after[0] - before[0])
                return before[1] + share * (after[1] - before[1])
            before = after
        return before[1] * rows / before[0]

    @classmethod
    def of_limits(
        cls, call: float, stage: float, byte: float, hidden: float, flops: float, bandwidth: float, element: int = 2
    ) -> Costs:
        """Of a device that reads so many bytes and makes so many operations a second."""
        least = element / bandwidth
        return cls(call, stage, byte, hidden, ((1.0, least), (least * flops / 2, least)))


@dataclass(frozen=True)
class Load:
    """A layer and what it is given, as far as time depends on it; each token's experts are any.

    Attributes:
        tokens: of a rank.
        ranks: how many.
        experts: of all ranks.
        pairs: experts of a token.
        cols, inner: K and I of `moe_mlp`.
        gated: whether w13 has gates.
        element: bytes of one of x.
    """

    tokens: float
    ranks: int
    experts: int
    pairs: int
    cols: int
    inner: int
    gated: bool = True
    element: int = 2

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.experts // self.ranks

    @property
    def weights(self) -> int:
        """Elements of an expert."""
        return self.cols * self.inner * (3 if self.gated else 2)

    @property
    def unevenness(self) -> float:
        """How much more pairs than the mean the rank has that has most, about, where each pair's expert is random."""
        others = (self.ranks - 1) / self.ranks
        return 0.7 * math.sqrt(2 * math.log(self.ranks) * others / max(1.0, self.tokens * self.pairs))

    def untouched(self, share: float) -> float:
        """Of tokens: how many have no expert in that share of a rank's."""
        return (1 - share / self.ranks) ** self.pairs


@dataclass(frozen=True)
class Prediction:
    """Seconds.

    Attributes:
        total: of the layer.
        compute: of its products and stages.
        communication: of its rows, one exchange after the other.
        waiting: for rows, while nothing computes.
        call: of all else.
    """

    total: float
    compute: float
    communication: float
    waiting: float
    call: float

    @property
    def hidden(self) -> float:
        """Share of the communication that the layer doesn't take longer for."""
        return 1 - (self.total - self.call - self.compute) / self.communication if self.communication else 1.0


def predict(load: Load, costs: Costs, stages: int) -> Prediction:
    """Plays the stages through: exchanges one after the other, as they are asked for; products beside them."""
    row = load.cols * load.element * costs.byte * load.tokens * (load.ranks - 1)
    # By stage: visits that begin there; and end, which is the same from behind.
    come = [row * (load.untouched(s / stages) - load.untouched((s + 1) / stages)) for s in range(stages)]
    leave = come[::-1]
    pairs = load.tokens * load.ranks * load.pairs
    used = load.experts * (1 - (1 - 1 / max(1, load.experts)) ** pairs)  # of the experts
    products = used / load.ranks * load.weights * costs.of_element(pairs / used) if used > 0 else 0.0
    products *= 1 + load.unevenness
    part = (products + costs.stage * (stages - 1)) / stages

    busy = waiting = 0.0  # until when products are made
    link = arrived = come[0]  # and rows under way
    for s in range(stages):
        following = link
        if s + 1 < stages:  # asked for before the wait for this one
            following = link = max(link, busy) + come[s + 1]
        waiting += max(0.0, arrived - busy)
        busy = max(arrived, busy) + part
        link, arrived = max(link, busy) + leave[s], following
    waiting += max(0.0, link - busy)
    communication = sum(come) + sum(leave)
    total = costs.call + max(link, busy) + (1 - costs.hidden) * (communication - waiting)
    return Prediction(total, part * stages, communication, waiting, costs.call)


@functools.lru_cache(1024)  # half a millisecond, and steps of decoding have the same load again and again
def best_stages(load: Load, costs: Costs) -> int:
    """The number of stages that takes least time; 1 unless more pay."""
    most = max(1, min(MOST_STAGES, load.local))
    times = {n: predict(load, costs, n).total for n in range(1, most + 1)}
    best = min(times, key=lambda n: times[n])
    return best if times[best] < (1 - WORTHWHILE) * times[1] else 1


# --- Measured ---------------------------------------------------------------------------------------------------------

# By the group itself: names come again.
_known: WeakKeyDictionary[ProcessGroup, dict[tuple[torch.dtype, str], Costs]] = WeakKeyDictionary()


def known(group: ProcessGroup, dtype: torch.dtype, device: torch.device) -> Costs | None:
    return _known.get(group, {}).get((dtype, device.type))


# What is timed: products of so many rows an expert, of more weights than caches near a core hold; and a layer without
# any worth speaking of.
ROWS = (1, 4, 16, 64)
EXPERTS, COLS, INNER = 16, 2048, 768
SMALL_EXPERTS = 4


def _random(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Numbers of a generator of their own, so that a calibration changes nobody else's."""
    generator = torch.Generator(device).manual_seed(0)
    return functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)


class _Products:
    """Calls of EXPERTS experts with so many rows each."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        most = EXPERTS * max(ROWS)
        random = _random(dtype, device)
        self.x, self.w13, self.w2 = random(most, COLS), random(EXPERTS, 2 * INNER, COLS), random(EXPERTS, COLS, INNER)
        self.weights = torch.ones(most, 1, device=device, dtype=torch.float32)
        self.ids = (torch.arange(most, device=device) % EXPERTS)[:, None]
        self.y = torch.zeros(most, COLS, device=device, dtype=torch.float32)

    def __call__(self, rows: int) -> None:
        y, x, weights, ids = (t[: EXPERTS * rows] for t in (self.y, self.x, self.weights, self.ids))
        torch.ops.effk.moe_mlp_(y, x, self.w13, self.w2, weights, ids)


def _small_layer(ranks: int, dtype: torch.dtype, device: torch.device, group: str) -> Callable[..., Tensor]:
    """A layer over ranks, of a token that has experts in all stages of all of them."""
    experts, cols, inner = SMALL_EXPERTS * ranks, 8, 8
    random = _random(dtype, device)
    w13, w2 = random(SMALL_EXPERTS, 2 * inner, cols), random(SMALL_EXPERTS, cols, inner)
    ids = torch.arange(experts, device=device)[None]
    given = (random(1, cols), w13, w2, random(1, experts).float(), ids, group)
    return functools.partial(torch.ops.effk.moe_mlp_ep, *given)


def calibrate(
    group: ProcessGroup, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", runs: int = RUNS
) -> Costs:
    """Measures the costs of a group's ranks together; all have to call it. Takes some seconds.

    `moe_mlp_ep(stages=0)` calls it where nobody has, once for a group and dtype. Another number of stages changes no
    bit of a result.

    Args:
        group: a process group of torch.distributed.
        dtype: of x.
        device: that the layer is on.
        runs: of each timed piece; the median counts, and of the ranks the largest.

    Returns:
        What later calls reckon with, the same on all ranks.
    """
    device = torch.device(device)
    ranks = group.size()

    def timed(*calls: Callable[[], exchanges.Waits | Tensor | None]) -> float:
        """Of calls of which some may give something to wait for."""
        seconds = []
        for _ in range(runs + 1):
            dist.barrier(group)
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for work in [call() for call in calls]:
                if not isinstance(work, Tensor | None):
                    work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def of_all(*values: float) -> list[float]:
        """The largest of the ranks: they wait for each other."""
        largest = torch.tensor(values, dtype=torch.float64).to(device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        return largest.tolist()

    symmetric = of_all(float(not exchanges.usable(group, device))) == [0.0]

    def exchange(rows: int) -> Callable[[], exchanges.Waits]:
        sent = torch.ones(rows * ranks, COLS, device=device, dtype=dtype)
        counts = [rows] * ranks
        send = exchanges.through(group, device, symmetric, len(sent))
        return functools.partial(send, torch.empty_like(sent), sent, counts, counts)

    with torch.no_grad():
        layer_of = _Products(dtype, device)
        elements = layer_of.w13.numel() + layer_of.w2.numel()
        products = of_all(*(timed(functools.partial(layer_of, rows)) for rows in ROWS))
        layer = _small_layer(ranks, dtype, device, group.group_name)
        one, many = of_all(*(timed(functools.partial(layer, stages=n)) for n in (1, SMALL_EXPERTS)))
        rows = 256
        bytes_sent = rows * (ranks - 1) * COLS * dtype.itemsize
        latency, sending = of_all(timed(exchange(0)), timed(exchange(rows)))
        # As long an exchange as some products take, beside them.
        most = (64 << 20) // (ranks * COLS * dtype.itemsize)
        rows = max(1, min(most, int(rows * products[-1] / sending)))
        alone, both = of_all(timed(exchange(rows)), timed(exchange(rows), functools.partial(layer_of, ROWS[-1])))
    costs = Costs(
        call=one,
        stage=max(0.0, many - one) / (SMALL_EXPERTS - 1),
        byte=max(0.0, sending - latency) / bytes_sent if bytes_sent else 0.0,
        hidden=min(1.0, max(0.0, (alone + products[-1] - both) / min(alone, products[-1]))),
        products=tuple((float(r), seconds / elements) for r, seconds in zip(ROWS, products, strict=True)),
    )
    _known.setdefault(group, {})[dtype, device.type] = costs
    log.info("effk: costs of group %r for %s: %s", group.group_name, dtype, costs)
    return costs
