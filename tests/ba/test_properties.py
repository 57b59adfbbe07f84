"""What must hold of ba on every back end."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import effk
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend, every_backend, on_backends
from ..kit.tensors import same_bits
from .strategies import (
    ANGLES,
    FLOATS,
    INDICES,
    LOSSES,
    MODELS,
    OPS,
    PERSPECTIVE,
    ROUNDINGS,
    UNIT,
    Bound,
    Case,
    Steps,
    System,
    cases,
    dense_residual,
    matrix_of,
    robust,
    skew,
    steps,
)

PROBLEM_OPS = OPS[:-1]  # all that take a problem
ANY_ORDER = ("ba_residual", "ba_jacobian", "ba_cost")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small here: threads would wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part_of(bound: Bound, at: Any) -> Bound:
    return Bound(bound.value[at], bound.error[at])


def shaped(bound: Bound, *shape: int) -> Bound:
    return Bound(bound.value.reshape(shape), bound.error.reshape(shape))


def apart(a: Tensor, b: Tensor, error: Tensor, what: str) -> None:
    """Two results of one exact number are no farther from each other than `error`."""
    Bound(b, error).assert_holds(a, what)


def blocks_of(system: System, case: Case, pairs: Tensor) -> Bound:
    """Blocks [B, n, n] of S."""
    s = shaped(system.schur[0], case.cameras, case.n, case.cameras, case.n)
    return part_of(s, (pairs[:, 0].long(), slice(None), pairs[:, 1].long()))


def assembled(case: Case, blocks: Tensor) -> Tensor:
    """S [C n, C n] of all blocks (a, b), a >= b."""
    a, b = case.all_pairs.long().T
    s = torch.zeros(case.cameras, case.n, case.cameras, case.n, dtype=torch.float64)
    s[b, :, a] = blocks.mT
    s[a, :, b] = blocks
    return s.flatten(2).flatten(0, 1)


# The formulas themselves ---------------------------------------------------------------------------------------------


@given(case=cases(dtypes=(torch.float64,), ordered=False))
@settings(max_examples=20)
def test_the_exact_derivatives_are_those_of_the_formula(case: Case) -> None:
    """By autograd through exp(w) R, where w = 0 and the exponential is torch's."""
    given, n = case.exact_numbers(), case.n
    zeros = torch.zeros(case.cameras, n, dtype=torch.float64), torch.zeros(case.points, 3, dtype=torch.float64)
    width = given["cameras"].shape[1] - n + 3
    camera, point = case.indices

    def moved(camera_step: Tensor, point_step: Tensor) -> Tensor:
        x = given["points"] + point_step
        if case.model == "position":
            cameras, of_x = given["cameras"] + camera_step, x[point]
        else:
            turn = torch.linalg.matrix_exp(skew(camera_step[:, :3])) @ matrix_of(given["cameras"][:, :width])
            # With the rotation already made, that of the camera is none.
            of_x = (turn[camera] @ x[point][..., None])[..., 0]
            rest = given["cameras"][:, width:] + camera_step[:, 3:]
            cameras = torch.cat([torch.zeros(case.cameras, 3, dtype=torch.float64), rest], 1)
        problem = (cameras, of_x, given["observations"], camera, torch.arange(len(point)), given.get("depth"))
        return dense_residual(*problem, model=case.model, depth_weight=case.depth_weight)[0]

    by_cameras, by_points = torch.func.jacrev(moved, (0, 1))(*zeros)  # [O, R, C, n], [O, R, P, 3]
    at = torch.arange(len(camera))
    rows = case.rows
    for exact, got in ((rows.of_camera, by_cameras[at, :, camera]), (rows.of_point, by_points[at, :, point])):
        exact.assert_holds(got, "derivatives")
    assert float(by_cameras.abs().sum()) == pytest.approx(float(rows.of_camera.value.abs().sum()))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_weights_are_the_slope_of_the_loss(loss: str) -> None:
    s = torch.tensor([1e-9, 0.1, 0.9, 1.0, 1.1, 5.0, 1e6], dtype=torch.float64, requires_grad=True)
    rho, factor = robust(loss, 0.9, s)
    (slope,) = torch.autograd.grad(rho.sum(), s)
    torch.testing.assert_close(factor.detach() ** 2, slope, rtol=1e-12, atol=0)


# Residuals and derivatives -------------------------------------------------------------------------------------------

unordered = functools.partial(cases, ordered=False)


@pytest.mark.parametrize("model", MODELS)
@on_backends("ba_residual", "ba_jacobian")
def test_residuals_and_derivatives_are_within_the_bound(backend: Backend, model: str) -> None:
    """Of observations in any order."""

    def check(case: Case) -> None:
        residual, valid = case.run(backend, "ba_residual")
        again, of_camera, of_point, same = case.run(backend, "ba_jacobian")
        assert {t.dtype for t in (residual, again, of_camera, of_point)} == {case.dtype}
        case.rows.residual.assert_holds(residual, "residual")
        case.rows.residual.assert_holds(again, "residual of ba_jacobian")
        case.rows.of_camera.assert_holds(of_camera, "by cameras")
        case.rows.of_point.assert_holds(of_point, "by points")
        assert torch.equal(valid, case.valid) and torch.equal(same, case.valid)

    run = given(case=unordered(backend, models=(model,)))(check)
    settings(max_examples=min(20, backend.examples))(run)()


@every_backend("ba_residual", "ba_jacobian", "ba_retract", cases=functools.partial(unordered, dtypes=(torch.float64,)))
def test_derivatives_are_differences_along_steps(backend: Backend, case: Case) -> None:
    """Of ba_residual after ba_retract: central differences, extrapolated from two lengths of the step.

    The difference between the two bounds what is left of higher derivatives: after extrapolation a smaller power.
    """
    step, of_points = case.x, 0.01 * case.size * case._random(40, case.points, 3)

    def at(length: float) -> Tensor:
        moved = (length * step, length * of_points)
        cameras, points = backend.run("ba_retract", *case.problem()[:2], *moved, model=case.model)
        return case.run(backend, "ba_residual", cameras=cameras, points=points)[0]

    h = 0.01
    wide, narrow = ((at(length) - at(-length)) / (2 * length) for length in (h, h / 2))
    _, of_camera, of_point, _ = case.run(backend, "ba_jacobian")
    camera, point = case.indices
    along = of_camera @ step[camera][..., None] + of_point @ of_points[point][..., None]
    # Four residuals over h, 4/3 of two and 1/3 of two others, and each of them off by the retraction's roundings, too.
    rounded = 6 * case.rows.residual.error / h
    off = case.rows.of_camera.error @ step[camera].abs()[..., None]
    off = (off + case.rows.of_point.error @ of_points[point].abs()[..., None])[..., 0]
    apart(along[..., 0], (4 * narrow - wide) / 3, (wide - narrow).abs() + rounded + off, "along a step")


