"""Merging or applying: which costs less for a set of adapters, from a few timed calls."""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .modules import AdapterBank, Layer

Points = Sequence[tuple[float, float]]

TOKENS = (1, 4, 16)  # of timed passes
SETS = (1, 2, 4)  # sizes of timed sets
SAMPLE_BYTES = {"cpu": 2**26, "cuda": 2**30}  # of timed weights: what caches don't hold


def interpolate(points: Points, x: float) -> float:
    """The piecewise linear function through points (sorted by their first number); its ends go on straight."""
    if len(points) == 1:
        return points[0][1]
    i = min(max(bisect_right([p[0] for p in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def check_amount(name: str, value: float) -> None:
    """That it is a number that isn't negative.

    Raises:
        ValueError: it isn't.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; wanted a number that is not negative")


@dataclass(frozen=True)
class Selector:
    """Predicts what sets of adapters cost in a bank: merged once, or applied in each pass.

    A merge takes time by the total rank of its set (that of the weights is there for any), an application by the
    total rank and the number of tokens. Both are interpolated between measured points.

    Attributes:
        switch: (total rank, seconds) of merging into all layers, by ascending rank; rank 0 is unmerging.
        apply: for each number of tokens (total rank, seconds) of a pass through all layers.
        in_place: weights have no copies: a switch takes out what was merged, and its rank counts, too.
    """

    switch: Points
    apply: Mapping[int, Points]
    in_place: bool = False

    def __post_init__(self) -> None:
        if not self.switch or not self.apply or not all(self.apply.values()):
            raise ValueError("there are no measured points")

    def switch_seconds(self, ranks: Sequence[int], merged: Sequence[int] | None = None) -> float:
        """Of merging adapters of these ranks, where adapters of the ranks `merged` were."""
        return max(0.0, interpolate(self.switch, sum(ranks) + self._left(merged)))

    def unmerge_seconds(self, merged: Sequence[int]) -> float:
        """Of taking adapters of these ranks out."""
        return max(0.0, interpolate(self.switch, self._left(merged)))

    def apply_seconds(self, tokens: int, ranks: Sequence[int]) -> float:
        """Of applying adapters of these ranks to all tokens of a pass."""
        points = [(float(t), interpolate(self.apply[t], sum(ranks))) for t in sorted(self.apply)]
        return max(0.0, interpolate(points, tokens))

    def choose(self, tokens: int, steps: float, ranks: Sequence[int], *, merged: Sequence[int] | None = None) -> str:
        """The cheaper of "merged" and "token".

        Args:
            tokens: in each pass.
            steps: passes until the next switch.
            ranks: of the set's adapters.
            merged: ranks of what is merged now, and would have to be taken out for "token"; None for nothing.

        Raises:
            ValueError: tokens or steps is no number or negative.
        """
        check_amount("tokens", tokens)
        check_amount("steps", steps)
        token = steps * self.apply_seconds(tokens, ranks)
        if merged is not None:
            token += self.unmerge_seconds(merged)
        return "merged" if self.switch_seconds(ranks, merged) < token else "token"

    def _left(self, merged: Sequence[int] | None) -> int:
        return sum(merged or ()) if self.in_place else 0

    @classmethod
    def calibrate(
        cls,
        bank: AdapterBank,
        *,
        tokens: Sequence[int] = TOKENS,
        seconds: float = 1.0,
        runs: int = 9,
        clock: Callable[[], float] | None = None,
    ) -> Selector:
        """Times a bank's own adapters with its own layers, as many of each shape as are larger than caches.

        Merges write into the model's weights, which get back their bits in the end; those of a bank without copies of
        the weights write elsewhere, which takes memory for a while. Between timed calls layers run without adapters,
        so that caches hold what they do in use. Points take turns, and each is the median of its runs.

        Args:
            bank: on the device that it will be used on.
            tokens: numbers of tokens in a pass to measure.
            seconds: after which no more runs are begun; there are at least three.
            runs: at most, of each point.
            clock: returns seconds; by default `time.perf_counter`, after waiting for the device.

        Raises:
            ValueError: tokens holds none or other than positive integers, seconds is negative, or runs isn't positive.
            RuntimeError: the bank was removed, or a weight was moved, replaced or changed since it was made.
        """
        if not tokens or not all(isinstance(t, int) and t > 0 for t in tokens):
            raise ValueError(f"tokens is {tokens!r}; wanted positive integers")
        if not isinstance(runs, int) or runs < 1:
            raise ValueError(f"runs is {runs!r}; wanted a positive integer")
        check_amount("seconds", seconds)
        bank._alive()
        bank._check_weights()
        with torch.inference_mode():
            calibration = _Calibration(bank, tokens, clock or _clock(bank.device))
            try:
                return calibration.run(seconds, runs)
            finally:
                calibration.put_back()


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


class _Calibration:
    def __init__(self, bank: AdapterBank, tokens: Sequence[int], clock: Callable[[], float]):
        self.bank, self.clock, self.tokens = bank, clock, sorted(set(tokens))
        shapes: dict[tuple[int, ...], list[Layer]] = {}
        for layer in bank.layers:
            shapes.setdefault((*layer.a.shape, *layer.w.shape), []).append(layer)
        self.shapes = list(shapes.values())
        self.sample = self._sample()
        layers = [layer for _, layer in self.sample]
        self.a, self.b = [layer.merge_a for layer in layers], [layer.merge_b for layer in layers]
        self.base = [layer.base for layer in layers if layer.base is not None] if bank.keep_base else None
        self.targets = [layer.w if bank.keep_base else layer.w.clone() for layer in layers]
        self.share = sum(layer.w.numel() for layer in bank.layers) / max(1, sum(t.numel() for t in self.targets))
        self.sets = self._sets()
        self.ids = {rank: torch.tensor(s, device=bank.device) for rank, s in self.sets.items()}
        self.gates = {rank: torch.ones(len(s), device=bank.device) for rank, s in self.sets.items()}
        generator = torch.Generator().manual_seed(0)
        self.x = {
            (t, k): torch.randn(t, k, generator=generator).to(bank.device, bank.dtype)
            for t in self.tokens
            for k in {layer.a.shape[2] for layer in layers}
        }

    def _sample(self) -> list[tuple[int, Layer]]:
        """Layers of each shape in turn, until they are larger than caches, with the number of the shape."""
        sample: list[tuple[int, Layer]] = []
        left = SAMPLE_BYTES.get(self.bank.device.type, SAMPLE_BYTES["cpu"])
        for turn in range(max(map(len, self.shapes))):
            for shape, layers in enumerate(self.shapes):
                if turn < len(layers) and (turn == 0 or left > 0):
                    sample.append((shape, layers[turn]))
                    left -= layers[turn].w.nbytes
        return sample

    def _sets(self) -> dict[int, list[int]]:
        """Sets of adapters to time, by their total rank: none, the one of the smallest rank, the largest ones."""
        ranks = self.bank._ranks
        order = sorted(range(len(ranks)), key=lambda i: -ranks[i])
        sets = [[-1], order[-1:], *(order[:k] for k in SETS)]
        return dict(sorted({sum(ranks[i] for i in s if i >= 0): s for s in sets}.items()))

    def run(self, seconds: float, runs: int) -> Selector:
        merges: dict[int, list[float]] = {rank: [] for rank in self.sets}
        applies: dict[tuple[int, int], list[list[float]]] = {
            (t, rank): [[] for _ in self.shapes] for t in self.tokens for rank in self.sets
        }
        start = time.perf_counter()
        for turn in range(runs + 1):
            if turn > 3 and time.perf_counter() - start > seconds:
                break
            for rank in self.sets:
                for t in self.tokens:
                    self._pass(t, rank, None)
                    self._pass(t, rank, applies[t, rank] if turn > 0 else None)  # the first turn warms up
                taken = self._time_merge(rank)
                if turn > 0:
                    merges[rank].append(taken)
        return Selector(
            tuple((rank, statistics.median(times)) for rank, times in merges.items()),
            {t: tuple((rank, self._total(applies[t, rank])) for rank in self.sets) for t in self.tokens},
            in_place=not self.bank.keep_base,
        )

    def put_back(self) -> None:
        """What was merged before."""
        if self.base is not None:
            merged = self.bank._merged or self.bank._nothing
            torch.ops.effk.lora_merge_(self.targets, self.a, self.b, *merged, self.base, self.bank.ranks)
            self.bank._remember()

    def _total(self, times: list[list[float]]) -> float:
        """Of all layers, from those of the same shape in the sample."""
        return sum(len(layers) * statistics.median(taken) for layers, taken in zip(self.shapes, times, strict=True))

    def _time_merge(self, rank: int) -> float:
        """Of all layers, from those of the sample by their share of the weights."""
        bank = self.bank
        start = self.clock()
        ids, gates = bank._pairs(self.ids[rank], self.gates[rank])
        gates = bank._with_scaling(ids, gates)
        bank._check_weights()
        between = self.clock()
        torch.ops.effk.lora_switch_(self.targets, self.a, self.b, *bank._nothing, ids, gates, self.base, bank.ranks)
        end = self.clock()
        bank._remember()
        return between - start + (end - between) * self.share

    def _pass(self, tokens: int, rank: int, times: list[list[float]] | None) -> None:
        """The sample's layers with adapters, whose times are added to those of the shape."""
        ids, gates = self.ids[rank], self.gates[rank]
        for shape, layer in self.sample:
            x = self.x[tokens, layer.a.shape[2]]
            y = type(layer.module).forward(layer.module, x)
            start = self.clock()
            layer.add(x, y, ids, gates)
            end = self.clock()
            if times is not None:
                times[shape].append(end - start)
