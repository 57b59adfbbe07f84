"""What was measured, as JSON, and the comparison of two such records.

The file is `Record` as written by dataclasses.asdict; the classes below are its schema. Times are seconds, rates are
a second, and SCHEMA rises when an entry changes its meaning.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .machine import Limits
from .timing import Stats

SCHEMA = 1
SINGLE = 3  # times the noise that a single call may differ by
RESULTS = "perf/results"  # where a repository keeps records, a folder a device


@dataclass(frozen=True)
class Entry:
    """One candidate of a problem that gave the right result and was timed.

    kind is "effk", "peer" or "derived" (computed from other times; n = 0). ratio: how many times as fast as it effk's
    main back end is.
    """

    name: str
    kind: str
    time: Stats
    share: float  # of the machine's limit: roofline / median
    ratio: float | None


@dataclass(frozen=True)
class GoalEntry:
    peer: str
    wanted: float
    ratio: float | None  # None: effk or the peer has no time

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio >= self.wanted


@dataclass(frozen=True)
class ProblemEntry:
    name: str
    family: str
    op: str
    size: dict[str, Any]
    bytes: int  # that have to be moved, weights packed
    flops: float  # that the result needs
    dtype: str  # whose matmul rate is the limit
    roofline: float  # seconds: max(bytes / bandwidth, flops / rate); of warm caches flops / rate
    limit: str  # "memory" or "compute", whichever that is
    main: str  # effk's back end that a plain call takes here
    entries: list[Entry]
    goals: list[GoalEntry]
    missing: dict[str, str]  # candidate -> why it has no time
    wrong: dict[str, str]  # candidate -> what is wrong with its result, or how effk failed
    quality: dict[str, float] = field(default_factory=dict)  # what the right result is worth: recall and the like

    def find(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name), None)


ALL = "all"  # numbers of a scenario are missing


@dataclass(frozen=True)
class ScenarioEntry:
    """What one candidate did in one scenario.

    Attributes:
        family: "" of a whole frame of a cascade.
        size: of the service, what all batches share.
        kind: "effk" or "peer".
        numbers: by the keys of LAYOUTS' columns; seconds, queries a second, joules a query.
        missing: number -> why it isn't there; ALL where none is.
        wrong: what is wrong with the result, or how effk failed.
        beside: the services that ran at the same time.
    """

    family: str
    service: str
    size: dict[str, Any]
    unit: str
    scenario: str
    candidate: str
    kind: str
    numbers: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: str = ""
    beside: list[str] = field(default_factory=list)


@dataclass
class Record:
    machine: dict[str, Any]  # machine.facts()
    limits: Limits
    seed: int
    notes: dict[str, str] = field(default_factory=dict)  # peer -> what its configuration is
    problems: list[ProblemEntry] = field(default_factory=list)
    scenarios: list[ScenarioEntry] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # problem -> why its inputs couldn't be made
    finished: bool = False  # False: interrupted, the rest is missing
    command: str = ""  # that measured it, with the environment that counts and without files; "" in older records
    checks: dict[str, str] = field(default_factory=dict)  # family -> how its results were checked
    schema: int = SCHEMA

    def errors(self) -> list[str]:
        """What makes the run a failure, a line each."""
        wrong = [f"{p.name}, {name}: {what}" for p in self.problems for name, what in p.wrong.items()]
        wrong += [f"{e.service}, {e.candidate}: {e.wrong}" for e in self.scenarios if e.wrong]
        return [*dict.fromkeys(wrong), *(f"{name}: {what}" for name, what in self.broken.items())]

    @property
    def said(self) -> str:
        """The command, as far as it is known."""
        if self.command:
            return self.command
        named = dict.fromkeys(p.family for p in self.problems)
        return " ".join(["python -m effk.perf", *named])

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises ValueError where the file isn't one of these, or of another schema."""
        return cls.parse(path.read_text(), str(path))

    @classmethod
    def parse(cls, text: str, path: str) -> Record:
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"{path}: schema {data['schema']}; this harness reads {SCHEMA}")
            data["machine"]["device"], data["machine"]["date"], data["limits"]["matmul"]["float32"]
            entries = [e["time"]["median"] for p in data["problems"] for e in p["entries"]]
            if not all(number > 0 for number in (*entries, *(p["bytes"] for p in data["problems"]))):
                raise ValueError(f"{path}: times and bytes have to be above 0")
            problems = [_read_problem(p) for p in data.pop("problems")]
            served = [ScenarioEntry(**e) for e in data.pop("scenarios", [])]
            return cls(limits=Limits(**data.pop("limits")), problems=problems, scenarios=served, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file that --json wrote ({error!r})") from error


def _read_problem(data: dict[str, Any]) -> ProblemEntry:
    entries = [Entry(**{**e, "time": Stats(**e["time"])}) for e in data["entries"]]
    return ProblemEntry(**{**data, "entries": entries, "goals": [GoalEntry(**g) for g in data["goals"]]})


def read_base(text: str, device: str) -> list[Record]:
    """Records to compare with: a file, or those of this device in perf/results at a commit of the repository here.

    Raises ValueError where it is neither.
    """
    if Path(text).is_file():
        return [Record.read(Path(text))]
    if not text:
        raise ValueError("empty; wanted a file or a commit")
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}").strip()
    if not commit:
        raise ValueError(f"{text}: no such file, and no commit of a git repository here")
    files = [
        f
        for f in _git("ls-tree", "-r", "-z", "--full-tree", "--name-only", commit, "--", RESULTS).split("\0")
        if ".json" in f
    ]
    kept = {file: _git("show", f"{commit}:{file}") for file in files}
    # Other devices' may be of another schema.
    records = [Record.parse(t, f"{text}:{file}") for file, t in kept.items() if json.dumps(device) in t]
    records = [r for r in records if r.machine["device"] == device]
    if not records:
        raise ValueError(f"{text}: no record of {device} in {RESULTS} there")
    return sorted(records, key=lambda r: r.machine["date"])


