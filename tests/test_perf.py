"""The benchmark harness: what it may call a time, and what it writes. No test looks at how fast anything is."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from effk import _library, _registry, backends
from effk.perf import __main__ as perf
from effk.perf import lora, lscd, vq, w4a8
from effk.perf.harness import overhead, page, run, scenarios, table
from effk.perf.harness.check import difference
from effk.perf.harness.machine import Limits
from effk.perf.harness.problem import Derived, Family, Goal, Peer, Problem, Work, families
from effk.perf.harness.record import Entry, GoalEntry, ProblemEntry, Record, ScenarioEntry, compare, read_base
from effk.perf.harness.timing import WARM_UPS, CpuClock, How, Stats, last_level_cache, torch_threads
from hypothesis import given
from hypothesis import strategies as st

from .kit.problems import unpack_problem

CPU = torch.device("cpu")
LIMITS = Limits(read=1e9, copy=2e9, matmul={"float32": 1e10, "bfloat16": 4e10, "float16": 1e9})
times = st.floats(1e-9, 1e3)
VQ = {**vq.SMALL, "D": 32, "S": 300}


class ScriptedClock:
    """Gives each candidate the next of its times, over and over."""

    caches = "scripted"

    def __init__(self, *scripts: list[float]):
        self.scripts = list(scripts)

    def quiet(self) -> bool:
        return True

    def copies(self, nbytes: int) -> int:
        return 1

    def sampler(self, calls, how):
        script = self.scripts.pop(0) if self.scripts else [1.0]
        state = {"i": 0}

        def sample() -> float:
            state["i"] += 1
            return script[state["i"] % len(script)]

        return sample


def peer(name: str, result=lambda w: w, **options) -> Peer:
    return Peer(name, lambda w: lambda: result(w), f"note on {name}", **options)


def measure(problem: Problem, clock=None, peers=None, goals=()) -> ProblemEntry:
    runner = run.Runner(CPU, clock or ScriptedClock(), LIMITS, peers, 1.0, 0)
    return runner.measure(problem, Family("family", [problem], goals))


def run_main(monkeypatch: pytest.MonkeyPatch, problems: list[Problem], *args: str, seconds: float = 1.0) -> int:
    """The exit status; each sample of the clock is that many seconds."""
    clock = ScriptedClock(*([seconds] for _ in range(20)))
    monkeypatch.setattr(perf, "clock_for", lambda device: clock)
    monkeypatch.setattr(perf, "families", lambda: {"family": Family("family", problems, ())})
    monkeypatch.setattr(perf, "measure_limits", lambda device: LIMITS)
    return perf.main(["--device", "cpu", "--no-progress", *args])


@pytest.fixture
def record() -> Record:
    entry = measure(
        unpack_problem([peer("a"), peer("gone", missing=lambda work: "not <here>")]),
        goals=[Goal("lscd_unpack", "cpu", "a", 0.5, {"rows": 16})],
    )
    return Record(perf.facts(CPU, "scripted"), LIMITS, 0, {"a": "note"}, [entry], finished=True)


@pytest.mark.parametrize("quick", [False, True])
def test_every_op_has_a_problem(quick: bool) -> None:
    measured = {p.op for family in families().values() for p in family.problems if p.quick == quick}
    assert measured == set(_registry.OPS)


def test_every_goal_meets_a_problem() -> None:
    for family in families().values():
        for goal in family.goals:
            assert any(goal.applies(p, goal.device) for p in family.problems), goal


def test_names_are_unique() -> None:
    names = [p.name for family in families().values() for p in family.problems]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "problem",
    [
        *(lscd.linear(dtype, 0.6, 3, (37, 290)) for dtype in lscd.DTYPES),
        *lscd.packing(37, 290),
        *(w4a8.linear(3, x, share8, (37, 290)) for x in w4a8.DTYPES for share8 in (0.0, 0.4, 1.0)),
        *w4a8.others((37, 290), 5),
        *(lora.merging(dtype, 37, base=base) for dtype in lora.DTYPES for base in (True, False)),
        *lora.others(37),
        *(lora.applying(5, dtype, adapters=3, side=70, ranks=r) for dtype in lora.DTYPES for r in ("one", "mixed")),
        *(vq.scoring(VQ, codes, table) for codes in vq.CODES if codes != "1x12" for table in ("float32", "int8")),
        *(vq.choosing(VQ, codes, table, 9) for codes in ("16x4", "8x8") for table in ("float32", "int8")),
        *(vq.attending(VQ, keys) for keys in ("all", "random")),
        vq.stepping({**VQ, "batch": 2}, "16x4", "int8"),
        *vq.others(VQ, 300, 300, quick=True),
    ],
    ids=lambda problem: problem.name,
)
def test_results_are_checked_on_every_back_end(problem: Problem) -> None:
    family = Family("family", [problem], ())
    entry = run.Runner(CPU, ScriptedClock(), LIMITS, None, 1.0, 0).measure(problem, family)
    assert not entry.wrong
    own = {e.name for e in entry.entries if e.kind == "effk"}
    assert own == ({b for b in backends(problem.op) if b.startswith("cpu-")} or {"reference"})


def test_one_lost_weight_is_seen() -> None:
    problem = lscd.linear("bf16", 0.5, 2, (37, 290))
    work = problem.make(problem, CPU)
    args, _ = work.arguments(work.inputs)
    x, values, *rest = args
    assert work.check(torch.ops.effk.lscd_linear(*args), True) == ""
    lost = values.clone()
    lost[5] = 0
    x[:, :] = torch.where(x == 0, 0.125, x)  # so that the weight counts
    right = torch.ops.effk.lscd_linear(x, values, *rest)
    expected = (x.double() @ work.inputs.weight.w.double().T).bfloat16()
    assert torch.equal(right, expected)
    bound = 2.0**-8 * expected.double().abs() / 2
    assert difference(torch.ops.effk.lscd_linear(x, lost, *rest), expected.double(), bound)


@pytest.mark.parametrize("x", w4a8.DTYPES)
def test_one_wrong_integer_is_seen(x: str) -> None:
    problem = w4a8.linear(2, x, 0.4, (37, 290))
    work = problem.make(problem, CPU)
    (tokens, *packed, group), _ = work.arguments(work.inputs)
    assert work.check(torch.ops.effk.w4a8_linear(tokens, *packed, group), True) == ""
    assert (tokens[:, 0] != 0).all()
    for i in (0, 3):  # q4 and q8, of which the first byte is of the first column
        wrong = [t.clone() for t in packed]
        wrong[i].view(-1)[0] ^= 1
        assert work.check(torch.ops.effk.w4a8_linear(tokens, *wrong, group), True)


@pytest.mark.parametrize("peer", ["onnxruntime", "torch-int4pack", "onednn-u8s8", "torch-bf16", "torch-f32"])
def test_peers_of_w4a8_compute_the_same(peer: str) -> None:
    """Else they would be no peers. Where they are installed."""
    x = "f32" if peer in ("onnxruntime", "torch-f32") else "bf16"
    problem = w4a8.linear(3, x, shape=(64, 256))
    entry = measure(problem, peers=[peer])
    if reason := entry.missing.get(peer):
        pytest.skip(reason)
    assert not entry.wrong and entry.find(peer) is not None


@pytest.mark.parametrize("layer", range(4))
def test_a_switch_that_misses_a_layer_is_seen(layer: int) -> None:
    work = (problem := lora.merging("bf16", 37)).make(problem, CPU)
    (w, *rest), _ = work.arguments(work.inputs)
    before = w[layer].clone()
    torch.ops.effk.lora_switch_(w, *rest)
    assert work.check(w, True) == ""
    w[layer] = before
    assert work.check(w, False)


@pytest.mark.parametrize(
    ("problem", "peer"),
    [
        *((lora.merging("bf16", 64), p) for p in ("peft", "peft-16-bit", "addmm", "addmm-prepared")),
        (lora.merging("bf16", 64, base=False), "addmm"),
        *((lora.applying(9, side=128, adapters=5), p) for p in ("bmm", "dense", "loop")),
    ],
)
def test_peers_of_lora_compute_the_same(problem: Problem, peer: str) -> None:
    entry = measure(problem, peers=[peer])
    assert not entry.wrong and not entry.missing and entry.find(peer) is not None


def swapped(idx: torch.Tensor, count: torch.Tensor, n: int) -> torch.Tensor:
    """The first list with one of its middle keys for another, that isn't on it."""
    other = idx.clone()
    other[0, 0, int(count[0, 0]) // 2] = next(i for i in range(n) if i not in idx[0, 0])
    return other


def test_another_key_than_the_best_is_seen() -> None:
    for problem in (vq.choosing(VQ, "16x4", "int8", 9), vq.choosing(VQ, "8x8", "float32", 9)):
        work = problem.make(problem, CPU)
        args, options = work.arguments(work.inputs)
        idx, count = torch.ops.effk.vq_topk(*args, **options)
        assert work.check((idx, count), True) == ""
        assert "missed" in work.check((swapped(idx, count, VQ["S"]), count), True)
        assert work.check((idx, count - 1), True)
        twice = idx.clone()
        twice[0, 0, 1] = twice[0, 0, 0]
        assert "twice" in work.check((twice, count), True)


@pytest.mark.parametrize("table", ["float32", "int8"])
def test_one_wrong_score_is_seen(table: str) -> None:
    work = (problem := vq.scoring(VQ, "16x4", table)).make(problem, CPU)
    (lut, codes), options = work.arguments(work.inputs)
    scores = torch.ops.effk.vq_score(lut, codes, **options)
    assert work.check(scores, True) == ""
    wrong = codes.clone()
    wrong[0, 1, 200, 0] ^= 1
    assert work.check(torch.ops.effk.vq_score(lut, wrong, **options), True)


def test_attention_without_one_key_is_seen() -> None:
    work = (problem := vq.attending(VQ, "random")).make(problem, CPU)
    (q, k, v, idx), _ = work.arguments(work.inputs)
    assert work.check(torch.ops.effk.vq_attend(q, k, v, idx), True) == ""
    assert work.check(torch.ops.effk.vq_attend(q, k, v, idx[..., 1:]), True)


@pytest.mark.parametrize(
    ("problem", "peer"),
    [
        *((vq.scoring(VQ, "16x4", "int8"), p) for p in ("torch-gather", "embedding_bag", "faiss")),
        *((vq.choosing(VQ, "16x4", "int8", 9), p) for p in ("torch-topk", "effk-with-lut", "faiss")),
        *((vq.attending(VQ, "all"), p) for p in ("sdpa-folded", "sdpa-gqa")),
        (vq.attending(VQ, "random"), "sdpa-folded"),
        *((vq.stepping(VQ, "8x8", "float32"), p) for p in ("sdpa-folded", "torch-step")),
    ],
)
def test_peers_of_vq_compute_the_same(problem: Problem, peer: str) -> None:
    entry = measure(problem, peers=[peer])
    if "not installed" in (reason := entry.missing.get(peer, "")):
        pytest.skip(reason)
    assert not entry.wrong and not entry.missing and entry.find(peer) is not None


def test_quality_is_shown_and_kept(record: Record, tmp_path: Path) -> None:
    entry = measure(vq.choosing(VQ, "16x4", "int8", 9))
    assert 0 < entry.quality["recall@9"] <= 1
    kept = dataclasses.replace(record, problems=[entry])
    (made,) = table.tables(kept.problems)
    assert "recall@9" in made.header and all(len(row) == len(made.header) for row in made.rows)
    kept.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == kept


def test_steps_take_the_back_ends_of_all_their_ops() -> None:
    asked = []

    def steps(op, w):
        asked.append(op("lscd_unpack"))
        return lambda: asked[-1](*torch.ops.effk.lscd_pack(w), 16, 24)

    problem = unpack_problem()
    made = dataclasses.replace(problem, make=lambda *a: dataclasses.replace(problem.make(*a), steps=steps))
    assert not measure(made).wrong
    assert len(asked) == len([b for b in backends("lscd_unpack") if b.startswith("cpu-")])


def test_stats_by_hand() -> None:
    stats = Stats.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert stats == Stats(n=5, min=1.0, q1=2.0, median=3.0, q3=4.0)
    assert stats.spread == pytest.approx(2 / 3)


@given(st.lists(times, min_size=1, max_size=30), st.randoms())
def test_stats_are_in_order_whatever_the_order(samples: list[float], random) -> None:
    stats = Stats.of(samples)
    assert min(samples) == stats.min <= stats.q1 <= stats.median <= stats.q3 <= max(samples)
    random.shuffle(samples)
    assert Stats.of(samples) == stats


def test_steady_times_settle_and_noisy_ones_use_their_share() -> None:
    names = [b for b in backends("lscd_unpack") if b.startswith("cpu-")]
    steady = measure(unpack_problem(), ScriptedClock(*([1e-4] for _ in names)))
    assert {e.time.n for e in steady.entries} == {run.ROUNDS}
    noisy = measure(unpack_problem(), ScriptedClock(*([1e-2, 3e-2, 9e-2] for _ in names)))
    for entry in noisy.entries:
        assert entry.time.n > run.ROUNDS or entry.time.n * 0.13 / 3 >= 1.0 / len(names) - 0.09
    slow = measure(unpack_problem(), ScriptedClock(*([10.0] for _ in names)))
    assert {e.time.n for e in slow.entries} == {run.MIN_ROUNDS}


def test_what_is_between_timed_calls_counts_too() -> None:
    """Samples that never settle, nor ever use up the seconds of timed calls, come to an end."""

    class Waiting(ScriptedClock):
        def sampler(self, calls, how):
            sample = super().sampler(calls, how)

            def waiting() -> float:
                time.sleep(2e-3)
                return sample()

            return waiting

    names = [b for b in backends("lscd_unpack") if b.startswith("cpu-")]
    clock = Waiting(*([1e-9, 3e-9, 9e-9] for _ in names))
    runner = run.Runner(CPU, clock, LIMITS, None, 0.01, 0)
    entry = runner.measure(unpack_problem(), Family("family", [], ()))
    assert {e.time.n >= run.MIN_ROUNDS for e in entry.entries} == {True}


@pytest.mark.parametrize("off", [1.0, float("nan")])
def test_a_wrong_result_is_never_a_time(off: float) -> None:
    entry = measure(unpack_problem([peer("right"), peer("wrong", lambda w: w + off)]))
    assert set(entry.wrong) == {"wrong"} and entry.find("wrong") is None
    entry = measure(unpack_problem(wanted=off))
    assert entry.entries == []
    assert set(entry.wrong) == {b for b in backends("lscd_unpack") if b.startswith("cpu-")}


def test_wrong_results_set_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, [unpack_problem([peer("right")])]) == 0
    assert run_main(monkeypatch, [unpack_problem([peer("wrong", lambda w: w + 1)])]) == 1
    assert run_main(monkeypatch, [unpack_problem(wanted=1.0)]) == 1


