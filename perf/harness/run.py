"""Measures a problem: every candidate is checked first, then all are timed in turns."""

from __future__ import annotations

import copy
import gc
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from effk import _registry

from .machine import Limits, dtype_name
from .problem import Call, Family, Peer, Problem, Work, nothing_missing, unchanged
from .record import Entry, GoalEntry, ProblemEntry
from .timing import Clock, How, Sample, Stats

ROUNDS = 15  # before a median may count as settled
MIN_ROUNDS = 5  # of candidates that use up their share of the time
PRECISION = 0.01  # relative standard error of a settled median
ELAPSED = 2.0  # times a candidate's share of the time, for its samples with what is done between timed calls
TOO_SLOW = 1.0  # seconds of a call that isn't worth more than one
SCALAR_FLOPS = 1e9  # of problems that are too large for the scalar level


@dataclass(frozen=True)
class Candidate:
    """A back end of effk or a peer."""

    name: str
    kind: str  # "effk" or "peer"
    make: Callable[[Any], Call]
    missing: Callable[[Work], str] = nothing_missing
    view: Callable[[Any], Any] = unchanged
    graph: bool = True
    own_threads: bool = False


@dataclass
class Timed:
    candidate: Candidate
    sample: Sample
    clock: Clock
    samples: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)  # those that nothing else slowed down
    elapsed: float = 0.0  # seconds, of samples with cold caches and waiting

    def add_sample(self) -> None:
        start = time.perf_counter()
        self.samples.append(self.sample())
        if self.clock.quiet():
            self.quiet.append(self.samples[-1])
        self.elapsed += time.perf_counter() - start

    @property
    def counting(self) -> list[float]:
        """All, where a machine is never quiet."""
        return self.quiet if len(self.quiet) >= MIN_ROUNDS else self.samples

    @property
    def settled(self) -> bool:
        return len(self.quiet) >= ROUNDS and Stats.of(self.quiet).precision < PRECISION

    def exhausted(self, seconds: float, patience: float) -> bool:
        if len(self.samples) < MIN_ROUNDS:
            return False
        patience = 1 if len(self.quiet) >= MIN_ROUNDS else patience
        return sum(self.samples) >= patience * seconds or self.elapsed >= patience * ELAPSED * seconds


def main_backend(op: str, device: torch.device) -> str:
    """The back end that torch.ops takes on a device."""
    if _registry.find(op).composite:
        return "reference"
    if device.type == "cpu":
        return f"cpu-{_registry._library.current_cpu_level(_registry.find(op).family)}"
    return next((b for b in ("cuda", "triton") if b in _registry.backends(op)), "reference")


def _backends(op: str, device: torch.device) -> list[str]:
    """All but the reference, which is there to be read, unless it is the implementation."""
    if _registry.find(op).composite:
        return ["reference"]
    prefixes = ("cpu-",) if device.type == "cpu" else ("cuda", "triton")
    return [b for b in _registry.backends(op) if b.startswith(prefixes)]


def effk_candidate(problem: Problem, work: Work, backend: str, device: torch.device) -> Candidate:
    main = backend == main_backend(problem.op, device)

    def op(name: str) -> Callable[..., Any]:
        # The plain op where it takes this back end anyway: a forced CPU level costs microseconds a call.
        return _registry.find(name).overload if main else _registry.implementation(name, backend)

    def make(inputs: Any) -> Call:
        if work.steps is not None:
            return work.steps(op, inputs)
        function = op(problem.op)
        args, kwargs = work.arguments(inputs)
        if work.written is None:
            return lambda: function(*args, **kwargs)
        written = work.written(args, kwargs)

        def call() -> Any:
            function(*args, **kwargs)
            return written

        return call

    def missing(work: Work) -> str:
        too_much = backend == "cpu-scalar" and not main and work.flops > SCALAR_FLOPS
        return f"seconds a call: not run above {SCALAR_FLOPS / 1e9:g} Gflop" if too_much else ""

    return Candidate(backend, "effk", make, missing, graph=work.graph)


def peer_candidate(peer: Peer) -> Candidate:
    return Candidate(peer.name, "peer", peer.make, peer.missing, peer.view, peer.graph, peer.own_threads)