def _git(*arguments: str) -> str:
    """What it prints; "" where it fails or isn't installed."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout
    except OSError:
        return ""


@dataclass(frozen=True)
class Change:
    problem: str
    name: str
    own: bool  # effk's, not a peer's
    before: Stats
    after: Stats

    @property
    def factor(self) -> float:
        """Time now over time then: above 1 is slower."""
        return self.after.median / self.before.median

    @property
    def beyond_spread(self) -> bool:
        """The ranges between the quartiles don't touch."""
        return self.after.q1 > self.before.q3 or self.after.q3 < self.before.q1

    def beyond(self, noise: float) -> bool:
        """A single call has no spread that would tell; more noise makes up for it."""
        allowed = 1 + (SINGLE if 1 in (self.before.n, self.after.n) else 1) * noise
        return self.beyond_spread and not 1 / allowed <= self.factor <= allowed


@dataclass(frozen=True)
class Comparison:
    """Of a run with earlier ones.

    Attributes:
        changes: of all times that both have; the newest earlier one counts.
        noise: relative change that is none.
        lost: effk's times that only the earlier run has, though it measured the same problem, and why.
        differences: what makes the records hard to compare.
    """

    changes: list[Change]
    noise: float
    lost: dict[str, str]
    differences: list[str]

    @property
    def drift(self) -> float | None:
        """By how much the machine is slower than then: the peers' median factor, or None without peers in both."""
        factors = [c.factor for c in self.changes if not c.own]
        return statistics.median(factors) if factors else None

    @property
    def notable(self) -> list[Change]:
        """Beyond spread and noise, the slowest first."""
        return sorted((c for c in self.changes if c.beyond(self.noise)), key=lambda c: -c.factor)

    @property
    def regressions(self) -> list[Change]:
        """Where effk is slower, and by more than the machine is."""
        return [c for c in self.notable if c.own and c.factor > max(1.0, self.drift or 1.0) * (1 + self.noise)]


def compare(bases: Sequence[Record], now: Record, noise: float) -> Comparison:
    problems = {p.name: p for base in bases for p in base.problems}
    changes: list[Change] = []
    lost: dict[str, str] = {}
    altered = 0
    for p in now.problems:
        if (old := problems.get(p.name)) is None:
            continue
        if (old.bytes, old.flops) != (p.bytes, p.flops):
            altered += 1
            continue
        for before in (e for e in old.entries if e.kind != "derived"):
            own = before.kind == "effk"
            if after := p.find(before.name):
                changes.append(Change(p.name, before.name, own, before.time, after.time))
            elif own and (why := p.missing.get(before.name) or p.wrong.get(before.name)):
                lost[f"{p.name}, {before.name}"] = why
    differences = [f"{altered} problems do other work than then and aren't compared"] if altered else []
    for base in bases:
        for key in ("device", "threads", "python", "torch", "versions", "caches"):
            if (a := base.machine.get(key)) != (b := now.machine.get(key)):
                differences.append(f"{key}: {a} -> {b}")
    return Comparison(changes, noise, lost, list(dict.fromkeys(differences)))