def test_a_broken_problem_fails_the_run_but_not_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(problem: Problem, device: torch.device) -> Work:
        raise MemoryError("too large")

    good, file = unpack_problem(), tmp_path / "r.json"
    bad = Problem("lscd_unpack", {"rows": 1}, broken, {"cpu": ()}, {"cpu": ()})
    assert run_main(monkeypatch, [bad, good], "--json", str(file)) == 1
    record = Record.read(file)
    assert record.broken == {bad.name: "MemoryError: too large"}
    assert [p.name for p in record.problems] == [good.name]


def test_missing_peers_are_named_with_the_reason() -> None:
    def fails(w):
        raise ImportError("no such library")

    peers = [peer("absent", missing=lambda work: "not installed"), peer("broken", fails), peer("there")]
    entry = measure(unpack_problem(peers))
    assert entry.missing == {"absent": "not installed", "broken": "ImportError: no such library"}
    assert entry.find("there") is not None


def test_a_derived_yardstick_needs_its_peers() -> None:
    sum_of_both = Derived("both", ("a", "b"), lambda medians, work, limits: sum(medians.values()), "")
    problem = unpack_problem([peer("a"), peer("b")], [sum_of_both])
    count = sum(b.startswith("cpu-") for b in backends("lscd_unpack"))
    clock = ScriptedClock(*([1.0] * count for _ in range(count)), [2.0], [3.0])
    both = measure(problem, clock).find("both")
    assert both is not None and both.time.median == 5.0
    assert measure(problem, peers=["a"]).find("both") is None


