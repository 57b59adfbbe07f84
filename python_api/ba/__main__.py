"""`python -m effk.ba problem.txt -o out.txt`: bundle adjustment of a BAL file or a COLMAP model."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from . import Problem, Summary, colmap, position_globally, solve
from .files import check_writable
from .levenberg_marquardt import SOLVERS, Iteration
from .models import INTRINSICS
from .reference import LOSSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERRUPTED = 130  # what shells say of Ctrl-C


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m effk.ba", description=__doc__, epilog="Ctrl-C ends a solve; what it has reached is written."
    )
    p.add_argument("problem", type=Path, help="BAL file (also .gz, .bz2) or folder of a COLMAP model")
    p.add_argument(
        "-o", "--output", type=Path, help="where the result goes; of a COLMAP model a folder, as text if it was"
    )
    p.add_argument("--loss", choices=LOSSES, default="trivial")
    p.add_argument("--loss-scale", type=float, default=1.0, metavar="PIXELS")
    p.add_argument("--linear-solver", choices=("auto", *SOLVERS), default="auto")
    p.add_argument("--max-iterations", type=int, default=100, metavar="N", help="of a solve")
    p.add_argument("--max-seconds", type=float, metavar="S", help="of all solves")
    p.add_argument("--function-tolerance", type=float, default=1e-6, metavar="T")
    p.add_argument("--fix-intrinsics", action="store_true")
    p.add_argument("--fix-principal-point", action="store_true", help="as COLMAP does")
    p.add_argument("--share-intrinsics", action="store_true", help="one set for all cameras, which must be equal")
    p.add_argument(
        "--position",
        action="store_true",
        help="find translations and points anew first, from rotations: a solve with a loss and tolerances of its own",
    )
    p.add_argument("--device", default="cpu")
    p.add_argument("--plot", type=Path, metavar="FILE", help="picture of the cost over time (matplotlib)")
    p.add_argument("-q", "--quiet", action="store_true", help="no line an iteration, but a progress bar")
    return p


class Output(io.TextIOBase):
    """Standard output whose reader may leave: a solve goes on without."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with self.going_on():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.going_on():
            self.stream.flush()

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What is left would fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def check_output(path: Path, problem: Problem, binary: bool | None) -> None:
    """What would be found wrong with it after the solve. binary: of a COLMAP model; None for a BAL file."""
    if binary is None:
        check_writable(path)
        return
    colmap.check_rivals(path, binary)
    if not binary and problem._source:
        colmap.check_names(problem._source)
    there = next(p for p in (path, *path.parents) if p.exists())
    for file in colmap.paths(path, binary) if there == path else [there / "some.part"]:
        check_writable(file)


def figure_of(path: Path) -> Figure:
    """An empty one, if it can be saved there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path} ends in {path.suffix}; wanted one of {', '.join(kinds)}")
    check_writable(path)
    return figure


def device_of(name: str) -> torch.device:
    """One that is there."""
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except AssertionError as error:  # what torch says without CUDA
        raise RuntimeError(str(error)) from error
    return device


def run(a: argparse.Namespace) -> int:
    # All that can be found wrong is, before anything is computed.
    device = device_of(a.device)
    figure = figure_of(a.plot) if a.plot else None
    binary = colmap.is_binary(a.problem) if a.problem.is_dir() else None
    problem = Problem.from_bal(a.problem) if binary is None else Problem.from_colmap(a.problem)
    if a.output:
        check_output(a.output, problem, binary)
    if a.share_intrinsics:
        problem.share_intrinsics()
    if a.fix_intrinsics:
        problem.fix_intrinsics()
    if a.fix_principal_point:
        if "cx" not in INTRINSICS[problem.model]:
            raise ValueError(f"{a.problem} has no principal point to fix: its cameras are {problem.model!r}")
        problem.fix_intrinsics(["cx", "cy"])
    problem = problem.to(device)
    both = {
        "linear_solver": a.linear_solver,
        "max_iterations": a.max_iterations,
        "verbose": not a.quiet,
        "progress": a.quiet,
    }
    history: list[Iteration] = []
    left, status = a.max_seconds, 0
    try:
        if a.position:
            start = time.perf_counter()
            position_globally(problem, max_seconds=left, **both)
            if left is not None:
                left = max(0.0, left - (time.perf_counter() - start))
        summary = solve(
            problem,
            callback=history.append,
            loss=a.loss,
            loss_scale=a.loss_scale,
            max_seconds=left,
            function_tolerance=a.function_tolerance,
            **both,
        )
        if a.quiet:
            print(summary)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sizes = len(problem.cameras), len(problem.points), len(problem.observations)
        summary = Summary(history, "interrupted", a.linear_solver, *sizes, free_parameters=0, behind=0)
        status = INTERRUPTED
    if a.output:
        problem.to_bal(a.output) if binary is None else problem.to_colmap(a.output, binary)
    if figure and history:
        summary.plot(figure.add_subplot())
        figure.savefig(a.plot, dpi=120)
    return status


def main(arguments: list[str] | None = None) -> int:
    a = parser().parse_args(arguments)
    try:
        with contextlib.redirect_stdout(Output(sys.stdout)) as out:  # type: ignore[type-var]
            try:
                return run(a)
            finally:
                out.flush()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to write, or once more
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