@every_backend("ba_cost", cases=unordered)
def test_cost_is_within_the_bound(backend: Backend, case: Case) -> None:
    cost = case.run(backend, "ba_cost")
    assert cost.dtype == torch.float64
    case.cost.assert_holds(cost, "cost")


@on_backends("ba_residual", "ba_jacobian")
def test_behind_a_camera(backend: Backend) -> None:
    """The formula stays as it is, and valid says so."""
    for model in PERSPECTIVE:
        front = Case(model=model, angle=0.0)
        camera = front.given["cameras"].clone()
        camera[:, 5] *= -1
        residual, valid = front.run(backend, "ba_residual", cameras=camera)
        wanted, _ = dense_residual(camera, *front.problem()[1:], model=model)
        assert not bool(valid.any()) and bool(front.run(backend, "ba_residual")[1].all())
        torch.testing.assert_close(residual, wanted, rtol=1e-12, atol=1e-12)


@on_backends("ba_residual", "ba_jacobian", "ba_cost")
def test_in_the_centre_of_a_camera(backend: Backend) -> None:
    """No number, and not valid; of a direction, the least scale of no difference."""
    index = torch.zeros(1, dtype=torch.int64)
    for model in MODELS:
        case = Case(model=model)
        cameras = case.given["cameras"][:1].clone()
        points = cameras if model == "position" else torch.zeros(1, 3, dtype=torch.float64)
        if model != "position":
            cameras[:, 3:6] = 0
        problem = (cameras, points, case.given["observations"][:1], index, index)
        residual, valid = backend.run("ba_residual", *problem, model=model)
        assert not bool(valid)
        if model == "position":
            assert torch.equal(residual, case.given["observations"][:1])
            _, by_camera, by_point, _ = backend.run("ba_jacobian", *problem, model=model)
            scale = 1e-5 * torch.eye(3, dtype=torch.float64)[None]
            assert torch.equal(by_camera, scale) and torch.equal(by_point, -scale)
        else:
            assert not bool(residual.isfinite().any())
            assert not math.isfinite(backend.run("ba_cost", *problem, model=model))


# The normal equations ------------------------------------------------------------------------------------------------


@every_backend("ba_build", cases=cases)
def test_build_is_within_the_bound(backend: Backend, case: Case) -> None:
    """Of the dense normal equations' gradient and diagonal blocks."""
    cost, *made = case.run(backend, "ba_build")
    system, split = case.system, case.cameras * case.n
    case.cost.assert_holds(cost, "cost")
    wanted = {
        "gradient of cameras": shaped(part_of(system.gradient, slice(split)), case.cameras, case.n),
        "hessian of cameras": system.block(system.hessian, False, case.n),
        "gradient of points": shaped(part_of(system.gradient, slice(split, None)), case.points, 3),
        "hessian of points": system.block(system.hessian, True, 3),
    }
    for (name, bound), got in zip(wanted.items(), made, strict=True):
        assert got.dtype == torch.float64
        bound.assert_holds(got, name)


@every_backend("ba_build", "ba_cost", cases=functools.partial(cases, dtypes=(torch.float64,)))
def test_build_has_the_gradient_of_the_cost(backend: Backend, case: Case) -> None:
    """As weighted rows have it where rho'' <= 0: differences of ba_cost by the points, as in the test of derivatives.

    rho'' jumps at the edge of huber and tukey. Where a step crosses it, the extrapolation of a quadratic is off by at
    most what both differences say of each other.
    """
    along = 0.003 * case.size * case._random(41, case.points, 3)
    points = case.given["points"]

    def at(length: float) -> Tensor:
        return case.run(backend, "ba_cost", points=points + length * along)

    h = 0.01
    wide, narrow = ((at(length) - at(-length)) / (2 * length) for length in (h, h / 2))
    gradient = case.run(backend, "ba_build")[3]
    error = 4 * (wide - narrow).abs() + 6 * case.cost.error / h
    apart((gradient * along).sum(), (4 * narrow - wide) / 3, error + case.system.gradient.error.sum() * h, "gradient")


@every_backend("ba_schur", cases=cases)
def test_schur_is_that_of_the_dense_equations(backend: Backend, case: Case) -> None:
    """All blocks, some of them, or those of the diagonal."""
    system, all_pairs = case.system, case.all_pairs
    some = all_pairs[torch.rand(len(all_pairs), generator=tensors.generator(case.seed)) < 0.5]
    diagonal = torch.arange(case.cameras)[:, None].expand(-1, 2)
    schur, rhs = system.schur
    of_points = part_of(system.gradient, slice(system.split, None))
    of_points = part_of(shaped(of_points, case.points, 3), system.free)
    largest = [t.abs().max() if t.numel() else torch.zeros(()).double() for t in (of_points.value, of_points.error)]
    assert schur.value.shape == (system.split, system.split)
    for pairs, wanted in ((all_pairs,) * 2, (some,) * 2, (None, diagonal)):
        blocks, got_rhs, gradient, of_diagonal, of_points, cost = case.run(backend, "ba_schur", pairs=pairs)
        assert blocks.dtype == got_rhs.dtype == gradient.dtype == of_diagonal.dtype == torch.float64
        blocks_of(system, case, wanted).assert_holds(blocks, "blocks")
        shaped(rhs, case.cameras, case.n).assert_holds(got_rhs, "rhs")
        of_cameras = part_of(system.gradient, slice(system.split))
        shaped(of_cameras, case.cameras, case.n).assert_holds(gradient, "gradient")
        hessian = Bound(system.hessian.value.diagonal(), system.hessian.error.diagonal())
        shaped(part_of(hessian, slice(system.split)), case.cameras, case.n).assert_holds(of_diagonal, "diagonal")
        Bound(largest[0], largest[1]).assert_holds(of_points, "largest gradient of a point")
        case.cost.assert_holds(cost, "cost")


@every_backend("ba_schur_mv", "ba_schur", cases=cases)
def test_implicit_product_is_that_with_the_explicit_matrix(backend: Backend, case: Case) -> None:
    x = case.x.flatten()
    exact = case.system.times(x)
    y = case.run(backend, "ba_schur_mv")
    assert y.dtype == torch.float64
    shaped(exact, case.cameras, case.n).assert_holds(y, "S x")
    explicit = assembled(case, case.run(backend, "ba_schur", pairs=case.all_pairs)[0])
    apart(y.flatten(), explicit @ x, 2 * exact.error, "S x against explicit S")


