"""Ops as a server runs them, and several at once.

single-stream, offline and server are scenarios as in MLPerf Inference (arXiv 1911.02549), of one op instead of a model:
a query is one token or the like. concurrent and cascaded are the two forms in which XRBench (arXiv 2211.08675) runs
several models. Caches are as a scenario leaves them: warm, as far as they hold what it uses.

What Python's loop takes, some microseconds a call, is in all times. On a GPU calls are CUDA graphs, where they can be,
and a query is answered when the GPU is done with it. Candidates are measured one after the other, for seconds each, on
the same inputs over and over, and every result is checked beforehand.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from effk._registry import find

from .energy import SPAN, Meter, meter_for
from .problem import Call, Family, Problem, Work
from .record import ALL, ScenarioEntry
from .run import Candidate, WrongResult, effk_candidate, main_backend, peer_candidate, short
from .table import Cell, Table, duration, scaled
from .timing import CpuClock, captured, torch_threads

QUERIES = 1000  # of a single stream at least,
SERVER_QUERIES = 500  # and of a trial of the server,
LONGER = 5  # if so many times the seconds suffice for them
FEWEST = 100  # that have a 99th percentile; rates at which a trial has fewer aren't tried
BURST = 0.02  # seconds of calls that a GPU gets at once
PRECISION = 0.03  # relative, of the server's rate
TRIALS = 16  # of rates, at most
ROUNDS = 4  # of a cascade, alone and in frames
WARM_UPS = 3
SETTLING = 5  # calls whose median tells about how long one takes

Numbers = tuple[dict[str, float], dict[str, str]]  # by the columns' keys: those there are, and why others are missing


@dataclass(frozen=True)
class Service:
    """An op that answers queries in batches: n of them are the problem of n, whose inputs, check and peers are used.

    Attributes:
        name: short, and no other's on the same device.
        problem: number of queries -> the problem. What doesn't depend on it, such as weights, should be made once.
        unit: what a query is.
        bound: seconds, by type of device, within which a server has to answer 99% of the queries.
        peers: names of those worth having.
        largest: batch, a power of two: there are inputs for each up to it.
    """

    name: str
    problem: Callable[[int], Problem]
    unit: str
    bound: Mapping[str, float]
    peers: Collection[str]
    largest: int = 64
    quick: bool = False
    devices: Collection[str] = ("cpu", "cuda")

    @property
    def batches(self) -> list[int]:
        return [1 << i for i in range(self.largest.bit_length())]

    @property
    def op(self) -> str:
        return self.problem(1).op

    @property
    def size(self) -> dict[str, Any]:
        """What all batches share."""
        least, most = self.problem(1).size, self.problem(self.largest).size
        return {key: value for key, value in least.items() if most[key] == value}

    def names(self, device: torch.device, wanted: Collection[str] | None) -> list[str]:
        """Of the candidates: effk's main back end, and the wanted peers (None for all)."""
        peers = [p.name for p in self.problem(1).peers[device.type] if p.name in self.peers]
        return [main_backend(self.op, device), *(p for p in peers if wanted is None or p in wanted)]


def services(families: Iterable[Family], device: torch.device, quick: bool) -> list[Service]:
    return [s for f in families for s in f.services if s.quick == quick and device.type in s.devices]


# --- Time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Waits by sleeping and, since sleeps end late, by spinning for the last `spin` seconds."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Any] = time.sleep
    spin: float = 1e-3

    def wait(self, until: float) -> None:
        while (left := until - self.now()) > 0:
            if left > self.spin:
                self.sleep(left - self.spin)