def test_ratio_and_goal() -> None:
    count = sum(b.startswith("cpu-") for b in backends("lscd_unpack"))
    goals = [Goal("lscd_unpack", "cpu", "a", wanted, {"rows": 16}) for wanted in (1.9, 2.1)]
    goals.append(Goal("lscd_unpack", "cpu", "b", 1.0, {}))
    clock = ScriptedClock(*([2e-6] for _ in range(count)), [4e-6])
    entry = measure(unpack_problem([peer("a"), peer("b", missing=lambda work: "gone")]), clock, goals=goals)
    assert [g.met for g in entry.goals] == [True, False, None]
    # 1000 bytes at 2 GB/s are 0.5 us.
    main = entry.find(entry.main)
    assert main is not None and main.share == pytest.approx(0.25) and entry.limit == "memory"


def test_roofline_is_the_slower_of_moving_and_computing() -> None:
    assert LIMITS.seconds(2000, 0, "bfloat16") == pytest.approx(1e-6)
    assert LIMITS.seconds(2000, 8e4, "bfloat16") == pytest.approx(2e-6)
    # float16 can be widened to float32.
    assert LIMITS.seconds(2000, 8e4, "float16") == pytest.approx(8e-6)


def with_time(record: Record, q1: float, median: float, q3: float, peer: float = 1.0) -> Record:
    entries = [
        Entry("cpu-scalar", "effk", Stats(9, q1, q1, median, q3), 0.5, 1.0),
        Entry("peer", "peer", Stats(9, *(peer,) * 4), 0.5, 1.0),
    ]
    problem = ProblemEntry("p", "f", "op", {}, 1, 1.0, "float32", 1.0, "memory", "cpu-scalar", entries, [], {}, {})
    return Record(record.machine, LIMITS, 0, {}, [problem])