@every_backend("ba_schur", cases=cases)
def test_schur_is_symmetric_and_positive(backend: Backend, case: Case) -> None:
    """Positive definite with camera damping; without it, up to rounding, not below 0.

    Of S scaled by the diagonal of U, so that all of it is at most 1. Eigenvalues move by no more than the norm of what
    is lost.
    """
    blocks, _, _, diagonal, _, _ = case.run(backend, "ba_schur", pairs=case.all_pairs)
    error = case.system.schur[0].error
    own = blocks[(case.all_pairs[:, 0] == case.all_pairs[:, 1])]
    at = torch.arange(case.cameras)
    of_own = error.reshape(case.cameras, case.n, case.cameras, case.n)[at, :, at]
    apart(own, own.mT, of_own + of_own.mT, "symmetry")
    scale = diagonal.flatten().clamp(min=1e-6).rsqrt()
    scaled = assembled(case, blocks) * scale[:, None] * scale
    scaled = (scaled + scaled.mT) / 2
    lost = float((error * scale[:, None] * scale).norm()) + 10 * len(scaled) * UNIT
    assert len(scaled) == 0 or float(torch.linalg.eigvalsh(scaled)[0]) >= -lost
    assume(lost < 0.1 / case.radius)  # else a weight is nearly 0, and what is known of it, too
    damped = scaled + torch.eye(len(scaled)).double() / case.radius
    assert int(torch.linalg.cholesky_ex(damped)[1]) == 0


@every_backend("ba_backsubstitute", cases=cases)
def test_backsubstitution_is_within_the_bound(backend: Backend, case: Case) -> None:
    """And what the model promises of the step that came back."""
    point_step, change = case.run(backend, "ba_backsubstitute")
    assert point_step.dtype == change.dtype == torch.float64
    x, moves = case.x.flatten(), case.system.moves
    case.system.back(x).assert_holds(point_step, "step of points")
    case.system.change(torch.cat([x, point_step.flatten()])).assert_holds(change, "change")
    assert not bool(point_step[~moves].any())


@every_backend("ba_schur", "ba_backsubstitute", cases=cases)
def test_both_together_solve_the_whole_damped_system(backend: Backend, case: Case) -> None:
    """(J^T J + D) step = -J^T r: what is left over is what S, rhs, its solution and the points' step may be off by.

    Cholesky's method solves a matrix that is off by (3 N + 1) u d d^T, d the root of its diagonal (Higham, ch. 10).
    """
    system = case.system
    blocks, rhs, _, diagonal, _, _ = case.run(backend, "ba_schur", pairs=case.all_pairs)
    damping = diagonal.flatten().clamp(min=1e-6) / case.radius
    matrix = assembled(case, blocks) + damping.diag()
    factor = torch.linalg.cholesky((matrix + matrix.mT) / 2)
    camera_step = torch.cholesky_solve(rhs.flatten()[:, None], factor)[:, 0]
    point_step, change = case.run(backend, "ba_backsubstitute", camera_step=camera_step.reshape(case.cameras, case.n))
    step = torch.cat([camera_step, point_step.flatten()])

    whole, gradient = system.whole(damping), system.gradient.value
    left = whole @ step + gradient
    size = camera_step.abs()
    root = matrix.diagonal().sqrt()
    schur, of_rhs = system.schur
    own = system.hessian.error.diagonal()[: system.split] / case.radius  # of the damping
    back = system.back(camera_step).error.flatten()
    of_cameras = schur.error @ size + of_rhs.error + (4 * len(size) + 4) * UNIT * root * (root @ size) + own * size
    of_cameras = of_cameras + whole[: system.split, system.split :].abs() @ back
    of_points = whole[system.split :, system.split :].abs() @ back
    error = torch.cat([of_cameras, of_points]) + len(step) * UNIT * (whole.abs() @ step.abs() + gradient.abs())
    takes_part = torch.cat([torch.ones(len(size), dtype=torch.bool), system.moves.repeat_interleave(3)])
    apart(left[takes_part], torch.zeros(int(takes_part.sum())).double(), error[takes_part], "left over")

    promised = system.change(step)
    promised.assert_holds(change, "change")
    assert float(change) >= -float(promised.error)  # a step of such a system never makes the model worse


@every_backend("ba_schur", "ba_backsubstitute", "ba_build", cases=functools.partial(cases, full=True))
def test_strong_damping_gives_the_scaled_gradient(backend: Backend, case: Case) -> None:
    """V + D is D (1 + e), D = diag V / radius, where e is at most 3 radius: its inverse is that of D, and S is U."""
    case = replace(case, radius=1e-9)
    _, of_cameras, hessian, of_points, of_hessian = case.run(backend, "ba_build")
    blocks, rhs, _, _, _, _ = case.run(backend, "ba_schur")
    zero = torch.zeros_like(case.x)
    point_step, _ = case.run(backend, "ba_backsubstitute", camera_step=zero)
    least = of_hessian.diagonal(dim1=1, dim2=2).clamp(min=1e-6)
    wanted = -case.radius * of_points / least
    # |V| <= d d^T elementwise, d the root of the diagonal: e moves an entry by the others', scaled.
    scaled = (of_points.abs() / least.sqrt()).sum(1, keepdim=True) / least.sqrt()
    apart(point_step, wanted, 4 * case.radius**2 * scaled + 8 * UNIT * wanted.abs(), "step of points")
    # A_p (V + D)^-1 A_p^T is below 3 radius: so is what S loses of U and rhs of the gradient, which are products with
    # the cameras' rows; and rho'(s) s <= rho(s), where rho'' <= 0. A third more leaves room for roundings.
    root = hessian.diagonal(dim1=1, dim2=2).sqrt()
    apart(blocks, hessian, 4 * case.radius * root[:, :, None] * root[:, None, :], "S")
    of_all = (2 * case.run(backend, "ba_cost")).sqrt()
    apart(rhs, -of_cameras, 4 * case.radius * root * of_all, "rhs")


# What isn't known, and what isn't asked for --------------------------------------------------------------------------


@every_backend("ba_build", "ba_schur", "ba_schur_mv", "ba_backsubstitute", cases=functools.partial(cases, least=3))
def test_unseen_cameras_and_points_stay(backend: Backend, case: Case) -> None:
    """Their numbers are zeros, exactly, whatever they hold; what is seen once has finite ones."""
    camera, point = case.indices
    unseen, unobserved = case.seed % case.cameras, case.seed // 7 % case.points
    keep = ((camera != unseen) & (point != unobserved)).nonzero()[:, 0]
    case = case.reordered(keep)
    points = case.given["points"].clone()
    points[unobserved] = math.nan
    cameras = case.given["cameras"].clone()
    cameras[unseen] = math.inf
    run = functools.partial(case.run, backend, points=points, cameras=cameras)
    _, gradient, hessian, of_points, of_hessian = run("ba_build")
    assert not bool(gradient[unseen].any()) and not bool(hessian[unseen].any())
    assert not bool(of_points[unobserved].any()) and not bool(of_hessian[unobserved].any())
    blocks, rhs, gradient, diagonal, largest, cost = run("ba_schur", pairs=case.all_pairs)
    assert not bool(blocks[(case.all_pairs == unseen).any(1)].any())
    assert not any(bool(t[unseen].any()) for t in (rhs, gradient, diagonal))
    y = run("ba_schur_mv")
    assert not bool(y[unseen].any())
    point_step, change = run("ba_backsubstitute")
    assert not bool(point_step[unobserved].any())
    for t in (blocks, rhs, gradient, diagonal, largest, cost, y, point_step, change):
        assert bool(t.isfinite().all())


