"""`python -m effk.perf`: times effk's back ends and their peers in one process, each checked before it is timed.

Exit status: 0; 1 where a result was wrong or effk failed; 2 for bad arguments, or where --base has nothing that was
measured; 3 where effk is slower than in --base, or too slow to be timed; 130 when interrupted (what was measured by
then is printed and written).
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from effk._registry import find

from .harness import page, scenarios, table
from .harness.machine import device_name, facts, measure_limits
from .harness.problem import Family, Problem, families
from .harness.record import Record, compare, read_base
from .harness.run import Runner, main_backend, short
from .harness.timing import clock_for

SEED = 0
SECONDS, QUICK_SECONDS = 4.0, 0.25  # of timed calls a problem
PATIENCE, QUICK_PATIENCE = 3.0, 1.0  # times as long where something else slows the machine down
TRIAL, QUICK_TRIAL = 3.0, 0.25  # seconds of a scenario, and of each trial of the server's

ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "EFFK_CPU_LEVEL", "EFFK_BACKEND")  # that changes what is measured

Peers = list[str] | None  # names of those wanted; None: all
WRONG, BAD_ARGUMENTS, SLOWER, INTERRUPTED = 1, 2, 3, 130  # exit statuses


def arguments(known: dict[str, Family]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m effk.perf", description=__doc__.split("\n\n")[0])
    parser.add_argument("family", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a few small problems, under 90 seconds")
    parser.add_argument("--only", metavar="REGEX", help="problems that it is found in, such as 'vq_score.* codes=1x12'")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU where effk can use one")
    parser.add_argument("--threads", type=int, help="of the CPU; by default torch's number")
    parser.add_argument("--peers", default="all", help="names, comma-separated, or all (default) or none")
    parser.add_argument(
        "--scenario",
        metavar="NAMES",
        help=f"in place of single problems, ops as a server runs them: {', '.join(scenarios.SCENARIOS)}, or all",
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="F", help="shows an earlier --json; measures nothing"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="writes what was measured")
    parser.add_argument("--report", type=Path, metavar="DIR", help="writes index.html and its pictures")
    parser.add_argument(
        "--base", metavar="F|REF", help="compares with an earlier --json, or with the records kept at a git commit"
    )
    parser.add_argument(
        "--noise", type=float, default=0.05, metavar="X", help="relative change from --base that is none (default 0.05)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none on a pipe)")
    return parser


def command(args: argparse.Namespace) -> str:
    """What measures this again, without what tells where it is written."""
    set_here = [f"{name}={shlex.quote(os.environ[name])}" for name in ENVIRONMENT if name in os.environ]
    set_here += ["EFFK_BAL=FOLDER"] if os.environ.get("EFFK_BAL") else []
    said = {"--quick": args.quick, "--only": args.only, "--device": args.device, "--threads": args.threads}
    said |= {"--peers": args.peers if args.peers != "all" else None, "--scenario": args.scenario}
    words = [[name] if value is True else [name, str(value)] for name, value in said.items() if value]
    flags = shlex.join([*args.family, *(word for pair in words for word in pair)])
    return " ".join([*set_here, "python -m effk.perf", *filter(None, [flags])])


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


def measure(args: argparse.Namespace, families: Sequence[Family], device: torch.device, peers: Peers) -> Record:
    """Interrupted, it returns what was measured so far, with `finished` False."""
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = clock_for(device)
    limits = measure_limits(device)
    checks = {family.name: family.check for family in families}
    record = Record(facts(device, clock.caches), limits, SEED, command=command(args), checks=checks)
    for problem in (p for f in families for p in f.problems):
        record.notes |= {p.name: p.note for p in problem.peers[device.type]}
        record.notes |= {d.name: d.note for d in problem.derived[device.type]}
    try:
        if args.scenario:
            _serve(record, args, families, device, peers)
        else:
            seconds, patience = (QUICK_SECONDS, QUICK_PATIENCE) if args.quick else (SECONDS, PATIENCE)
            runner = Runner(device, clock, limits, peers, seconds, SEED, patience)
            _time(record, families, runner, not args.no_progress)
        record.finished = True
    except KeyboardInterrupt:
        print("effk.perf: interrupted; what was measured is kept", file=sys.stderr)
    return record


def _time(record: Record, families: Sequence[Family], runner: Runner, show: bool) -> None:
    with progress(sum(len(f.problems) for f in families), show) as advance:
        for family in families:
            for problem in family.problems:
                advance(problem.name)
                try:
                    record.problems.append(runner.measure(problem, family))
                except Exception as error:  # of making its inputs; the others are still worth measuring
                    record.broken[problem.name] = short(error)


def _serve(
    record: Record, args: argparse.Namespace, families: Sequence[Family], device: torch.device, peers: Peers
) -> None:
    names, seconds = scenarios_wanted(args), QUICK_TRIAL if args.quick else TRIAL
    services = scenarios.services(families, device, args.quick)
    with progress(scenarios.steps(services, device, names, peers), not args.no_progress) as advance:
        for entry in scenarios.run(services, device, names, seconds, SEED, peers, advance):
            record.scenarios.append(entry)


def scenarios_wanted(args: argparse.Namespace) -> list[str]:
    return list(scenarios.SCENARIOS) if args.scenario == "all" else args.scenario.split(",")


def plan(
    args: argparse.Namespace, known: dict[str, Family], parser: argparse.ArgumentParser
) -> tuple[str, Callable[[], Record]]:
    """The device's name, and what gives the record that the arguments ask for: by reading, or by measuring."""
    if args.source:
        if args.family or args.quick or args.only or args.scenario:
            parser.error(
                "--from shows what a file has; families, --quick, --only and --scenario choose what to measure"
            )
        try:
            read = Record.read(args.source)
        except (OSError, ValueError) as error:
            parser.error(f"--from: {error}")
        return read.machine["device"], lambda: read
    if args.scenario and (unknown := set(scenarios_wanted(args)) - set(scenarios.SCENARIOS)):
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(scenarios.SCENARIOS)}")
    families = [known[name] for name in args.family or known]
    device = torch.device(args.device or default_device([p for f in families for p in f.problems]))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    try:
        only = re.compile(args.only or "")
    except re.error as error:
        parser.error(f"--only: {error}")

    def wanted(p: Problem) -> bool:
        return p.quick == args.quick and device.type in p.devices and only.search(p.name) is not None

    families = [replace(f, problems=[p for p in f.problems if wanted(p)]) for f in families]
    if args.only and not any(f.problems for f in families):
        parser.error(f"--only {args.only}: found in no problem")
    peers = peers_wanted(args.peers, [p for f in families for p in f.problems], device, parser)
    if args.scenario and not scenarios.services(families, device, args.quick):
        parser.error(f"--scenario: {', '.join(f.name for f in families)} has none")
    return device_name(device), lambda: measure(args, families, device, peers)


