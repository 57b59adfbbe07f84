"""Points shared out over the ranks of a process group: the same cameras on all of them, and the same as without."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import time
from typing import Any

import pytest
import torch
from effk.ba import Problem, solve
from torch import Tensor

from ..kit.ranks import Groups, needs_gloo, on_ranks
from ..kit.tensors import same_bits
from . import solver_strategies as kit
from .solver_strategies import EXACT, SOLVERS, scene

pytestmark = [pytest.mark.xdist_group("ba_group"), needs_gloo]  # of one run
SIZES = (1, 2, 4)
SHARES = {1: [1.0], 2: [0.7, 0.3], 4: [0.5, 0.0, 0.2, 0.3]}  # of the points; one rank has none
KINDS = ("plain", "more")


def problem_of(kind: str) -> tuple[Problem, dict[str, Any]]:
    """And options. "more" is everything that cameras may have, and depths."""
    problem, truth = scene(6, 50, kind="street", observations=180, seed=3, perturbation=0.003)
    if kind == "plain":
        return problem, {"loss": "huber", "loss_scale": 2.0}
    kit.shared_intrinsics(problem, truth, 0.5)
    problem.fix_cameras(2)
    problem.positions = kit.centres(truth) + 0.01
    problem.positions[4] = math.nan
    problem.fixed_points = torch.arange(50) % 7 == 0
    problem.depth = torch.full((180,), 5.0, dtype=torch.float64)
    problem.depth[::2] = math.nan
    return problem, {"depth_weight": 3.0, "position_weight": 20.0}


def shares(size: int) -> list[slice]:
    """Of 50 points."""
    ends = [0, *(round(50 * sum(SHARES[size][: i + 1])) for i in range(size))]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def share_of(problem: Problem, points: slice) -> Problem:
    own = (problem.point_index >= points.start) & (problem.point_index < points.stop)
    return Problem(
        problem.cameras.clone(),
        problem.points[points].clone(),
        problem.observations[own],
        problem.camera_index[own],
        problem.point_index[own] - points.start,
        problem.model,
        depth=None if problem.depth is None else problem.depth[own],
        fixed_points=None if problem.fixed_points is None else problem.fixed_points[points],
        columns=problem.columns,
        positions=problem.positions,
    )


def solved(problem: Problem, options: dict[str, Any], group: Any = None) -> dict[str, Any]:
    summary = solve(problem, group=group, max_iterations=12, **options)
    return {
        "cameras": problem.cameras,
        "points": problem.points,
        "history": torch.tensor(summary.history, dtype=torch.float64)[:, :6],
        "termination": summary.termination,
        "counts": (summary.cameras, summary.points, summary.observations, summary.free_parameters, summary.behind),
    }


def rank_of_all(rank: int, groups: Groups) -> dict[Any, Any]:
    """One of four processes; smaller groups are the first of them."""
    found: dict[Any, Any] = {}
    for size in SIZES:
        if rank >= size:
            continue
        for kind in KINDS:
            for name in SOLVERS:
                problem, options = problem_of(kind)
                mine = share_of(problem, shares(size)[rank])
                found[size, kind, name] = solved(mine, {**options, **EXACT, "linear_solver": name}, groups[size])
    # Of two, one wants to stop, or has slept, or has what isn't finite, or another camera.
    if rank < 2:
        problem, options = problem_of("plain")
        rows: list[float] = []

        def note(row: Any) -> bool:
            rows.append(row.cost)
            return rank == 1 and len(rows) == 3

        found["stopped"] = solve(share_of(problem, shares(2)[rank]), group=groups[2], callback=note).termination
        found["rows"] = len(rows)
        late = solve(
            share_of(problem, shares(2)[rank]),
            group=groups[2],
            max_seconds=0.5,
            callback=lambda _: time.sleep(0.6 * rank),
        )
        found["late"] = (late.termination, late.iterations)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            solve(share_of(problem, shares(2)[rank]), group=groups[2], verbose=True, max_iterations=3)
        found["printed"] = len(printed.getvalue().splitlines())
        last = problem.clone()  # whose last observation, of the second rank, is of a point in the camera's plane
        camera, point = int(last.camera_index[-1]), int(last.point_index[-1])
        last.cameras[camera, :6] = torch.cat([torch.zeros(3), -last.points[point]])
        for name, options in {
            "points": {},
            "cameras": {},
            "loss": {},
            "option": {},
            "plane": {"loss": "tukey"},
        }.items():
            broken = share_of(last if name == "plane" else problem, shares(2)[rank])
            if rank == 1:
                if name in ("points", "cameras"):
                    getattr(broken, name)[3, 0] = math.nan if name == "points" else 0.1
                options = {"loss": {"loss": "l2"}, "option": {"losss": "huber"}}.get(name, options)
            try:
                solve(broken, group=groups[2], **options)
            except (RuntimeError, TypeError, ValueError) as error:
                found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank came to."""
    return on_ranks(rank_of_all, tmp_path_factory.mktemp("group"), SIZES)