@dataclass(frozen=True)
class Setting:
    """What scenarios are measured with; `meter` may be why there is none."""

    device: torch.device
    seconds: float
    seed: int
    meter: Meter | str
    clock: Clock = field(default_factory=Clock)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without pauses for Python's garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rank(count: int, percent: int) -> int:
    """The nearest rank: of the least sample that at least `percent` of 100 aren't above.

    MLPerf's own load generator takes the next one up where that is exactly so many.
    """
    return -(-count * percent // 100)


def percentile(samples: Sequence[float] | np.ndarray, percent: int) -> float:
    return float(np.sort(samples)[rank(len(samples), percent) - 1])


def percentiles(samples: Sequence[float] | np.ndarray) -> Numbers:
    enough = len(samples) >= FEWEST
    numbers = {f"p{percent}": percentile(samples, percent) for percent in ((50, 90, 99) if enough else (50, 90))}
    return {"queries": len(samples), **numbers}, {} if enough else {"p99": f"of fewer than {FEWEST} queries"}


def latencies(call: Call, seconds: float, clock: Clock, least: int = 1) -> list[float]:
    """Of calls one after the other."""
    found: list[float] = []
    begin = now = clock.now()
    while now - begin < (seconds if len(found) >= least else LONGER * seconds) or not found:
        call()
        end = clock.now()
        found.append(end - now)
        now = end
    return found


# --- One op -----------------------------------------------------------------------------------------------------------


class Answers:
    """A candidate's calls by size of batch, and what waits for the result of one."""

    def __init__(self, calls: Mapping[int, Call], finish: Callable[[], Any]):
        self.calls, self.finish, self.largest = calls, finish, max(calls)

    def launch(self, queries: int) -> Any:
        """In the next batch that is a power of two."""
        return self.calls[1 << (queries - 1).bit_length()]()

    def __call__(self, queries: int = 1) -> Any:
        result = self.launch(queries)
        self.finish()
        return result

    def usual(self, queries: int, clock: Clock) -> float:
        """Seconds of such a batch, about; the first calls warm up."""
        times = []
        for _ in range(WARM_UPS + SETTLING):
            begin = clock.now()
            self(queries)
            times.append(clock.now() - begin)
        return statistics.median(times[WARM_UPS:])


def single_stream(answers: Answers, bound: float, setting: Setting) -> Numbers:
    answers.usual(1, setting.clock)
    return percentiles(latencies(answers, setting.seconds, setting.clock, QUERIES))


def offline(answers: Answers, bound: float, setting: Setting) -> Numbers:
    batch, clock, meter = answers.largest, setting.clock, setting.meter
    burst = max(1, round(BURST / answers.usual(batch, clock)))
    seconds = setting.seconds if isinstance(meter, str) else max(setting.seconds, SPAN)
    queries, before = 0, 0.0 if isinstance(meter, str) else meter.joules()
    begin = clock.now()
    while (spent := clock.now() - begin) < seconds:
        for _ in range(burst):
            answers.launch(batch)
        answers.finish()
        queries += burst * batch
    numbers: dict[str, float] = {"batch": batch, "queries": queries, "rate": queries / spent}
    if isinstance(meter, str):
        return numbers, {"joules": f"not readable here: {meter}"}
    return {**numbers, "joules": (meter.joules() - before) / queries}, {}


@dataclass(frozen=True)
class Trial:
    """Of a server at one rate; where it is given up, of the queries answered by then."""

    rate: float
    passed: bool
    latencies: np.ndarray
    batch: float  # mean of those taken


def trial(
    answers: Answers, rate: float, bound: float, queries: int, random: np.random.Generator, clock: Clock
) -> Trial:
    """Queries arrive as a Poisson process; all that wait, up to the largest batch, are taken and answered together.

    It is given up when too many are late, or have waited so long already that they will be.
    """
    arrivals = array("d", random.exponential(1 / rate, queries).cumsum().tobytes())
    ends: list[float] = []
    sizes: list[int] = []
    done = late = 0
    passed, begin = True, clock.now()
    while done < queries and passed:
        clock.wait(begin + arrivals[done])
        here = bisect_right(arrivals, clock.now() - begin, done, min(queries, done + answers.largest))
        size = max(1, here - done)  # the one waited for has arrived, whatever was rounded
        answers(size)
        end = clock.now() - begin
        overdue = bisect_left(arrivals, end - bound, done, queries)
        late += min(overdue, done + size) - done
        done += size
        ends.append(end)
        sizes.append(size)
        passed = late + max(0, overdue - done) <= queries - rank(queries, 99)
    return Trial(rate, passed, np.repeat(ends, sizes) - np.array(arrivals[:done]), done / len(sizes))


def largest_rate(attempt: Callable[[float], Trial], start: float, least: float) -> Trial | None:
    """The trial at the largest rate that passed; None where none from `least` on did. More can only be harder."""
    best, low, high, rate = None, 0.0, math.inf, max(start, least)
    for _ in range(TRIALS):
        if (tried := attempt(rate)).passed:
            best, low = tried, rate
        else:
            high = rate
        rate = 2 * low if high == math.inf else (low + high) / 2
        if high <= low * (1 + PRECISION) or rate < least:
            break
    return best


def server(answers: Answers, bound: float, setting: Setting) -> Numbers:
    clock = setting.clock
    none = {"bound": bound, "rate": 0.0}
    if (alone := answers.usual(1, clock)) > bound:
        return none, {"p99": f"one query, alone, takes {duration(alone)}"}
    seconds = max(setting.seconds, bound / PRECISION)  # before which so little too much makes nothing late
    least = FEWEST / (LONGER * seconds)

    def attempt(rate: float) -> Trial:
        queries = max(min(SERVER_QUERIES, math.ceil(rate * LONGER * seconds)), round(rate * seconds))
        # The same draws at all rates, so that more can only be harder.
        return trial(answers, rate, bound, queries, np.random.default_rng(setting.seed), clock)

    best = largest_rate(attempt, answers.largest / answers.usual(answers.largest, clock), least)
    if best is None:
        return none, {"p99": f"above the bound at every rate down to {least:.3g}/s"}
    numbers, missing = percentiles(best.latencies)
    return {"bound": bound, "rate": best.rate, "batch": best.batch, **numbers}, missing


SERVED: Mapping[str, Callable[[Answers, float, Setting], Numbers]] = {
    "single-stream": single_stream,
    "offline": offline,
    "server": server,
}


def finisher(device: torch.device) -> Callable[[], Any]:
    """What waits for a call of this thread."""
    return (lambda: torch.cuda.current_stream().synchronize()) if device.type == "cuda" else (lambda: None)


def prepare(candidates: Mapping[int, Candidate], works: Mapping[int, Work], device: torch.device) -> Answers:
    """Raises WrongResult."""
    calls = {}
    for n, candidate in candidates.items():
        call = candidate.make(works[n].inputs)
        calls[n] = captured(call) if device.type == "cuda" and candidate.graph else call
    answers = Answers(calls, finisher(device))
    for n, candidate in candidates.items():
        if found := works[n].check(candidate.view(answers(n)), candidate.kind == "effk"):
            raise WrongResult(f"{found} (of a batch of {n})" if len(works) > 1 else found)
    return answers


def candidate_for(name: str, problem: Problem, work: Work, device: torch.device) -> Candidate:
    """A peer, or a back end of effk."""
    peer = next((p for p in problem.peers[device.type] if p.name == name), None)
    return peer_candidate(peer) if peer else effk_candidate(problem, work, name, device)


def measured(
    candidates: Mapping[int, Candidate], works: Mapping[int, Work], bound: float, names: Sequence[str], setting: Setting
) -> Iterator[Numbers]:
    """Numbers of each scenario. Raises WrongResult, or whatever a candidate fails with."""
    answers = prepare(candidates, works, setting.device)
    if setting.device.type == "cpu":
        CpuClock.wait_for_quiet()  # of threads that check, or that another candidate has left spinning
    for name in names:
        with uncollected():
            numbers = SERVED[name](answers, bound, setting)
        yield numbers


def serve(
    service: Service,
    names: Sequence[str],
    peers: Collection[str] | None,
    setting: Setting,
    progress: Callable[[str], Any],
) -> Iterator[ScenarioEntry]:
    """An entry for each candidate and scenario."""
    device = setting.device
    problems = {n: service.problem(n) for n in service.batches}
    works: dict[int, Work] = {}
    broken = ""
    progress(f"{service.name}: inputs")
    try:
        works.update((n, p.make(p, device)) for n, p in problems.items())
    except Exception as error:
        broken = short(error)
    main, *others = service.names(device, peers)
    for name in (main, *others):
        progress(f"{service.name} {name}")
        kind = "effk" if name == main else "peer"
        candidates = {n: candidate_for(name, problems[n], work, device) for n, work in works.items()}
        missing = next(filter(None, (c.missing(works[n]) for n, c in candidates.items())), "")
        wrong, left = broken, list(names)
        if not missing and not wrong:
            try:
                for numbers, without in measured(candidates, works, service.bound[device.type], names, setting):
                    yield entry(service, left.pop(0), name, kind, numbers=numbers, missing=without)
            except WrongResult as error:
                wrong = f"wrong result: {error}"
            except Exception as error:  # whatever a peer fails with, the run goes on and says so
                missing, wrong = ("", short(error)) if kind == "effk" else (short(error), "")
        for scenario in left:
            yield entry(service, scenario, name, kind, missing={ALL: missing} if missing else {}, wrong=wrong)


def entry(service: Service, scenario: str, candidate: str, kind: str, **found: Any) -> ScenarioEntry:
    family = find(service.op).family
    return ScenarioEntry(family, service.name, service.size, service.unit, scenario, candidate, kind, **found)


# --- Several ops ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class One:
    """effk's op of a service for one query."""

    service: Service
    candidate: Candidate
    work: Work
    answer: Call

    def entry(self, scenario: str, **found: Any) -> ScenarioEntry:
        return entry(self.service, scenario, self.candidate.name, "effk", **found)


def rates(calls: Sequence[Call], threads: int, setting: Setting) -> list[tuple[float, Any]]:
    """Calls a second of each, all at the same time, and their last results.

    Each is called by a thread of its own, which has that many of torch's threads, and a stream.
    """
    clock, cuda = setting.clock, setting.device.type == "cuda"
    ready = threading.Barrier(len(calls))

    def loop(call: Call) -> tuple[float, Any]:
        stream = torch.cuda.stream(torch.cuda.Stream() if cuda else None)
        with torch.inference_mode(), torch_threads(threads), stream:
            try:
                call()
            except BaseException:
                ready.abort()
                raise
            ready.wait()
            begin, count = clock.now(), 0
            while (spent := clock.now() - begin) < setting.seconds or not count:
                result = call()
                count += 1
            return count / spent, result

    # New threads begin with the number set last in any: in the end, this one's again.
    with torch_threads(torch.get_num_threads()), ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(loop, call) for call in calls]
        errors = [error for f in futures if (error := f.exception())]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [f.result() for f in futures]


