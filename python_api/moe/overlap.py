"""How long a layer takes whose experts are shared out over ranks, by its number of stages: a model and its measurement.

As EPS-MoE's (Qian et al., 2024, arXiv:2410.12247) the model weighs what a further stage costs against what it hides.
With C the time that could be hidden and k the cost of a stage, theirs comes to N* = sqrt(C / k); that is the case here
where each visit of a token at a rank is for one expert. Visits for several begin with their first stage and end with
their last, which leaves more to wait for at both ends: so the stages are played through, and the best number counts.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger("effk")

MOST_STAGES = 32
WORTHWHILE = 0.005  # of the time: a gain that is worth more stages than one
RUNS = 5


@dataclass(frozen=True)
class Costs:
    """Of a rank, in seconds.

    Attributes:
        latency: of an exchange of rows, however few.
        byte: of a byte that goes to another rank.
        flop: of a floating-point operation of the experts' products.
        read: of a byte of an expert's weights.
        stage: of a stage more, beside its exchanges: products in two parts, sums that are added to.
        hidden: share of an exchange's time that products under way aren't slowed down by; 1 where they run on
            something else, less where the same processor does both.
    """

    latency: float
    byte: float
    flop: float
    read: float
    stage: float
    hidden: float


@dataclass(frozen=True)
class Load:
    """A layer and what it is given, as far as time depends on it; tokens spread evenly over experts.

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

    def untouched(self, share: float) -> float:
        """Of tokens: how many have no expert in that share of a rank's."""
        return (1 - share / self.ranks) ** self.pairs


@dataclass(frozen=True)
class Prediction:
    """Seconds.

    Attributes:
        total: of the layer.
        compute: of its products and stages.
        communication: of all exchanges, one after the other.
        waiting: for exchanges, while nothing computes.
    """

    total: float
    compute: float
    communication: float
    waiting: float

    @property
    def hidden(self) -> float:
        """Share of the communication that the layer doesn't take longer for."""
        return 1 - (self.total - self.compute) / self.communication if self.communication else 1.0


def predict(load: Load, costs: Costs, stages: int) -> Prediction:
    """Plays the stages through: exchanges one after the other, as they are asked for; products beside them.

    Of the exchange of counts and ids before the first stage, only its latency counts.
    """
    row = load.cols * load.element * costs.byte * load.tokens * (load.ranks - 1)
    announced = 2 * costs.latency + 8 * load.pairs * costs.byte * load.tokens * (load.ranks - 1)
    # By stage: visits that begin there; and end, which is the same from behind.
    begins = [load.untouched(s / stages) - load.untouched((s + 1) / stages) for s in range(stages)]
    come = [costs.latency + row * share for share in begins]
    leave = come[::-1]
    used = 1 - (1 - 1 / max(1, load.experts)) ** (load.tokens * load.ranks * load.pairs)  # of the experts
    products = max(
        costs.flop * 2 * load.weights * load.tokens * load.pairs,
        costs.read * load.weights * load.element * load.local * used,
    )
    part = products / stages + (costs.stage if stages > 1 else 0)

    busy = announced  # until when; and so is the link
    waiting = announced
    link = arrived = busy + come[0]
    for s in range(stages):
        following = link
        if s + 1 < stages:  # asked for before the wait for this one
            following = link = max(link, busy) + come[s + 1]
        waiting += max(0.0, arrived - busy)
        busy = max(arrived, busy) + part
        link, arrived = max(link, busy) + leave[s], following
    waiting += max(0.0, link - busy)
    communication = announced + sum(come) + sum(leave)
    total = max(link, busy) + (1 - costs.hidden) * (communication - waiting)
    return Prediction(total, part * stages, communication, waiting)


def best_stages(load: Load, costs: Costs) -> int:
    """The number of stages that takes least time; 1 unless more pay."""
    most = max(1, min(MOST_STAGES, load.local))
    times = {n: predict(load, costs, n).total for n in range(1, most + 1)}
    best = min(times, key=lambda n: times[n])
    return best if times[best] < (1 - WORTHWHILE) * times[1] else 1


