"""Layers of experts over the ranks of a process group, in stages that overlap with their communication.

The stages are EPS-MoE's (Qian et al., 2024, arXiv:2410.12247): a rank's experts are cut into parts, and while those of
one compute, the tokens of the next are under way to it, and sums of those that are through on their way back. A token
goes to a rank once, with the first stage that has an expert of it, however many of its experts are there; after the
last such stage one sum comes back.

What takes part, by rank:

    source   pairs of a token and an expert, each token's ascending by expert; runs of them that are on one rank are
             visits, in the order (rank, token)
    target   visits in the order (source, token), as they were announced; their rows arrive in the order (first stage,
             source, token) and their sums leave in the order (last stage, source, token)

so that all orders but the announced one follow from the announced ids on both sides, and no sum depends on the stages.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import FLOATS, check_range, check_tensor
from . import exchanges, gradients, overlap, reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# --- The group --------------------------------------------------------------------------------------------------------


def resolve(op: str, group: str) -> ProcessGroup:
    if not dist.is_available():
        raise RuntimeError(f"effk::{op}: group is {group!r}, but torch was built without torch.distributed")
    try:
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(f"effk::{op}: group is {group!r}; wanted the group_name of a process group") from error


# --- What ranks have to agree on --------------------------------------------------------------------------------------

SAME = ("columns of x", "rows of w13", "columns of w2", "experts", "experts of a token", "dtype", "activation")
DTYPE = SAME.index("dtype")
ROOM = 512  # int32 numbers of a message: 32 visits of 8 experts
NAMES = {"dtype": FLOATS, "activation": tuple(reference.ACTIVATIONS)}  # of the numbers that are exchanged


@dataclass(frozen=True)
class Agreed:
    """What the ranks said of a call, in their order."""

    visits: list[int]  # that each announces to this one
    stages: int
    most: int  # rows that a rank sends to all, or gets from all
    symmetric: bool  # whether all can exchange through symmetric memory
    rows: Tensor | None  # all of what is announced, where it is little


def agree(
    op: str,
    group: ProcessGroup,
    wrong: Exception | None,
    said: tuple[int, ...],
    visits: Visits | None,
    tokens: int,
    stages: int,
    device: torch.device,
) -> Agreed:
    """Exchanges a few numbers, so that all ranks raise where one would, and all take as many stages.

    A message has the same size whatever is in it, and room for the announcement of a few visits, as in decoding, which
    saves an exchange.

    Args:
        wrong: what this rank would raise.
        said: SAME of this rank.
        visits: of this rank's tokens; None where something is wrong.
        tokens: of this rank.
        stages: that it wants; 0: whatever is best.
    """
    ranks = group.size()
    dtype = FLOATS[said[DTYPE]]
    costs = overlap.known(group, dtype, device)
    mark = zlib.crc32(op.encode())
    counts = visits.counts if visits is not None else [0] * ranks
    known = zlib.crc32(repr(costs).encode())
    symmetric = exchanges.usable(group, device)
    head = torch.tensor((mark, wrong is not None, *said, tokens, stages, known, symmetric, *counts))
    width = len(head)
    sent = torch.zeros(ranks, width + ROOM // 2, dtype=torch.int64, device=device)
    sent[:, :width] = head
    room = sent.view(torch.int32)[:, 2 * width :]
    if visits is not None and max(counts) * visits.rows.shape[1] <= ROOM:
        for r, rows in enumerate(visits.rows.split(counts)):
            room[r, : rows.numel()] = rows.flatten()
    received = torch.empty_like(sent)
    one = [1] * ranks
    exchanges.exchange(group, received, sent, one, one).wait()
    found = received[:, :width].tolist()
    if wrong is not None:
        raise wrong
    for r, row in enumerate(found):
        if row[0] != mark:
            raise RuntimeError(f"effk::{op}: rank {r} of the group is in another call")
        if row[1]:
            raise RuntimeError(f"effk::{op}: rank {r} of the group has refused its arguments")
    mine = found[group.rank()]
    for i, name in enumerate(SAME, 2):
        for r, row in enumerate(found):
            if row[i] != mine[i]:
                theirs, own = (NAMES.get(name, range(row[i] + mine[i] + 1))[v] for v in (row[i], mine[i]))
                raise RuntimeError(
                    f"effk::{op}: rank {r} of the group has {theirs} for the {name}, this one {own}; wanted the same"
                )
    at = 2 + len(SAME)
    cols, rows13, inner, experts, pairs, *_ = said
    wanted = [row[at + 1] for row in found if row[at + 1] > 0]
    if wanted:
        chosen = min(wanted)
    elif ranks == 1 or experts < 2:
        chosen = 1
    else:
        if costs is None or any(row[at + 2] != mine[at + 2] for row in found):
            costs = overlap.calibrate(group, dtype, device)
        mean = sum(row[at] for row in found) / ranks
        load = overlap.Load(mean, ranks, experts * ranks, pairs, cols, inner, rows13 != inner, dtype.itemsize)
        chosen = overlap.best_stages(load, costs)
    sends = [row[at + 4 :] for row in found]  # visits, by the rank that announces and the one that it announces to
    gets = list(zip(*sends, strict=True))
    agreed = Agreed(
        list(gets[group.rank()]),
        max(1, min(chosen, experts)),
        max(map(sum, sends + gets)),
        all(row[at + 3] for row in found),
        None,
    )
    if 2 * pairs * max(map(max, sends)) > ROOM:
        return agreed
    room = received.view(torch.int32)[:, 2 * width :]
    parts = (room[r, : 2 * pairs * count].view(count, 2 * pairs) for r, count in enumerate(agreed.visits))
    return replace(agreed, rows=torch.cat(list(parts)))


# --- Who sends what where ---------------------------------------------------------------------------------------------


def stage_bounds(experts: int, stages: int) -> list[int]:
    """Where the experts of each stage begin, and where the last one's end."""
    return [-(-s * experts // stages) for s in range(stages + 1)]


def stage_of_experts(bounds: list[int], device: torch.device) -> Tensor:
    sizes = torch.tensor([end - begin for begin, end in itertools.pairwise(bounds)])
    return torch.arange(len(sizes)).repeat_interleave(sizes).to(device)


def counted(keys: Tensor, rows: int, cols: int) -> list[list[int]]:
    """[rows][cols]: how many of the keys row * cols + col there are."""
    return torch.bincount(keys, minlength=rows * cols).view(rows, cols).tolist()


@dataclass(frozen=True)
class Visits:
    """Tokens of this rank at all ranks.

    Attributes:
        ids, weights: [T, k], each token's ascending by expert; -1 last.
        back: [T, k] where each of those was.
        token, rank: [V] of each visit, by (rank, token).
        rows: [V, 2k] int32, what is announced: ids as the rank numbers its experts, and the bits of weights.
        run: [T, k] the visit that a pair is part of; V for none.
        begins: [T, k] bool, the first pairs of the visits.
        counts: visits to each rank.
    """

    ids: Tensor
    weights: Tensor
    back: Tensor
    token: Tensor
    rank: Tensor
    rows: Tensor
    run: Tensor
    begins: Tensor
    counts: list[int]

    @classmethod
    def of(cls, weights: Tensor, ids: Tensor, experts: int, ranks: int) -> Visits:
        """experts: of a rank."""
        k, device = ids.shape[-1], ids.device
        absent = (ids < 0) | (ids >= experts * ranks)
        by = torch.where(absent, experts * ranks, ids)
        by, back = by.sort(dim=-1, stable=True)
        weights = weights.gather(-1, back)
        ids = torch.where(by == experts * ranks, -1, by)
        rank = torch.where(ids < 0, ranks, ids // max(1, experts))
        begins = (rank < ranks) & (rank != torch.nn.functional.pad(rank, (1, 0), value=-1)[:, :k])
        place = begins.nonzero()  # by token
        order = rank[begins].argsort(stable=True)
        token, of_visit = place[order, 0], rank[begins][order]
        here = rank[token] == of_visit[:, None]
        local = torch.where(here, ids[token] - of_visit[:, None] * experts, -1).int()
        # Weights of other ranks' experts stay here: they may be anything.
        rows = torch.cat([local, torch.where(here, weights[token], 0.0).view(torch.int32)], 1)
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order), device=device)
        run = (begins.view(-1).long().cumsum(0) - 1).view(rank.shape)
        run = torch.where(rank < ranks, number[run.clamp(min=0)] if len(order) else 0, len(order))
        counts = torch.bincount(of_visit, minlength=ranks).tolist()
        return cls(ids, weights, back, token, of_visit, rows, run, begins, counts)


@dataclass(frozen=True)
class Stages:
    """A list of visits by the stages in which they begin and end, on either side.

    Attributes:
        arrival, departure: [V] the visits in the order in which rows go to the target, and sums come from it.
        arrivals, departures: [stages][ranks] how many.
    """

    arrival: Tensor
    departure: Tensor
    arrivals: list[list[int]]
    departures: list[list[int]]

    @classmethod
    def of(cls, local: Tensor, rank: Tensor, ranks: int, bounds: list[int]) -> Stages:
        """local: [V, k] ids, -1 for none; rank: the one at the other end, ascending."""
        stages = len(bounds) - 1
        stage = torch.nn.functional.pad(stage_of_experts(bounds, local.device), (0, 1))[local.long()]
        there = local >= 0
        first, last = rank, rank
        if len(local):  # without pairs there are no visits
            first, last = torch.where(there, stage, stages - 1).amin(-1), torch.where(there, stage, 0).amax(-1)
        begin, end = first * ranks + rank, last * ranks + rank
        return cls(
            begin.argsort(stable=True),
            end.argsort(stable=True),
            counted(begin, stages, ranks),
            counted(end, stages, ranks),
        )


def slices(counts: list[list[int]]) -> list[slice]:
    ends = [0, *itertools.accumulate(map(sum, counts))]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


# --- A call -----------------------------------------------------------------------------------------------------------


class Call:
    """One layer's communication: announced, and then stage by stage.

    Attributes:
        ids, weights: [R, k] of the tokens that visit this rank, in the order in which their rows arrive; ids are its
            own numbers of experts, -1 for others'.
        announced: [R] of each visit as it was announced, by (source, token), its place among those.
        bounds: where the experts of each stage begin, and where the last one's end.
        sources: how many visits each rank has announced.
    """

    def __init__(
        self,
        op: str,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        weights: Tensor,
        ids: Tensor,
        group: str,
        activation: str,
        stages: int,
        check: Callable[[], None],
    ):
        self.group = resolve(op, group)
        self.ranks = self.group.size()
        experts, k = (w2.shape or (0,))[0], (ids.shape or (0,))[-1]
        wrong: Exception | None = None
        visits: Visits | None = None
        said, tokens = (0,) * len(SAME), 0
        try:
            check()
            said = (
                x.shape[-1],
                w13.shape[1],
                w2.shape[2],
                experts,
                k,
                FLOATS.index(x.dtype),
                list(reference.ACTIVATIONS).index(activation),
            )
            if ids.device.type == "cpu":
                check_range(op, "ids", ids, -1, experts * self.ranks - 1)
            tokens = math.prod(ids.shape[:-1])
            flat = ids.reshape(tokens, k).long().contiguous()
            visits = Visits.of(weights.reshape(tokens, k).contiguous(), flat, experts, self.ranks)
        except Exception as error:  # the others have to hear of it, whatever it is
            wrong = error
        # One that is elsewhere has been refused by now; the others still have to hear of it.
        device = next((t.device for t in (x, w2, ids) if t.device.type != "meta"), torch.device("cpu"))
        agreed = agree(op, self.group, wrong, said, visits, tokens, stages, device)
        self.bounds, self.sources = stage_bounds(experts, agreed.stages), agreed.visits
        self.exchange = exchanges.through(self.group, device, agreed.symmetric, agreed.most)

        assert visits is not None
        self.visits = v = visits
        rows = agreed.rows
        if rows is None:
            rows = v.rows.new_empty(sum(agreed.visits), 2 * k)
            self.exchange(rows, v.rows, agreed.visits, v.counts).wait()
        source = torch.arange(self.ranks, device=x.device).repeat_interleave(
            torch.tensor(agreed.visits, device=x.device), output_size=len(rows)
        )
        local, of_pairs = rows[:, :k], rows[:, k:].view(torch.float32)
        self.there = Stages.of(local, source, self.ranks, self.bounds)
        self.here = Stages.of(v.rows[:, :k], v.rank, self.ranks, self.bounds)
        self.ids, self.weights = local[self.there.arrival], of_pairs[self.there.arrival]
        self.announced = torch.empty_like(self.there.arrival)
        self.announced[self.there.arrival] = torch.arange(len(rows), device=x.device)

    @property
    def visitors(self) -> int:
        return self.ids.shape[0]

    def stages(
        self, rows: Tensor, compute: Callable[[Tensor, int, int], None], sums: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Sends rows of tokens there, computes with those that come, and gets sums back.

        Args:
            rows: [T, n] of this rank's tokens.
            compute: compute(arrived [R, n], begin, end), of experts from begin to end; rows that haven't arrived hold
                anything.
            sums: sums(places) [m, n'] of the visits at those places of the arrived.

        Returns:
            [V, n'] of this rank's visits.
        """
        arrived = rows.new_empty(self.visitors, rows.shape[1])
        underway: list[tuple[exchanges.Waits, Tensor]] = []
        come, go = slices(self.there.arrivals), slices(self.here.arrivals)
        leave, back = slices(self.there.departures), slices(self.here.departures)
        token = self.visits.token[self.here.arrival]
        places = self.announced[self.there.departure]

        def dispatch(s: int) -> tuple[exchanges.Waits, Tensor]:
            sent = rows.index_select(0, token[go[s]])
            to = arrived[come[s]]
            return self.exchange(to, sent, self.there.arrivals[s], self.here.arrivals[s]), sent

        returned: Tensor | None = None
        following = dispatch(0)
        for s, (begin, end) in enumerate(itertools.pairwise(self.bounds)):
            (work, _), following = following, dispatch(s + 1) if s + 2 < len(self.bounds) else following
            with torch.profiler.record_function(f"moe_mlp_ep: wait for stage {s}"):
                work.wait()
            with torch.profiler.record_function(f"moe_mlp_ep: compute stage {s}"):
                compute(arrived, begin, end)
                sent = sums(places[leave[s]])
            if returned is None:
                returned = sent.new_empty(len(self.visits.token), sent.shape[1])
            to = returned[back[s]]
            underway.append((self.exchange(to, sent, self.here.departures[s], self.there.departures[s]), sent))
        assert returned is not None
        with torch.profiler.record_function("moe_mlp_ep: wait for what comes back"):
            for work, _ in underway:
                work.wait()
        out = torch.empty_like(returned)
        out[self.here.departure] = returned
        return out

    def returned(self, rows: Tensor) -> Tensor:
        """[R, n] of the visits of this rank, as they arrived -> [V, n] of this rank's visits."""
        sent = rows[self.announced]
        out = rows.new_empty(len(self.visits.token), rows.shape[1])
        self.exchange(out, sent, self.visits.counts, self.sources).wait()
        return out

    def of_tokens(self, sums: Tensor) -> Tensor:
        """[V, n] -> [T, n]: each token's visits added up, by ascending rank."""
        places = torch.where(self.visits.begins, self.visits.run, -1)
        return torch.ops.effk.moe_combine(sums, places, torch.ones_like(self.visits.weights))

    def pairs_of_tokens(self, found: Tensor) -> Tensor:
        """[V, k] of the ascending pairs of each visit -> [T, k] of the pairs as they were given."""
        run = self.visits.run
        there = run < len(found)
        ascending = torch.zeros_like(self.visits.weights)
        t, j = there.nonzero(as_tuple=True)
        ascending[t, j] = found[run[t, j], j]
        return torch.zeros_like(ascending).scatter(-1, self.visits.back, ascending)


# --- The ops ----------------------------------------------------------------------------------------------------------


def check_mlp_ep(
    op: str,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    stages: int,
    gemm: str,
) -> None:
    reference.check_mlp(x, w13, w2, weights, ids, activation, gemm, op)
    torch._check(stages >= 0, lambda: f"effk::{op}: stages is {stages}; wanted 0, for what is best, or more")


def check_mlp_ep_backward(
    grad: Tensor, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, activation: str, stages: int
) -> None:
    op = "moe_mlp_ep_backward"
    check_mlp_ep(op, x, w13, w2, weights, ids, activation, stages, "auto")
    check_tensor(op, "grad", grad, FLOATS, tuple(x.shape), x)


def moe_mlp_ep(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    group: str,
    *,
    activation: str = "swiglu",
    stages: int = 0,
    gemm: str = "auto",
) -> Tensor:
    op = "moe_mlp_ep"

    def check() -> None:
        check_mlp_ep(op, x, w13, w2, weights, ids, activation, stages, gemm)

    call = Call(op, x, w13, w2, weights, ids, group, activation, stages, check)
    tokens, cols = math.prod(x.shape[:-1]), x.shape[-1]
    sums = x.new_zeros(call.visitors, cols, dtype=torch.float32)

    def compute(rows: Tensor, begin: int, end: int) -> None:
        here = (call.ids >= begin) & (call.ids < end)
        some = torch.where(here, call.ids - begin, -1)
        torch.ops.effk.moe_mlp_(
            sums, rows, w13[begin:end], w2[begin:end], call.weights, some, activation=activation, gemm=gemm
        )

    back = call.stages(x.reshape(tokens, cols), compute, lambda places: sums[places].to(x.dtype))
    return call.of_tokens(back).view(x.shape)


def moe_mlp_ep_backward(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    group: str,
    *,
    activation: str = "swiglu",
    stages: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens visit again, with their gradients beside them."""
    op = "moe_mlp_ep_backward"

    def check() -> None:
        check_mlp_ep_backward(grad, x, w13, w2, weights, ids, activation, stages)

    call = Call(op, x, w13, w2, weights, ids, group, activation, stages, check)
    tokens, cols, k = math.prod(x.shape[:-1]), x.shape[-1], ids.shape[-1]
    # Sorted as they were announced, so that the sums of weights' gradients have an order that no stage changes.
    perm, inverse, offsets = torch.ops.effk.moe_sort(call.ids[call.announced], w2.shape[0])
    ends = [0, *offsets.tolist()]
    token = call.announced[perm // max(1, k)]
    weight = call.weights[call.announced].reshape(-1)[perm]
    grad_w13, grad_w2 = w13.new_empty(w13.shape), w2.new_empty(w2.shape)
    of_rows = x.new_empty(len(perm), cols, dtype=torch.float32)
    of_weights = x.new_zeros(len(perm), dtype=torch.float32)

    def compute(rows: Tensor, begin: int, end: int) -> None:
        # torch's functions of elements round by where in a tensor one is. On a CPU experts come one by one, so that no
        # stage changes that; and with a row more, which none of them has, since one row is a case of its own.
        step = 1 if x.device.type == "cpu" else max(1, end - begin)
        for first in range(begin, end, step):
            experts = slice(first, first + step)
            some = slice(ends[first], ends[first + step])
            if some.start == some.stop:
                grad_w13[experts], grad_w2[experts] = 0, 0
                continue
            shares, tokens_of = (torch.cat([t[some], t[some][-1:]]) for t in (weight, token))
            of_x, of_w13, of_w2, of_weight = gradients.of_layer(
                rows[:, :cols],
                rows[:, cols:],
                w13[experts],
                w2[experts],
                shares,
                tokens_of,
                offsets[experts] - some.start,
                activation,
            )
            assert of_x is not None and of_w13 is not None and of_w2 is not None and of_weight is not None  # wanted
            of_rows[some], of_weights[some] = of_x[:-1], of_weight[:-1]
            grad_w13[experts], grad_w2[experts] = of_w13, of_w2

    # Of visits by the place where they arrived.
    by_arrival = torch.empty_like(inverse)
    by_arrival[call.announced] = inverse
    ones = torch.ones_like(call.weights)
    absent = call.ids < 0
    places_of = torch.where(absent, -1, by_arrival)

    def sums(places: Tensor) -> Tensor:
        return torch.ops.effk.moe_combine(of_rows, places_of[places], ones[places]).to(x.dtype)

    rows = torch.cat([x.reshape(tokens, cols), grad.reshape(tokens, cols).to(x.dtype)], 1)
    back = call.stages(rows, compute, sums)
    own = torch.where(absent, 0.0, of_weights[by_arrival]) if len(perm) else call.weights
    grad_weights = call.pairs_of_tokens(call.returned(own))
    return call.of_tokens(back).view(x.shape), grad_w13, grad_w2, grad_weights.view(weights.shape)