def frames(calls: Sequence[Call], setting: Setting) -> tuple[list[float], list[list[float]]]:
    """Median seconds of each alone; and of frames, in which they run one after the other, the seconds of each."""
    share, clock = setting.seconds / (2 * ROUNDS), setting.clock
    alone: list[list[float]] = [[] for _ in calls]
    found: list[list[float]] = []

    def frame() -> list[float]:
        return [latencies(call, 0.0, clock)[0] for call in calls]

    for _ in range(ROUNDS):
        for of, call in zip(alone, calls, strict=True):
            call()
            of += latencies(call, share / len(calls), clock)
        frame()  # its first op finds other data in the caches than after a frame
        latencies(lambda: found.append(frame()), share, clock)
    return [statistics.median(of) for of in alone], found


def compared(alone: float, together: float, slowdown: float, **more: float) -> dict[str, float]:
    return {"alone": alone, "together": together, "slowdown": slowdown, **more}


def concurrent(ones: Sequence[One], setting: Setting) -> Iterator[ScenarioEntry]:
    """Every two of them, which share torch's threads evenly; alone with as many as then."""
    threads = max(1, torch.get_num_threads() // 2)
    alone = [rates([one.answer], threads, setting)[0][0] for one in ones]
    for pair in combinations(zip(ones, alone, strict=True), 2):
        found = rates([one.answer for one, _ in pair], threads, setting)
        for (one, before), (rate, result), (other, _) in zip(pair, found, pair[::-1], strict=True):
            wrong = one.work.check(one.candidate.view(result), True)
            numbers = {} if wrong else compared(before, rate, before / rate, threads=threads)
            yield one.entry("concurrent", numbers=numbers, wrong=wrong, beside=[other.service.name])


def cascaded(ones: Sequence[One], setting: Setting) -> Iterator[ScenarioEntry]:
    alone, found = frames([one.answer for one in ones], setting)
    for one, before, times in zip(ones, alone, zip(*found, strict=True), strict=True):
        now = statistics.median(times)
        yield one.entry("cascaded", numbers=compared(before, now, now / before))
    whole = statistics.median(map(sum, found))
    numbers = compared(sum(alone), whole, whole / sum(alone))
    yield ScenarioEntry("", "a whole frame", {}, "frame", "cascaded", "", "effk", numbers)


MIXED: Mapping[str, Callable[[Sequence[One], Setting], Iterator[ScenarioEntry]]] = {
    "concurrent": concurrent,
    "cascaded": cascaded,
}
SCENARIOS = (*SERVED, *MIXED)


def mix(
    chosen: Sequence[Service], names: Sequence[str], setting: Setting, progress: Callable[[str], Any]
) -> Iterator[ScenarioEntry]:
    """Services that fail are left out of the mix."""
    device, ones = setting.device, []
    for service in chosen:
        progress(f"{service.name}: inputs")
        problem, name = service.problem(1), main_backend(service.op, device)
        wrong = ""
        try:
            work = problem.make(problem, device)
            candidate = candidate_for(name, problem, work, device)
            ones.append(One(service, candidate, work, prepare({1: candidate}, {1: work}, device)))
        except WrongResult as error:
            wrong = f"wrong result: {error}"
        except Exception as error:
            wrong = short(error)
        if wrong:
            yield from (entry(service, scenario, name, "effk", wrong=wrong) for scenario in names)
    for scenario in names:
        progress(scenario)
        if len(ones) < 2:
            yield from (one.entry(scenario, missing={ALL: "takes two services"}) for one in ones)
            continue
        try:
            with uncollected():
                yield from MIXED[scenario](ones, setting)
        except Exception as error:
            yield from (one.entry(scenario, wrong=short(error)) for one in ones)


# --- All of it --------------------------------------------------------------------------------------------------------


def steps(
    chosen: Sequence[Service], device: torch.device, names: Collection[str], peers: Collection[str] | None
) -> int:
    """How often `run` calls progress."""
    served = sum(1 + len(s.names(device, peers)) for s in chosen) if set(names) & set(SERVED) else 0
    mixed = len(set(names) & set(MIXED))
    return served + (mixed and len(chosen) + mixed)


@torch.inference_mode()
def run(
    chosen: Sequence[Service],
    device: torch.device,
    names: Collection[str],
    seconds: float,
    seed: int,
    peers: Collection[str] | None = None,
    progress: Callable[[str], Any] = lambda name: None,
) -> Iterator[ScenarioEntry]:
    """Entries as they are measured: an interruption loses the candidate at hand.

    Args:
        names: of SCENARIOS.
        seconds: of each scenario, and of each of the server's trials, of which there are about eight.
        peers: names of those wanted; None for all.
        progress: is told what comes next.
    """
    setting = Setting(device, seconds, seed, meter_for(device))
    if served := [name for name in SERVED if name in names]:
        for service in chosen:
            yield from serve(service, served, peers, setting, progress)
    if mixed := [name for name in MIXED if name in names]:
        yield from mix(chosen, mixed, setting, progress)


# --- Tables -----------------------------------------------------------------------------------------------------------


def seconds_of(value: float, unit: str) -> str:
    return duration(value)


def per_second(value: float, unit: str) -> str:
    """Three digits that count."""
    text = f"{value:.3g}" if value < 999.5 else f"{float(f'{value:.3g}'):,.0f}".replace(",", " ")
    return f"{text} {unit}s/s"


def joules_of(value: float, unit: str) -> str:
    return scaled(value, "J", (("", 1.0), ("m", 1e-3), ("µ", 1e-6)))


def whole(value: float, unit: str) -> str:
    return f"{value:.0f}"


def about(value: float, unit: str) -> str:
    return f"{value:.3g}"


def factor(value: float, unit: str) -> str:
    return f"{value:.2f}x"


@dataclass(frozen=True)
class Column:
    header: str
    key: str  # of numbers
    show: Callable[[float, str], str]  # (number, unit of a query)


@dataclass(frozen=True)
class Layout:
    """`ratio`: the number by which candidates are compared, and how many times as good as a peer effk is."""

    title: str
    columns: Sequence[Column]
    ratio: tuple[str, Callable[[float, float], float]] | None = None


RATE = ("rate", lambda own, other: own / other)
LATENCY = ("p50", lambda own, other: other / own)
P50, P90, P99 = (Column(f"p{n}", f"p{n}", seconds_of) for n in (50, 90, 99))
COUNT = Column("queries", "queries", whole)
SLOWDOWN = Column("slowdown", "slowdown", factor)
LAYOUTS: Mapping[str, Layout] = {
    "single-stream": Layout("single-stream: one query after the other", (P50, P90, P99, COUNT), LATENCY),
    "offline": Layout(
        "offline: the largest batch, over and over; energy is that of the whole package or board, idle included",
        (
            Column("batch", "batch", whole),
            Column("rate", "rate", per_second),
            Column("energy a query", "joules", joules_of),
            COUNT,
        ),
        RATE,
    ),
    "server": Layout(
        "server: the largest rate of Poisson arrivals at which 99% of the queries are answered within the bound",
        (
            Column("bound", "bound", seconds_of),
            Column("rate", "rate", per_second),
            P50,
            P99,
            Column("mean batch", "batch", about),
            COUNT,
        ),
        RATE,
    ),
    "concurrent": Layout(
        "concurrent: two ops at the same time, each with its share of the threads or a stream",
        (
            Column("alone", "alone", per_second),
            Column("together", "together", per_second),
            SLOWDOWN,
            Column("threads each", "threads", whole),
        ),
    ),
    "cascaded": Layout(
        "cascaded: one query of each op, one op after the other, over and over",
        (Column("alone", "alone", seconds_of), Column("in the frame", "together", seconds_of), SLOWDOWN),
    ),
}


def tables(entries: Sequence[ScenarioEntry]) -> list[Table]:
    """One a scenario."""
    return [_table(found, LAYOUTS[s]) for s in SCENARIOS if (found := [e for e in entries if e.scenario == s])]


def _table(entries: Sequence[ScenarioEntry], layout: Layout) -> Table:
    own = {e.service: e for e in entries if e.kind == "effk"}
    rows = []
    for e in entries:
        tone = "bad" if e.wrong else "strong" if e.kind == "effk" else "dim"
        hint = " ".join(f"{key}={value}" for key, value in e.size.items())
        row = [Cell(" beside ".join([e.service, *e.beside]), hint=hint), Cell(e.candidate, tone, e.wrong)]
        row += [_cell(e, column) for column in layout.columns]
        if layout.ratio:
            row.append(_ratio(own.get(e.service, e), e, *layout.ratio))
        rows.append(row)
    header = ["service", "candidate", *(c.header for c in layout.columns), *(["effk's ratio"] if layout.ratio else [])]
    return Table(layout.title, header, rows)


def _cell(e: ScenarioEntry, column: Column) -> Cell:
    if column.key in e.numbers:
        value = e.numbers[column.key]
        return Cell(column.show(value, e.unit), "strong" if e.kind == "effk" else "", key=value)
    return Cell("-", "dim", e.wrong or e.missing.get(column.key) or e.missing.get(ALL, ""))


def _ratio(own: ScenarioEntry, e: ScenarioEntry, key: str, better: Callable[[float, float], float]) -> Cell:
    if e is own or not own.numbers.get(key) or not e.numbers.get(key):
        return Cell("" if e is own else "-", "dim")
    return Cell(f"{better(own.numbers[key], e.numbers[key]):.2f}", hint="above 1: effk is better")
