"""Global positioning: from nothing but directions, and from problems whose translations and points are unknown."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import effk
import pytest
import torch
from effk.ba import Problem, position_globally, solve
from effk.ba.solve import _undistorted, to_directions
from hypothesis import given as given_case
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from ..kit.tensors import generator, same_bits
from . import solver_strategies as kit
from .solver_strategies import SOLVERS, cost_of, given, scene
from .strategies import PERSPECTIVE, SEEDS, matrix_of, pixels

every_model = pytest.mark.parametrize("model", PERSPECTIVE)
FAR = {"loss": "huber", "loss_scale": 0.1}  # gp_solve's own


def ring(noise: float, seed: int = 0, **options: Any) -> Problem:
    """The truth; five cameras see a point."""
    return scene(8, 60, observations=300, noise=noise, seed=seed, **options)[1]


def directions(noise: float, seed: int) -> Problem:
    """[O, 3] of norm 1, off by a noise in radians; at the true centres and points."""
    made = to_directions(ring(0.0, seed % 7))
    v = made.points[made.point_index.long()] - made.cameras[made.camera_index.long()]
    v = torch.nn.functional.normalize(v, dim=1)
    v = v + noise * torch.randn(v.shape, generator=generator(seed), dtype=torch.float64)
    return replace(made, observations=torch.nn.functional.normalize(v, dim=1))


def scattered(problem: Problem, seed: int) -> Problem:
    """The same at random places."""
    problem = problem.clone()
    for i, t in enumerate((problem.cameras, problem.points)):
        t.copy_(200 * torch.rand(t.shape, generator=generator(seed + i), dtype=torch.float64) - 100)
    return problem


@given_case(SEEDS, st.sampled_from(SOLVERS))
@settings(max_examples=15)
def test_truth_is_found_from_anywhere(seed: int, linear_solver: str) -> None:
    """Without noise up to a similarity: what the tolerance leaves of the gradient moves nothing by a millionth."""
    truth = directions(0.0, seed)
    problem = scattered(truth, seed)
    assert kit.away(problem, truth) > 0.1
    table = torch.ops.effk.gp_solve(
        *given(problem), linear_solver=linear_solver, gradient_tolerance=1e-15, max_iterations=500
    )
    assert table.shape == (501, 6) and effk.backends("gp_solve") == ("reference",)
    reached = table[~table[:, 0].isnan()]
    assert reached[0, 0] > 1 and reached[-1, 0] < 1e-12 and bool((reached[1:, 0] <= reached[:-1, 0]).all())
    assert kit.away(problem, truth) < 1e-5


@given_case(SEEDS)
@settings(max_examples=10)
def test_noise(seed: int) -> None:
    """With two rows of noise s an observation, 2 cost / s^2 is chi-squared with the rows less the parameters, but for
    the seven of a similarity, to which rotations are no more part of: four. Six standard deviations."""
    sigma = 1e-3
    truth = directions(sigma, seed)
    problem = scattered(truth, seed)
    summary = solve(problem, **FAR, max_iterations=500, gradient_tolerance=1e-14)
    left = 2 * 300 - (3 * 8 + 3 * 60 - 4)
    assert abs(2 * summary.final_cost / sigma**2 - left) < 6 * math.sqrt(2 * left), summary
    assert summary.final_cost < cost_of(truth, **FAR)
    # That of a point is s times the distance, over the root of five; a few times that is little.
    assert kit.away(problem, truth) < 30 * sigma


def test_op_is_what_solve_runs() -> None:
    problem = scattered(directions(1e-3, 1), 1)
    problem.fixed_points = torch.arange(60) == 7
    problem.fix_cameras(2)
    other = problem.clone()
    summary = solve(problem, **FAR, max_iterations=20)
    table = torch.ops.effk.gp_solve(*given(other), other.fixed_points, other.columns, max_iterations=20)
    assert table[: len(summary.history), :6].tolist() == [list(i[:6]) for i in summary.history]
    assert same_bits(problem.cameras, other.cameras) and same_bits(problem.points, other.points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_centres_and_points_stay(dtype: torch.dtype) -> None:
    """To the bit, and so the scene is where they say."""
    truth = directions(0.0, 3).to(dtype)
    problem = truth.clone()
    problem.fix_cameras([0, 3])
    problem.fixed_points = torch.arange(60) == 5
    for t, still in ((problem.cameras, [0, 3]), (problem.points, [5])):
        moved = torch.randn(t.shape, generator=generator(4))
        moved[still] = 0
        t += moved
    assert kit.away(problem, truth, aligned=False) > 0.2
    solve(problem, **FAR, max_iterations=300, gradient_tolerance=1e-14)
    assert same_bits(problem.cameras[[0, 3]], truth.cameras[[0, 3]])
    assert same_bits(problem.points[5], truth.points[5])
    assert kit.away(problem, truth, aligned=False) < (1e-5 if dtype == torch.float64 else 1e-2)


# From pixels ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("quaternion", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_undo_every_distortion(model: str, quaternion: bool, dtype: torch.dtype) -> None:
    """Points a little way along them are seen where the pixels are."""
    problem, _ = scene(6, 40, model=model, seed=3)
    problem = (kit.as_quaternions(problem) if quaternion else kit.as_vectors(problem)).to(dtype)
    made = to_directions(problem)
    assert made.model == "position" and made.cameras.dtype == made.observations.dtype == dtype
    torch.testing.assert_close(made.cameras, kit.centres(problem).to(dtype))
    assert same_bits(made.points, problem.points)
    v = made.observations.double()
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    assert float((v.norm(dim=1) - 1).abs().max()) < 16 * unit  # turned by a matrix of as many roundings
    index = problem.camera_index.long()
    first = kit.rotation_columns(problem)
    y = (matrix_of(problem.cameras[:, :first].double())[index] @ (2.5 * v)[..., None])[..., 0]
    assert bool(((y[:, 2] < 0) if model == "snavely" else (y[:, 2] > 0)).all())
    seen = pixels(model, y, problem.cameras[:, first + 3 :].double()[index])
    # Newton's method ends within 1e-6; and a direction's rounding counts some two thousand times.
    assert float((seen - problem.observations.double()).abs().max()) < 1e-6 + 1e4 * unit


def forgotten(problem: Problem) -> Problem:
    """Without what positioning is to find."""
    problem = problem.clone()
    first = kit.rotation_columns(problem)
    problem.cameras[:, first : first + 3] = 0.0
    problem.points.zero_()
    return problem


@every_model
def test_positions_from_pixels(model: str) -> None:
    """Rotations and intrinsics stay to the bit; pixels are half a pixel off, of 1600 for a focal length."""
    truth = ring(0.5, model=model)
    problem = forgotten(truth)
    before = problem.clone()
    summary = position_globally(problem)
    first = kit.rotation_columns(problem)
    for part in (slice(0, first), slice(first + 3, None)):
        assert same_bits(problem.cameras[:, part], before.cameras[:, part])
    assert same_bits(problem.observations, truth.observations) and problem.model == model
    assert kit.away(problem, truth) < 30 * 0.5 / 1600
    assert summary.final_cost < cost_of(to_directions(truth), **FAR)
    # Of the result, the summary's cost is that of directions.
    assert cost_of(to_directions(problem), **FAR) == pytest.approx(summary.final_cost, rel=1e-6)


def test_seed_and_start() -> None:
    truth = ring(0.5)
    runs = []
    for seed in (0, 0, 1):
        problem = forgotten(truth)
        position_globally(problem, seed=seed, max_iterations=3)
        runs.append(problem.points)
    assert same_bits(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    # From where it is, it has not far to go.
    near = truth.clone()
    summary = position_globally(near, start=False)
    assert summary.initial_cost == pytest.approx(cost_of(to_directions(truth), **FAR), rel=1e-9)
    assert kit.away(near, truth, aligned=False) < 0.05


def test_options_are_those_of_a_solve(capsys: pytest.CaptureFixture[str]) -> None:
    problem = forgotten(ring(0.5))
    summary = position_globally(problem, loss="trivial", linear_solver="sparse_schur", max_iterations=2, verbose=True)
    assert summary.linear_solver == "sparse_schur" and summary.iterations == 2
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3 + len(str(summary).splitlines())
    huber = position_globally(problem, max_iterations=0)  # whose start is the same
    assert summary.initial_cost > 2 * huber.initial_cost
    with pytest.raises(TypeError, match="iterations"):
        position_globally(problem, iterations=2)


def test_positions_then_bundle_adjustment() -> None:
    """End where bundle adjustment does from near the truth."""
    problem, truth = scene(8, 60, observations=300, seed=1)
    problem.cameras[:, 6:] = truth.cameras[:, 6:]
    problem.cameras[:, :3] = truth.cameras[:, :3]
    problem.fix_intrinsics()
    lost = forgotten(problem)
    position_globally(lost)
    options: dict[str, Any] = {"function_tolerance": 1e-12, "max_iterations": 300}
    found, plain = solve(lost, **options), solve(problem, **options)
    assert found.initial_cost < 100 * plain.final_cost
    assert found.final_cost == pytest.approx(plain.final_cost, rel=1e-6)


@pytest.mark.parametrize("name", ["problem-16-22106", "problem-21-11315"])
def test_bal_from_rotations_alone(name: str) -> None:
    """Plain bundle adjustment's cost, as far as both tolerances of 1e-6 an iteration tell."""
    problem = kit.bal(name)
    lost = forgotten(problem)
    position_globally(lost)
    assert solve(lost).final_cost == pytest.approx(solve(problem).final_cost, rel=1e-4)