def test_changes_are_beyond_spread_and_noise(record: Record) -> None:
    def factors(now: Record, noise: float = 0.05) -> list[float]:
        return [c.factor for c in compare([base], now, noise).notable]

    base = with_time(record, 1.0, 1.1, 1.2)
    assert factors(with_time(record, 2.0, 2.2, 2.4)) == [pytest.approx(2.0)]
    assert factors(with_time(record, 0.5, 0.55, 0.6)) == [pytest.approx(0.5)]
    assert factors(with_time(record, 1.15, 1.3, 1.5)) == []
    assert factors(with_time(record, 2.0, 2.2, 2.4), noise=1.1) == []
    assert factors(base) == []


def test_a_regression_is_effks_own_and_more_than_the_machines(record: Record) -> None:
    base = with_time(record, 1.0, 1.0, 1.0)
    slower, faster = with_time(record, 1.5, 1.5, 1.5), with_time(record, 0.5, 0.5, 0.5)
    machine, peers = with_time(record, 1.5, 1.5, 1.5, peer=1.5), with_time(record, 1.0, 1.0, 1.0, peer=1.5)
    count = [len(compare([base], now, 0.05).regressions) for now in (base, slower, faster, machine, peers)]
    assert count == [0, 1, 0, 0, 0]
    assert compare([base], dataclasses.replace(base, problems=[]), 0.05).drift is None
    assert compare([base], machine, 0.05).drift == 1.5
    assert compare([slower, base], slower, 0.05).regressions, "the newest record counts"