class WrongResult(Exception):
    """What a candidate computed isn't within the bound."""


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class Runner:
    """Measures problems one after the other on one device.

    Args:
        peers: names of the peers wanted; None for all.
        seconds: of timed calls a problem.
        patience: so many times the seconds are spent on waiting for a quiet machine.
    """

    def __init__(
        self,
        device: torch.device,
        clock: Clock,
        limits: Limits,
        peers: Collection[str] | None,
        seconds: float,
        seed: int,
        patience: float = 1.0,
    ):
        self.device, self.clock, self.limits = device, clock, limits
        self.peers, self.seconds = peers, seconds
        self.random, self.patience = random.Random(seed), patience

    @torch.inference_mode()  # as these ops are used; torch would look for gradients in Python at every call
    def measure(self, problem: Problem, family: Family) -> ProblemEntry:
        work = problem.make(problem, self.device)
        copies = 1 if problem.warm else self.clock.copies(work.bytes)
        inputs = [work.inputs, *(copy.deepcopy(work.inputs) for _ in range(1, copies))]
        candidates = [effk_candidate(problem, work, b, self.device) for b in _backends(problem.op, self.device)]
        peers = problem.peers[self.device.type]
        candidates += [peer_candidate(p) for p in peers if self.peers is None or p.name in self.peers]
        missing: dict[str, str] = {}
        wrong: dict[str, str] = {}
        timed = []
        for candidate in candidates:
            if reason := candidate.missing(work):
                missing[candidate.name] = reason
                continue
            try:
                calls = [candidate.make(i) for i in inputs]
                seconds = self._check(candidate, calls, work)
                if problem.once:
                    timed.append(Timed(candidate, calls[-1], self.clock, [seconds]))
                elif seconds > TOO_SLOW:
                    missing[candidate.name] = f"right but too slow to time: one call took {seconds:.1f} s"
                else:
                    how = How(problem.warm, candidate.graph, candidate.own_threads)
                    timed.append(Timed(candidate, self.clock.sampler(calls, how), self.clock))
            except WrongResult as error:
                wrong[candidate.name] = f"wrong result: {error}"
            except Exception as error:  # whatever a peer fails with, the run goes on and says so
                (wrong if candidate.kind == "effk" else missing)[candidate.name] = short(error)
        self._time([one for one in timed if not one.samples])
        return self._entry(problem, family, work, timed, missing, wrong)

    def _check(self, candidate: Candidate, calls: Sequence[Call], work: Work) -> float:
        """Seconds of the last call. Raises WrongResult."""
        seconds = 0.0
        for call in calls:
            start = time.perf_counter()
            result = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if difference := work.check(candidate.view(result), candidate.kind == "effk"):
                raise WrongResult(difference)
        return seconds

    def _time(self, timed: Sequence[Timed]) -> None:
        """Rounds of one sample each, in random order, until all medians are settled or the time is used up."""
        share = self.seconds / max(1, len(timed))
        gc.disable()
        try:
            for one in self._shuffled(timed):  # warm-up of code, threads and pages
                one.sample()
            active = list(timed)
            while not all(one.settled for one in active):
                for one in self._shuffled(active):
                    one.add_sample()
                active = [one for one in active if not one.exhausted(share, self.patience)]
        finally:
            gc.enable()

    def _shuffled(self, timed: Sequence[Timed]) -> list[Timed]:
        return self.random.sample(timed, len(timed))

    def _entry(
        self,
        problem: Problem,
        family: Family,
        work: Work,
        timed: Sequence[Timed],
        missing: dict[str, str],
        wrong: dict[str, str],
    ) -> ProblemEntry:
        times = {t.candidate.name: (t.candidate.kind, Stats.of(t.counting)) for t in timed}
        medians = {name: stats.median for name, (kind, stats) in times.items() if kind == "peer"}
        for derived in problem.derived[self.device.type]:
            if self.peers is not None and not set(derived.of) <= set(self.peers):
                continue
            seconds = derived.seconds(medians, work, self.limits)
            if seconds is None:
                missing[derived.name] = "nothing measured to compute it from"
            else:
                times[derived.name] = ("derived", Stats(0, *(seconds,) * 4))

        main = main_backend(problem.op, self.device)
        # What is in the caches needn't come from memory.
        nbytes = 0 if problem.warm else work.bytes
        roofline = self.limits.seconds(nbytes, work.flops, dtype_name(work.dtype))
        own = times[main][1].median if main in times else None
        entries = [
            Entry(name, kind, stats, roofline / stats.median, stats.median / own if own else None)
            for name, (kind, stats) in times.items()
        ]
        ratios = {e.name: e.ratio for e in entries}
        return ProblemEntry(
            name=problem.name,
            family=family.name,
            op=problem.op,
            size=dict(problem.size),
            bytes=work.bytes,
            flops=work.flops,
            dtype=dtype_name(work.dtype),
            roofline=roofline,
            limit="memory" if roofline == self.limits.memory_seconds(nbytes) else "compute",
            main=main,
            entries=entries,
            goals=[
                GoalEntry(g.peer, g.ratio, ratios.get(g.peer))
                for g in family.goals
                if g.applies(problem, self.device.type)
            ],
            missing=missing,
            wrong=wrong,
            quality=dict(work.quality),
        )
