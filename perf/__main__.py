"""`python -m effk.perf`: times effk's back ends and their peers in one process, each checked before it is timed.

Exit status: 0; 1 where a result was wrong or effk failed; 2 for bad arguments; 130 when interrupted (what was
measured by then is printed and written).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from effk._registry import find

from .harness import page, table
from .harness.machine import facts, measure_limits
from .harness.problem import Family, Problem, families
from .harness.record import Record, changes, differing_machines
from .harness.run import Runner, main_backend, short
from .harness.timing import clock_for

SEED = 0
SECONDS, QUICK_SECONDS = 4.0, 1.0  # of timed calls a problem


def arguments(known: dict[str, Family]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m effk.perf", description=__doc__.split("\n\n")[0])
    parser.add_argument("family", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a few small problems, under a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU where effk can use one")
    parser.add_argument("--threads", type=int, help="of the CPU; by default torch's number")
    parser.add_argument("--peers", default="all", help="names, comma-separated, or all (default) or none")
    parser.add_argument("--json", type=Path, metavar="F", help="writes what was measured")
    parser.add_argument("--report", type=Path, metavar="DIR", help="writes index.html and its pictures")
    parser.add_argument("--base", type=Path, metavar="F", help="an earlier --json: lists changes beyond the spread")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none on a pipe)")
    return parser


@contextmanager
def progress(total: int, wanted: bool) -> Iterator[Any]:
    """Yields next(problem), called before each problem: a bar on a terminal, else a line each on stderr."""
    if wanted and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            print("effk.perf: no progress bar, since rich isn't installed", file=sys.stderr)
        else:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("", total=total, completed=-1)

                def advance(name: str) -> None:
                    bar.update(task, description=name, advance=1)

                yield advance
            return
    done = 0

    def line(name: str) -> None:
        nonlocal done
        done += 1
        if wanted:
            print(f"[{done}/{total}] {name}", file=sys.stderr, flush=True)

    yield line


def default_device(problems: Sequence[Problem]) -> str:
    if torch.cuda.is_available() and all(
        find(p.op).composite or main_backend(p.op, torch.device("cuda")) != "reference" for p in problems
    ):
        return "cuda"
    return "cpu"


def measure(
    problems: Sequence[tuple[Family, Problem]],
    device: torch.device,
    peers: Sequence[str] | None,
    seconds: float,
    show: bool,
) -> Record:
    """Interrupted, it returns what was measured so far, with `finished` False."""
    notes: dict[str, str] = {}
    for _, problem in problems:
        notes |= {p.name: p.note for p in problem.peers[device.type]}
        notes |= {d.name: d.note for d in problem.derived[device.type]}
    clock = clock_for(device)
    limits = measure_limits(device)
    runner = Runner(device, clock, limits, peers, seconds, SEED)
    record = Record(facts(device, clock.caches), limits, SEED, notes)
    try:
        with progress(len(problems), show) as advance:
            for family, problem in problems:
                advance(problem.name)
                try:
                    record.problems.append(runner.measure(problem, family))
                except Exception as error:  # of making its inputs; the others are still worth measuring
                    record.broken[problem.name] = short(error)
        record.finished = True
    except KeyboardInterrupt:
        print("effk.perf: interrupted; what was measured is kept", file=sys.stderr)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    known = families()
    parser = arguments(known)
    args = parser.parse_args(argv)
    if unknown := set(args.family) - set(known):
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [known[name] for name in args.family or known]
    problems = [(f, p) for f in chosen for p in f.problems if p.quick == args.quick]
    device = torch.device(args.device or default_device([p for _, p in problems]))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    problems = [(f, p) for f, p in problems if device.type in p.devices]
    peers = peers_wanted(args.peers, [p for _, p in problems], device, parser)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        base = Record.read(args.base) if args.base else None
    except (OSError, ValueError) as error:
        parser.error(f"--base: {error}")

    record = measure(problems, device, peers, QUICK_SECONDS if args.quick else SECONDS, not args.no_progress)
    found = list(changes(base, record)) if base else None
    printer = table.Printer()
    table.print_record(record, printer)
    if base and found is not None:
        for line in differing_machines(base, record):
            printer.line(f"the base is of another machine or set-up: {line}", "bad")
        if found:
            printer.table(table.changes_table(found))
        else:
            printer.line("no time changed beyond the spread", "strong")
    if args.json:
        record.write(args.json)
    if args.report:
        page.write(record, args.report, found)
        printer.line(f"report   {args.report / 'index.html'}")
    return 1 if record.errors() else 0 if record.finished else 130


def peers_wanted(
    text: str, problems: Sequence[Problem], device: torch.device, parser: argparse.ArgumentParser
) -> list[str] | None:
    """The names that --peers asks for; None for all."""
    if text == "all":
        return None
    names = [] if text == "none" else text.split(",")
    there = {p.name for q in problems for p in q.peers[device.type]}
    if unknown := set(names) - there:
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(sorted(there))}")
    return names


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before anything was measured
        sys.exit(130)
