"""What was measured, as JSON, and the comparison of two such files.

The file is `Record` as written by dataclasses.asdict; the classes below are its schema. Times are seconds, rates are
a second, and SCHEMA rises when an entry changes its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .machine import Limits
from .timing import Stats

SCHEMA = 1


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


@dataclass
class Record:
    machine: dict[str, Any]  # machine.facts()
    limits: Limits
    seed: int
    notes: dict[str, str]  # peer -> what its configuration is
    problems: list[ProblemEntry] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # problem -> why its inputs couldn't be made
    finished: bool = False  # False: interrupted, the rest is missing
    schema: int = SCHEMA

    def errors(self) -> list[str]:
        """What makes the run a failure, a line each."""
        wrong = [f"{p.name}, {name}: {what}" for p in self.problems for name, what in p.wrong.items()]
        return wrong + [f"{name}: {what}" for name, what in self.broken.items()]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises ValueError where the file isn't one of these, or of another schema."""
        try:
            data = json.loads(path.read_text())
            if data["schema"] != SCHEMA:
                raise ValueError(f"{path}: schema {data['schema']}; this harness reads {SCHEMA}")
            problems = [_read_problem(p) for p in data.pop("problems")]
            return cls(limits=Limits(**data.pop("limits")), problems=problems, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file that --json wrote ({error!r})") from error


def _read_problem(data: dict[str, Any]) -> ProblemEntry:
    entries = [Entry(**{**e, "time": Stats(**e["time"])}) for e in data["entries"]]
    return ProblemEntry(**{**data, "entries": entries, "goals": [GoalEntry(**g) for g in data["goals"]]})


@dataclass(frozen=True)
class Change:
    problem: str
    name: str
    before: Stats
    after: Stats

    @property
    def factor(self) -> float:
        """Time now over time then: above 1 is slower."""
        return self.after.median / self.before.median


def changes(base: Record, now: Record) -> Iterator[Change]:
    """Times that moved beyond the spread: the ranges between the quartiles don't touch."""
    before = {(p.name, e.name): e for p in base.problems for e in p.entries if e.kind != "derived"}
    for problem in now.problems:
        for entry in problem.entries:
            old = before.get((problem.name, entry.name))
            if old and (entry.time.q1 > old.time.q3 or entry.time.q3 < old.time.q1):
                yield Change(problem.name, entry.name, old.time, entry.time)


def differing_machines(base: Record, now: Record) -> list[str]:
    """What makes the two records hard to compare."""
    keys = ("device", "threads", "torch", "caches")
    return [
        f"{key}: {base.machine.get(key)} -> {now.machine.get(key)}"
        for key in keys
        if base.machine.get(key) != now.machine.get(key)
    ]