@every_backend("ba_schur", "ba_backsubstitute", cases=functools.partial(cases, full=True))
def test_fixed_points_are_only_seen(backend: Backend, case: Case) -> None:
    """With all of them fixed, S is U and rhs is -g."""
    fixed = torch.ones(case.points, dtype=torch.bool)
    blocks, rhs, gradient, _, largest, _ = case.run(backend, "ba_schur", fixed_points=fixed)
    hessian = case.system.block(case.system.hessian, False, case.n)
    hessian.assert_holds(blocks, "U")
    apart(rhs, -gradient, 2 * case.system.gradient.error[: case.system.split].reshape(rhs.shape), "rhs")
    assert float(largest) == 0
    point_step, change = case.run(backend, "ba_backsubstitute", fixed_points=fixed)
    assert not bool(point_step.any())
    none = torch.zeros(3 * case.points, dtype=torch.float64)
    case.system.change(torch.cat([case.x.flatten(), none])).assert_holds(change, "change")


def results(backend: Backend, case: Case, **changed: Any) -> dict[str, tuple[Tensor, ...]]:
    """What every op makes of a problem."""
    made = {}
    for op in PROBLEM_OPS:
        own = {"pairs": case.all_pairs} if op == "ba_schur" else {}
        out = case.run(backend, op, **own, **changed)
        made[op] = out if isinstance(out, tuple) else (out,)
    return made


def spoiled(case: Case, kind: str, o: int) -> tuple[dict[str, Tensor], Tensor]:
    """NaN in the observation o, or in its camera or point; and which observations have it, [O] bool."""
    at = torch.arange(len(case.indices[0])) == o
    if kind != "observations":
        labels = case.indices[0 if kind == "cameras" else 1]
        at, o = labels == labels[o], int(labels[o])
    t = case.given[kind].clone()
    t[o] = math.nan
    return {kind: t}, at


def _spoiled(backend: Backend) -> st.SearchStrategy[tuple[Case, str]]:
    return st.tuples(cases(backend, least=2), st.sampled_from(("observations", "cameras", "points")))


@every_backend(*PROBLEM_OPS, cases=_spoiled)
def test_nan_spoils_what_depends_on_it(backend: Backend, case: tuple[Case, str]) -> None:
    """That is NaN, and nothing else changes a bit."""
    problem, kind = case
    problem = replace(problem, behind=False)
    changed, at = spoiled(problem, kind, problem.seed % len(problem.indices[0]))
    camera, point = problem.indices
    of_cameras = torch.zeros(problem.cameras, dtype=torch.bool).index_fill(0, camera[at], True)
    of_points = torch.zeros(problem.points, dtype=torch.bool).index_fill(0, point[at], True)
    # Cameras that see one of the points which are eliminated.
    met = torch.zeros(problem.cameras, dtype=torch.bool).index_fill(0, camera[(of_points & problem.free)[point]], True)
    met = met | of_cameras
    before, after = results(backend, problem), results(backend, problem, **changed)

    def same(op: str, number: int, rest: Tensor) -> None:
        assert same_bits(before[op][number][rest], after[op][number][rest]), f"{op}, result {number}"

    def no_number(op: str, number: int, part: Tensor) -> None:
        t = after[op][number]
        t = (t[part] if t.dim() else t).isnan()
        assert bool((t.flatten(1).any(1) if t.dim() > 1 else t).all()), f"{op}, result {number}"

    for op, last in (("ba_residual", 2), ("ba_jacobian", 4)):
        for number in range(last):
            same(op, number, ~at)
        assert bool(after[op][0][at][:, :2].isnan().all()), op
        assert kind == "observations" or not bool(after[op][-1][at].any()), op
    no_number("ba_cost", 0, at)
    no_number("ba_build", 0, at)
    for number, part in ((1, of_cameras), (2, of_cameras), (3, of_points), (4, of_points)):
        same("ba_build", number, ~part)
        if number in (1, 3):
            no_number("ba_build", number, part)
    pairs = problem.all_pairs.long()
    same("ba_schur", 0, ~(met[pairs[:, 0]] & met[pairs[:, 1]]))
    for number, part in ((1, met), (2, of_cameras), (3, of_cameras)):
        same("ba_schur", number, ~part)
        if number < 3:
            no_number("ba_schur", number, part)
    if bool((of_points & problem.free).any()):
        no_number("ba_schur", 4, at)
    else:
        same("ba_schur", 4, torch.ones((), dtype=torch.bool))
    no_number("ba_schur", 5, at)
    same("ba_schur_mv", 0, ~met)
    same("ba_backsubstitute", 0, ~(of_points & problem.free))
    no_number("ba_backsubstitute", 0, of_points & problem.free)
    no_number("ba_backsubstitute", 1, at)
    if kind != "observations":  # by that alone, no derivative changes
        no_number("ba_schur_mv", 0, met)


@on_backends(*PROBLEM_OPS)
def test_nan_in_a_step(backend: Backend) -> None:
    """Of one camera spoils the points that it sees, and in a product the cameras that see these."""
    case = Case(cameras=6, points=12, observations=20, seed=3)
    camera, point = case.indices
    x = case.x
    x[2] = math.nan
    sees = torch.zeros(case.points, dtype=torch.bool).index_fill(0, point[camera == 2], True)
    met = torch.zeros(case.cameras, dtype=torch.bool).index_fill(0, camera[sees[point]], True)
    assert bool(sees.any()) and not bool(sees.all()) and not bool(met.all())
    point_step, change = case.run(backend, "ba_backsubstitute", camera_step=x)
    assert torch.equal(point_step.isnan().any(1), sees) and math.isnan(change)
    assert torch.equal(case.run(backend, "ba_schur_mv", x=x).isnan().any(1), met)


# Invariance ----------------------------------------------------------------------------------------------------------


def quaternion_of(w: Tensor) -> Tensor:
    angle = w.norm(dim=-1, keepdim=True)
    axis = torch.where(angle > 0, w / angle.clamp(min=1e-300), 0.0)
    return torch.cat([(angle / 2).cos(), (angle / 2).sin() * axis], -1)


def vector_of(q: Tensor) -> Tensor:
    q = torch.where(q[..., :1] < 0, -q, q)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    return 2 * torch.atan2(sine, q[..., :1]) * q[..., 1:] / sine.clamp(min=1e-300)


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    a0, a1, a2, a3 = a.unbind(-1)
    b0, b1, b2, b3 = b.unbind(-1)
    return torch.stack(
        [
            a0 * b0 - a1 * b1 - a2 * b2 - a3 * b3,
            a0 * b1 + a1 * b0 + a2 * b3 - a3 * b2,
            a0 * b2 - a1 * b3 + a2 * b0 + a3 * b1,
            a0 * b3 + a1 * b2 - a2 * b1 + a3 * b0,
        ],
        -1,
    )


