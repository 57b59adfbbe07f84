"""The solver: what it ends at, each of its iterations, how it is stopped, what stays as it was, and bad input."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import effk
import pytest
import torch
from effk.ba import Problem, Summary, solve
from effk.ba import levenberg_marquardt as lm
from effk.ba.levenberg_marquardt import Iteration
from hypothesis import given as given_case
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from ..kit.tensors import generator, same_bits
from . import solver_strategies as kit
from .solver_strategies import EXACT, SOLVERS, Dense, cost_of, given, scene
from .strategies import LOSSES, PERSPECTIVE, SEEDS

UNIT = 2.0**-53
every_solver = pytest.mark.parametrize("linear_solver", SOLVERS)
every_model = pytest.mark.parametrize("model", PERSPECTIVE)


def rejected(history: list[Iteration]) -> list[bool]:
    """Of each iteration."""
    return [after.cost == before.cost for before, after in itertools.pairwise(history)]


def table(summary: Summary) -> Tensor:
    """All of the history but the time."""
    return torch.tensor(summary.history, dtype=torch.float64)[:, :6]


def by_op(problem: Problem, **options: Any) -> Tensor:
    """A solve that only the op has a look at beforehand."""
    more = problem.depth, problem.fixed_points, problem.columns, problem.positions
    return torch.ops.effk.ba_solve(*given(problem), *more, model=problem.model, **options)


def permuted(problem: Problem, seed: int = 0) -> Problem:
    order = torch.randperm(len(problem.observations), generator=generator(seed))
    problem = problem.clone()
    changed = {name: getattr(problem, name)[order] for name in ("observations", "camera_index", "point_index")}
    return replace(problem, **changed, depth=None if problem.depth is None else problem.depth[order])


def with_depths(problem: Problem, truth: Problem) -> None:
    """Gives the problem true depths, but for every fifth one."""
    first = kit.rotation_columns(truth)
    rotation = kit.matrix_of(truth.cameras[:, :first])
    index = truth.camera_index.long()
    y = (rotation[index] @ truth.points[truth.point_index.long(), :, None])[..., 0] + truth.cameras[
        index, first : first + 3
    ]
    problem.depth = (-y[:, 2] if problem.model == "snavely" else y[:, 2]).clone()
    problem.depth[::5] = math.nan


# What it ends at -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    model: str
    quaternion: bool
    free: str
    loss: str
    seed: int

    def make(self) -> Problem:
        problem, truth = scene(4, 15, model=self.model, seed=self.seed, outliers=0.05 if self.loss != "trivial" else 0)
        problem = kit.as_quaternions(problem) if self.quaternion else kit.as_vectors(problem)
        if self.free == "shared":
            truth = kit.as_quaternions(truth) if self.quaternion else kit.as_vectors(truth)
            kit.shared_intrinsics(problem, truth, 0.5)
        if self.free == "fixed":
            problem.fix_cameras(0, intrinsics=True)
            problem.fix_cameras(1, pose=False, intrinsics=True)
            problem.fixed_points = torch.arange(15) % 4 == 0
        if self.free == "positions":
            problem.positions = kit.centres(truth)
            problem.positions[2] = math.nan
        return problem

    @property
    def options(self) -> dict[str, Any]:
        return {"loss": self.loss, "loss_scale": 2.0, "position_weight": 300.0}


def small(**kinds: tuple[Any, ...]) -> st.SearchStrategy[Small]:
    choices = {
        "model": PERSPECTIVE,
        "quaternion": (False, True),
        "free": ("all", "fixed", "shared", "positions"),
        "loss": LOSSES[:4],
    } | kinds
    return st.builds(Small, *(st.sampled_from(c) for c in choices.values()), SEEDS)


@given_case(small())
@settings(max_examples=25)
def test_linear_solvers_make_the_same_steps(case: Small) -> None:
    """Damping leaves the system a condition of no more than the radius times its size, some 1e7, so that rounding makes
    steps differ by 1e-9 of the first one, and what they leave of the cost by that of what was there at the start."""
    rows = {}
    for name in SOLVERS:
        summary = solve(case.make(), linear_solver=name, max_iterations=3, **case.options, **EXACT)
        assert summary.linear_solver == name
        cost, _, gradient, _, radius = table(summary)[0, :5].tolist()
        rows[name] = table(summary)[:, :5] / torch.tensor([cost, cost, gradient, summary.history[1].step, radius])
        counts = [i.linear_iterations for i in summary.history[1:]]
        assert all(c > 1 for c in counts) if name == "iterative_schur" else counts == [1] * len(counts)
    torch.testing.assert_close(rows["sparse_schur"], rows["dense_schur"], rtol=1e-5, atol=1e-8)
    # Conjugate gradients end where rounding hides what a step decreases: its error is the root of that.
    torch.testing.assert_close(rows["iterative_schur"][:2], rows["dense_schur"][:2], rtol=1e-3, atol=1e-6)


@given_case(small(free=("known",), loss=("trivial", "huber")))
@settings(max_examples=15)
def test_linear_solvers_end_at_the_same_cost(case: Small) -> None:
    """Rough steps of conjugate gradients end, too, where the gradient vanishes. The last of them may have left more
    than they changed, but for a change of 1e-13 not a millionth."""
    problem, truth = scene(4, 15, model=case.model, seed=case.seed)
    problem.cameras[:, -problem.num_parameters + 6 :] = truth.cameras[:, -problem.num_parameters + 6 :]
    problem.fix_intrinsics()
    options = {**case.options, "function_tolerance": 1e-13, "parameter_tolerance": 0.0, "max_iterations": 300}
    costs = [solve(problem.clone(), linear_solver=name, **options).final_cost for name in ("auto", *SOLVERS)]
    assert costs[0] == costs[1]  # few cameras: auto is dense
    assert costs[2] == pytest.approx(costs[0], rel=1e-9)
    assert costs[3] == pytest.approx(costs[0], rel=1e-6)


def test_auto_goes_by_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = scene(kind="street", cameras=6, points=30, observations=80)
    assert solve(problem.clone(), max_iterations=1).linear_solver == "dense_schur"
    monkeypatch.setattr(lm, "MOST_DENSE", 53)
    assert solve(problem.clone(), max_iterations=1).linear_solver == "sparse_schur"
    monkeypatch.setattr(lm, "MOST_FLOPS", 1.0)
    assert solve(problem.clone(), max_iterations=1).linear_solver == "iterative_schur"
    monkeypatch.setattr(lm, "MOST_FLOPS", 1e11)
    monkeypatch.setattr(lm, "MOST_SPARSE", 5)
    assert solve(problem.clone(), max_iterations=1).linear_solver == "iterative_schur"
    problem.fix_cameras(0, intrinsics=True)  # what counts are free parameters
    monkeypatch.setattr(lm, "MOST_DENSE", 45)
    monkeypatch.setattr(lm, "MOST_SPARSE", 6)
    assert solve(problem.clone(), max_iterations=1).linear_solver == "dense_schur"


@pytest.mark.parametrize(
    "kind", [*LOSSES, "quaternion", "intrinsics", "depth", "positions", "shared", "fixed", "position"]
)
def test_scipy_finds_the_same_minimum(kind: str) -> None:
    """By differences and another trust region. Both go on until nothing changes, so that costs agree to far more than
    a millionth; a missing or wrong term would be seen in the first digits."""
    loss = kind if kind in LOSSES else "trivial"
    problem, truth = scene(3, 9, seed=5, perturbation=0.003)
    problem.cameras[:, 6:] = truth.cameras[:, 6:]
    if loss != "trivial":
        problem.observations[::6] += torch.tensor([6.0, -4.0], dtype=torch.float64)
    options: dict[str, Any] = {"loss": loss, "loss_scale": 30.0 if kind == "tukey" else 1.5}
    if kind == "quaternion":
        problem = kit.as_quaternions(problem)
    if kind == "depth":
        with_depths(problem, truth)
        assert problem.depth is not None
        problem.depth *= 1 + 0.02 * torch.randn(len(problem.depth), generator=generator(0), dtype=torch.float64)
    if kind == "positions":
        problem.positions = kit.centres(truth) + 0.1 * torch.randn(3, 3, generator=generator(0), dtype=torch.float64)
        problem.positions[1, 2] = math.nan
        options["position_weight"] = 3.0
    if kind == "shared":
        kit.shared_intrinsics(problem, truth, 0.5)
    elif kind == "fixed":
        problem.fix_cameras(0)
    elif kind == "position":
        problem = _directions(problem)
        options["loss_scale"] = 0.1
    elif kind != "intrinsics":
        problem.fix_intrinsics()
    numbers = torch.arange(problem.cameras.numel()).view_as(problem.cameras)  # of cameras, not tangents
    if problem.columns is not None:
        free, width = problem.columns.flip(1), problem.num_parameters - 3
        numbers[:, -width:] = torch.where(free[:, :width] < 0, -1, 1000 + free[:, :width]).flip(1)
        numbers[:, :-width] = torch.where(problem.columns[:, :1] < 0, -1, numbers[:, :-width])
        numbers = numbers.unique(return_inverse=True)[1] - int((numbers < 0).any())
    theirs = kit.scipy_minimum(problem, columns=numbers, **options)
    summary = solve(problem, function_tolerance=1e-15, parameter_tolerance=1e-14, max_iterations=500, **options)
    assert summary.initial_cost > 1.5 * summary.final_cost > 0
    assert summary.final_cost == pytest.approx(theirs, rel=1e-7)


def _directions(problem: Problem) -> Problem:
    """Centres off by 0.3, and directions off by 0.01."""
    from effk.ba.solve import to_directions

    made = to_directions(problem)
    for t, size in ((made.cameras, 0.3), (made.observations, 0.01)):
        t += size * torch.randn(t.shape, generator=generator(1), dtype=torch.float64)
    return made


@every_model
@pytest.mark.parametrize("quaternion", [False, True])
def test_truth_is_found(model: str, quaternion: bool) -> None:
    """Without noise up to a similarity. With noise of s pixels, 2 cost / s^2 is chi-squared with the rows less the
    parameters, but for the seven of a similarity; and so is how much better than the truth it is, with the rest. Six
    standard deviations of that happen in one of 1e8 scenes.

    Intrinsics are shared: six cameras whose fx and fy may be anything know the scene up to less than a similarity.
    """
    problem, truth = scene(6, 40, model=model, seed=2)
    if quaternion:
        problem, truth = kit.as_quaternions(problem), kit.as_quaternions(truth)
    else:
        problem, truth = kit.as_vectors(problem), kit.as_vectors(truth)
    kit.shared_intrinsics(problem, truth, 0.0)
    noisy = problem.clone()
    assert kit.away(problem, truth) > 1e-3
    options = {"max_iterations": 300, "parameter_tolerance": 1e-13, "function_tolerance": 1e-9}
    summary = solve(problem, **options)
    assert summary.final_cost < 1e-12 and kit.away(problem, truth) < 1e-6, summary
    sigma = 0.5
    kit.observe_again(noisy, truth, sigma)
    parameters = 6 * 6 + noisy.num_parameters - 6 + 3 * 40 - 7
    left = 2 * 240 - parameters
    found = solve(noisy, **options).final_cost
    of_truth = cost_of(truth)
    assert abs(2 * found / sigma**2 - left) < 6 * math.sqrt(2 * left)
    assert abs(2 * (of_truth - found) / sigma**2 - parameters) < 6 * math.sqrt(2 * parameters)


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_losses_resist_outliers(loss: str) -> None:
    """A tenth of the observations is anywhere, hundreds of pixels off, and squares weigh them most."""
    problem, truth = scene(6, 50, outliers=0.1, seed=1, perturbation=0.003)
    plain = problem.clone()
    solve(plain)
    summary = solve(problem, loss=loss, loss_scale=2.0 if loss != "tukey" else 20.0, max_iterations=300)
    assert kit.away(problem, truth) < 0.2 * kit.away(plain, truth)
    assert cost_of(problem) > cost_of(plain)
    # The others fit nearly as well as the noise lets them, half a pixel each way.
    good = (problem.observations - kit.seen_by(truth)).norm(dim=1) < 5
    assert 0.85 < good.double().mean() < 0.95
    off = (problem.observations - kit.seen_by(problem)).norm(dim=1)[good]
    assert off.square().mean().sqrt() < 2 * 0.5 * math.sqrt(2), summary


def test_depths_fix_the_scale() -> None:
    """And nothing else does: a scene of 1.3 times the size stays one."""
    problem, truth = scene(6, 40, seed=3)
    for t in (problem.points, problem.cameras[:, 3:6]):
        t *= 1.3
    without = problem.clone()
    with_depths(problem, truth)

    def size(p: Problem) -> float:
        return kit.similarity(torch.cat([p.points, kit.centres(p)]), torch.cat([truth.points, kit.centres(truth)]))[0]

    solve(problem, depth_weight=1e4)
    solve(without)
    assert size(problem) == pytest.approx(1, abs=1e-3)
    assert size(without) == pytest.approx(1 / 1.3, rel=0.05)


def test_a_depth_that_is_none_is_none() -> None:
    """The same bits as without, where there isn't one; but a row."""
    problem, _ = scene(4, 20)
    other = problem.clone()
    other.depth = torch.full((80,), math.nan, dtype=torch.float64)
    other.depth[::2] = -1.0
    other.depth[::3] = 0.0
    a, b = solve(problem, max_iterations=5), solve(other, max_iterations=5)
    torch.testing.assert_close(table(a), table(b), rtol=1e-9, atol=0)


