"""The tables: the same cells for the terminal (with rich or without it) and for the page."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .record import ALL, Comparison, Entry, ProblemEntry, Record

STYLES = {"good": "green", "bad": "red bold", "strong": "bold", "dim": "dim", "": ""}


CHECKED = "every result is within its bound of the float64 reference; none was timed before that, but single calls"
NOISY = 0.1  # half a spread that makes a median doubtful


@dataclass(frozen=True)
class Cell:
    text: str
    tone: str = ""  # of STYLES
    hint: str = ""  # shown by the page
    key: float | None = None  # that the page sorts by, where the text isn't a plain number


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def scaled(value: float, unit: str, prefixes: Sequence[tuple[str, float]]) -> str:
    """With the first prefix that leaves 1 or more before the point, after rounding."""
    prefix, scale = next(((p, s) for p, s in prefixes if value >= 0.9995 * s), prefixes[-1])
    return f"{three_digits(value / scale)} {prefix}{unit}"


def duration(seconds: float) -> str:
    return scaled(seconds, "s", (("", 1.0), ("m", 1e-3), ("µ", 1e-6), ("n", 1e-9)))


def rate(value: float, unit: str) -> str:
    return scaled(value, unit, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1.0)))


def grouped(problems: Iterable[ProblemEntry], key: Callable[[ProblemEntry], Any]) -> dict[Any, list[ProblemEntry]]:
    """In the order of their first appearance."""
    groups: dict[Any, list[ProblemEntry]] = {}
    for problem in problems:
        groups.setdefault(key(problem), []).append(problem)
    return groups


def alike(problem: ProblemEntry) -> tuple[str, ...]:
    """The op and the choice of its sizes that aren't numbers, such as a dtype: what shares a table."""
    return (problem.op, *(value for value in problem.size.values() if isinstance(value, str)))


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def rivals(problems: Iterable[ProblemEntry]) -> list[str]:
    """Peers and derived yardsticks with a time, in the order of their first appearance."""
    return unique(e.name for p in problems for e in p.entries if e.kind != "effk")


def tables(problems: Iterable[ProblemEntry]) -> list[Table]:
    return [table_of(group) for group in grouped(problems, alike).values()]


def varying(problems: Sequence[ProblemEntry]) -> list[str]:
    """The sizes in which they differ."""
    return [key for key in unique(k for p in problems for k in p.size) if len({p.size.get(key) for p in problems}) > 1]


def table_of(problems: Sequence[ProblemEntry], peers: Sequence[str] | None = None, main_only: bool = False) -> Table:
    """A row for each back end, or for the main one alone, unnamed; beside these peers, all by default."""
    sizes, peers = varying(problems), rivals(problems) if peers is None else peers
    quality = unique(name for p in problems for name in p.quality)
    rows = [
        [
            *(Cell(str(p.size.get(key, ""))) for key in sizes),
            *(Cell(f"{p.quality[name]:.3g}" if name in p.quality else "") for name in quality),
            *_own_cells(p, e)[main_only:],
            *(_ratio(p, e, name) for name in peers),
        ]
        for p in problems
        for e in p.entries
        if e.kind == "effk" and (e.name == p.main or not main_only)
    ]
    header = [*sizes, *quality, *([] if main_only else ["back end"]), "time", "spread", "of the limit", *peers]
    return Table(title(problems), header, rows)


def title(problems: Sequence[ProblemEntry]) -> str:
    """The op, and the sizes that all have."""
    sizes = varying(problems)
    same = [f"{key} {value}" for key, value in problems[0].size.items() if key not in sizes]
    return "  ".join([problems[0].op, *same])


def _own_cells(problem: ProblemEntry, entry: Entry) -> list[Cell]:
    tone = "strong" if entry.name == problem.main else "dim"
    t = entry.time
    hint = f"quartiles {duration(t.q1)} to {duration(t.q3)}, least {duration(t.min)}, {t.n} samples"
    return [
        Cell(entry.name, tone),
        Cell(duration(t.median), tone, hint, t.median),
        Cell(f"±{t.spread / 2:.1%}", "bad" if t.spread / 2 > NOISY else "dim", key=t.spread)
        if t.n > 1
        else Cell("one call", "dim", key=math.inf),
        Cell(f"{entry.share:.0%} {problem.limit}", tone, f"at least {duration(problem.roofline)}", entry.share),
    ]


def _ratio(problem: ProblemEntry, entry: Entry, peer: str) -> Cell:
    other = problem.find(peer)
    if other is None:
        reason = problem.missing.get(peer) or problem.wrong.get(peer, "")
        return Cell("-", "dim", reason)
    ratio = other.time.median / entry.time.median
    text, hint = f"{ratio:.2f}", f"{peer}: {duration(other.time.median)}"
    if entry.name != problem.main:
        return Cell(text, "dim", hint)
    goal = next((g for g in problem.goals if g.peer == peer), None)
    if goal is None:
        return Cell(text, "", hint)
    sign, tone = ("≥", "good") if goal.met else ("<", "bad")
    hint = f"{hint}; wanted {goal.wanted:g}, {'' if goal.met else 'not '}met"
    return Cell(f"{text} {sign} {goal.wanted:g}", tone, hint, ratio)