@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_agree_with_each_other_and_with_one_alone(
    found: list[dict[Any, Any]], size: int, kind: str, linear_solver: str
) -> None:
    """Cameras to the bit; the same as without a group but for the order of sums, and to the bit with one rank."""
    results = [found[rank][size, kind, linear_solver] for rank in range(size)]
    problem, options = problem_of(kind)
    alone = solved(problem, {**options, **EXACT, "linear_solver": linear_solver})
    assert alone["history"][0, 0] > 10 * alone["history"][-1, 0] > 0
    for result in results:
        assert same_bits(result["cameras"], results[0]["cameras"])
        assert same_bits(result["history"], results[0]["history"])
        assert result["termination"] == results[0]["termination"]
    points = torch.cat([result["points"] for result in results])
    if size == 1:
        assert same_bits(points, alone["points"]) and same_bits(results[0]["cameras"], alone["cameras"])
        assert same_bits(results[0]["history"], alone["history"])
    costs: list[Tensor] = [r["history"][:, 0] for r in (results[0], alone)]
    first = float(costs[1][0])
    assert float(costs[0][0]) == pytest.approx(first, rel=1e-12)
    assert float(costs[0][1]) == pytest.approx(float(costs[1][1]), rel=1e-9, abs=1e-9 * first)
    assert float(costs[0][-1]) == pytest.approx(float(costs[1][-1]), rel=1e-6)
    if len(costs[0]) == len(costs[1]):
        torch.testing.assert_close(points, alone["points"], rtol=1e-3, atol=1e-3)
    assert alone["counts"][:3] == (6, 50, 180) and [result["counts"] for result in results] == [alone["counts"]] * size


def test_one_rank_stops_all(found: list[dict[Any, Any]]) -> None:
    assert [found[rank]["rows"] for rank in range(2)] == [3, 3]
    assert [found[rank]["stopped"] for rank in range(2)] == ["stopped by the callback"] * 2


def test_time_is_over_for_all(found: list[dict[Any, Any]]) -> None:
    """At the row before which one of them had slept: the seconds of the other may or may not have been over."""
    (a, i), (b, j) = (found[rank]["late"] for rank in range(2))
    assert i == j == 1 and a == b and "max_seconds" in a


def test_all_refuse_what_one_has(found: list[dict[Any, Any]]) -> None:
    """Rather than one, for which the others would wait; and that one knows what it is."""
    for name, why in (("points", "points isn't finite in row 3"), ("loss", "loss is 'l2'"), ("option", "losss")):
        assert found[0][name] == "effk::ba_solve: rank 1 of the group refused its arguments" and why in found[1][name]
    assert all("effk::ba_solve: cameras differ" in found[rank]["cameras"] for rank in range(2))
    assert "residuals of another rank" in found[0]["plane"] and "can't see point" in found[1]["plane"]


def test_first_rank_prints_for_all(found: list[dict[Any, Any]]) -> None:
    assert [found[rank]["printed"] for rank in range(2)] == [8, 0]  # a heading, four rows and three lines of summary