def test_positions_pull_cameras() -> None:
    """All cameras to where they are known to be, and with them the whole scene; but one that isn't known to be."""
    problem, truth = scene(6, 40, seed=4)
    known = kit.centres(truth).clone()
    known[5] = math.nan
    for p in (problem, truth):  # elsewhere, and of another size
        p.points *= 3
        kit.with_centres(p, 3 * kit.centres(p) + 5)
        p.points += 5
    problem.positions = known
    summary = solve(problem, position_weight=1e4, function_tolerance=1e-12)
    found = kit.centres(problem)
    assert (found - known)[:5].norm() < 1e-3 * known[:5].norm()
    back = (kit.centres(truth)[5] - 5) / 3
    assert (found[5] - back).norm() < 0.01 * back.norm()
    assert summary.final_cost == pytest.approx(
        cost_of(problem) + 0.5 * 1e8 * float((found - known)[:5].square().sum()), rel=1e-9
    )


@pytest.mark.parametrize("quaternion", [False, True])
def test_derivatives_of_positions(quaternion: bool) -> None:
    """Against central differences of the prior's cost and rows along the tangent."""
    problem, _ = scene(4, 3, seed=6)
    problem = kit.as_quaternions(problem) if quaternion else problem
    known = kit.centres(problem) + torch.randn(4, 3, generator=generator(2), dtype=torch.float64)
    known[2, 0] = math.nan
    prior = lm.PositionPrior(known, 2.0, problem.num_parameters)
    rows, jacobian = prior.linearize(problem.cameras)
    wanted = torch.where(known.isnan().any(1, keepdim=True), 0.0, 2.0 * (kit.centres(problem) - known))
    torch.testing.assert_close(rows, wanted, rtol=1e-12, atol=1e-12)
    assert float(prior.cost(problem.cameras)) == pytest.approx(0.5 * float(rows.square().sum()), rel=1e-12)
    h, none = 1e-5, torch.zeros(3, 3, dtype=torch.float64)
    for i in range(6):
        step = torch.zeros(4, 9, dtype=torch.float64)
        step[:, i] = h
        ahead, behind = (
            prior.residual(effk.ba.ops.ba_retract(problem.cameras, problem.points, s, none)[0])[0]
            for s in (step, -step)
        )
        # The third derivative is at most the centre's distance, some 10, times h^2; and rounding is 1e-15 over h.
        torch.testing.assert_close((ahead - behind) / (2 * h), jacobian[..., i], rtol=0, atol=1e-8)