def transformed(case: Case, turn: Tensor, shift: Tensor, scale: float) -> Case:
    """The scene by a similarity X -> scale Q X + shift: the same pixels."""
    old, q = case.numbers, matrix_of(turn)
    numbers = {"points": scale * old["points"] @ q.mT + shift}
    cameras = old["cameras"]
    if case.model == "position":
        numbers |= {"cameras": scale * cameras @ q.mT + shift, "observations": old["observations"] @ q.mT}
        return case.with_numbers(**numbers)
    numbers["depth"] = scale * old["depth"]
    width = 4 if case.quaternion else 3
    rotation, t, rest = cameras[:, :width], cameras[:, width : width + 3], cameras[:, width + 3 :]
    back = quaternion_of(-turn).expand(len(cameras), 4)
    rotation = multiplied(rotation if case.quaternion else quaternion_of(rotation), back)
    rotation = rotation if case.quaternion else vector_of(rotation)
    t = scale * t - (matrix_of(rotation) @ shift[:, None])[..., 0]
    return case.with_numbers(**numbers, cameras=torch.cat([rotation, t, rest], 1))


@every_backend("ba_cost", cases=functools.partial(unordered, dtypes=(torch.float64,)))
def test_cost_is_invariant_under_similarities(backend: Backend, case: Case) -> None:
    """Of the scene and the cameras. Depth is no angle: with it the scale must stay."""
    case = replace(case, behind=case.behind and case.model != "position", size=1.0)
    g = tensors.generator(case.seed)
    turn, shift = (torch.randn(3, generator=g, dtype=torch.float64) for _ in range(2))
    other = transformed(case, turn, shift, 1.0 if case.has_depth else 2.5)
    costs = [c.run(backend, "ba_cost") for c in (case, other)]
    # What the other scene's own numbers are rounded to is of the size of what the bound holds.
    apart(costs[0], costs[1], 2 * (case.cost.error + other.cost.error), "cost")


def null_directions(case: Case) -> tuple[Tensor, Tensor]:
    """Steps of cameras [7 or 4, C, n] and points [7 or 4, P, 3] that change no pixel: turns, shifts and the scale.

    With depth not the scale; of directions not the turns.
    """
    given = case.exact_numbers()
    x, cameras = given["points"], given["cameras"]
    eye = torch.eye(3).double()
    of_points = [*(torch.linalg.cross(e.expand_as(x), x) for e in eye), *(e.expand_as(x) for e in eye), x]
    if case.model == "position":
        of_cameras = [*(torch.linalg.cross(e.expand_as(cameras), cameras) for e in eye)]
        of_cameras += [*(e.expand_as(cameras) for e in eye), cameras]
        return torch.stack(of_cameras[3:]), torch.stack(of_points[3:])
    width = 4 if case.quaternion else 3
    r, t = matrix_of(cameras[:, :width]), cameras[:, width : width + 3]
    steps = torch.zeros(7, case.cameras, case.n, dtype=torch.float64)
    for i in range(3):
        steps[i, :, :3] = -r[..., i]
        steps[3 + i, :, 3:6] = -r[..., i]
    steps[6, :, 3:6] = t
    last = 6 if case.has_depth else 7
    return steps[:last], torch.stack(of_points)[:last]


@every_backend("ba_build", "ba_schur_mv", "ba_jacobian", cases=functools.partial(cases, full=True, losses=LOSSES[:-1]))
def test_null_directions(backend: Backend, case: Case) -> None:
    """Seven of them: no residual, no cost and no undamped Schur complement changes along them."""
    case = replace(case, radius=math.inf)
    system, rows, (camera, point) = case.system, case.rows, case.indices
    _, of_cameras, _, of_points, _ = case.run(backend, "ba_build")
    gradient = torch.cat([of_cameras.flatten(), of_points.flatten()])
    _, by_camera, by_point, _ = case.run(backend, "ba_jacobian")
    terms = system.a.value.abs().mT @ system.b.value.abs()
    directions = null_directions(case)
    for weights in torch.randn(2, len(directions[0]), generator=tensors.generator(case.seed), dtype=torch.float64):
        camera_step, point_step = (torch.tensordot(weights, t, 1) for t in directions)
        x = camera_step.flatten()
        step = torch.cat([x, point_step.flatten()])
        along = (system.gradient.error + ROUNDINGS * UNIT * terms) @ step.abs()
        apart(gradient @ step, torch.zeros(()).double(), along, "gradient")
        # The step's own numbers are rounded, which moves S x by S times that: no more than U times it.
        own = system.hessian.value[: system.split, : system.split].abs() @ (ROUNDINGS * UNIT * x.abs())
        y = case.run(backend, "ba_schur_mv", x=camera_step).flatten()
        apart(y, torch.zeros_like(y), system.times(x).error + own, "S x")
        if case.dtype == torch.float64:
            steps = camera_step[camera][..., None], point_step[point][..., None]
            moved = by_camera @ steps[0] + by_point @ steps[1]
            error = torch.zeros_like(moved)
            for of, part in zip((rows.of_camera, rows.of_point), steps, strict=True):
                error += (of.error + ROUNDINGS * UNIT * of.value.abs()) @ part.abs()
            apart(moved, torch.zeros_like(moved), error, "residuals")