def main(argv: Sequence[str] | None = None) -> int:
    known = families()
    parser = arguments(known)
    args = parser.parse_args(argv)
    if unknown := set(args.family) - set(known):
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not (math.isfinite(args.noise) and args.noise >= 0):
        parser.error(f"--noise is {args.noise}; wanted 0 or more")
    if args.base is not None and args.scenario:
        parser.error("--base compares problems; scenarios have none")
    if args.report and (reason := page.missing()):
        parser.error(f"--report: {reason}; --json keeps what was measured, and --from makes its report elsewhere")
    device, make = plan(args, known, parser)
    try:
        bases = read_base(args.base, device) if args.base is not None else []
        for folder in filter(None, (args.json and args.json.parent, args.report)):
            folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    record = make()
    if args.json:  # before anything else can fail
        record.write(args.json)
    found = compare(bases, record, args.noise) if bases else None
    printer = table.Printer()
    for made in scenarios.tables(record.scenarios):
        printer.table(made)
    table.print_record(record, printer)
    if found:
        table.print_comparison(found, printer)
    if args.report:
        page.write(record, args.report, found)
        printer.line(f"report   {args.report / 'index.html'}")
    if record.errors():
        return WRONG
    if not record.finished:
        return INTERRUPTED
    if found and not found.changes and not found.lost:
        return BAD_ARGUMENTS
    return SLOWER if found and (found.regressions or found.lost) else 0


def peers_wanted(
    text: str, problems: Sequence[Problem], device: torch.device, parser: argparse.ArgumentParser
) -> Peers:
    """The names that --peers asks for."""
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
        sys.exit(INTERRUPTED)
