"""Gradients of ba_residual against autograd of the dense formula, and against differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ..kit import tensors
from ..kit.backends import device_params
from .strategies import ANGLES, MODELS, PERSPECTIVE, UNIT, Bound, Case, cases, dense_residual, matrix_of

NAMES = ("cameras", "points", "observations")

every_device = pytest.mark.parametrize("device", device_params())


def inputs_of(case: Case, device: str) -> dict[str, Tensor]:
    return {name: tensors.to_device(case.given[name], device).requires_grad_() for name in NAMES}


def residual(case: Case, inputs: dict[str, Tensor], function: Any = torch.ops.effk.ba_residual) -> Tensor:
    """The residual as a function of those inputs that have gradients."""
    rest = [
        tensors.to_device(case.given[name], inputs["cameras"].device.type) for name in ("camera_index", "point_index")
    ]
    depth = tensors.to_device(case.given["depth"], inputs["cameras"].device.type)
    options = {"model": case.model, "depth_weight": case.depth_weight}
    return function(*inputs.values(), *rest, depth, **options)[0]


def rotation_gradient(rotation: Tensor, w: Bound) -> Bound:
    """What becomes of the gradient by w where R becomes exp(w) R, for the rotation's own numbers [C, 3 or 4].

    By the derivative of R in its numbers: exp(w) R has dR R^T = [w]x. It loses what the exponential is rounded to, and
    of small angles nothing. A quaternion's is over its length.
    """

    def turns(numbers: Tensor, at: Tensor) -> Tensor:
        skewed = matrix_of(numbers) @ at.mT
        return torch.stack([skewed[2, 1] - skewed[1, 2], skewed[0, 2] - skewed[2, 0], skewed[1, 0] - skewed[0, 1]]) / 2

    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda t, r=r: turns(t, matrix_of(r)), r) for r in rotation]
        or [torch.zeros(3, rotation.shape[1], dtype=torch.float64)]
    )[: len(rotation)]
    size = w.value.abs().sum(1, keepdim=True) * jacobian.abs().amax((1, 2), keepdim=True)[..., 0]
    value = (jacobian.mT @ w.value[..., None])[..., 0]
    error = (jacobian.abs().mT @ w.error[..., None])[..., 0] + 100 * UNIT * size
    return Bound(value, error)


def exact_gradients(case: Case, grad: Tensor) -> dict[str, Bound]:
    """Sums over observations of derivatives as ba_jacobian gives them, rounded to the storage type, times grad."""
    rows, (camera, point) = case.rows, case.indices
    g = grad.double()[..., None]

    def summed(of: Bound, place: Tensor, size: int) -> Bound:
        stored = of.stored(case.dtype)
        value = (stored.value.mT @ g)[..., 0]
        lost = (stored.error.mT @ g.abs())[..., 0] + (len(g) + 8) * UNIT * (stored.value.abs().mT @ g.abs())[..., 0]
        zero = torch.zeros(size, value.shape[1], dtype=torch.float64)
        return Bound(zero.index_add(0, place, value), zero.index_add(0, place, lost))

    tangent = summed(rows.of_camera, camera, case.cameras)
    found = {"points": summed(rows.of_point, point, case.points)}
    cameras = case.exact_numbers()["cameras"]
    if case.model == "position":
        found["cameras"] = tangent
    else:
        of_rotation = rotation_gradient(
            cameras[:, : cameras.shape[1] - case.n + 3], Bound(tangent.value[:, :3], tangent.error[:, :3])
        )
        found["cameras"] = Bound(
            torch.cat([of_rotation.value, tangent.value[:, 3:]], 1),
            torch.cat([of_rotation.error, tangent.error[:, 3:]], 1),
        )
    given = {k: t.clone().requires_grad_() for k, t in case.exact_numbers().items() if k in NAMES}
    (of,) = torch.autograd.grad(residual(case, given, dense_residual), given["observations"], grad.double())
    found["observations"] = Bound(of, 100 * UNIT * grad.double().abs().sum(1, keepdim=True).expand_as(of))
    return found


def check_gradients(case: Case, device: str) -> None:
    inputs = inputs_of(case, device)
    out = residual(case, inputs)
    # Not contiguous, as gradients may come from above.
    grad = tensors.lay_out(tensors.values(tuple(out.shape), case.dtype, "normal", case.seed), "strided")
    got = torch.autograd.grad(out, list(inputs.values()), tensors.to_device(grad, device))
    exact = exact_gradients(case, grad)
    for (name, of), result in zip(inputs.items(), got, strict=True):
        assert result.shape == of.shape and result.dtype == of.dtype, name
        exact[name].assert_holds(result.cpu(), f"gradient of {name}")


@every_device
def test_gradients_are_those_of_the_exact_derivatives(device: str) -> None:
    """Of all models, rotations and types, observations in any order."""
    settings(max_examples=60)(given(case=cases(ordered=False))(check_gradients))(device=device)


def test_the_formula_itself() -> None:
    """exact_gradients against autograd through dense_residual."""
    for model in MODELS:
        for quaternion in (False, True)[: 1 if model == "position" else 2]:
            case = Case(model=model, quaternion=quaternion, cameras=6, observations=30, with_depth=True)
            given = {k: t.clone().requires_grad_() for k, t in case.exact_numbers().items() if k in NAMES}
            out = residual(case, given, dense_residual)
            grad = tensors.values(tuple(out.shape), torch.float64, "normal", 1)
            got = torch.autograd.grad(out, list(given.values()), grad)
            exact = exact_gradients(case, grad)
            for name, result in zip(given, got, strict=True):
                torch.testing.assert_close(result, exact[name].value, rtol=1e-9, atol=1e-9, msg=name)


@every_device
@pytest.mark.parametrize("quaternion", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_gradcheck(device: str, model: str, quaternion: bool) -> None:
    """With depth, rotations of all angles, and quaternions of any length."""
    if model == "position" and quaternion:
        pytest.skip("has no rotations")
    case = Case(model=model, quaternion=quaternion, with_depth=True, observations=9, seed=3)
    inputs = inputs_of(case, device)

    def function(*values: Tensor) -> Tensor:
        return residual(case, dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(function, list(inputs.values()), eps=1e-6, atol=1e-7, rtol=1e-6)


@every_device
@pytest.mark.parametrize("angle", [*ANGLES, 0.0099, 0.0101])  # on both sides of where a series ends
def test_gradient_of_a_vector_at_any_angle(device: str, angle: float) -> None:
    """Near none and near half a turn, beyond it, too."""
    for dtype in (torch.float64, torch.float32):
        check_gradients(Case(angle=angle, dtype=dtype, cameras=5, observations=20, seed=8), device)


@every_device
def test_clamped_scales_have_none(device: str) -> None:
    """The gradient of v - s d where s is kept at 1e-5: that of a constant s."""
    case = Case(model="position", observations=9)
    case = case.with_numbers(observations=-case.numbers["observations"])
    inputs = inputs_of(case, device)
    residual(case, inputs).sum().backward()
    counts = [torch.bincount(t, minlength=n) for t, n in zip(case.indices, (case.cameras, case.points), strict=True)]
    of_cameras, of_points, of_observations = (inputs[name].grad.cpu() for name in NAMES)
    assert torch.equal(of_observations, torch.ones_like(of_observations))
    for of, count, sign in ((of_cameras, counts[0], 1), (of_points, counts[1], -1)):
        wanted = sign * 1e-5 * count[:, None].double().expand(-1, 3)
        torch.testing.assert_close(of, wanted, rtol=1e-12, atol=0)


@every_device
@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("model", ["snavely", "opencv", "position"])
def test_one_gradient_without_the_others(device: str, model: str, wanted: str) -> None:
    """The same bits as of all."""
    case = Case(model=model, with_depth=True)
    all_of = inputs_of(case, device)
    one = {name: t.detach().requires_grad_(name == wanted) for name, t in all_of.items()}
    (alone,) = torch.autograd.grad(residual(case, one).sum(), one[wanted])
    together = torch.autograd.grad(residual(case, all_of).sum(), list(all_of.values()))
    assert tensors.same_bits(alone, together[NAMES.index(wanted)])


@every_device
def test_what_is_not_seen_has_none(device: str) -> None:
    """Whatever it holds; and NaN in an observation spoils its own camera and point."""
    for model in MODELS:
        case = Case(model=model, cameras=5, points=9, observations=12, seed=2)
        camera, point = case.indices
        seen = [torch.bincount(t, minlength=n) > 0 for t, n in ((camera, 5), (point, 9))]
        assert not all(bool(t.all()) for t in seen)
        inputs = inputs_of(case, device)
        with torch.no_grad():
            for name, t in zip(NAMES, seen, strict=False):
                inputs[name][~t.to(device)] = torch.nan
            inputs["observations"][3] = torch.nan
        residual(case, inputs).sum().backward()
        for name, t, at in zip(NAMES, seen, (camera[3], point[3]), strict=False):
            of = inputs[name].grad.cpu()
            assert not bool(of[~t].any())
            rest = torch.arange(len(of)) != at
            assert bool(of[rest].isfinite().all())


@every_device
def test_twice_is_refused(device: str) -> None:
    """Second derivatives aren't there, and nobody gets zeros for them."""
    case = Case()
    inputs = inputs_of(case, device)
    (once,) = torch.autograd.grad(residual(case, inputs).square().sum(), inputs["cameras"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled(dynamic: bool) -> None:
    """The same gradients, to the bit."""
    torch._dynamo.reset()
    for case in (Case(with_depth=True, quaternion=True), Case(model="position")):

        def function(cameras: Tensor, points: Tensor, observations: Tensor, case: Case = case) -> Tensor:
            rest = (case.given["camera_index"], case.given["point_index"], case.given["depth"])
            return torch.ops.effk.ba_residual(cameras * 2, points, observations, *rest, model=case.model)[0].square()

        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        inputs = list(inputs_of(case, "cpu").values())
        gradients = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, function)]
        assert all(map(tensors.same_bits, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_descent(dtype: torch.dtype) -> None:
    """A step against the gradients makes the sum of squares smaller, by about what they say."""
    for model in PERSPECTIVE:
        case = replace(Case(model=model, dtype=dtype, outliers=False), quaternion=len(model) % 2 == 0)
        inputs = inputs_of(case, "cpu")
        before = residual(case, inputs).double().square().sum()
        gradients = torch.autograd.grad(before, list(inputs.values()))
        promised = 1e-3 * float(before.detach())
        length = promised / sum(float(g.double().square().sum()) for g in gradients)
        moved = {k: (t - length * g).detach() for (k, t), g in zip(inputs.items(), gradients, strict=True)}
        after = residual(case, moved).double().square().sum()
        assert 0.5 * promised < float((before - after).detach()) < 1.5 * promised, model