# Each iteration ------------------------------------------------------------------------------------------------------


def states_of(problem: Problem, **options: Any) -> tuple[Summary, list[Problem]]:
    """The problem at each row of the history."""
    states: list[Problem] = []
    summary = solve(problem, callback=lambda _: states.append(problem.clone()), **options)
    assert len(states) == len(summary.history)
    return summary, states


@every_solver
@given_case(small(loss=LOSSES[:4]), st.sampled_from((0.01, 0.2)), st.sampled_from((1e4, 1e9)))
@settings(max_examples=8)
def test_accepted_costs_fall_and_are_true(linear_solver: str, case: Small, wrong: float, radius: float) -> None:
    """A row's cost is that of the problem at that moment, but for the order of summation."""
    problem = case.make()
    problem.points += wrong * torch.randn(problem.points.shape, generator=generator(case.seed), dtype=torch.float64)
    summary, states = states_of(
        permuted(problem), linear_solver=linear_solver, initial_radius=radius, max_iterations=15, **case.options
    )
    costs = [i.cost for i in summary.history]
    assert all(after <= before for before, after in itertools.pairwise(costs))
    options = {k: v for k, v in case.options.items() if k != "position_weight"}
    wanted = [cost_of(p, **options) + kit.cost_of_positions(p, 300.0) for p in states]
    assert costs == pytest.approx(wanted, rel=1e-12)
    for i, was_rejected in enumerate(rejected(summary.history)):
        assert same_bits(states[i].cameras, states[i + 1].cameras) == was_rejected or case.free == "fixed"
        assert same_bits(states[i].points, states[i + 1].points) >= was_rejected
        assert was_rejected or summary.history[i + 1].change == pytest.approx(costs[i] - costs[i + 1], rel=1e-12)


FAR = [("snavely", 0.2, 0, 1e10), ("snavely", 0.3, 3, 1e4), ("opencv", 0.1, 1, 1e10), ("simple_pinhole", 0.3, 1, 1e4)]


@pytest.mark.parametrize(("model", "perturbation", "seed", "radius"), FAR)
@pytest.mark.parametrize("kind", ["free", "fixed", "huber", "positions"])
def test_iterations_are_those_of_dense_equations(
    model: str, perturbation: float, seed: int, radius: float, kind: str
) -> None:
    """From each state, with the row's radius: damped by the diagonal as it is there, however many steps were rejected.

    As the radius grows, what rounding leaves of a step in directions that nothing tells of (those of a similarity) is
    1e-16 of the largest, times the radius: steps are compared up to where that is small, costs always.
    """
    problem, truth = scene(4, 12, model=model, perturbation=perturbation, seed=seed)
    options: dict[str, Any] = {"loss": "huber", "loss_scale": 20.0} if kind == "huber" else {}
    if kind == "positions":
        problem.positions = kit.centres(truth)
        options["position_weight"] = 300.0
    if kind == "fixed":
        problem.fix_cameras(1)
        problem.fixed_points = torch.arange(12) == 5
    summary, states = states_of(problem, max_iterations=25, initial_radius=radius, function_tolerance=0.0, **options)
    in_a_row = most = 0
    for i, (row, following) in enumerate(zip(summary.history, summary.history[1:], strict=False)):
        dense = Dense(states[i], **options)
        assert row.cost == pytest.approx(dense.cost, rel=1e-12)
        # Of residuals, which are differences of pixels up to some 2000.
        rounding = 16 * UNIT * float((dense.j.abs().T @ (dense.r.abs() + 2000)).max())
        assert row.gradient == pytest.approx(float(dense.gradient.abs().max()), rel=1e-9, abs=rounding)
        wanted, in_a_row = dense.iteration(row, in_a_row)
        most = max(most, in_a_row)
        for name in ("cost", "change", "radius", "step"):
            if name == "cost" or row.radius <= 1e8:
                assert getattr(following, name) == pytest.approx(getattr(wanted, name), rel=1e-4), (i, name)
    assert most >= 2 or kind == "positions", "no two steps in a row were rejected"


def test_radius_after_rejected_steps() -> None:
    """Each takes twice as much of it as the one before, and after an accepted one it starts anew."""
    problem, _ = scene(5, 25, perturbation=0.3, seed=3)
    history = solve(problem, max_iterations=40).history
    divisor, seen = 2.0, 0
    for before, after, was_rejected in zip(history, history[1:], rejected(history), strict=False):
        if was_rejected:
            assert after.radius == before.radius / divisor
            divisor *= 2
            seen += 1
        else:
            assert after.radius > before.radius / 2 or after.change > 0
            assert after.radius <= 3 * before.radius * (1 + 4 * UNIT)
            divisor = 2.0
    assert seen > 5


@every_solver
def test_small_radius_gives_the_scaled_gradient_step(linear_solver: str) -> None:
    """(H + D / r)^-1 g = r D^-1 g, but for r D^-1 H of it, whose norm is at most r times the number of parameters."""
    problem, _ = scene(5, 25, model="radial")
    radius, before = 1e-6, problem.clone()
    _, g, h, gp, hp = effk.ba.build(*given(problem), model="radial")
    step = [-radius * a / b.diagonal(dim1=1, dim2=2).clamp(min=1e-6) for a, b in ((g, h), (gp, hp))]
    norm = math.sqrt(sum(float(s.square().sum()) for s in step))
    row = solve(problem, linear_solver=linear_solver, initial_radius=radius, max_iterations=1, **EXACT).history[1]
    share = radius * (5 * 11 + 25 * 3)
    assert row.step == pytest.approx(norm, rel=2 * share)
    cameras, points = effk.ba.ops.ba_retract(before.cameras, before.points, *step, model="radial")
    for found, wanted, old in ((problem.cameras, cameras, before.cameras), (problem.points, points, before.points)):
        assert bool(((found - wanted).abs() <= 2 * share * norm + 8 * UNIT * old.abs()).all())
        assert bool((found != old).any())


@given_case(small(), st.booleans())
@settings(max_examples=10)
def test_same_bits_twice(case: Small, iterative: bool) -> None:
    runs = []
    for _ in range(2):
        problem = case.make()
        summary = solve(problem, linear_solver="iterative_schur" if iterative else "sparse_schur", **case.options)
        runs.append((problem.cameras, problem.points, table(summary)))
    assert all(map(same_bits, *runs))


@every_solver
def test_order_of_observations(linear_solver: str) -> None:
    problem, _ = scene(6, 40, observations=120)
    with_depths(problem, problem)
    other = permuted(problem)
    assert not torch.equal(other.point_index, problem.point_index)
    kept = other.clone()
    options: dict[str, Any] = {"linear_solver": linear_solver, "loss": "huber", "depth_weight": 10.0}
    a, b = solve(problem, **options), solve(other, **options)
    torch.testing.assert_close(table(a), table(b), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other.points, problem.points, rtol=1e-6, atol=1e-6)
    for name in ("observations", "camera_index", "point_index", "depth"):
        assert same_bits(getattr(other, name), getattr(kept, name)), name


@pytest.mark.parametrize("model", ["snavely", "opencv"])
def test_float32(model: str) -> None:
    """Parameters, and so residuals, are off by a rounding of each number times the derivative by it.

    By the triangle inequality of norms, the root of the cost is off by no more than half the norm of that. Three
    roundings: of the problem, of the minimum, and of what is too small a step from there.
    """
    problem, _ = scene(6, 40, model=model, seed=7)
    narrow = problem.to(torch.float32)
    double = solve(problem)
    single = solve(narrow)
    assert narrow.cameras.dtype == narrow.points.dtype == torch.float32
    _, of_camera, of_point, _ = effk.ba.jacobian(*given(problem), model=model)
    camera, point = problem.camera_index.long(), problem.point_index.long()
    size = problem.cameras[:, -problem.num_parameters :].abs()[camera]
    size[:, :3] = 1.0 if problem.cameras.shape[1] > problem.num_parameters else size[:, :3]
    moved = (of_camera.abs() @ size[..., None])[..., 0] + (of_point.abs() @ problem.points[point].abs()[..., None])[
        ..., 0
    ]
    off = 2.0**-24 * (moved + problem.observations.abs()).norm()
    limit = (math.sqrt(double.final_cost * (1 + 1e-6)) + 3 * float(off) / math.sqrt(2)) ** 2
    assert double.final_cost * (1 - 1e-3) < single.final_cost < limit
    assert limit < 1.05 * double.final_cost  # or this says nothing
    assert cost_of(narrow) == pytest.approx(single.final_cost, rel=1e-12)  # that of what is stored


