"""Solving a `Problem`, with a report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._progress import progress_bar
from . import levenberg_marquardt, reference
from .levenberg_marquardt import Iteration, Options
from .models import INTRINSICS
from .problem import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.distributed import ProcessGroup

log = logging.getLogger("effk")

NEWTON_STEPS, PIXEL_TOLERANCE = 40, 1e-6  # of undoing distortions, at most; pixels

Callback = Callable[[Iteration], "bool | None"]

# Heading, and how an iteration's number is written below it.
TABLE = (
    ("iter", "{:4d}"),
    ("cost", "{:13.6e}"),
    ("change", "{:10.2e}"),
    ("|gradient|", "{:10.2e}"),
    ("|step|", "{:9.2e}"),
    ("radius", "{:9.2e}"),
    ("linear", "{:6d}"),
    ("seconds", "{:8.3f}"),
)


@dataclass(frozen=True)
class Summary:
    """What a solve came to. Costs are half the sum of squares, by the loss, as Ceres has them.

    Attributes:
        history: the start, and each iteration. `gradient` of the last is of the state before it where a tolerance of
            function or parameters ended the solve.
        termination: why it ended.
        converged: whether a tolerance of function, gradient or parameters ended it.
        linear_solver: the one that was used.
        cameras, points, observations, free_parameters: how many there were, in a group on all ranks; free parameters
            are the cameras'.
        behind: observations of points that are behind their camera at the end. They count, as in Ceres.
    """

    history: list[Iteration]
    termination: str
    linear_solver: str
    cameras: int
    points: int
    observations: int
    free_parameters: int
    behind: int

    @property
    def initial_cost(self) -> float:
        return self.history[0].cost

    @property
    def final_cost(self) -> float:
        return self.history[-1].cost

    @property
    def iterations(self) -> int:
        return len(self.history) - 1

    @property
    def converged(self) -> bool:
        return "_tolerance" in self.termination

    @property
    def seconds(self) -> float:
        return self.history[-1].seconds

    def __str__(self) -> str:
        root = (2 * self.final_cost / max(1, self.observations)) ** 0.5
        return (
            f"{self.cameras} cameras, {self.points} points, {self.observations} observations; {self.linear_solver}\n"
            f"cost {self.initial_cost:.6e} -> {self.final_cost:.6e} (sqrt(2 cost / observations): {root:.3g}) in "
            f"{self.iterations} iterations, {self.seconds:.3f} s\n{self.termination}"
            + (f"\n{self.behind} observations are behind their camera" if self.behind else "")
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The cost over time, with matplotlib.

        Args:
            ax: axes to draw in; new ones by default.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure(figsize=(6, 4), layout="constrained").add_subplot()
        ax.step([i.seconds for i in self.history], [i.cost for i in self.history], where="post", marker=".")
        ax.set(xlabel="seconds", ylabel="cost", yscale="log")
        ax.grid(alpha=0.3)
        return ax


def line(number: int, i: Iteration) -> str:
    """An iteration below `heading()`."""
    values = (number, i.cost, i.change, i.gradient, i.step, i.radius, i.linear_iterations, i.seconds)
    return " ".join(form.format(value) for (_, form), value in zip(TABLE, values, strict=True))


def heading() -> str:
    return " ".join(f"{name:>{len(form.format(0))}}" for name, form in TABLE)


def solve(
    problem: Problem,
    *,
    group: ProcessGroup | None = None,
    callback: Callback | None = None,
    verbose: bool = False,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """Bundle adjustment of a problem, in place: `ba_solve` with a report.

    An exception, Ctrl-C too, leaves the problem as the last accepted step made it.

    Args:
        problem: its cameras and points are changed. With model "position" this is global positioning.
        group: a process group of torch.distributed whose ranks call this together, each with all cameras (the same
            on every rank) and its own share of the points with all of their observations; point numbers are the
            rank's own. Cameras come out the same on every rank.
        callback: called with each `Iteration`, the start first; true ends the solve. With a group, ranks have to
            agree.
        verbose: print a line an iteration, as Ceres does; of a group the first rank does.
        progress: show a progress bar on a terminal instead.
        **options: those of `ba_solve` from `loss` on; `model` is the problem's.

    Returns:
        A `Summary`. Each iteration is also logged, at level DEBUG.

    Raises:
        ValueError: the problem doesn't pass its `check`.
        RuntimeError: as `ba_solve`; another rank of the group raised one of these.
        TypeError: an unknown option.
    """
    with levenberg_marquardt.refusing_together("ba_solve", group, problem.cameras):
        chosen = Options(model=problem.model, **options)
        problem.check()
    if group is not None and group.rank() > 0:  # which has nothing else to say than the first
        verbose = progress = False
    number = 0
    with progress_bar("bundle adjustment", chosen.max_iterations + 1, progress and not verbose) as advance:

        def note(i: Iteration) -> bool | None:
            nonlocal number
            text = line(number, i)
            log.debug("%s", text)
            if verbose:
                if number == 0:
                    print(heading())
                print(text, flush=True)
            advance()
            number += 1
            return None if callback is None else callback(i)

        given = problem.cameras, problem.points, problem.observations, problem.camera_index, problem.point_index
        more = problem.depth, problem.fixed_points, problem.columns, problem.positions
        result = levenberg_marquardt.run("ba_solve", *given, *more, chosen, group=group, callback=note)
    _, valid = torch.ops.effk.ba_residual(*given, model=problem.model)
    counts = torch.tensor([len(problem.points), len(valid), int((~valid).sum())], device=valid.device)
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    points, observations, behind = counts.tolist()
    summary = Summary(
        result.history,
        result.termination,
        result.linear_solver,
        problem.cameras.shape[0],
        points,
        observations,
        result.free_parameters,
        behind,
    )
    if verbose:
        print(summary)
    log.info("ba: %s", str(summary).replace("\n", "; "))
    return summary


@torch.no_grad()
def position_globally(problem: Problem, *, seed: int = 0, start: bool = True, **options: Any) -> Summary:
    """Camera centres and points of a problem from its rotations and pixels alone, in place (GLOMAP, InstantSfM).

    The pixels become directions by the model and the rotations; `gp_solve` finds centres and points, up to a shift and
    a scale, and the translations follow. `depth` and `positions` aren't used. An exception, Ctrl-C too, leaves the
    problem as the last accepted step made it, and as it was if there was none.

    Args:
        problem: rotations and intrinsics are kept; translations and points are changed, but for those that are fixed or
            that no observation is of. With several that are fixed, a random start rarely ends at the least cost.
        seed: of the random start, uniform in a cube of side 200.
        start: False begins with the centres and points that the problem has.
        **options: those of `gp_solve` and of `solve`.

    Returns:
        The `Summary` of the solve; its costs are those of directions.

    Raises:
        ValueError: a problem with model "position" (which `solve` takes); a pixel whose distortion can't be undone;
            translations that are tied, or fixed in part.
        RuntimeError: as `gp_solve`.
    """
    directions = to_directions(problem)
    cameras, points = _seen(problem.camera_index, problem.cameras), _seen(problem.point_index, problem.points)
    if directions.columns is not None:
        cameras &= directions.columns[:, 0] >= 0
    if problem.fixed_points is not None:
        points &= ~problem.fixed_points
    if start:
        draw = torch.Generator().manual_seed(seed)
        for t, free in ((directions.cameras, cameras), (directions.points, points)):
            places = 200 * (torch.rand(t.shape, generator=draw, dtype=torch.float64) - 0.5)
            t.copy_(torch.where(free[:, None], places.to(t), t))
    before = directions.cameras.clone(), directions.points.clone()
    moved = False
    try:
        summary = solve(directions, **{"loss": "huber", "loss_scale": 0.1, **options})
        moved = True
    finally:
        if moved or not all(map(torch.equal, before, (directions.cameras, directions.points))):
            turn = levenberg_marquardt.rotations(problem.cameras, problem.num_parameters)
            translations = -(turn @ directions.cameras.double()[..., None]).squeeze(-1)
            first = _rotation_columns(problem)
            problem.cameras[cameras, first : first + 3] = translations[cameras].to(problem.cameras.dtype)
            problem.points.copy_(directions.points)
    return summary


def _seen(index: Tensor, of: Tensor) -> Tensor:
    """[len(of)] bool"""
    return torch.bincount(index, minlength=len(of)) > 0


def _rotation_columns(problem: Problem) -> int:
    return 3 + problem.cameras.shape[1] - problem.num_parameters


def to_directions(problem: Problem) -> Problem:
    """The problem of model "position" for a problem's rotations, intrinsics and pixels, at its centres and points.

    Raises:
        ValueError: the problem has model "position" already; a pixel is where the distortion can't be undone; columns
            ties translations, or fixes a part of one, which fixes no centre.
    """
    if problem.model == "position":
        raise ValueError("the problem has model 'position' already")
    problem.check()
    fixed = None if problem.columns is None else _fixed_centres(problem.columns)
    index = problem.camera_index.long()
    turn = levenberg_marquardt.rotations(problem.cameras, problem.num_parameters)
    _, translation, intrinsics = reference.parts(problem.cameras, problem.num_parameters)
    centres = -(turn.mT @ translation[..., None]).squeeze(-1)
    ahead = -1.0 if problem.model == "snavely" else 1.0
    xy, undone = _undistorted(problem, intrinsics[index], ahead)
    if len(bad := (~undone).nonzero()):
        raise ValueError(f"observation {int(bad[0])} is where its camera's distortion can't be undone")
    rays = torch.cat([xy, torch.full_like(xy[:, :1], ahead)], 1)
    directions = (turn[index].mT @ torch.nn.functional.normalize(rays, dim=1)[..., None]).squeeze(-1)
    dtype = problem.cameras.dtype
    made = Problem(
        centres.to(dtype),
        problem.points.clone(),
        directions.to(dtype),
        problem.camera_index,
        problem.point_index,
        "position",
        fixed_points=problem.fixed_points,
    )
    if fixed is not None:
        made.fix_cameras(fixed)
    return made


def _fixed_centres(columns: Tensor) -> Tensor:
    """[C] bool. Rotations stay, so that a centre is fixed with the whole translation."""
    fixed = columns[:, 3:6] < 0
    if len(bad := (fixed.any(1) != fixed.all(1)).nonzero()):
        raise ValueError(f"columns fixes a part of the translation of camera {int(bad[0])}; wanted all of it, or none")
    uses = torch.bincount(columns[columns >= 0], minlength=1)
    if len(bad := ((uses[columns[:, 3:6]] > 1) & ~fixed).any(1).nonzero()):
        raise ValueError(f"columns ties the translation of camera {int(bad[0])}; wanted it free or fixed")
    return fixed.all(1)


def _undistorted(problem: Problem, intrinsics: Tensor, ahead: float) -> tuple[Tensor, Tensor]:
    """Where pixels [O, 2] would be without distortion, in the plane that is `ahead`, and which of them that is true of.

    A distortion may take several places to a pixel. Wanted is the one before the image folds over, counted from its
    middle: Newton's method goes there from the middle if no step leaves the side of the fold on which it began.
    """
    pixels = problem.observations.double()

    def project(xy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        pixel = reference.project(problem.model, torch.cat([xy, xy.new_full((1,), ahead)]), k)[0]
        return pixel, pixel

    def look(xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope, pixel = torch.func.vmap(torch.func.jacfwd(project, has_aux=True))(xy, intrinsics)
        error = pixel - pixels
        return slope, error, error.norm(dim=1)

    xy = torch.zeros_like(pixels)
    if not len(xy):
        return xy, xy.new_ones(0, dtype=torch.bool)
    slope, error, off = look(xy)
    side = torch.linalg.det(slope).sign()
    share = torch.ones_like(off)
    for _ in range(NEWTON_STEPS):
        ends = bool((off < PIXEL_TOLERANCE).all())  # with one step more, which doubles the digits
        trial = xy - share[:, None] * torch.linalg.solve_ex(slope, error[..., None])[0].squeeze(-1)
        found = look(trial)
        better = (found[2] < off) & (torch.linalg.det(found[0]) * side > 0)
        xy = torch.where(better[:, None], trial, xy)
        slope = torch.where(better[:, None, None], found[0], slope)
        error, off = torch.where(better[:, None], found[1], error), torch.where(better, found[2], off)
        share = torch.where(better, (2 * share).clamp(max=1), share / 2)
        if ends:
            break
    # A long step may have crossed two folds.
    k = dict(zip(INTRINSICS[problem.model], intrinsics.unbind(1), strict=True))
    k1, k2 = k.get("k1", k.get("k", torch.zeros_like(off))), k.get("k2", torch.zeros_like(off))
    n = xy.square().sum(1)
    n = torch.where(k2 > 0, torch.minimum(n, (-0.3 * k1 / k2).clamp(min=0)), n)  # where the radius grows least
    return xy, (off < PIXEL_TOLERANCE) & (1 + n * (3 * k1 + 5 * k2 * n) > 0)
