"""Scenarios of the benchmark, mostly on a simulated clock. No test looks at how fast anything is."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from effk.perf import lora, lscd, moe
from effk.perf.harness import scenarios, table
from effk.perf.harness.machine import Limits
from effk.perf.harness.problem import Peer, Problem, Work, families
from effk.perf.harness.record import Record, ScenarioEntry
from effk.perf.harness.scenarios import Answers, Clock, Service, Setting, rates, trial
from effk.perf.harness.timing import torch_threads

from .kit.problems import W, unpack_problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAMILIES = ("lscd", "lora", "moe", "w4a8", "vq")


class Simulated:
    """Time that passes only where something is waited for or computed."""

    def __init__(self) -> None:
        self.time = 0.0
        self.clock = Clock(lambda: self.time, self.passes, spin=0.0)

    def passes(self, seconds: float) -> None:
        self.time += seconds

    def answers(self, seconds: float, largest: int = 1, seen: list[int] | None = None) -> Answers:
        """Each batch takes that long, whatever its size."""

        def call(n: int) -> Callable[[], None]:
            def run() -> None:
                self.passes(seconds)
                if seen is not None:
                    seen.append(n)

            return run

        return Answers({1 << i: call(1 << i) for i in range(largest.bit_length())}, lambda: None)

    def setting(self, seconds: float, meter="none") -> Setting:
        return Setting(CPU, seconds, 0, meter, self.clock)


class Gaps:
    """Scripted draws, of whatever distribution."""

    def __init__(self, *gaps: float):
        self.gaps = gaps

    def exponential(self, scale: float, count: int) -> np.ndarray:
        return np.array(self.gaps)


def draws() -> np.random.Generator:
    return np.random.default_rng(0)


def test_percentiles_by_hand() -> None:
    """Nearest rank: of ten samples the 90th percentile is the ninth; no sample is made up between two."""
    ten = [7.0, 1.0, 10.0, 3.0, 5.0, 2.0, 9.0, 4.0, 8.0, 6.0]
    assert [scenarios.percentile(ten, p) for p in (50, 90, 91, 99)] == [5.0, 9.0, 10.0, 10.0]
    hundred = [float(i) for i in range(1, 101)]
    assert [scenarios.percentile(hundred, p) for p in (50, 90, 99)] == [50.0, 90.0, 99.0]
    assert scenarios.percentile([*hundred, 101.0], 99) == 100.0
    assert scenarios.percentile([2.0], 50) == 2.0
    assert all(scenarios.rank(100 * n, 29) == 29 * n for n in range(1, 200)), "in integers: 0.29 * 100 is below 29"


def test_few_queries_have_no_99th_percentile() -> None:
    numbers, missing = scenarios.percentiles([1.0] * 99)
    assert "p99" not in numbers and missing == {"p99": "of fewer than 100 queries"}
    numbers, missing = scenarios.percentiles([1.0] * 100)
    assert numbers == {"queries": 100, "p50": 1.0, "p90": 1.0, "p99": 1.0} and not missing


@pytest.mark.parametrize(("each", "count"), [(0.002, 1000), (0.01, 500), (0.0005, 2000), (7.0, 1)])
def test_a_single_stream_has_1000_queries_or_runs_out_of_time(each: float, count: int) -> None:
    """In 1 s, or up to 5."""
    sim = Simulated()
    numbers, _ = scenarios.single_stream(sim.answers(each), 1.0, sim.setting(1.0))
    assert numbers["queries"] == pytest.approx(count, abs=1)
    assert numbers["p50"] == pytest.approx(each)


def test_offline_counts_the_queries_of_whole_batches() -> None:
    sim, seen = Simulated(), []
    numbers, missing = scenarios.offline(sim.answers(0.01, 8, seen), 1.0, sim.setting(2.0))
    assert set(seen) == {8} and numbers["batch"] == 8
    assert numbers["rate"] == pytest.approx(800)
    assert missing == {"joules": "not readable here: none"}


def test_energy_is_that_of_a_span_that_can_be_read() -> None:
    sim = Simulated()

    class Heater:
        what = "5 W"

        def joules(self) -> float:
            return 40 + 5 * sim.time

    before = sim.time
    numbers, missing = scenarios.offline(sim.answers(0.01, 4), 1.0, sim.setting(0.1, Heater()))
    assert not missing and numbers["joules"] == pytest.approx(5 * 0.01 / 4)
    assert sim.time - before >= 1.0, "0.1 s were asked for"


def test_a_server_by_hand() -> None:
    """Arrivals at 1, 1.5, 2 and 7 s; a batch of up to two takes a second."""
    sim, seen, gaps = Simulated(), [], Gaps(1.0, 0.5, 0.5, 5.0)
    sim.time = 100.0
    made = trial(sim.answers(1.0, 2, seen), 1.0, 1.5, 4, gaps, sim.clock)
    assert seen == [1, 2, 1] and made.batch == pytest.approx(4 / 3)
    assert made.latencies == pytest.approx([1.0, 1.5, 1.0, 1.0]) and made.passed, "one may arrive when another is done"
    assert not trial(sim.answers(1.0, 2), 1.0, 1.45, 4, gaps, sim.clock).passed


def test_batches_are_filled_up_to_powers_of_two() -> None:
    sim, seen = Simulated(), []
    answers = sim.answers(1.0, 8, seen)
    for n in range(1, 9):
        answers(n)
    assert seen == [1, 2, 4, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_waiting_is_that_of_queueing_theory(load: float) -> None:
    """M/D/1: Poisson arrivals, one server, a constant time of service s: the mean wait is load s / (2 (1 - load))."""
    sim, service, count, parts = Simulated(), 0.25, 200_000, 100
    made = trial(sim.answers(service), load / service, float("inf"), count, draws(), sim.clock)
    waits = (made.latencies - service).reshape(parts, -1).mean(1)  # of stretches so long that they hardly correlate
    theory = load * service / (2 * (1 - load))
    error = waits.std(ddof=1) / parts**0.5
    assert error < 0.03 * theory, "else nothing would be tested"
    assert abs(waits.mean() - theory) < 4 * error


@pytest.mark.parametrize("bound", [0.6, 1.0, 1.5, 3.0, 10.0])
def test_giving_up_early_changes_no_verdict(bound: float) -> None:
    verdicts = set()
    for rate in np.linspace(0.5, 16, 40):
        sim = Simulated()
        whole = trial(sim.answers(0.25, 2), rate, float("inf"), 400, draws(), sim.clock)
        some = trial(sim.answers(0.25, 2), rate, bound, 400, draws(), sim.clock)
        assert some.passed == (scenarios.percentile(whole.latencies, 99) <= bound)
        assert len(some.latencies) == 400 or not some.passed
        verdicts.add(some.passed)
    assert verdicts == {True, False}


def test_a_hopeless_trial_is_short() -> None:
    sim = Simulated()
    made = trial(sim.answers(1.0), 100.0, 5.0, 10_000, draws(), sim.clock)
    assert not made.passed and sim.time < 10


@pytest.mark.parametrize("start", [0.2, 37.0, 40.0, 4e3])
def test_the_largest_rate_is_found(start: float) -> None:
    tried = []

    def attempt(rate: float) -> scenarios.Trial:
        tried.append(rate)
        return scenarios.Trial(rate, rate <= 37.0, np.zeros(1), 1.0)

    found = scenarios.largest_rate(attempt, start, 0.1)
    assert found is not None and 37.0 / (1 + 2 * scenarios.PRECISION) < found.rate <= 37.0
    assert min(tried) >= 0.1
    assert scenarios.largest_rate(attempt, start, 37.1) is None
    assert min(tried) >= 0.1


def test_no_rate_is_tried_that_has_too_few_queries() -> None:
    """Of a service that is quick enough when it is tried alone, and never again."""
    sim, counts = Simulated(), []

    def call() -> None:
        counts.append(1)
        sim.passes(0.01 if len(counts) <= 2 * (scenarios.WARM_UPS + scenarios.SETTLING) else 0.03)

    numbers, missing = scenarios.server(Answers({1: call}, lambda: None), 0.02, sim.setting(10.0))
    assert numbers == {"bound": 0.02, "rate": 0.0}
    assert missing == {"p99": "above the bound at every rate down to 2/s"}


def test_a_server_finds_what_its_bound_allows() -> None:
    def found(largest: int, bound: float) -> dict[str, float]:
        sim = Simulated()
        numbers, missing = scenarios.server(sim.answers(0.01, largest), bound, sim.setting(100.0))
        assert numbers["p99"] <= bound and not missing
        return numbers

    one, slack, eight = found(1, 0.05), found(1, 1.0), found(8, 0.05)
    assert 50 < one["rate"] < slack["rate"] < 101 and one["batch"] == 1
    assert 500 < eight["rate"] < 801, "nearly full batches"


def test_a_server_that_is_too_slow_for_one_query_has_no_rate() -> None:
    sim = Simulated()
    numbers, missing = scenarios.server(sim.answers(0.01, 8), 0.0099, sim.setting(100.0))
    assert numbers == {"bound": 0.0099, "rate": 0.0} and missing == {"p99": "one query, alone, takes 10 ms"}


def test_the_server_rests_on_the_seed_alone() -> None:
    def found(seed: int) -> scenarios.Numbers:
        sim = Simulated()
        return scenarios.server(sim.answers(0.01), 0.03, dataclasses.replace(sim.setting(10.0), seed=seed))

    assert found(1) == found(1) != found(2)


def test_waiting_ends_neither_early_nor_much_too_late() -> None:
    """Whatever sleep does: this one sleeps too long by a third of a millisecond."""
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(seconds + 3e-4)

    clock = Clock(sleep=sleep)
    until = clock.now() + 0.02
    clock.wait(until)
    assert clock.now() >= until and sum(slept) <= 0.02 - clock.spin
    clock.wait(until)
    count = len(slept)
    clock.wait(clock.now() + clock.spin / 2)
    assert len(slept) == count, "short waits are spun"


# --- Several ops ------------------------------------------------------------------------------------------------------


def setting(seconds: float = 0.02) -> Setting:
    return Setting(CPU, seconds, 0, "none")


def test_ops_at_once_have_their_own_threads() -> None:
    before = torch.get_num_threads()
    seen: dict[int, set[tuple[int, bool]]] = {}

    def call() -> str:
        state = (torch.get_num_threads(), torch.is_inference_mode_enabled())
        seen.setdefault(threading.get_ident(), set()).add(state)
        time.sleep(1e-3)
        return "result"

    found = rates([call, call, call], 7, setting())
    assert [result for _, result in found] == ["result"] * 3 and all(1 < rate < 1000 for rate, _ in found)
    assert len(seen) == 3 and threading.get_ident() not in seen
    assert {state for states in seen.values() for state in states} == {(7, True)}
    assert torch.get_num_threads() == before
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before], "a new thread begins with what was set last, anywhere"


def test_torchs_threads_are_each_threads_own() -> None:
    """Two threads with different numbers, set at the same time."""
    ready, found = threading.Barrier(2), {}

    def run(n: int) -> None:
        with torch_threads(n):
            ready.wait()
            found[n] = torch.get_num_threads()
            ready.wait()

    threads = [threading.Thread(target=run, args=(n,)) for n in (2, 3)]
    with torch_threads(torch.get_num_threads()):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {2: 2, 3: 3}


def test_an_op_that_fails_beside_another_stops_both() -> None:
    def fails() -> None:
        raise ValueError("no result")

    with pytest.raises(ValueError, match="no result"):
        rates([lambda: time.sleep(1e-3), fails], 1, setting(60.0))


def test_a_cascade_is_compared_with_each_op_alone() -> None:
    """Here an op takes twice as long after another one, as if that had thrown its data out of the caches, and longer
    after two: as the first one does after others alone, which isn't counted."""
    sim, last = Simulated(), []

    def op(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            sim.passes(seconds * (1 + (name not in last[-1:]) + (name not in last[-2:])))
            last.append(name)

        return call

    alone, found = scenarios.frames([op("a", 0.1), op("b", 0.3)], sim.setting(100.0))
    assert alone == pytest.approx([0.1, 0.3])
    assert len(found) > 20 and all(times == pytest.approx([0.2, 0.6]) for times in found)


# --- All of it --------------------------------------------------------------------------------------------------------


def service(name: str, *peers: Peer, off: float = 0.0) -> Service:
    return Service(
        name,
        lambda n: unpack_problem(peers, wanted=off, queries=n),
        "matrix",
        {"cpu": 1e-3},
        [p.name for p in peers],
        largest=2,
    )


def peer(name: str, call: Callable[[], object], **options) -> Peer:
    return Peer(name, lambda w: call, "", **options)


def recorded(entries: list[ScenarioEntry]) -> Record:
    return Record({"device": "d", "date": ""}, Limits(1.0, 1.0, {"float32": 1.0}), 0, scenarios=entries)


def run(*chosen: Service, names=("single-stream",), seconds: float = 1e-3, **options) -> list[ScenarioEntry]:
    return list(scenarios.run(chosen, CPU, names, seconds, 0, **options))


def test_wrong_results_are_reported_and_not_timed() -> None:
    right, wrong = peer("right", lambda: W), peer("wrong", lambda: W + 1)
    entries = run(service("s", right, wrong))
    assert [(e.candidate, bool(e.numbers), bool(e.wrong)) for e in entries[1:]] == [
        ("right", True, False),
        ("wrong", False, True),
    ]
    (error,) = recorded(entries).errors()
    assert "s, wrong: wrong result" in error
    bad = run(service("bad", off=1.0), service("a"), service("b"), names=scenarios.SCENARIOS)
    mine = [e for e in bad if e.service == "bad"]
    assert {e.scenario for e in mine} == set(scenarios.SCENARIOS) and all(e.wrong and not e.numbers for e in mine)
    others = [e for e in bad if e.scenario == "concurrent" and e.service != "bad"]
    assert [(e.service, e.beside) for e in others] == [("a", ["b"]), ("b", ["a"])] and all(e.numbers for e in others)


def test_a_result_that_is_wrong_beside_another_op_has_no_rate() -> None:
    """Only there: it was right before."""
    made = service("s")
    problem = made.problem(1)
    threads: list[bool] = []

    def check(y: torch.Tensor, own: bool) -> str:
        threads.append(True)
        return "" if len(threads) < 2 else "torn"

    torn = dataclasses.replace(problem, make=lambda *a: dataclasses.replace(problem.make(*a), check=check))
    entries = run(dataclasses.replace(made, problem=lambda n: torn), service("t"), names=("concurrent",))
    assert [(e.service, e.wrong, bool(e.numbers)) for e in entries] == [("s", "torn", False), ("t", "", True)]


def test_ops_that_fail_together_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise RuntimeError("out of threads")

    monkeypatch.setattr(scenarios, "rates", failing)
    entries = run(service("a"), service("b"), names=scenarios.MIXED)
    failed = [e.scenario == "concurrent" for e in entries]
    assert failed == [e.wrong == "RuntimeError: out of threads" for e in entries] == [True, True, False, False, False]


def test_what_cant_run_says_why() -> None:
    def fails() -> None:
        raise OSError("no such thing")

    entries = run(
        service("s", peer("gone", lambda: W, missing=lambda work: "not installed"), peer("fails", fails)),
        names=("single-stream", "offline"),
    )
    assert [(e.candidate, e.scenario, e.missing) for e in entries[2:]] == [
        *(("gone", s, {"all": "not installed"}) for s in ("single-stream", "offline")),
        *(("fails", s, {"all": "OSError: no such thing"}) for s in ("single-stream", "offline")),
    ]
    assert not recorded(entries).errors()
    assert ("gone", "not installed (2 times)") in table.not_timed(recorded(entries))
    assert run(service("s"), names=("cascaded",))[0].missing == {"all": "takes two services"}


def test_inputs_that_cant_be_made_fail_their_service_alone() -> None:
    def broken(problem: Problem, device: torch.device) -> Work:
        raise MemoryError("too large")

    problem = dataclasses.replace(unpack_problem(queries=1), make=broken)
    bad = dataclasses.replace(service("bad", peer("p", lambda: W)), problem=lambda n: problem)
    entries = run(bad, service("good"), names=scenarios.SCENARIOS)
    assert {e.wrong for e in entries if e.service == "bad"} == {"MemoryError: too large"}
    assert all(e.numbers for e in entries if e.service == "good" and e.scenario in scenarios.SERVED)


def test_an_interruption_keeps_what_was_measured() -> None:
    calls: list[int] = []

    def interrupts() -> torch.Tensor:
        calls.append(1)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return W

    kept: list[ScenarioEntry] = []
    names = ("single-stream", "offline")
    with pytest.raises(KeyboardInterrupt):
        for entry in scenarios.run([service("a"), service("b", peer("p", interrupts))], CPU, names, 1e-3, 0):
            kept.append(entry)
    assert [(e.service, e.scenario) for e in kept] == [(s, n) for s in ("a", "b") for n in names]
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(scope="module")
def everything() -> Iterator[tuple[list[ScenarioEntry], list[str], int]]:
    """Every family's quick service in all scenarios, by one thread, and what progress was told."""
    told: list[str] = []
    bound = {"cpu": 1e-3}  # the trials' seconds depend on it
    chosen = [
        dataclasses.replace(s, largest=2, bound=bound) for s in scenarios.services(families().values(), CPU, True)
    ]
    with torch_threads(1):
        entries = run(*chosen, names=scenarios.SCENARIOS, progress=told.append)
    yield entries, told, scenarios.steps(chosen, CPU, scenarios.SCENARIOS, None)


def test_every_family_serves(everything) -> None:
    entries, told, steps = everything
    assert not recorded(entries).errors() and len(told) == steps
    own = {(e.family, e.scenario) for e in entries if e.kind == "effk" and (e.numbers or e.scenario == "server")}
    assert own - {("", "cascaded")} == {(f, s) for f in FAMILIES for s in scenarios.SCENARIOS}
    for e in entries:
        assert e.numbers or e.missing
        assert all(value >= 0 for value in e.numbers.values())
        assert ("joules" in e.numbers) != ("joules" in e.missing) or e.scenario != "offline" or "all" in e.missing
    pairs = [e for e in entries if e.scenario == "concurrent"]
    assert len(pairs) == len(FAMILIES) * (len(FAMILIES) - 1) and {e.numbers["threads"] for e in pairs} == {1}
    *parts, whole = [e for e in entries if e.scenario == "cascaded"]
    assert whole.numbers["alone"] == pytest.approx(sum(e.numbers["alone"] for e in parts))


def test_entries_are_kept(everything, tmp_path: Path) -> None:
    entries, _, _ = everything
    record = recorded(entries)
    record.write(tmp_path / "r.json")
    assert Record.read(tmp_path / "r.json") == record


def test_tables_show_every_number(everything) -> None:
    entries, _, _ = everything
    tables = scenarios.tables(entries)
    assert [t.title.split(":")[0] for t in tables] == list(scenarios.SCENARIOS)
    assert sum(len(t.rows) for t in tables) == len(entries)
    assert all(len(row) == len(t.header) for t in tables for row in t.rows)
    shown = {column.key for layout in scenarios.LAYOUTS.values() for column in layout.columns}
    assert {key for e in entries for key in e.numbers} <= shown
    assert scenarios.tables([]) == []


def test_ratios_say_how_much_better_effk_is() -> None:
    common = ("lscd", "s", {}, "token")
    entries = [
        ScenarioEntry(*common, scenario, name, kind, {key: value})
        for scenario, key in (("single-stream", "p50"), ("offline", "rate"))
        for name, kind, value in (("cpu-avx2", "effk", 2.0), ("peer", "peer", 4.0))
    ]
    latency, rate = scenarios.tables(entries)
    assert [row[-1].text for row in latency.rows] == ["", "2.00"]
    assert [row[-1].text for row in rate.rows] == ["", "0.50"]
    assert [row[3].text for row in rate.rows] == ["2 tokens/s", "4 tokens/s"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (99.96, "100"), (1234.5, "1 230"), (9876543.0, "9 880 000")]
)
def test_rates_have_three_digits(value: float, text: str) -> None:
    assert scenarios.per_second(value, "token") == f"{text} tokens/s"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_services_are_declared_as_they_have_to_be(device: torch.device, quick: bool) -> None:
    chosen = scenarios.services(families().values(), device, quick)
    assert len({s.name for s in chosen}) == len(chosen) == len(FAMILIES)
    for s in chosen:
        problems = [s.problem(n) for n in s.batches]
        assert s.batches[-1] == s.largest and device.type in s.bound
        for p in problems:
            assert p.op == s.op and p.quick == quick and device.type in p.devices
            assert p.size.get("caches", "warm") == "warm", "a name of what isn't so"
            assert [q.name for q in p.peers[device.type]] == [q.name for q in problems[0].peers[device.type]]
        assert len(s.names(device, None)) > 1, "no peer"
        assert s.names(device, []) == s.names(device, None)[:1]
    known = {q.name for s in chosen for d in ("cpu", "cuda") for q in s.problem(1).peers[d]}
    assert {name for s in chosen for name in s.peers} <= known


def test_batches_share_their_weights() -> None:
    """As a server has them once; and 604 MB of experts would be too many times seven."""

    def inputs(problem: Problem):
        return problem.make(problem, CPU).inputs

    a, b = (inputs(lscd.SERVICES[1].problem(n)) for n in (1, 2))
    assert a.weight is b.weight
    a, b = (inputs(lora.SERVICES[1].problem(n)) for n in (1, 2))
    assert a.a is b.a and a.b is b.b and len(a.x) != len(b.x)
    a, b = (inputs(moe.SERVICES[1].problem(n)) for n in (1, 2))
    assert a.w13 is b.w13 and a.w2 is b.w2 and len(a.x) != len(b.x)