@every_backend("ba_build", "ba_schur", "ba_residual", "ba_backsubstitute", cases=cases)
def test_order_and_labels_do_not_matter(backend: Backend, case: Case) -> None:
    """Of cameras and points, and of the observations of a point."""
    g = tensors.generator(case.seed + 50)
    cameras, points = (torch.randperm(n, generator=g) for n in (case.cameras, case.points))
    shuffled = torch.randperm(len(case.indices[0]), generator=g)
    order = shuffled[points.argsort()[case.indices[1]][shuffled].argsort(stable=True)]
    other = case.reordered(order, cameras, points)
    system = case.system
    assert same_bits(other.run(backend, "ba_residual")[0], case.run(backend, "ba_residual")[0][order])
    n = case.n

    def both(op: str, x: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        changed = [{}, {}] if x is None else [{"camera_step": x}, {"camera_step": x[cameras]}]
        changed = [{"pairs": case.all_pairs, **c} if op == "ba_schur" else c for c in changed]
        return zip(case.run(backend, op, **changed[0]), other.run(backend, op, **changed[1]), strict=True)

    gradient = system.gradient.error
    labels = {
        "cost": (case.cost.error, slice(None)),
        "gradient of cameras": (gradient[: system.split].reshape(-1, n), cameras),
        "hessian of cameras": (system.block(system.hessian, False, n).error, cameras),
        "gradient of points": (gradient[system.split :].reshape(-1, 3), points),
        "hessian of points": (system.block(system.hessian, True, 3).error, points),
    }
    for (name, (error, by)), (a, b) in zip(labels.items(), both("ba_build"), strict=True):
        a, error = (t if t.dim() == 0 else t[by] for t in (a, error))
        apart(b, a, 2 * error, name)
    (blocks, other_blocks), (rhs, other_rhs), *_ = both("ba_schur")
    place = (cameras[:, None] * n + torch.arange(n)).flatten()
    schur, of_rhs = system.schur
    apart(
        assembled(case, other_blocks),
        assembled(case, blocks)[place][:, place],
        2 * torch.maximum(schur.error, schur.error.mT)[place][:, place],
        "S",
    )
    apart(other_rhs.flatten(), rhs.flatten()[place], 2 * of_rhs.error[place], "rhs")
    x = case.x
    (step, other_step), (change, other_change) = both("ba_backsubstitute", x)
    back = system.back(x.flatten()).error
    apart(other_step, step[points], 2 * back[points], "step of points")
    # The two steps differ, too; along that the model's slope is what J^T (r + J step) says.
    whole = torch.cat([x.flatten(), step.flatten()])
    slope = (system.gradient.value + system.hessian.value @ whole)[system.split :].abs() @ (2 * back.flatten())
    apart(other_change, change, 2 * system.change(whole).error + 2 * slope, "change")


@every_backend(*PROBLEM_OPS, cases=cases)
def test_the_same_call_has_the_same_bits(backend: Backend, case: Case) -> None:
    """Whatever the strides are, and the type of indices."""
    again = results(backend, replace(case, layout="contiguous", index=torch.int32))
    for op, made in results(backend, case).items():
        assert all(map(same_bits, made, again[op])), op


# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES[1:])
@on_backends("ba_cost", "ba_build")
def test_a_large_scale_is_no_loss(backend: Backend, loss: str) -> None:
    """rho(s) and rho'(s) s differ from s by no more than 2 s^2 / a^2, and of huber not at all."""
    a = 1e5

    def check(case: Case) -> None:
        plain = replace(case, loss="trivial")
        r = plain.rows.residual.value[:, : plain.loss_rows]
        away = 0.0 if loss == "huber" else float((2 * r.square().sum(1) ** 2 / a**2).sum())
        options = {"loss": loss, "loss_scale": a}
        cost = plain.run(backend, "ba_cost")
        apart(plain.run(backend, "ba_cost", **options), cost, 2 * plain.cost.error + away, "cost")
        # Each row moves by a factor of at most 1 + 2 s / a^2.
        factor = 0.0 if loss == "huber" else 4 * float(most(r)) / a**2
        terms = plain.system.a.value.abs().mT @ plain.system.b.value.abs()
        error = (2 * plain.system.gradient.error + factor * terms)[: plain.system.split]
        gradient = plain.run(backend, "ba_build", **options)[1]
        apart(gradient.flatten(), plain.run(backend, "ba_build")[1].flatten(), error, "gradient")

    def most(r: Tensor) -> Tensor:
        return r.square().sum(1).max() if len(r) else torch.zeros(())

    settings(max_examples=min(15, backend.examples))(given(case=cases(backend))(check))()


@on_backends("ba_cost", "ba_build", "ba_schur", "ba_jacobian")
def test_outliers_of_tukey_have_no_weight(backend: Backend) -> None:
    """Not even in the last bit, but their cost; rows of depth keep theirs."""
    for model, with_depth in itertools.product(MODELS, (False, True)):
        case = Case(model=model, loss="tukey", with_depth=with_depth, cameras=4, points=6, observations=40, seed=1)
        residual = case.run(backend, "ba_residual")[0]
        a = case.loss_scale
        out = residual[:, : case.loss_rows].square().sum(1) > a**2
        assert bool(out.any()) and not bool(out.all())
        kept = case.reordered((~out).nonzero()[:, 0])
        if not case.has_depth:
            cost, of_cameras, _, of_points, _ = case.run(backend, "ba_build")
            rest, *wanted = kept.run(backend, "ba_build")
            apart(cost, rest + int(out.sum()) * a**2 / 6, 4 * case.cost.error, "cost")
            gradient = torch.cat([of_cameras.flatten(), of_points.flatten()])
            without = torch.cat([wanted[0].flatten(), wanted[2].flatten()])
            apart(gradient, without, 2 * kept.system.gradient.error, "gradient")
        # Alone, they are no more than their cost.
        alone = case.reordered(out.nonzero()[:, 0])
        cost, *made = alone.run(backend, "ba_build", depth=None)
        apart(
            cost, torch.tensor(int(out.sum()) * a**2 / 6, dtype=torch.float64), alone.cost.error + a**2 * UNIT, "cost"
        )
        assert not any(bool(t.any()) for t in made)


# Steps ---------------------------------------------------------------------------------------------------------------


def rotation_error(case: Case, angle: float) -> float:
    """What a rotation matrix may be off by: a few roundings of angles up to that, and the storage of its numbers."""
    storage = 0.0 if case.dtype == torch.float64 else 2.0**-24 * (math.pi + 1) * 3
    return ROUNDINGS * UNIT * (1 + angle) + storage


@every_backend("ba_retract", cases=steps)
def test_retraction_is_the_exponential(backend: Backend, case: Steps) -> None:
    """R becomes exp(w) R; the rest is a sum, rounded once."""
    problem, step = case.case, case.camera_step
    cameras, points = case.run(backend)
    before = problem.given["cameras"].double()
    assert cameras.dtype == points.dtype == problem.dtype
    wanted = problem.given["points"].double() + case.point_step
    assert same_bits(points, wanted.to(problem.dtype))
    if problem.model == "position":
        assert same_bits(cameras, (before + step).to(problem.dtype))
        return
    width = before.shape[1] - problem.n + 3
    assert same_bits(cameras[:, width:], (before[:, width:] + step[:, 3:]).to(problem.dtype))
    got, rotation = cameras[:, :width].double(), before[:, :width]
    exact = torch.linalg.matrix_exp(skew(step[:, :3])) @ matrix_of(rotation)
    error = rotation_error(problem, max(ANGLES))
    apart(matrix_of(got), exact, torch.full_like(exact, error), "rotation")
    size = got.norm(dim=1)
    rounding = 4 * UNIT if problem.dtype == torch.float64 else 2.0**-23
    if problem.quaternion:
        apart(size, torch.ones_like(size), torch.full_like(size, rounding), "norm")
    else:
        assert bool((size <= math.pi * (1 + rounding)).all())


@every_backend("ba_retract", cases=functools.partial(steps, models=PERSPECTIVE, least=1))
def test_a_step_back_comes_back(backend: Backend, case: Steps) -> None:
    problem = case.case
    there = case.run(backend)
    back = case.run(
        backend, cameras=there[0], points=there[1], camera_step=-case.camera_step, point_step=-case.point_step
    )
    given = problem.given
    width = back[0].shape[1] - problem.n + 3
    unit = UNIT if problem.dtype == torch.float64 else 2.0**-24
    for a, b, via in (
        (back[1], given["points"], there[1]),
        (back[0][:, width:], given["cameras"][:, width:], there[0][:, width:]),
    ):
        a, b, via = a.double(), b.double(), via.double()
        apart(a, b, 2 * unit * (b.abs() + via.abs()), "translation, intrinsics, points")
    turned = [matrix_of(t[:, :width].double()) for t in (back[0], given["cameras"])]
    error = 2 * rotation_error(problem, max(ANGLES))
    apart(*turned, torch.full_like(turned[0], error), "rotation")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("ba_retract")
def test_small_rotations_keep_their_digits(backend: Backend, dtype: torch.dtype) -> None:
    """A step from no rotation is the vector itself; a step of none, at most rounding."""
    axes = torch.nn.functional.normalize(Case(cameras=7)._random(1, 7, 3), dim=1)
    cameras, points = torch.zeros(7, 9, dtype=dtype), torch.zeros(0, 3, dtype=dtype)
    for angle in (1e-40, 1e-20, 1e-9, 1e-6, 1e-3, 0.5, 3.0):
        step = torch.zeros(7, 9, dtype=torch.float64)
        step[:, :3] = angle * axes
        made, _ = backend.run("ba_retract", cameras, points, step, points.double())
        Bound(step[:, :3], ROUNDINGS * UNIT * step[:, :3].norm(dim=1, keepdim=True).expand(-1, 3)).assert_holds(
            made[:, :3], "vector"
        )
        again, _ = backend.run("ba_retract", made, points, torch.zeros_like(step), points.double())
        error = 2 * torch.finfo(dtype).eps * made[:, :3].double().abs() + ROUNDINGS * UNIT * angle
        apart(again[:, :3].double(), made[:, :3].double(), error, "again")
        # A quaternion has a sine of half of it.
        quaternions = torch.cat([torch.ones(7, 1, dtype=dtype), cameras], 1)
        made, _ = backend.run("ba_retract", quaternions, points, step, points.double())
        exact = quaternion_of(step[:, :3])
        error = ROUNDINGS * UNIT * exact[:, 1:].norm(dim=1, keepdim=True).expand(-1, 3)
        Bound(exact[:, 1:], error).assert_holds(made[:, 1:4], "quaternion")


@on_backends("ba_retract")
def test_rotations_by_nearly_half_a_turn(backend: Backend) -> None:
    """On both sides of pi; the axis may turn around there, the rotation doesn't."""
    axes = torch.nn.functional.normalize(Case(cameras=9)._random(1, 9, 3), dim=1)
    points = torch.zeros(0, 3, dtype=torch.float64)
    for beyond in (-1e-3, -1e-9, -1e-15, 0.0, 1e-15, 1e-9, 1e-3, math.pi - 1e-9, math.pi):
        cameras, step = (torch.zeros(9, 9, dtype=torch.float64) for _ in range(2))
        cameras[:, :3], step[:, :3] = 2 * axes, (math.pi + beyond - 2) * axes
        made = backend.run("ba_retract", cameras, points, step, points)[0][:, :3]
        assert bool((made.norm(dim=1) <= math.pi * (1 + 4 * UNIT)).all())
        exact = torch.linalg.matrix_exp(skew((math.pi + beyond) * axes))
        apart(matrix_of(made), exact, torch.full_like(exact, ROUNDINGS * UNIT * 8), f"pi + {beyond}")


@on_backends("ba_retract", "ba_residual")
def test_quaternions_of_any_length(backend: Backend) -> None:
    """They are the same camera; one of none at all is no number."""
    case = Case(quaternion=True, cameras=4, seed=2)
    cameras = case.given["cameras"]
    for factor in (1e-3, -1.0, 1e3):
        scaled = torch.cat([factor * cameras[:, :4], cameras[:, 4:]], 1)
        residual = case.run(backend, "ba_residual", cameras=scaled)[0]
        apart(residual, case.run(backend, "ba_residual")[0], 2 * case.rows.residual.error, "residual")
    none = cameras.clone()
    none[1, :4] = 0
    at = case.indices[0] == 1
    residual = case.run(backend, "ba_residual", cameras=none)[0]
    assert torch.equal(residual.isnan().all(1), at)
    made, _ = Steps(case).run(backend, cameras=none)
    assert torch.equal(made[:, :4].isnan().all(1), torch.arange(4) == 1) and bool(made[:, 4:].isfinite().all())


@on_backends("ba_retract")
def test_nan_in_a_camera_or_point_stays_there(backend: Backend) -> None:
    for quaternion in (False, True):
        case = Steps(Case(quaternion=quaternion, cameras=5, points=7))
        cameras, points, step, point_step = (
            t.clone()
            for t in (case.case.given["cameras"], case.case.given["points"], case.camera_step, case.point_step)
        )
        before = case.run(backend)
        cameras[1], step[3, :3], points[2], point_step[5] = (math.nan,) * 4
        after = case.run(backend, cameras=cameras, points=points, camera_step=step, point_step=point_step)
        width = 4 if quaternion else 3
        assert torch.equal(after[0][:, :width].isnan().any(1), torch.tensor([False, True, False, True, False]))
        assert torch.equal(after[1].isnan().all(1), torch.tensor([i in (2, 5) for i in range(7)]))
        for a, b in zip(before, after, strict=True):
            sound = ~b.isnan().any(1)
            assert same_bits(a[sound], b[sound])


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@on_backends(*PROBLEM_OPS)
def test_nothing_to_do(backend: Backend, model: str) -> None:
    """No observations, cameras, points or pairs."""
    for cameras, points, depth in itertools.product((0, 2), (0, 3), (False, True)):
        case = Case(model=model, cameras=cameras, points=points, observations=0, with_depth=depth)
        made = results(backend, case)
        rows = 3 if case.has_depth or model == "position" else 2
        assert made["ba_residual"][0].shape == (0, rows) and made["ba_jacobian"][1].shape == (0, rows, case.n)
        assert made["ba_schur"][0].shape == (cameras * (cameras + 1) // 2, case.n, case.n)
        assert not any(bool(t.any()) for out in made.values() for t in out)
        none = case.run(backend, "ba_schur", pairs=torch.zeros(0, 2, dtype=torch.int64))[0]
        assert none.shape == (0, case.n, case.n)
        moved = Steps(case).run(backend)
        assert [len(t) for t in moved] == [cameras, points]


LARGE = {
    **{
        f"many observations of a point, {model}": Case(model, cameras=4, points=5, observations=700) for model in MODELS
    },
    "whole vectors": Case("opencv", cameras=5, points=40, observations=512),
    "for several threads": Case("snavely", cameras=3, points=40, observations=4300),
}
# Kept, with their exact results, for all back ends.
LARGE = {name: replace(case, with_depth=True, with_fixed=True, loss="cauchy", seed=5) for name, case in LARGE.items()}


@pytest.mark.parametrize("size", LARGE)
@on_backends(*PROBLEM_OPS)
def test_large(backend: Backend, size: str) -> None:
    """More observations than a kernel takes at a time, of one point and of all; in parts."""
    if backend.slow or backend.name == "simt":
        pytest.skip("takes minutes in an emulator")
    case = LARGE[size]
    for threads in (1, 3)[: 2 if size == "for several threads" else 1]:
        torch.set_num_threads(threads)
        made = results(backend, case)
        again = results(backend, case)
        torch.set_num_threads(1)
        for op in PROBLEM_OPS:
            assert all(map(same_bits, made[op], again[op])), op
        system, x = case.system, case.x.flatten()
        case.rows.residual.assert_holds(made["ba_residual"][0], "residual")
        for number, bound in enumerate((case.rows.residual, case.rows.of_camera, case.rows.of_point)):
            bound.assert_holds(made["ba_jacobian"][number], "derivatives")
        case.cost.assert_holds(made["ba_cost"][0], "cost")
        gradient = torch.cat([made["ba_build"][1].flatten(), made["ba_build"][3].flatten()])
        system.gradient.assert_holds(gradient, "gradient")
        system.block(system.hessian, False, case.n).assert_holds(made["ba_build"][2], "U")
        system.block(system.hessian, True, 3).assert_holds(made["ba_build"][4], "V")
        blocks_of(system, case, case.all_pairs).assert_holds(made["ba_schur"][0], "S")
        system.schur[1].assert_holds(made["ba_schur"][1].flatten(), "rhs")
        system.times(x).assert_holds(made["ba_schur_mv"][0].flatten(), "S x")
        point_step, change = made["ba_backsubstitute"]
        system.back(x).assert_holds(point_step, "step of points")
        system.change(torch.cat([x, point_step.flatten()])).assert_holds(change, "change")


# Contents that nobody may trust --------------------------------------------------------------------------------------

NARROW = (-1, -(2**31), 2**31 - 1)
WIDE = (2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63))  # some are a right number in 32 bits


def refused(backend: Backend, op: str, name: str, run: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        run()
    assert re.search(rf"effk::{op}: .*(?<!\w){name}(?!\w)", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", ["camera_index", "point_index"])
@pytest.mark.parametrize("op", PROBLEM_OPS)
@on_backends(*PROBLEM_OPS)
def test_corrupt_indices(backend: Backend, op: str, name: str) -> None:
    """Refused, with the number; on a GPU the observation is left out."""
    for index in INDICES:
        case = Case(index=index, with_depth=True, cameras=4, points=6, observations=14, seed=4)
        limit = case.cameras if name == "camera_index" else case.points
        for number in (limit, *NARROW, *(WIDE if index == torch.int64 else ())):
            o = 0 if number < 0 else 13  # so that they stay ascending
            wrong = case.given[name].clone()
            wrong[o] = number
            if backend.raises_on_corrupt:
                refused(backend, op, name, lambda case=case, wrong=wrong: case.run(backend, op, **{name: wrong}))
                with pytest.raises(RuntimeError, match=rf"(?<!\d){number}(?!\d)"):
                    case.run(backend, op, **{name: wrong})
                continue
            got, left = case.run(backend, op, **{name: wrong}), torch.arange(14) != o
            wanted = case.reordered(left.nonzero()[:, 0]).run(backend, op)
            if op in ("ba_residual", "ba_jacobian"):
                for t, of in zip(got, wanted, strict=True):
                    assert same_bits(t[left], of) and not bool(t[o].any())
                continue
            for t, of in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True):
                size = float(of.abs().max())  # the same sums, with a 0 in them
                apart(t, of, torch.full_like(of, ROUNDINGS * UNIT * 1e4 * size), op)


@pytest.mark.parametrize("op", [op for op in PROBLEM_OPS if op not in ANY_ORDER])
@on_backends(*PROBLEM_OPS)
def test_points_must_ascend(backend: Backend, op: str) -> None:
    """Where they are eliminated. On a GPU results are anybody's guess, within bounds."""
    case = Case(observations=30, points=8)
    point = case.given["point_index"].clone()
    at = int((point[1:] > point[:-1]).nonzero()[3])
    point[[at, at + 1]] = point[[at + 1, at]]
    if backend.raises_on_corrupt:
        refused(backend, op, "point_index", lambda: case.run(backend, op, point_index=point))
    else:
        case.run(backend, op, point_index=point)


@on_backends("ba_schur")
def test_corrupt_pairs(backend: Backend) -> None:
    """The larger camera first, ascending, none twice, none that isn't there."""
    case = Case(cameras=3)
    wrong = {
        "upper": [[0, 0], [0, 1]],
        "twice": [[1, 0], [1, 0]],
        "falling": [[1, 1], [1, 0]],
        "falling rows": [[2, 0], [1, 1]],
        "too far": [[3, 0]],
        "below": [[1, -1]],
        "both below": [[-1, -1]],
        "far": [[2**31, 0]],
        "right in 32 bits": [[2**32 + 1, 2**32]],
    }
    for pairs in wrong.values():
        for index in INDICES if max(map(max, pairs)) < 2**31 else (torch.int64,):
            given = torch.tensor(pairs, dtype=index)
            if backend.raises_on_corrupt:
                refused(backend, "ba_schur", "pairs", lambda given=given: case.run(backend, "ba_schur", pairs=given))
            else:
                case.run(backend, "ba_schur", pairs=given)


@pytest.mark.parametrize("name", ["camera_index", "point_index"])
@on_backends(*PROBLEM_OPS)
def test_hostile_indices_stay_in_bounds(backend: Backend, name: str) -> None:
    """Any numbers at all: an error, or a result."""
    options = st.one_of(st.integers(-2, 8), st.sampled_from((*NARROW, *WIDE)))

    def check(numbers: list[int]) -> None:
        case = Case(observations=8)
        wrong = torch.tensor(numbers)
        for op in PROBLEM_OPS:
            try:
                case.run(backend, op, **{name: wrong})
            except RuntimeError as error:
                assert backend.raises_on_corrupt and f"effk::{op}: " in str(error)

    settings(max_examples=min(20, backend.examples))(given(numbers=st.lists(options, min_size=8, max_size=8))(check))()


@on_backends("ba_cost")
def test_bound_is_tight_enough_to_see_one_number(backend: Backend) -> None:
    """The bounds would be no test if one number of a camera could be another, or damping could be left out."""
    case = Case(cameras=4, points=8, observations=30, with_depth=True, seed=6)
    cost = case.run(backend, "ba_cost")
    case.cost.assert_holds(cost, "cost")
    moved = case.with_numbers(cameras=case.numbers["cameras"] * (1 + 1e-12))
    with pytest.raises(AssertionError, match="out of bounds"):
        moved.cost.assert_holds(cost, "cost")
    exact, undamped = case.system.schur[0], replace(case, radius=1e9).system.schur[0]
    assert bool(((exact.value - undamped.value).abs() > 1e3 * exact.error).any())


def test_back_ends_are_all_there() -> None:
    """Those of ba run all of its ops."""
    assert len({effk.backends(op) for op in OPS}) == 1