def test_base_is_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.json"
    assert run_main(monkeypatch, [unpack_problem()], "--json", str(base)) == 0
    assert run_main(monkeypatch, [unpack_problem()], "--base", str(base)) == 0
    assert "no regression among" in capsys.readouterr().out
    assert run_main(monkeypatch, [unpack_problem()], "--base", str(base), seconds=0.5) == 0
    assert "0.50x" in capsys.readouterr().out
    assert run_main(monkeypatch, [unpack_problem()], "--base", str(base), seconds=2.0) == perf.SLOWER
    assert "2.00x" in capsys.readouterr().out
    assert run_main(monkeypatch, [unpack_problem()], "--base", str(base), "--noise", "1.5", seconds=2.0) == 0


def test_what_is_no_longer_timed_is_a_regression(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = tmp_path / "base.json", tmp_path / "other.json"
    assert run_main(monkeypatch, [unpack_problem()], "--json", str(base)) == 0
    monkeypatch.setattr(run, "TOO_SLOW", 0.0)
    assert run_main(monkeypatch, [unpack_problem()], "--base", str(base)) == perf.SLOWER
    said = capsys.readouterr().out
    assert "no longer timed: lscd_unpack" in said and "too slow to time" in said
    monkeypatch.undo()
    assert (
        run_main(monkeypatch, [unpack_problem(tag=5)], "--base", str(base), "--json", str(other)) == perf.BAD_ARGUMENTS
    )
    assert "nothing of the base was measured again" in capsys.readouterr().out and other.exists()


def test_other_work_under_the_same_name_is_not_compared(record: Record) -> None:
    (problem,) = record.problems
    more = dataclasses.replace(record, problems=[dataclasses.replace(problem, bytes=2 * problem.bytes)])
    found = compare([record], more, 0.05)
    assert not found.changes and "1 problems do other work" in found.differences[0]
    versions = {**record.machine, "versions": {"onnxruntime": "0"}}
    assert "versions" in compare([dataclasses.replace(record, machine=versions)], record, 0.05).differences[0]


def test_a_single_call_has_no_spread_to_show(record: Record) -> None:
    once = Stats.of([1.0])
    entry = Entry("cpu-scalar", "effk", once, 0.5, 1.0)
    (problem,) = with_time(record, 1.0, 1.0, 1.0).problems
    (made,) = table.tables([dataclasses.replace(problem, entries=[entry])])
    assert "one call" in [cell.text for cell in made.rows[0]]
    base = with_time(record, 1.0, 1.0, 1.0)
    base.problems[0].entries[0] = entry

    def regressions(seconds: float) -> int:
        return len(compare([base], with_time(record, *(seconds,) * 3), 0.05).regressions)

    assert [regressions(s) for s in (1.1, 1.14, 1.16)] == [0, 0, 1]


@pytest.mark.parametrize(
    "seconds, text",
    [(1.5, "1.5 s"), (999.6e-6, "1 ms"), (999.4e-6, "999 µs"), (0.9996, "1 s"), (5e-10, "0.5 ns"), (1234.5, "1234 s")],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert table.duration(seconds) == text


def test_base_may_be_a_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records of this device that it keeps."""

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "perf" / "results" / "here" / "r.json"
    assert run_main(monkeypatch, [unpack_problem()], "--json", str(kept)) == 0
    git("add", "-A")
    git("commit", "-m", "measured")
    kept.write_text("{}")  # the file of now isn't that of the commit
    assert run_main(monkeypatch, [unpack_problem()], "--base", "HEAD", seconds=2.0) == perf.SLOWER
    assert "2.00x" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no record of another device"):
        read_base("HEAD", "another device")
    with pytest.raises(ValueError, match="no such file, and no commit"):
        read_base("--upload-pack=x", "any")


def test_an_earlier_record_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    record.write(file)
    monkeypatch.setattr(perf, "measure", lambda *args: pytest.fail("measured"))
    assert run_main(monkeypatch, [], "--from", str(file), "--report", str(tmp_path / "report")) == 0
    assert "lscd_unpack" in capsys.readouterr().out and (tmp_path / "report" / "index.html").exists()


def test_scenarios_take_the_place_of_problems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ScenarioEntry("lscd", "a service", {}, "token", "offline", "cpu-avx2", "effk", {"rate": 5.0})
    monkeypatch.setattr(scenarios, "run", lambda *args: iter([served]))
    monkeypatch.setattr(scenarios, "services", lambda *args: lscd.SERVICES)
    file = tmp_path / "r.json"
    assert run_main(monkeypatch, [unpack_problem()], "--scenario", "offline", "--json", str(file)) == 0
    record = Record.read(file)
    assert record.scenarios == [served] and not record.problems
    assert record.said.endswith("python -m effk.perf --device cpu --scenario offline")
    said = capsys.readouterr().out
    assert "5 tokens/s" in said and "are read before every call" not in said


def test_the_command_leaves_files_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFK_CPU_LEVEL", "scalar")
    monkeypatch.setenv("EFFK_BAL", str(tmp_path))
    file = tmp_path / "r.json"
    run_main(monkeypatch, [unpack_problem([peer("a")])], "--peers", "a", "--json", str(file))
    assert Record.read(file).said.endswith(
        "EFFK_CPU_LEVEL=scalar EFFK_BAL=FOLDER python -m effk.perf --device cpu --peers a"
    )


def test_json_says_everything(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "a" / "r.json"
    record.write(file)
    assert Record.read(file) == record
    data = json.loads(file.read_text())
    assert data["machine"]["effk"]["backends"].keys() == _registry.OPS.keys()
    assert "/" not in "".join(data["machine"]["effk"]["libraries"].values()), "paths are not for publication"
    assert data["problems"][0]["missing"] == {"gone": "not <here>"}
    assert record.problems[0].goals == [GoalEntry("a", 0.5, 1.0)]


def test_a_record_that_cant_be_shown_is_refused(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    record.write(file)
    good = json.loads(file.read_text())
    for spoil in (
        lambda d: d["machine"].pop("device"),
        lambda d: d["limits"].update(matmul={}),
        lambda d: d["problems"][0].update(bytes=0),
        lambda d: d["problems"][0]["entries"][0]["time"].update(median=0.0),
    ):
        bad = copy.deepcopy(good)
        spoil(bad)
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError):
            Record.read(file)


def test_names_may_look_like_markup(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = record.problems
    table.print_record(dataclasses.replace(record, problems=[dataclasses.replace(problem, op="[/x]")]), table.Printer())
    assert "[/x]" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"schema": 0}', "[]", "{}", "nonsense"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(ValueError):
        Record.read(file)


def test_an_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(w):
        raise KeyboardInterrupt

    file, folder = tmp_path / "r.json", tmp_path / "report"
    problems = [unpack_problem(tag=0), unpack_problem([peer("p", interrupt)], tag=1), unpack_problem(tag=2)]
    assert run_main(monkeypatch, problems, "--json", str(file), "--report", str(folder)) == 130
    record = Record.read(file)
    assert [p.size["tag"] for p in record.problems] == [0] and not record.finished
    assert "Interrupted" in (folder / "index.html").read_text()


def test_bad_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for args in (
        ["none_such"],
        ["--peers", "none_such"],
        ["--base", str(tmp_path / "none")],
        ["--scenario", "none_such"],
        ["--scenario", "all"],  # which this family has none for
        ["--noise", "nan"],
        ["--noise", "-1"],
        ["--base", ""],
        ["--base", "HEAD", "--scenario", "all"],
        ["--quick", "--from", "x"],
        ["--only", "lscd", "--from", "x"],
        ["--only", "("],
        ["--only", "none_such"],
    ):
        with pytest.raises(SystemExit) as raised:
            run_main(monkeypatch, [unpack_problem([peer("a")])], *args)
        assert raised.value.code == 2


def test_without_what_a_report_needs_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "NEEDS", ("no_such_module",))
    monkeypatch.setattr(perf, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit) as raised:
        run_main(monkeypatch, [unpack_problem()], "--report", str(tmp_path))
    assert raised.value.code == 2 and "no_such_module not installed (pip install" in capsys.readouterr().err


def test_without_rich_the_table_is_plain(
    monkeypatch: pytest.MonkeyPatch, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    table.print_record(record, table.Printer())
    rich = capsys.readouterr().out
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    table.print_record(record, table.Printer())
    plain = capsys.readouterr().out
    cells = [cell.text for made in table.tables(record.problems) for row in made.rows for cell in row]
    assert all(cell in plain and cell in rich for cell in cells)


def test_the_cpu_clock_times_the_call_alone() -> None:
    clock = CpuClock()
    assert clock.copies(1) == 1 and clock.buffer.nbytes >= 2 * last_level_cache()
    done = []
    seconds = clock.sampler([lambda: done.append(time.sleep(0.02))], How())()
    assert len(done) == 1 and seconds >= 0.02


def test_samples_of_a_slowed_machine_dont_count() -> None:
    """Unless it is never quiet."""

    class Disturbed(ScriptedClock):
        def __init__(self, *slowed: float):
            super().__init__()
            self.factors, self.count = slowed, 0

        def sampler(self, calls, how):
            def sample() -> float:
                self.count += 1
                return 1e-3 * self.slowed

            return sample

        @property
        def slowed(self) -> float:
            return self.factors[self.count % len(self.factors)]

        def quiet(self) -> bool:
            return self.slowed == 1.0

    sometimes = measure(unpack_problem(), Disturbed(1.0, 1.5, 2.0))
    assert {e.time.median for e in sometimes.entries} == {1e-3} and all(e.time.n >= 5 for e in sometimes.entries)
    never = measure(unpack_problem(), Disturbed(1.5))
    assert {e.time.median for e in never.entries} == {1.5e-3}


@pytest.mark.parametrize("slowed, quiet", [((1.0, 1.0), True), ((1.2, 1.0), False), ((1.0, 1.2), False)])
def test_fixed_work_tells_whether_the_machine_is_quiet(
    monkeypatch: pytest.MonkeyPatch, slowed: tuple[float, float], quiet: bool
) -> None:
    """Products and reading, each beside its best."""
    clock, now = CpuClock(), [0.0]
    for factors in ((1.5, 1.0), (1.0, 1.5), slowed):
        ends = iter([0.0, factors[0], 10.0, 10.0 + 4 * factors[1]])
        monkeypatch.setattr(time, "perf_counter", lambda ends=ends: now[0] + next(ends))
        clock.read()
        monkeypatch.undo()
    assert clock.quiet() == quiet


def test_warm_caches_and_other_threads() -> None:
    clock, threads = CpuClock(), torch.get_num_threads()
    done = []
    clock.sampler([lambda: done.append(1)], How(warm=True))()
    assert 2 <= len(done) <= WARM_UPS + 1
    done.clear()
    clock.sampler([lambda: done.append(torch.get_num_threads())], How(own_threads=True))()
    assert done == [threads, threads]
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


def test_a_problem_that_says_so_is_warm() -> None:
    seen = []

    class Listening(ScriptedClock):
        def sampler(self, calls, how):
            seen.append((len(calls), how.warm))
            return super().sampler(calls, how)

        def copies(self, nbytes: int) -> int:
            return 3

    problem = unpack_problem()
    measure(problem, Listening())
    assert set(seen) == {(3, False)}
    seen.clear()
    warm = measure(dataclasses.replace(problem, size={**problem.size, "caches": "warm"}), Listening())
    assert set(seen) == {(1, True)}
    assert warm.limit == "compute" or not warm.roofline


def test_int8_operations_are_counted() -> None:
    operations = _library.cpu.handle.effk_int8_operations
    operations.argtypes, operations.restype = [ctypes.c_int64], ctypes.c_int64
    has_vnni = "avx512" in _library.supported_cpu_levels()
    # Of each round's 16 instructions, every one multiplies and adds 64 pairs of bytes.
    assert operations(1000) == (1000 * 16 * 64 * 2 if has_vnni else 0)


def test_overhead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every call is one of nothing, and they all are told."""
    monkeypatch.setattr(overhead, "CALLS", 1)
    monkeypatch.setattr(overhead, "REPEATS", 2)
    monkeypatch.setattr(overhead, "import_seconds", lambda: 0.1)
    overhead.main()
    out = capsys.readouterr().out
    calls = overhead.empty_calls()
    assert {_registry.find(op).family for op in calls} == {op.family for op in _registry.OPS.values()}
    assert all(re.search(rf"\b{op} +\d", out) for op in ("torch.add", *calls)) and "100 ms" in out


def test_import_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "IMPORTS", 1)
    assert 0 < overhead.import_seconds() < 60
