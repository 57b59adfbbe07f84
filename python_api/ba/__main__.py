"""`python -m effk.ba problem.txt -o out.txt`: bundle adjustment of a BAL file or a COLMAP model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import Problem, position_globally, solve
from .levenberg_marquardt import SOLVERS
from .reference import LOSSES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m effk.ba", description=__doc__)
    p.add_argument("problem", type=Path, help="BAL file (also .gz, .bz2) or folder of a COLMAP model")
    p.add_argument("-o", "--output", type=Path, help="where the result goes, in the same format")
    p.add_argument("--loss", choices=LOSSES, default="trivial")
    p.add_argument("--loss-scale", type=float, default=1.0, metavar="PIXELS")
    p.add_argument("--linear-solver", choices=("auto", *SOLVERS), default="auto")
    p.add_argument("--max-iterations", type=int, default=100, metavar="N")
    p.add_argument("--max-seconds", type=float, metavar="S")
    p.add_argument("--function-tolerance", type=float, default=1e-6, metavar="T")
    p.add_argument("--fix-intrinsics", action="store_true")
    p.add_argument("--share-intrinsics", action="store_true", help="one set for all cameras, which must be equal")
    p.add_argument("--position", action="store_true", help="find translations and points anew first, from rotations")
    p.add_argument("--device", default="cpu")
    p.add_argument("--plot", type=Path, metavar="FILE", help="picture of the cost over time (matplotlib)")
    p.add_argument("-q", "--quiet", action="store_true", help="no line an iteration, but a progress bar")
    return p


def main(arguments: list[str] | None = None) -> int:
    a = parser().parse_args(arguments)
    try:
        if a.plot:  # before anything is computed: it may not be installed
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6, 4), layout="constrained")
        folder = a.problem.is_dir()
        problem = Problem.from_colmap(a.problem) if folder else Problem.from_bal(a.problem)
        if a.share_intrinsics:
            problem.share_intrinsics()
        if a.fix_intrinsics:
            problem.fix_intrinsics()
        problem = problem.to(torch.device(a.device))
        shown = {"verbose": not a.quiet, "progress": a.quiet}
        if a.position:
            position_globally(problem, **shown)
        summary = solve(
            problem,
            loss=a.loss,
            loss_scale=a.loss_scale,
            linear_solver=a.linear_solver,
            max_iterations=a.max_iterations,
            max_seconds=a.max_seconds,
            function_tolerance=a.function_tolerance,
            **shown,
        )
        if a.quiet:
            print(summary)
        if a.output:
            problem.to_colmap(a.output) if folder else problem.to_bal(a.output)
        if a.plot:
            summary.plot(figure.add_subplot())
            figure.savefig(a.plot, dpi=120)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