# How it ends ---------------------------------------------------------------------------------------------------------


def test_function_tolerance() -> None:
    """Of the cost before the step; where it is far from small."""
    problem, _ = scene(5, 25, perturbation=0.3, seed=1)
    summary = solve(problem, function_tolerance=0.1)
    shares = [abs(after.change) / before.cost for before, after in itertools.pairwise(summary.history)]
    assert summary.termination.startswith("function_tolerance") and summary.converged
    assert shares[-1] <= 0.1 < min(shares[:-1]) and summary.final_cost > 1e3
    assert f"the relative change is {shares[-1]:.2e}" in summary.termination


def test_gradient_tolerance() -> None:
    problem, _ = scene()
    summary = solve(problem.clone(), gradient_tolerance=100.0)
    gradients = [i.gradient for i in summary.history]
    assert summary.termination.startswith("gradient_tolerance") and summary.converged
    assert gradients[-1] <= 100.0 < min(gradients[:-1])
    before = problem.clone()
    at_once = solve(problem, gradient_tolerance=1e9)
    assert at_once.iterations == 0 and at_once.converged
    assert same_bits(problem.cameras, before.cameras) and same_bits(problem.points, before.points)


def test_parameter_tolerance() -> None:
    problem, _ = scene()
    states: list[float] = []

    def note(_: Iteration) -> None:
        states.append(math.sqrt(float(problem.cameras.square().sum() + problem.points.square().sum())))

    summary = solve(problem, parameter_tolerance=1e-4, function_tolerance=0.0, callback=note)
    shares = [i.step / size for i, size in zip(summary.history[1:], states, strict=False)]
    assert summary.termination.startswith("parameter_tolerance") and summary.converged
    assert shares[-1] <= 1.0001e-4 and min(shares[:-1]) > 1e-4


@pytest.mark.parametrize("most", [0, 1, 3])
def test_max_iterations(most: int) -> None:
    problem, _ = scene(perturbation=0.1)
    before = problem.clone()
    summary = solve(problem, max_iterations=most, function_tolerance=0.0)
    assert summary.iterations == most and "max_iterations" in summary.termination and not summary.converged
    assert same_bits(problem.points, before.points) == (most == 0)
    assert same_bits(problem.cameras, before.cameras) == (most == 0)


def test_max_seconds() -> None:
    problem, _ = scene(perturbation=0.1)
    before = problem.clone()
    summary = solve(problem, max_seconds=0)
    assert summary.iterations == 0 and "max_seconds" in summary.termination and not summary.converged
    assert same_bits(problem.points, before.points)
    # Time that the callback takes counts.
    late = solve(problem, max_seconds=1.0, callback=lambda _: time.sleep(1.01))
    assert late.iterations == 1 and "max_seconds" in late.termination
    seconds = [i.seconds for i in late.history]
    assert 0 <= seconds[0] < 1 < seconds[1] == late.seconds
    assert solve(problem, max_seconds=1e6).converged


@pytest.mark.parametrize("at", [0, 2])
def test_callback_stops(at: int) -> None:
    problem, _ = scene(perturbation=0.1)
    rows: list[Iteration] = []

    def note(row: Iteration) -> bool:
        rows.append(row)
        return len(rows) > at

    summary = solve(problem, callback=note)
    assert summary.history == rows and len(rows) == at + 1
    assert summary.termination == "stopped by the callback" and not summary.converged
    assert cost_of(problem) == pytest.approx(rows[-1].cost, rel=1e-12)


class MyError(Exception):
    pass


