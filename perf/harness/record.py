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
    flags: str = ""  # of the command, without families and files
    checks: dict[str, str] = field(default_factory=dict)  # family -> how its results were checked
    schema: int = SCHEMA

    def errors(self) -> list[str]:
        """What makes the run a failure, a line each."""
        wrong = [f"{p.name}, {name}: {what}" for p in self.problems for name, what in p.wrong.items()]
        wrong += [f"{e.service}, {e.candidate}: {e.wrong}" for e in self.scenarios if e.wrong]
        return [*dict.fromkeys(wrong), *(f"{name}: {what}" for name, what in self.broken.items())]

    @property
    def families(self) -> list[str]:
        named = [*(p.family for p in self.problems), *(e.family for e in self.scenarios)]
        return list(dict.fromkeys(filter(None, named)))

    def command(self, *families: str) -> str:
        """That measures this, or some families of it."""
        return " ".join(["python -m effk.perf", *families, *filter(None, [self.flags])])

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
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}").strip()
    if not commit:
        raise ValueError(f"{text}: no such file, and no commit of a git repository here")
    files = [f for f in _git("ls-tree", "-r", "--name-only", commit, "--", RESULTS).splitlines() if f.endswith(".json")]
    records = [Record.parse(_git("show", f"{commit}:{file}"), f"{text}:{file}") for file in files]
    records = [r for r in records if r.machine["device"] == device]
    if not records:
        raise ValueError(f"{text}: no record of {device} in {RESULTS} there")
    return sorted(records, key=lambda r: r.machine["date"])


def _git(*arguments: str) -> str:
    """What it prints; "" where it fails or isn't installed."""
    try:
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True).stdout.strip()
        return subprocess.run(["git", "-C", top, *arguments], capture_output=True, text=True).stdout if top else ""
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


@dataclass(frozen=True)
class Comparison:
    """Of a run with earlier ones.

    Attributes:
        changes: of all times that both have; the newest earlier one counts.
        noise: relative change that is none.
        machines: what makes the records hard to compare.
    """

    changes: list[Change]
    noise: float
    machines: list[str]

    @property
    def drift(self) -> float:
        """By how much the machine is slower than then: the peers' median factor, or 1 without peers."""
        factors = [c.factor for c in self.changes if not c.own]
        return statistics.median(factors) if factors else 1.0

    @property
    def notable(self) -> list[Change]:
        """Beyond spread and noise, the slowest first."""
        found = [c for c in self.changes if c.beyond_spread and not 1 / (1 + self.noise) <= c.factor <= 1 + self.noise]
        return sorted(found, key=lambda c: -c.factor)

    @property
    def regressions(self) -> list[Change]:
        """Where effk is slower, and by more than the machine is."""
        return [c for c in self.notable if c.own and c.factor > max(1.0, self.drift) * (1 + self.noise)]


def compare(bases: Sequence[Record], now: Record, noise: float) -> Comparison:
    before = {(p.name, e.name): e for base in bases for p in base.problems for e in p.entries}
    changes = [
        Change(p.name, e.name, e.kind == "effk", before[p.name, e.name].time, e.time)
        for p in now.problems
        for e in p.entries
        if e.kind != "derived" and (p.name, e.name) in before
    ]
    keys = ("device", "threads", "torch", "caches")
    differing = {
        f"{key}: {base.machine.get(key)} -> {now.machine.get(key)}": None
        for base in bases
        for key in keys
        if base.machine.get(key) != now.machine.get(key)
    }
    return Comparison(changes, noise, list(differing))