def changes_table(found: Comparison) -> Table:
    regressions = found.regressions
    rows = [
        [
            Cell(c.problem),
            Cell(c.name, "strong" if c.own else "dim"),
            Cell(duration(c.before.median), key=c.before.median),
            Cell(duration(c.after.median), key=c.after.median),
            Cell(f"{c.factor:.2f}x", "bad" if c in regressions else "good" if c.factor < 1 else "", key=c.factor),
        ]
        for c in found.notable
    ]
    return Table("Changes", ["problem", "candidate", "before", "now", "time"], rows)


def changes_line(found: Comparison) -> str:
    """What the table of changes amounts to."""
    if not found.changes and not found.lost:
        return "nothing of the base was measured again"
    count = len(found.regressions) + len(found.lost)
    text = f"{count} regression{'s' * (count != 1)}" if count else "no regression"
    peers = "no peer in both" if found.drift is None else f"peers' times are {found.drift:.2f} times those of the base"
    return f"{text} among {len(found.changes)} times (changes beyond the quartiles and {found.noise:.0%}; {peers})"


def goals_line(record: Record) -> str:
    goals = [g for p in record.problems for g in p.goals]
    if not goals:
        return "no problem of this run has a goal"
    met, open_ = sum(g.met is True for g in goals), sum(g.met is None for g in goals)
    rest = f"; {open_} without a measurement" if open_ else ""
    return f"{met} of {len(goals)} met{rest}"


def limits_line(record: Record) -> str:
    matmul = ", ".join(
        f"{name} {rate(value, 'op/s' if name.startswith('int') else 'flop/s')}"
        for name, value in record.limits.matmul.items()
    )
    return f"read {rate(record.limits.read, 'B/s')}, copy {rate(record.limits.copy, 'B/s')}, matmul {matmul}"


def busy(record: Record) -> str:
    """What else kept the processors busy, or ""."""
    load, processors = record.machine["load"], record.machine["processors"]
    return f"; BUSY: load {load:.1f} before the run, on {processors} processors" if load >= processors / 2 else ""


def facts(record: Record) -> list[tuple[str, str]]:
    machine = record.machine
    return [
        ("command", record.said),
        ("device", f"{machine['device']}, {machine['threads']} threads{busy(record)}"),
        ("software", f"effk {machine['effk']['version']}, torch {machine['torch']}, Python {machine['python']}"),
        ("limits", limits_line(record)),
        ("caches", machine["caches"] if record.problems else "warm, as far as they hold what a scenario uses"),
        ("checks", CHECKED),
        ("goals", goals_line(record)),
    ]


def not_timed(record: Record) -> Iterator[tuple[str, str]]:
    """(candidate, or number of a scenario; why, and how often)."""
    found = [item for p in record.problems for item in p.missing.items()]
    found += [(e.candidate if name == ALL else name, why) for e in record.scenarios for name, why in e.missing.items()]
    for (name, why), count in sorted(Counter(found).items()):
        yield name, f"{why} ({count} time{'s' * (count > 1)})"


class Printer:
    """Writes to stdout, with rich where it is installed."""

    def __init__(self) -> None:
        self.console: Any = None
        if importlib.util.find_spec("rich"):
            from rich.console import Console

            # Wider than any table: cells cut short would tell nothing.
            self.console = Console(highlight=False, width=1000)

    def line(self, text: str = "", tone: str = "") -> None:
        if self.console:
            self.console.print(text, style=STYLES[tone] or None, markup=False)
        else:
            print(text)

    def table(self, table: Table) -> None:
        if self.console:
            self._rich(table)
        else:
            self._plain(table)

    def _rich(self, table: Table) -> None:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(title=Text(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name in table.header:
            made.add_column(Text(name.replace("-", "-\n")), no_wrap=True)
        for row in table.rows:
            made.add_row(*(Text(cell.text, STYLES[cell.tone]) for cell in row))
        self.console.print(made)

    def _plain(self, table: Table) -> None:
        lines = [list(table.header), *([cell.text for cell in row] for row in table.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(f"\n{table.title}")
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def print_record(record: Record, printer: Printer) -> None:
    for table in tables(record.problems):
        printer.table(table)
    if skipped := list(not_timed(record)):
        printer.line("Not timed", "strong")
        for name, reason in skipped:
            printer.line(f"  {name}: {reason}")
    for error in record.errors():
        printer.line(f"ERROR {error}", "bad")
    printer.line()
    for name, text in facts(record):
        printer.line(f"{name:9}{text}")


def print_comparison(found: Comparison, printer: Printer) -> None:
    for line in found.differences:
        printer.line(f"unlike the base: {line}", "bad")
    for name, why in found.lost.items():
        printer.line(f"no longer timed: {name}: {why}", "bad")
    if found.notable:
        printer.table(changes_table(found))
    printer.line(f"base     {changes_line(found)}", "bad" if found.regressions or found.lost else "")