@pytest.mark.parametrize("error", [MyError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_callback_raises(error: type[BaseException], at: int) -> None:
    """The problem is what the row that was handed over says; here with some rejected steps before it."""
    problem, _ = scene(5, 25, perturbation=0.2)
    rows: list[Iteration] = []

    def note(row: Iteration) -> None:
        rows.append(row)
        if len(rows) > at:
            raise error

    with pytest.raises(error):
        solve(problem, callback=note)
    assert len(rows) == at + 1
    assert cost_of(problem) == pytest.approx(rows[-1].cost, rel=1e-12)


@pytest.mark.parametrize("where", ["linearize", "product", "backsubstitute", "cost", "norm"])
def test_interrupted_anywhere(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves cameras and points that belong together, of the last step that was accepted."""
    options: dict[str, Any] = {"linear_solver": "iterative_schur", "max_iterations": 8, "initial_radius": 1e9}
    problem, _ = scene(5, 25, perturbation=0.2)
    _, states = states_of(problem.clone(), **options)
    original, calls = getattr(lm.Steps, where), 0
    reached = set()
    for last in range(1, 30, 3):
        calls = 0

        def interrupted(self: lm.Steps, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:  # noqa: B023
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(lm.Steps, where, interrupted)
        rows: list[Iteration] = []
        left = problem.clone()
        try:
            solve(left, callback=rows.append, **options)
        except KeyboardInterrupt:
            same = [same_bits(left.cameras, s.cameras) and same_bits(left.points, s.points) for s in states]
            assert any(same)
            # That of the last row, or the next one.
            assert any(same[max(0, len(rows) - 1) : len(rows) + 1])
            reached.add(len(rows))
    assert len(reached) > 1


def test_failure_to_compute_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five in a row end it, and nothing has changed."""
    problem, _ = scene()
    before = problem.clone()
    broken = lambda self, *_: (torch.full((5, 9), math.nan, dtype=torch.float64), 1)  # noqa: E731
    monkeypatch.setattr(lm.DenseSchur, "solve", broken)
    summary = solve(problem)
    assert summary.iterations == 5 and summary.termination.startswith("failure") and not summary.converged
    assert summary.final_cost == summary.initial_cost
    assert same_bits(problem.cameras, before.cameras) and same_bits(problem.points, before.points)
    # Damping grows in between.
    assert [i.radius for i in summary.history] == [1e4 / 2**k for k in (0, 1, 3, 6, 10, 15)]


# What stays ----------------------------------------------------------------------------------------------------------


@every_solver
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_fixed_stays_to_the_bit(linear_solver: str, model: str, dtype: torch.dtype) -> None:
    problem, _ = scene(5, 25, model=model, dtype=dtype)
    problem.fixed_points = torch.arange(25) % 3 == 0
    problem.fix_cameras([0, 2], intrinsics=True)
    problem.fix_cameras(3, pose=False, intrinsics=True)
    problem.fix_cameras(4)
    before = problem.clone()
    summary = solve(problem, linear_solver=linear_solver, max_iterations=5)
    assert summary.final_cost < 0.9 * summary.initial_cost
    assert summary.free_parameters == problem.num_parameters + 6 + problem.num_parameters - 6
    still, poses = problem.fixed_points, kit.rotation_columns(problem) + 3
    assert same_bits(problem.points[still], before.points[still])
    assert bool((problem.points[~still] != before.points[~still]).any(1).all())
    assert same_bits(problem.cameras[3, poses:], before.cameras[3, poses:])
    assert same_bits(problem.cameras[4, poses - 3 : poses], before.cameras[4, poses - 3 : poses])
    assert bool((problem.cameras[1] != before.cameras[1]).any())
    assert same_bits(problem.cameras[[0, 2]], before.cameras[[0, 2]])
    assert same_bits(problem.cameras[4, :poses], before.cameras[4, :poses])


def test_fixed_rotations_of_any_size_stay_to_the_bit() -> None:
    """Beyond half a turn, and quaternions of any norm, too."""
    problem, _ = scene(4, 20)
    w = problem.cameras[1, :3]
    problem.cameras[1, :3] = w * (1 + 2 * math.pi / w.norm())
    scaled = kit.as_quaternions(problem)
    scaled.cameras[1, :4] *= -1.7
    for p in (problem, scaled):
        p.fix_cameras(1)
        before = p.cameras[1].clone()
        assert solve(p, max_iterations=4).final_cost < 100
        assert same_bits(p.cameras[1, :-3], before[:-3])


@every_solver
@every_model
def test_shared_intrinsics_stay_equal(linear_solver: str, model: str) -> None:
    """To the bit; and groups of them are apart."""
    problem, truth = scene(6, 30, model=model)
    kit.shared_intrinsics(problem, truth, 0.5)
    problem.share_intrinsics([0, 0, 0, 1, 1, 1])
    before = problem.clone()
    summary = solve(problem, linear_solver=linear_solver, max_iterations=20)
    count = problem.num_parameters - 6
    assert summary.free_parameters == 36 + 2 * count
    own = problem.cameras[:, -count:]
    assert same_bits(own[:3], own[:1].repeat(3, 1)) and same_bits(own[3:], own[3:4].repeat(3, 1))
    assert bool((own[0] != own[3]).any()) and bool((own != before.cameras[:, -count:]).any())


@every_solver
def test_tied_rotations_turn_alike(linear_solver: str) -> None:
    """As those of a rig whose cameras' axes are parallel: each turns by the same from where it was."""
    problem, _ = scene(4, 20)
    columns = torch.arange(36).view(4, 9)
    columns[1, :3] = columns[0, :3]
    problem.columns = columns.unique(return_inverse=True)[1]
    before = kit.matrix_of(problem.cameras[:, :3])
    solve(problem, linear_solver=linear_solver, max_iterations=5)
    turned = kit.matrix_of(problem.cameras[:, :3]) @ before.mT
    torch.testing.assert_close(turned[0], turned[1], rtol=0, atol=1e-12)
    assert float((turned[0] - torch.eye(3)).norm()) > 1e-4 < float((turned[0] - turned[2]).norm())


@every_solver
def test_numbers_of_columns_may_have_gaps(linear_solver: str) -> None:
    """What they are doesn't matter, only which are equal."""
    problem, truth = scene(4, 20)
    kit.shared_intrinsics(problem, truth, 0.5)
    other = problem.clone()
    assert problem.columns is not None
    mapping = torch.randperm(36, generator=generator(0))[: int(problem.columns.max()) + 1]
    other.columns = mapping[problem.columns]
    a, b = (by_op(p, linear_solver=linear_solver, **EXACT)[:, 0] for p in (problem, other))
    assert float(a[~a.isnan()][-1]) == pytest.approx(float(b[~b.isnan()][-1]), rel=1e-9)


# Bad and odd input ---------------------------------------------------------------------------------------------------


@every_solver
def test_point_seen_once(linear_solver: str) -> None:
    """It moves along its ray as damping lets it, and is no cost in the end."""
    problem, _ = scene(4, 20)
    once = (problem.point_index == 7) & (problem.camera_index != 2)
    problem = replace(
        problem, **{n: getattr(problem, n)[~once] for n in ("observations", "camera_index", "point_index")}
    )
    summary = solve(problem, linear_solver=linear_solver, function_tolerance=1e-12)
    assert bool(problem.points.isfinite().all()) and summary.converged
    residual, _ = effk.ba.residual(*given(problem))
    assert float(residual[problem.point_index == 7].norm()) < 1e-3


@every_solver
def test_unseen_camera_and_point(linear_solver: str) -> None:
    """They stay, and change nothing for the others."""
    problem, _ = scene(5, 25)
    seen = (problem.camera_index != 1) & (problem.point_index != 3)
    names = ("observations", "camera_index", "point_index")
    problem = replace(problem, **{n: getattr(problem, n)[seen] for n in names})
    before = problem.clone()
    summary = solve(problem, linear_solver=linear_solver, max_iterations=3, **EXACT)
    torch.testing.assert_close(problem.cameras[1], before.cameras[1], rtol=1e-14, atol=1e-14)
    assert same_bits(problem.points[3], before.points[3])
    cameras, points = torch.arange(5) != 1, torch.arange(25) != 3
    alone = replace(
        before,
        cameras=before.cameras[cameras],
        points=before.points[points],
        camera_index=before.camera_index - (before.camera_index > 1).int(),
        point_index=before.point_index - (before.point_index > 3).int(),
    )
    other = solve(alone, linear_solver=linear_solver, max_iterations=3, **EXACT)
    assert [i.cost for i in summary.history] == pytest.approx(
        [i.cost for i in other.history], rel=1e-9, abs=1e-9 * other.initial_cost
    )


@every_solver
def test_duplicate_observations(linear_solver: str) -> None:
    """All of them twice: twice the cost, and the same steps, from half the damping each."""
    problem, _ = scene(4, 20)
    names = ("observations", "camera_index", "point_index")
    twice = replace(problem.clone(), **{n: torch.cat([getattr(problem, n)] * 2) for n in names})
    one = solve(problem, linear_solver=linear_solver, max_iterations=4, **EXACT)
    two = solve(twice, linear_solver=linear_solver, max_iterations=4, **EXACT)
    assert [2 * i.cost for i in one.history] == pytest.approx(
        [i.cost for i in two.history], rel=1e-9, abs=1e-9 * two.initial_cost
    )
    torch.testing.assert_close(twice.points, problem.points, rtol=1e-7, atol=1e-7)


def test_points_behind_cameras_count() -> None:
    """As in Ceres, and the summary says how many there are."""
    problem, truth = scene(4, 20, noise=0.0, perturbation=0.001)
    problem.points[3] = kit.centres(problem)[0] - 0.5 * (truth.points[3] - kit.centres(problem)[0])
    _, valid = effk.ba.residual(*given(problem))
    assert 0 < int((~valid).sum()) < 4
    at_once = solve(problem.clone(), max_iterations=0)
    assert at_once.behind == int((~valid).sum())
    assert f"{at_once.behind} observations are behind their camera" in str(at_once)
    assert at_once.initial_cost == pytest.approx(cost_of(problem), rel=1e-12)
    summary = solve(problem)
    _, valid = effk.ba.residual(*given(problem))
    assert summary.behind == int((~valid).sum())
    assert ("behind" in str(summary)) == (summary.behind > 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "row"), [("cameras", 2), ("points", 7), ("observations", 11)])
def test_what_is_not_finite_is_named(name: str, row: int, value: float) -> None:
    """By the row that the caller knows, whatever the order."""
    for problem in (scene(4, 20)[0], permuted(scene(4, 20)[0])):
        getattr(problem, name)[row, -1] = value
        before = problem.clone()
        with pytest.raises(RuntimeError, match=rf"effk::ba_solve: {name}\[{row}\] holds NaN or infinity"):
            by_op(problem)
        with pytest.raises(ValueError, match=rf"{name} isn't finite in row {row}"):
            solve(problem)
        assert same_bits(problem.cameras, before.cameras) and same_bits(problem.points, before.points)


def test_point_in_the_plane_of_a_camera() -> None:
    problem, _ = scene(4, 20)
    problem.points[6] = kit.centres(problem)[3]
    first = kit.rotation_columns(problem)
    problem.cameras[3, :first] = 0.0  # so that it is exactly there
    problem.cameras[3, first : first + 3] = -problem.points[6]
    with pytest.raises(RuntimeError, match=r"effk::ba_solve: camera 3 can't see point 6"):
        solve(problem)


def test_a_radius_for_which_a_rhs_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made less, as after any step that can't be computed."""
    problem, _ = scene(4, 20)
    linearize = lm.Steps.linearize

    def overflowing(self: lm.Steps, pairs: Tensor | None, radius: float) -> lm.Linearized:
        lin = linearize(self, pairs, radius)
        return lin if radius < 1e4 else lin._replace(rhs=math.nan * lin.rhs)

    monkeypatch.setattr(lm.Steps, "linearize", overflowing)
    assert solve(problem, initial_radius=2e4, max_iterations=3).iterations == 3


def test_a_cost_that_overflows() -> None:
    problem, _ = scene(4, 20)
    problem.observations[5] = 1e160
    with pytest.raises(RuntimeError, match="effk::ba_solve: the cost at the start is too large"):
        solve(problem)


@pytest.mark.parametrize("linear_solver", ("auto", *SOLVERS))
@pytest.mark.parametrize("lacking", ["observations", "points", "cameras", "everything"])
def test_nothing_to_solve(linear_solver: str, lacking: str) -> None:
    problem, _ = scene(4, 20)
    none = torch.empty(0, dtype=torch.int32)
    changed: dict[str, Any] = {"observations": problem.observations[:0], "camera_index": none, "point_index": none}
    if lacking in ("points", "everything"):
        changed["points"] = problem.points[:0]
    if lacking in ("cameras", "everything"):
        changed["cameras"] = problem.cameras[:0]
    problem = replace(problem, **changed)
    before = problem.clone()
    for columns in (None, torch.full((len(problem.cameras), 9), -1)):
        problem.columns = columns
        summary = solve(problem, linear_solver=linear_solver)
        assert (summary.initial_cost, summary.final_cost, summary.iterations) == (0.0, 0.0, 0) and summary.converged
    assert same_bits(problem.cameras, before.cameras) and same_bits(problem.points, before.points)
    assert "0 observations" in str(summary)


@every_solver
def test_nothing_is_free(linear_solver: str) -> None:
    problem, _ = scene(4, 20)
    problem.columns = torch.full((4, 9), -1)
    cameras = problem.cameras.clone()
    still = problem.clone()
    still.fixed_points = torch.ones(20, dtype=torch.bool)
    summary = solve(still, linear_solver=linear_solver)
    assert summary.iterations == 0 and summary.history[0].gradient == 0 and summary.free_parameters == 0
    assert same_bits(still.points, problem.points)
    # Points alone are triangulated: where their gradient vanishes.
    only_points = solve(problem, linear_solver=linear_solver, function_tolerance=1e-15)
    assert only_points.final_cost < 0.9 * only_points.initial_cost
    torch.testing.assert_close(problem.cameras, cameras, rtol=1e-14, atol=1e-14)
    _, _, _, gradient, hessian = effk.ba.build(*given(problem))
    assert float(gradient.abs().max()) < 1e-6 * float(hessian.abs().max())


@pytest.mark.parametrize(("name", "number"), [("camera_index", 4), ("camera_index", -1), ("point_index", 20)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_indices_out_of_range(name: str, number: int, index: torch.dtype) -> None:
    problem, _ = scene(4, 20)
    changed = getattr(problem, name).to(index)
    changed[5] = number
    other = "point_index" if name == "camera_index" else "camera_index"
    problem = replace(problem, **{name: changed, other: getattr(problem, other).to(index)})
    most = 3 if name == "camera_index" else 19
    with pytest.raises(RuntimeError, match=rf"effk::ba_solve: {name} holds {number}; wanted 0 to {most}"):
        by_op(problem)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["camera_index", "point_index"])
def test_indices_out_of_range_on_a_gpu(name: str) -> None:
    """An error there, too, unlike the steps."""
    problem, _ = scene(4, 20)
    getattr(problem, name)[5] = 1000
    moved = Problem(*(t.cuda() for t in given(problem)))
    with pytest.raises(RuntimeError, match=f"effk::ba_solve: {name} holds 1000"):
        solve(moved)


def test_columns_out_of_range() -> None:
    problem, _ = scene(4, 20)
    for number in (-2, 36):
        problem.columns = torch.arange(36).view(4, 9)
        problem.columns[2, 4] = number
        with pytest.raises(RuntimeError, match=rf"effk::ba_solve: columns holds {number}; wanted -1 to 35"):
            by_op(problem)


def test_columns_tie_what_differs() -> None:
    problem, _ = scene(4, 20)
    for column in (3, 5, 6, 8):
        problem.columns = torch.arange(36).view(4, 9)
        problem.columns[2, column] = problem.columns[0, column]
        with pytest.raises(RuntimeError, match="effk::ba_solve: columns ties parameters of cameras"):
            by_op(problem)


def test_a_tied_parameter_that_is_not_finite() -> None:
    """Isn't said to differ."""
    problem, truth = scene(4, 20)
    kit.shared_intrinsics(problem, truth, 0.5)
    problem.cameras[2, -1] = math.nan
    with pytest.raises(RuntimeError, match=r"effk::ba_solve: cameras\[2\] holds NaN"):
        by_op(problem)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("points", None, "points is a NoneType"),
        ("points", torch.zeros(20, 4).double(), "points has shape"),
        ("depth", torch.full((80,), math.inf).double(), "depth holds infinity"),
        ("columns", torch.full((4, 9), 1), "columns lacks the number 0"),
    ],
)
def test_problem_is_checked(name: str, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        solve(replace(scene(4, 20)[0], **{name: value}))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"loss": "l2"}, RuntimeError, "effk::ba_solve: loss is 'l2'"),
        ({"linear_solver": "qr"}, RuntimeError, "effk::ba_solve: linear_solver is 'qr'"),
        ({"max_iterations": -1}, RuntimeError, "effk::ba_solve: max_iterations is -1"),
        ({"max_iterations": 10**12}, RuntimeError, "effk::ba_solve: max_iterations is 1000000000000; wanted at most"),
        ({"loss": "cauchy", "loss_scale": math.inf}, RuntimeError, "effk::ba_solve: loss_scale is inf, its square inf"),
        ({"loss": "cauchy", "loss_scale": 1e-170}, RuntimeError, "effk::ba_solve: loss_scale is 1e-170, its square 0"),
        ({"losss": "huber"}, TypeError, "losss"),
        ({"model": "pinhole"}, TypeError, "model"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        solve(scene(4, 20)[0], **options)


# The ops -------------------------------------------------------------------------------------------------------------


def test_op_is_what_solve_runs() -> None:
    """With the same numbers, in rows up to the one that ended it."""
    problem, _ = scene(5, 25)
    problem.fix_cameras(0)
    other = problem.clone()
    summary = solve(problem, loss="cauchy", max_iterations=30)
    more = other.depth, other.fixed_points, other.columns
    table = torch.ops.effk.ba_solve(*given(other), *more, loss="cauchy", max_iterations=30)
    assert table.shape == (31, 6) and table.dtype == torch.float64
    count = len(summary.history)
    assert count < 31 and bool(table[count:].isnan().all()) and bool(table[:count].isfinite().all())
    assert table[:count, :6].tolist() == [list(i[:6]) for i in summary.history]
    assert same_bits(problem.cameras, other.cameras) and same_bits(problem.points, other.points)
    assert effk.backends("ba_solve") == ("reference",)


def test_strides_of_what_is_written() -> None:
    """A solve of views is one of what they show, and leaves the rest."""
    problem, _ = scene(5, 25)
    wide = torch.full((25, 7), math.nan, dtype=torch.float64)
    points = wide[:, 1:7:2]
    points.copy_(problem.points)
    cameras = problem.cameras.T.contiguous().T
    table = torch.ops.effk.ba_solve(cameras, points, *given(problem)[2:], max_iterations=5)
    wanted = torch.ops.effk.ba_solve(*given(problem), max_iterations=5)
    assert same_bits(table[:, :6], wanted[:, :6])
    assert same_bits(points, problem.points) and same_bits(cameras, problem.cameras)
    assert bool(wide[:, ::2].isnan().all())


def system_of(problem: Problem, radius: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S [C, n, C, n] whole, rhs, damping, and the damped blocks' inverses."""
    count = len(problem.cameras)
    pairs = torch.tril_indices(count, count).T.contiguous()
    blocks, rhs, _, diagonal, _, _ = effk.ba.schur(*given(problem), pairs, model=problem.model, radius=radius)
    damping = diagonal.clamp(min=1e-6) / radius
    whole = torch.zeros(count, rhs.shape[1], count, rhs.shape[1], dtype=torch.float64)
    for (a, b), block in zip(pairs.tolist(), blocks, strict=True):
        whole[a, :, b], whole[b, :, a] = block, block.T
    inverse = torch.linalg.inv(torch.stack([whole[i, :, i] for i in range(count)]) + damping.diag_embed())
    return whole, rhs, damping, inverse


@given_case(small(free=("all",), loss=("trivial",)), st.sampled_from((1e4, 1.0)))
@settings(max_examples=15)
def test_conjugate_gradients(case: Small, radius: float) -> None:
    """ "ba_pcg" solves the damped system: to what rounding lets it, given steps and time, and in 1 to the exact minimum
    along the preconditioned residual."""
    problem = case.make()
    whole, rhs, damping, inverse = system_of(problem, radius)
    options = {"model": problem.model, "radius": radius}
    system = rhs, inverse, damping
    matrix = whole.flatten(2).flatten(0, 1) + damping.flatten().diag()
    wanted = torch.linalg.solve(matrix, rhs.flatten()).view_as(rhs)
    x, count = effk.ba.pcg(*given(problem), *system, **options, tolerance=1e-15, max_iterations=3000)
    assert count.dtype == torch.int64 and count.shape == () and 0 < int(count) < 3000

    def model(x: Tensor) -> float:
        return float(x.flatten() @ (rhs.flatten() - 0.5 * matrix @ x.flatten()))

    assert model(x) == pytest.approx(model(wanted), rel=1e-6)
    z = (inverse @ rhs[..., None])[..., 0]
    first, count = effk.ba.pcg(*given(problem), *system, **options, tolerance=0.0, max_iterations=1)
    along = float(z.flatten() @ rhs.flatten()) / float(z.flatten() @ matrix @ z.flatten())
    torch.testing.assert_close(first, along * z, rtol=1e-6, atol=1e-12)
    assert int(count) == 1
    # More steps take the model lower.
    models = [
        model(effk.ba.pcg(*given(problem), *system, **options, tolerance=0.0, max_iterations=k)[0])
        for k in (1, 2, 4, 8)
    ]
    assert models == sorted(models)
    # The rule for the end: the last step's share, times the number of steps.
    for tolerance in (0.5, 0.1, 0.01):
        count = int(effk.ba.pcg(*given(problem), *system, **options, tolerance=tolerance)[1])
        of = [
            model(effk.ba.pcg(*given(problem), *system, **options, tolerance=0.0, max_iterations=k)[0])
            for k in range(count + 1)
        ]
        shares = [k * (of[k] - of[k - 1]) / of[k] for k in range(1, count + 1)]
        assert shares[-1] < tolerance * (1 + 1e-6) and all(s > tolerance * (1 - 1e-6) for s in shares[:-1])


def test_conjugate_gradients_that_cannot() -> None:
    """NaN, no step to make, or a matrix of the wrong sign: what was reached before."""
    problem, _ = scene(4, 20)
    _, rhs, damping, inverse = system_of(problem, 1e4)
    for changed in (
        (rhs, inverse, damping.clone().fill_(math.nan)),
        (rhs, -inverse, damping),
        (rhs, inverse, -1e12 * torch.ones_like(damping)),
        (torch.zeros_like(rhs), inverse, damping),
    ):
        x, count = effk.ba.pcg(*given(problem), *changed)
        assert int(count) == 0 and not bool(x.any())
    x, count = effk.ba.pcg(*given(problem), rhs, inverse, damping, max_iterations=0)
    assert int(count) == 0 and not bool(x.any())


# Files of BAL, and Ceres' costs of them ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "initial", "final"),
    [("problem-16-22106", 4.18566e6, 1.803390e4), ("problem-21-11315", 4.41324e6, 3.037865e4)],
)
@pytest.mark.parametrize("linear_solver", ["dense_schur", "sparse_schur"])
def test_bal(name: str, initial: float, final: float, linear_solver: str) -> None:
    """What Ceres 2.1 ends at with the same tolerance, which is 1e-6 of the cost for each of them."""
    summary = solve(kit.bal(name), linear_solver=linear_solver)
    assert summary.initial_cost == pytest.approx(initial, rel=1e-5)
    assert summary.final_cost == pytest.approx(final, rel=1e-5)
    assert summary.converged and summary.behind == 0


# The report ----------------------------------------------------------------------------------------------------------


def test_summary() -> None:
    problem, _ = scene(5, 25, observations=90)
    problem.fix_cameras(0)
    summary = solve(problem, linear_solver="sparse_schur", max_iterations=2, function_tolerance=0.0)
    assert (summary.cameras, summary.points, summary.observations) == (5, 25, 90)
    assert summary.free_parameters == 39 and summary.linear_solver == "sparse_schur"
    assert summary.iterations == 2 and len(summary.history) == 3
    assert summary.initial_cost == summary.history[0].cost > summary.final_cost == summary.history[2].cost
    assert summary.history[0].change == summary.history[0].step == summary.history[0].linear_iterations == 0
    assert 0 <= summary.history[0].seconds <= summary.history[1].seconds <= summary.seconds
    assert not summary.converged and summary.behind == 0
    lines = str(summary).splitlines()
    root = math.sqrt(2 * summary.final_cost / 90)
    assert lines == [
        "5 cameras, 25 points, 90 observations; sparse_schur",
        f"cost {summary.initial_cost:.6e} -> {summary.final_cost:.6e} (sqrt(2 cost / observations): {root:.3g}) in "
        f"2 iterations, {summary.seconds:.3f} s",
        "max_iterations (2) is reached",
    ]


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    problem, _ = scene()
    summary = solve(problem, verbose=True)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["iter", "cost", "change", "|gradient|", "|step|", "radius", "linear", "seconds"]
    rows = out[1 : 1 + len(summary.history)]
    for number, (text, i) in enumerate(zip(rows, summary.history, strict=True)):
        assert len(text) == len(out[0])
        values = [float(word) for word in text.split()]
        wanted = [number, i.cost, i.change, i.gradient, i.step, i.radius, i.linear_iterations, i.seconds]
        assert values == pytest.approx(wanted, rel=6e-3, abs=6e-4)
    assert out[1 + len(summary.history) :] == str(summary).splitlines()
    solve(problem)
    assert capsys.readouterr() == ("", "")


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar for as many iterations as there may be, and the start; not together with lines."""
    bars: list[tuple[int, bool, list[None]]] = []

    @contextlib.contextmanager
    def bar(description: str, total: int, enabled: bool) -> Iterator[Any]:
        assert description
        steps: list[None] = []
        bars.append((total, enabled, steps))
        yield lambda: steps.append(None)

    monkeypatch.setattr(sys.modules["effk.ba.solve"], "progress_bar", bar)
    problem, _ = scene()
    for options, enabled in (({}, False), ({"progress": True}, True), ({"progress": True, "verbose": True}, False)):
        summary = solve(problem.clone(), max_iterations=7, **options)
        total, shown, steps = bars.pop()
        assert (total, shown, len(steps)) == (8, enabled, len(summary.history))


def test_logging(caplog: pytest.LogCaptureFixture) -> None:
    problem, _ = scene()
    with caplog.at_level(logging.DEBUG, "effk"):
        summary = solve(problem)
    levels = [r.levelno for r in caplog.records if r.name == "effk"]
    assert levels == [logging.DEBUG] * len(summary.history) + [logging.INFO]
    assert f"{summary.history[1].cost:.6e}" in caplog.records[1].getMessage()
    assert caplog.records[-1].getMessage() == "ba: " + str(summary).replace("\n", "; ")


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    summary = solve(scene()[0])
    axes = summary.plot()
    (drawn,) = axes.get_lines()
    assert drawn.get_xdata().tolist() == [i.seconds for i in summary.history]
    assert drawn.get_ydata().tolist() == [i.cost for i in summary.history]
    assert axes.get_yscale() == "log" and "cost" in axes.get_ylabel() and "seconds" in axes.get_xlabel()
    own = plt.figure().add_subplot()
    assert summary.plot(own) is own and len(own.get_lines()) == 1
    plt.close("all")


def test_no_gradients_are_kept() -> None:
    """Tensors that ask for gradients are changed all the same."""
    problem, _ = scene(4, 20)
    wanted = problem.clone()
    solve(wanted, max_iterations=3)
    problem.points.requires_grad_()
    with torch.no_grad():
        solve(problem, max_iterations=3)
    assert same_bits(problem.points.detach(), wanted.points)


# What is chosen, and refused, by size --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1000, 8300])
def test_few_free_cameras_among_many(count: int) -> None:
    """Neither memory nor time goes by the fixed ones; but ba_schur with pairs takes no more than 8192 in all."""
    problem, _ = scene(count, 2 * count, kind="street", observations=8 * count, seed=1, perturbation=0.01)
    problem.fix_cameras(range(10, count), pose=True, intrinsics=True)
    other = problem.clone()
    summary = solve(problem, max_iterations=12)
    assert summary.free_parameters == 90 and summary.final_cost < summary.initial_cost
    assert summary.linear_solver == ("dense_schur" if count == 1000 else "iterative_schur")
    if count == 1000:
        steps = lm.Steps(*given(problem), None, None, problem.columns, None, lm.Options(model=problem.model))
        sparse = lm.SparseSchur(steps)
        assert len(lm.DenseSchur(steps).pairs) == 55 >= len(sparse.pairs)
        assert sum(part.size for part, _ in sparse.plan[0]) == 90 and len(sparse.plan[0]) < 10
        found = solve(other, max_iterations=12, linear_solver="sparse_schur")
        assert found.final_cost == pytest.approx(summary.final_cost, rel=1e-6)


def test_few_parameters_of_many_cameras(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense matrix is made of blocks between all cameras, however few parameters they share."""
    problem, truth = scene(40, 80, kind="street", observations=320, seed=1, perturbation=0.01)
    kit.shared_intrinsics(problem, truth, 0.5)
    problem.fix_cameras(range(1, 40))
    dense = solve(problem.clone(), max_iterations=4)
    assert dense.free_parameters == 9 and dense.linear_solver == "dense_schur"
    monkeypatch.setattr(lm, "MOST_ENTRIES", (40 * 9) ** 2 // 2 - 1)
    sparse = solve(problem.clone(), max_iterations=4)
    assert sparse.linear_solver == "sparse_schur"
    assert sparse.final_cost == pytest.approx(dense.final_cost, rel=1e-9)


def test_pairs_are_of_free_cameras() -> None:
    """Of all of them that see a point in common, and each with itself; seen more than once counts once."""
    problem, _ = scene(6, 30, kind="street", observations=90, seed=2)
    problem.fix_cameras([1, 4], pose=True, intrinsics=True)
    repeats = 1 + torch.arange(90) % 3
    names = ("observations", "camera_index", "point_index")
    more = {name: getattr(problem, name).repeat_interleave(repeats, 0) for name in names}
    for p in (problem, permuted(replace(problem, **more))):
        seen = set(zip(p.camera_index.tolist(), p.point_index.tolist(), strict=True))
        wanted = {(c, c) for c in (0, 2, 3, 5)}
        for a, b in itertools.product((0, 2, 3, 5), repeat=2):
            if a > b and {p for c, p in seen if c == a} & {p for c, p in seen if c == b}:
                wanted.add((a, b))
        steps = lm.Steps(*given(p), None, None, p.columns, None, lm.Options(model=p.model))
        assert [tuple(pair) for pair in lm.SparseSchur(steps).pairs.tolist()] == sorted(wanted)


def test_a_point_that_a_camera_sees_often() -> None:
    """Which of a large problem takes no pass over it for each time."""
    often = torch.zeros(2**18, dtype=torch.int32)
    assert lm.covisible(often, often, 2).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("limit", ["MOST_ENTRIES", "MOST_FLOPS"])
def test_a_factor_that_takes_too_much_is_not_begun(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of 1200 cameras that all see the same points, whose matrix is dense."""
    count = 1200
    camera, point = torch.arange(count).repeat(2), torch.arange(2).repeat_interleave(count)
    tensors = torch.zeros(count, 9), torch.zeros(2, 3), torch.zeros(2 * count, 2)
    steps = lm.Steps(*(t.double() for t in tensors), camera, point, None, None, None, None, lm.Options())
    monkeypatch.setattr(lm, "Entries", None)
    monkeypatch.setattr(lm, "MOST_ENTRIES" if limit == "MOST_FLOPS" else "MOST_FLOPS", math.inf)
    monkeypatch.setattr(lm, "MOST_DENSE", 0)
    assert isinstance(lm.choose(steps), lm.IterativeSchur)
    if limit == "MOST_FLOPS":
        assert lm.SparseSchur(steps).plan[1] == pytest.approx((9 * count) ** 3 / 3)


@pytest.mark.parametrize("name", ["dense_schur", "sparse_schur"])
def test_solvers_that_cannot_are_refused_at_once(name: str) -> None:
    problem, _ = scene(3, 9)
    problem.cameras = problem.cameras[:1].repeat(8193, 1)
    with pytest.raises(RuntimeError, match=f"linear_solver is '{name}' with 8193 cameras"):
        solve(problem, linear_solver=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_point_in_a_plane_of_a_camera_is_named(loss: str) -> None:
    """Also where the loss of an infinite residual is finite."""
    problem, _ = scene(4, 12, model="simple_pinhole")
    problem.cameras[1, :7] = torch.tensor([1.0, 0, 0, 0, 0, 0, 64])
    problem.points[7] = torch.tensor([1.0, 1, -64])
    with pytest.raises(RuntimeError, match="camera 1 can't see point 7"):
        solve(problem, loss=loss)


@pytest.mark.parametrize("name", ["cameras", "points"])
def test_what_no_observation_is_of_must_be_finite_too(name: str) -> None:
    problem, _ = scene(4, 12)
    rows = getattr(problem, name)
    setattr(problem, name, torch.cat([rows, torch.full_like(rows[:1], math.nan)]))
    with pytest.raises(RuntimeError, match=rf"{name}\[{len(rows)}\] holds NaN or infinity"):
        by_op(problem)


@pytest.mark.parametrize("quaternion", [False, True])
def test_a_camera_that_sees_nothing_keeps_its_bits(quaternion: bool) -> None:
    """Whatever its rotation is written as."""
    problem, _ = scene(4, 12, perturbation=0.01)
    rotation = torch.tensor([0.0, 0, 4], dtype=torch.float64)
    if quaternion:
        problem, rotation = kit.as_quaternions(problem), torch.tensor([-3.0, 0, 0, 4], dtype=torch.float64)
    unseen = problem.cameras[:1].clone()
    unseen[0, : len(rotation)] = rotation
    problem.cameras = torch.cat([problem.cameras, unseen])
    summary = solve(problem)
    assert summary.final_cost < summary.initial_cost and same_bits(problem.cameras[-1:], unseen)


def test_weight_of_positions_is_in_float64() -> None:
    problem, truth = scene(4, 12)
    problem.positions = kit.centres(truth) + 0.1
    for weight in (0.1, 1e39):
        start = solve(problem.clone(), position_weight=weight, max_iterations=0).initial_cost
        wanted = cost_of(problem) + kit.cost_of_positions(problem, weight)
        assert start == pytest.approx(wanted, rel=1e-13)


def test_interrupted_between_cameras_and_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the problem holds then is one state of the solve."""
    problem, _ = scene(4, 12, perturbation=0.01)
    wanted: list[tuple[Tensor, Tensor]] = []
    copy = Tensor.copy_

    def copied(self: Tensor, other: Tensor, *args: Any) -> Tensor:
        if self is problem.points and not wanted:
            wanted.append((problem.cameras.clone(), other.clone()))
            raise KeyboardInterrupt
        return copy(self, other, *args)

    monkeypatch.setattr(Tensor, "copy_", copied)
    with pytest.raises(KeyboardInterrupt):
        solve(problem)
    monkeypatch.undo()
    ((cameras, points),) = wanted
    assert same_bits(problem.cameras, cameras) and same_bits(problem.points, points)