# --- Measured ---------------------------------------------------------------------------------------------------------

_known: dict[tuple[str, torch.dtype], Costs] = {}


def known(group: ProcessGroup, dtype: torch.dtype) -> Costs | None:
    return _known.get((group.group_name, dtype))


def calibrate(
    group: ProcessGroup, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", runs: int = RUNS
) -> Costs:
    """Measures the costs of a group's ranks together; all have to call it. Takes about a second.

    `moe_mlp_ep(stages=0)` calls it where nobody has, once for a group and dtype. Another number of stages changes no
    bit of a result.

    Args:
        group: a process group of torch.distributed.
        dtype: of x.
        device: that the layer is on.
        runs: of each timed piece; the median counts, and of the ranks the mean.

    Returns:
        What later calls reckon with, the same on all ranks.
    """
    device = torch.device(device)
    ranks = group.size()
    experts, cols, inner, tokens = 4, 1024, 512, 128
    with torch.no_grad():
        x = torch.randn(tokens, cols, device=device).to(dtype)
        w13 = torch.randn(experts, 2 * inner, cols, device=device).to(dtype)
        w2 = torch.randn(experts, cols, inner, device=device).to(dtype)
        few = torch.randn(1, cols, device=device).to(dtype)
        weights, ids = torch.ones(tokens, 1, device=device), (torch.arange(tokens, device=device) % experts)[:, None]
        y = torch.zeros(tokens, cols, device=device)

        def products(count: int = experts, begin: int = 0, given: Tensor = x) -> None:
            some = ids[: len(given)] - begin
            some = torch.where((some >= 0) & (some < count), some, -1)
            part = slice(begin, begin + count)
            torch.ops.effk.moe_mlp_(y[: len(given)], given, w13[part], w2[part], weights[: len(given)], some)

        def parts() -> None:
            for begin in range(0, experts, 2):
                products(2, begin)

        def exchange(rows: int) -> Callable[[], Any]:
            sent = torch.ones(rows * ranks, cols, device=device).to(dtype)
            received = torch.empty_like(sent)
            return lambda: dist.all_to_all_single(received, sent, group=group, async_op=True)

        def timed(*calls: Callable[[], Any]) -> float:
            """Of calls of which the first may be work to wait for."""
            seconds = []
            for _ in range(runs + 1):
                dist.barrier(group)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                started = [call() for call in calls]
                for work in started:
                    if work is not None:
                        work.wait()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            return statistics.median(seconds[1:])

        def of_all(*values: float) -> list[float]:
            """Means over the ranks, the same bits on all of them."""
            mean = torch.tensor(values, dtype=torch.float64).to(device)
            dist.all_reduce(mean, group=group)
            sent = [mean.clone() for _ in range(ranks)]
            dist.all_gather(sent, mean, group=group)
            return [v / ranks for v in sent[0].tolist()]

        rows = 256
        whole, sending = of_all(timed(products), timed(exchange(rows)))
        cut, one, latency = of_all(timed(parts), timed(lambda: products(given=few)), timed(exchange(0)))
        bytes_sent = rows * (ranks - 1) * cols * x.element_size()
        # As long an exchange as the products take, beside them.
        rows = max(1, min(4096, int(rows * whole / sending)))
        alone, both = of_all(timed(exchange(rows)), timed(exchange(rows), products))
    costs = Costs(
        latency=latency,
        byte=max(0.0, sending - latency) / bytes_sent if bytes_sent else 0.0,
        flop=whole / (2.0 * 3 * cols * inner * tokens),
        read=one / (3.0 * cols * inner * x.element_size()),
        stage=max(0.0, cut - whole),
        hidden=min(1.0, max(0.0, (alone + whole - both) / min(alone, whole))),
    )
    _known[group.group_name, dtype] = costs
    log.info("effk: costs of group %r for %s: %s", group.group_name, dtype, costs)
    return costs