def test_fixed_points_stay_where_they_are() -> None:
    """They are no part of what is scattered at the start."""
    truth = ring(0.0)
    problem = truth.clone()
    problem.fixed_points = torch.arange(60) % 6 == 0
    position_globally(problem)
    assert same_bits(problem.points[::6], truth.points[::6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_cameras_stay_where_they_are(dtype: torch.dtype) -> None:
    """To the bit, and so the scene is where they say. Fixed intrinsics and rotations fix nothing else."""
    truth = ring(0.0, model="simple_radial").to(dtype)
    problem = truth.clone()
    problem.fix_intrinsics()
    problem.fix_cameras([0, 3, 4])
    assert problem.columns is not None
    problem.columns[1, :3] = -1
    problem.columns = problem.columns.unique(return_inverse=True)[1] - 1
    others = [1, 2, 5, 6, 7]
    problem.cameras[others, 4:7] += torch.randn(5, 3, generator=generator(4)).to(dtype)
    anywhere = problem.clone()
    position_globally(anywhere, max_iterations=2)
    position_globally(problem, start=False, gradient_tolerance=1e-14, max_iterations=300)
    for found in (problem, anywhere):
        assert same_bits(found.cameras[[0, 3, 4]], truth.cameras[[0, 3, 4]])
        assert bool((found.cameras[others, 4:7] != truth.cameras[others, 4:7]).any(1).all())
    assert kit.away(problem, truth, aligned=False) < (1e-4 if dtype == torch.float64 else 1e-2)


def test_what_is_not_seen_stays_where_it_is() -> None:
    problem = ring(0.5)
    kept = (problem.camera_index != 2) & (problem.point_index != 7)
    for name in ("observations", "camera_index", "point_index"):
        setattr(problem, name, getattr(problem, name)[kept])
    before = problem.clone()
    position_globally(problem, max_iterations=2)
    for name, row in (("cameras", 2), ("points", 7)):
        t, old = getattr(problem, name), getattr(before, name)
        assert same_bits(t[row], old[row]) and int((t != old).any(1).sum()) == len(t) - 1


@pytest.mark.parametrize(("cameras", "points"), [(2, 3), (0, 0), (0, 3)])
def test_no_observations(cameras: int, points: int) -> None:
    none = torch.empty(0, dtype=torch.int32)
    problem = Problem(torch.ones(cameras, 9), torch.ones(points, 3), torch.empty(0, 2), none, none)
    summary = position_globally(problem)
    assert summary.final_cost == 0 and (summary.cameras, summary.points) == (cameras, points)
    assert bool((problem.cameras == 1).all()) and bool((problem.points == 1).all())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_one_keeps_its_last_step(error: type[BaseException]) -> None:
    """And what there was before, rather than a random start, if there was no step."""
    truth = ring(0.5)

    def stopped(after: int) -> Problem:
        problem, calls = truth.clone(), 0

        def callback(_: object) -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise error

        with pytest.raises(error):
            position_globally(problem, callback=callback)
        return problem

    wanted = truth.clone()
    position_globally(wanted, max_iterations=3)
    found, untouched = stopped(3), stopped(0)
    assert same_bits(found.cameras, wanted.cameras) and same_bits(found.points, wanted.points)
    assert same_bits(untouched.cameras, truth.cameras) and same_bits(untouched.points, truth.points)
    with pytest.raises(RuntimeError, match="max_iterations"):  # found before a solve begins
        position_globally(untouched, max_iterations=-1)
    assert same_bits(untouched.cameras, truth.cameras) and same_bits(untouched.points, truth.points)


def test_parameters_of_a_model_that_is_trained() -> None:
    problem, plain = ring(0.5), ring(0.5)
    for t in (problem.cameras, problem.points, problem.observations):
        t.requires_grad_()
    for p in (problem, plain):
        position_globally(p, max_iterations=3)
    assert problem.cameras.requires_grad and problem.cameras.is_leaf
    assert same_bits(problem.cameras.detach(), plain.cameras) and same_bits(problem.points.detach(), plain.points)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_model_position_is_refused() -> None:
    made = to_directions(ring(0.0))
    with pytest.raises(ValueError, match="model 'position' already"):
        to_directions(made)
    before = made.clone()
    with pytest.raises(ValueError, match="model 'position' already"):
        position_globally(made)
    assert same_bits(made.points, before.points)


def test_columns_that_directions_cannot_have() -> None:
    problem = ring(0.0)
    columns = torch.arange(72).view(8, 9)
    columns[3, 4] = -1
    problem.columns = columns.unique(return_inverse=True)[1].view(8, 9) - 1
    with pytest.raises(ValueError, match="columns fixes a part of the translation of camera 3; wanted all of it"):
        position_globally(problem)
    problem = ring(0.0)
    problem.cameras[5, 3] = problem.cameras[6, 3]
    columns = torch.arange(72).view(8, 9)
    columns[6, 3] = columns[5, 3]
    problem.columns = columns.unique(return_inverse=True)[1].view(8, 9)
    with pytest.raises(ValueError, match="columns ties the translation of camera 5; wanted it free or fixed"):
        position_globally(problem)


def test_distortion_that_cannot_be_undone() -> None:
    """r (1 - r^2) is 0.385 at most, so that no direction is seen farther out."""
    problem = ring(0.0, model="simple_radial")
    problem.cameras[:, -1] = -1.0
    f, cx, cy = problem.cameras[int(problem.camera_index[17]), -4:-1].tolist()
    middle = problem.cameras[:, -3:-1][problem.camera_index.long()]
    problem.observations = middle + 0.01 * f * torch.ones(1, 2, dtype=torch.float64)
    to_directions(problem)
    problem.observations[17] = torch.tensor([cx + 0.4 * f, cy], dtype=torch.float64)
    before = problem.clone()
    for run in (to_directions, position_globally):
        with pytest.raises(ValueError, match="observation 17 is where its camera's distortion can't be undone"):
            run(problem)
    assert same_bits(problem.points, before.points) and same_bits(problem.cameras, before.cameras)


def through(model: str, k: list[float], seen: Tensor) -> Problem:
    """One camera, at 0 and not turned."""
    count = len(seen)
    camera = torch.tensor([[0.0] * 6 + k], dtype=torch.float64)
    index = torch.arange(count, dtype=torch.int32)
    return Problem(camera, torch.ones(count, 3, dtype=torch.float64), seen, torch.zeros_like(index), index, model)


@pytest.mark.parametrize(
    ("model", "k", "farthest"),
    [
        ("snavely", [1000.0, -0.1, 0.0], (1 / 0.3) ** 0.5),
        ("snavely", [1000.0, 0.4, -0.3], 1.1442),  # 1 + 1.2 n - 1.5 n^2 is 0
        ("snavely", [1000.0, 5.0, 20.0], 2.0),
        ("simple_radial", [1000.0, 9.0, -7.0, -0.5], (1 / 1.5) ** 0.5),
        ("simple_radial", [1000.0, 9.0, -7.0, -0.3], (1 / 0.9) ** 0.5),
        ("simple_radial", [-1000.0, 9.0, -7.0, -0.1], (1 / 0.3) ** 0.5),
        # 1 - 2.4 n + 1.25 n^2 is less than 0 from n = 0.61 to 1.31, and then the image unfolds again.
        ("radial", [1000.0, 9.0, -7.0, -0.8, 0.25], 0.7813),
        ("radial", [1000.0, 9.0, -7.0, -0.2, 0.05], 2.0),
        ("opencv", [1000.0, 1100.0, 9.0, -7.0, -0.3, 0.0, 1e-3, -2e-3], 1.05),
        ("opencv", [1000.0, 1100.0, 9.0, -7.0, -0.8, 0.25, 1e-3, -2e-3], 0.7813),
    ],
)
def test_distortion_is_undone_up_to_its_fold(model: str, k: list[float], farthest: float) -> None:
    """Nearer directions come back, and pixels that only others have, mirrored or beyond the fold, are refused."""
    angle = torch.arange(24, dtype=torch.float64)[:, None, None] * (math.pi / 12)
    around = torch.cat([angle.cos(), angle.sin(), torch.ones_like(angle)], -1)
    if model == "snavely":
        around = around * torch.tensor([1.0, 1.0, -1.0])
    radius = farthest * torch.tensor([0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98], dtype=torch.float64)
    away = (around * torch.tensor([1.0, 1.0, 0.0]) * radius[:, None] + around * torch.tensor([0.0, 0.0, 1.0])).view(
        -1, 3
    )
    kept = torch.tensor([k], dtype=torch.float64)
    made = to_directions(through(model, k, pixels(model, away, kept)))
    v = made.observations
    torch.testing.assert_close(v / v[:, 2:] * away[:, 2:], away, rtol=1e-7, atol=1e-9)
    if farthest == 2:  # it has no fold
        return
    edge = around[::6, 0] * torch.tensor([farthest, farthest, 1.0])
    middle = pixels(model, around[:1, 0] * torch.tensor([0.0, 0.0, 1.0]), kept)
    far = torch.cat([torch.linspace(1.003, 4, 1000), torch.tensor([10.0, 30.0, 1000.0])])[:, None, None]
    seen = (middle + far * (pixels(model, edge, kept) - middle)).view(-1, 2)
    problem = through(model, k, seen)
    _, undone = _undistorted(problem, kept.expand(len(seen), -1), -1.0 if model == "snavely" else 1.0)
    assert not undone.any()
    with pytest.raises(ValueError, match="observation 0 is where its camera's distortion can't be undone"):
        to_directions(problem)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("camera_index", 8, "camera_index holds 8; wanted 0 to 7"),
        ("point_index", -1, "point_index holds -1; wanted 0 to 59"),
        ("observations", math.nan, "observations isn't finite in row 4"),
    ],
)
def test_contents_are_checked(name: str, value: float, match: str) -> None:
    problem = ring(0.0)
    getattr(problem, name)[4] = value
    with pytest.raises(ValueError, match=match):
        position_globally(problem)
    # And by the op, of directions.
    made = to_directions(ring(0.0))
    getattr(made, name)[4] = value
    wanted = match.split(" isn't")[0].split(";")[0]
    with pytest.raises(RuntimeError, match=f"effk::gp_solve: {wanted}"):
        torch.ops.effk.gp_solve(*given(made))


def test_point_at_a_centre() -> None:
    """No direction leads there: the scale is the least, and nothing is lost of the others."""
    truth = directions(0.0, 2)
    problem = truth.clone()
    problem.points[4] = problem.cameras[int(problem.camera_index[problem.point_index == 4][0])]
    summary = solve(problem, **FAR, gradient_tolerance=1e-14, max_iterations=300)
    assert summary.final_cost < summary.initial_cost < 10
    others = torch.arange(60) != 4
    moved = [t for p in (problem, truth) for t in (torch.cat([p.points[others], p.cameras]),)]
    scale, rotation, shift = kit.similarity(*moved)
    assert float((scale * moved[0] @ rotation.T + shift - moved[1]).norm()) < 1e-2 * float(moved[1].norm())


def test_nothing_to_position() -> None:
    none = torch.empty(0, dtype=torch.int64)
    empty: list[Tensor] = [torch.empty(0, 3, dtype=torch.float64) for _ in range(3)]
    table = torch.ops.effk.gp_solve(*empty, none, none, max_iterations=3)
    assert table[0, :6].tolist() == [0, 0, 0, 0, 1e4, 0] and bool(table[1:].isnan().all())
