"""The ops of ba as documented functions, with what torch needs to know of them beside the kernels.

Letters: C cameras, P points, O observations, ni intrinsics of a camera, n the size of a camera's tangent, R rows of a
residual, B blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._registry import op
from .._sums import sum_rows
from . import levenberg_marquardt as solver
from . import reference

# --- Shapes ----------------------------------------------------------------------------------------------------------


def _doubles(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


def _fake_residual(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    depth_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    problem = (cameras, points, observations, camera_index, point_index, depth)
    _, rows = reference.check_problem("ba_residual", *problem, model, depth_weight)
    count = observations.shape[0]
    return cameras.new_empty(count, rows), cameras.new_empty(count, dtype=torch.bool)


def _fake_jacobian(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    depth_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = (cameras, points, observations, camera_index, point_index, depth)
    n, rows = reference.check_problem("ba_jacobian", *problem, model, depth_weight)
    count = observations.shape[0]
    return (
        cameras.new_empty(count, rows),
        cameras.new_empty(count, rows, n),
        cameras.new_empty(count, rows, 3),
        cameras.new_empty(count, dtype=torch.bool),
    )


def _fake_cost(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
) -> Tensor:
    problem = (cameras, points, observations, camera_index, point_index, depth)
    reference.check_problem("ba_cost", *problem, model, depth_weight)
    reference.check_loss("ba_cost", loss, loss_scale)
    return _doubles(cameras)


def _fake_build(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = (cameras, points, observations, camera_index, point_index, depth)
    n, _ = reference.check_problem("ba_build", *problem, model, depth_weight)
    reference.check_loss("ba_build", loss, loss_scale)
    of_cameras, of_points = cameras.shape[0], points.shape[0]
    return (
        _doubles(cameras),
        _doubles(cameras, of_cameras, n),
        _doubles(cameras, of_cameras, n, n),
        _doubles(cameras, of_points, 3),
        _doubles(cameras, of_points, 3, 3),
    )


def _fake_schur(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    pairs: Tensor | None = None,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 1e4,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    name, problem = "ba_schur", (cameras, points, observations, camera_index, point_index, depth)
    n, _ = reference.check_problem(name, *problem, model, depth_weight)
    reference.check_loss(name, loss, loss_scale)
    reference.check_damping(name, fixed_points, points, radius)
    blocks, count = reference.check_pairs(name, pairs, cameras), cameras.shape[0]
    vectors = [_doubles(cameras, count, n) for _ in range(3)]
    return _doubles(cameras, blocks, n, n), vectors[0], vectors[1], vectors[2], _doubles(cameras), _doubles(cameras)


def _fake_schur_mv(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    x: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 1e4,
) -> Tensor:
    name, problem = "ba_schur_mv", (cameras, points, observations, camera_index, point_index, depth)
    n, _ = reference.check_problem(name, *problem, model, depth_weight)
    reference.check_loss(name, loss, loss_scale)
    reference.check_damping(name, fixed_points, points, radius)
    reference.check_step(name, "x", x, cameras.shape[0], n, cameras)
    return _doubles(cameras, cameras.shape[0], n)


def _fake_backsubstitute(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    camera_step: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 1e4,
) -> tuple[Tensor, Tensor]:
    name, problem = "ba_backsubstitute", (cameras, points, observations, camera_index, point_index, depth)
    n, _ = reference.check_problem(name, *problem, model, depth_weight)
    reference.check_loss(name, loss, loss_scale)
    reference.check_damping(name, fixed_points, points, radius)
    reference.check_step(name, "camera_step", camera_step, cameras.shape[0], n, cameras)
    return _doubles(cameras, points.shape[0], 3), _doubles(cameras)


def _fake_retract(
    cameras: Tensor, points: Tensor, camera_step: Tensor, point_step: Tensor, *, model: str = "snavely"
) -> tuple[Tensor, Tensor]:
    reference.check_retract(cameras, points, camera_step, point_step, model)
    return cameras.new_empty(cameras.shape), points.new_empty(points.shape)


def _fake_pcg(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    rhs: Tensor,
    inverse: Tensor,
    damping: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 10000.0,
    tolerance: float = 0.1,
    max_iterations: int = 500,
) -> tuple[Tensor, Tensor]:
    problem = (cameras, points, observations, camera_index, point_index)
    system = (rhs, inverse, damping, depth, fixed_points)
    settings = (loss_scale, depth_weight, radius, tolerance)
    solver.check_pcg(*problem, *system, model, loss, *settings, max_iterations)
    return rhs.new_empty(rhs.shape), rhs.new_empty((), dtype=torch.int64)


def _fake_solve(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    columns: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    position_weight: float = 1.0,
    max_iterations: int = 100,
    function_tolerance: float = 1e-6,
    gradient_tolerance: float = 1e-10,
    parameter_tolerance: float = 1e-8,
    max_seconds: float | None = None,
    initial_radius: float = 10000.0,
    linear_solver: str = "auto",
    linear_tolerance: float = 0.1,
    max_linear_iterations: int = 500,
) -> Tensor:
    options = solver.Options(
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
        position_weight=position_weight,
        max_iterations=max_iterations,
        function_tolerance=function_tolerance,
        gradient_tolerance=gradient_tolerance,
        parameter_tolerance=parameter_tolerance,
        max_seconds=max_seconds,
        initial_radius=initial_radius,
        linear_solver=linear_solver,
        linear_tolerance=linear_tolerance,
        max_linear_iterations=max_linear_iterations,
    )
    problem = cameras, points, observations, camera_index, point_index, depth, fixed_points, columns, positions
    solver.check_solve("ba_solve", *problem, options)
    return _doubles(cameras, max_iterations + 1, solver.COLUMNS)


def _fake_gp_solve(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    fixed_points: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    loss: str = "huber",
    loss_scale: float = 0.1,
    max_iterations: int = 100,
    function_tolerance: float = 1e-6,
    gradient_tolerance: float = 1e-10,
    parameter_tolerance: float = 1e-8,
    max_seconds: float | None = None,
    initial_radius: float = 10000.0,
    linear_solver: str = "auto",
    linear_tolerance: float = 0.1,
    max_linear_iterations: int = 500,
) -> Tensor:
    options = solver.Options(
        model="position",
        loss=loss,
        loss_scale=loss_scale,
        max_iterations=max_iterations,
        function_tolerance=function_tolerance,
        gradient_tolerance=gradient_tolerance,
        parameter_tolerance=parameter_tolerance,
        max_seconds=max_seconds,
        initial_radius=initial_radius,
        linear_solver=linear_solver,
        linear_tolerance=linear_tolerance,
        max_linear_iterations=max_linear_iterations,
    )
    problem = cameras, points, observations, camera_index, point_index, None, fixed_points, columns, None
    solver.check_solve("gp_solve", *problem, options)
    return _doubles(cameras, max_iterations + 1, solver.COLUMNS)


# --- Gradients -------------------------------------------------------------------------------------------------------


def _residual_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    cameras, points, observations, camera_index, point_index, *rest = inputs
    ctx.num_inputs, ctx.options = len(inputs), keyword_only_inputs
    ctx.save_for_backward(cameras, points, observations, camera_index, point_index, rest[0] if rest else None)


@once_differentiable
def _residual_backward(ctx: Any, of_residual: Tensor, of_valid: Tensor) -> tuple[Tensor | None, ...]:
    cameras, points, observations, camera_index, point_index, depth = ctx.saved_tensors
    model, grad = ctx.options["model"], of_residual.double()
    of_cameras = of_points = of_observations = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        problem = (cameras, points, observations, camera_index, point_index, depth)
        _, by_camera, by_point, _ = torch.ops.effk.ba_jacobian(*problem, **ctx.options)
    if ctx.needs_input_grad[0]:
        by_tangent = torch.einsum("or,orn->on", grad, by_camera.double())
        of_tangents = sum_rows(by_tangent, camera_index, cameras.shape[0])
        of_cameras = _from_tangents(cameras, of_tangents, model).to(cameras.dtype)
    if ctx.needs_input_grad[1]:
        rows = torch.einsum("or,orn->on", grad, by_point.double())
        of_points = sum_rows(rows, point_index, points.shape[0]).to(points.dtype)
    if ctx.needs_input_grad[2]:
        of_observations = _of_observations(cameras, points, observations, camera_index, point_index, grad, model).to(
            observations.dtype
        )
    return (of_cameras, of_points, of_observations, None, None, None)[: ctx.num_inputs]


def _from_tangents(cameras: Tensor, of_tangents: Tensor, model: str) -> Tensor:
    """The gradient [C, ..] of the cameras' own numbers."""
    if model == reference.POSITION:
        return of_tangents
    w, rest = of_tangents[:, :3], of_tangents[:, 3:]
    own = cameras[:, : cameras.shape[1] - rest.shape[1]].double()
    if own.shape[1] == 4:  # a change dq of the quaternion q rotates by 2 Im(dq q*) / |q|^2
        size = torch.linalg.vector_norm(own, dim=1, keepdim=True)
        pure = torch.cat([torch.zeros_like(w[:, :1]), w], 1)
        return torch.cat([2 * reference.product(pure, own / size) / size, rest], 1)
    # A change da of the vector a rotates by J da, J = 1 + b [a]x + c [a]x^2 the left Jacobian of SO(3).
    square = own.square().sum(1, keepdim=True)
    small = square < 1e-4  # where two terms more of the series would be lost in float64
    angle = torch.where(small, 1.0, square).sqrt()
    b = torch.where(small, 1 / 2 - square / 24 + square**2 / 720, 2 * ((angle / 2).sin() / angle) ** 2)
    c = torch.where(small, 1 / 6 - square / 120 + square**2 / 5040, (angle - angle.sin()) / angle**3)
    once = torch.linalg.cross(own, w)
    return torch.cat([w - b * once + c * torch.linalg.cross(own, once), rest], 1)


def _of_observations(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    grad: Tensor,
    model: str,
) -> Tensor:
    camera, point = camera_index.long(), point_index.long()
    there = (camera >= 0) & (camera < cameras.shape[0]) & (point >= 0) & (point < points.shape[0])
    if model == reference.POSITION:  # of v - s(v) d
        x = points[torch.where(there, point, 0)].double()
        d = x - cameras[torch.where(there, camera, 0)].double()
        square = (d * d).sum(1, keepdim=True)
        free = (observations.double() * d).sum(1, keepdim=True) / square > reference.MIN_SCALE
        rows = grad - torch.where(free, d * (d * grad).sum(1, keepdim=True) / square, 0.0)
    else:
        rows = -grad[:, :2]
    return torch.where(there[:, None], rows, 0.0)  # on a GPU wrong indices have rows of 0


# --- The ops ---------------------------------------------------------------------------------------------------------


@op(
    reference=reference.ba_residual,
    fake=_fake_residual,
    triton=None,
    setup_context=_residual_context,
    backward=_residual_backward,
)
def ba_residual(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    depth_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """How far from where it was seen each camera sees its point (InstantSfM, arXiv:2510.13310).

    A camera is its rotation R, as an angle-axis vector or a quaternion (w, x, y, z; normalised where used), its
    translation t (3) and its intrinsics; Y = R X + t. With x = Y.x / Y.z, y = Y.y / Y.z, n = x^2 + y^2 the models of
    COLMAP are, by their intrinsics,

    - "simple_pinhole" f, cx, cy: (f x + cx, f y + cy); "pinhole" fx, fy, cx, cy: likewise;
    - "simple_radial" f, cx, cy, k: with x and y times 1 + k n; "radial" f, cx, cy, k1, k2: times 1 + k1 n + k2 n^2;
    - "opencv" fx, fy, cx, cy, k1, k2, p1, p2: x (1 + k1 n + k2 n^2) + 2 p1 x y + p2 (n + 2 x^2), and
      y (1 + k1 n + k2 n^2) + 2 p2 x y + p1 (n + 2 y^2);

    and "snavely" f, k1, k2, of Bundle Adjustment in the Large (Agarwal et al., 2010), looks the other way: with
    x = -Y.x / Y.z, y = -Y.y / Y.z and -Y.z as its depth, (f x, f y) times 1 + k1 n + k2 n^2.

    Model "position" is global positioning: cameras are centres c, observations directions v in the frame of the
    points, and the residual is v - s d with d = X - c, s = v.d / d.d, the best scale, but at least 1e-5.

    Observations count wherever the point is, as in Ceres. One with NaN has NaN in its residual; it spoils no other.
    Computed in float64, rounded once. Differentiable in cameras, points and observations, once.

    Args:
        cameras: [C, 6 + ni] (angle-axis) or [C, 7 + ni] (quaternions), or [C, 3] of model "position"; float32 or
            float64, any strides, as all tensors here.
        points: [P, 3] of cameras' dtype.
        observations: [O, 2] of cameras' dtype, pixels; or [O, 3], directions.
        camera_index: [O] int32 or int64, in any order; a pair of camera and point may come more than once.
        point_index: likewise.
        depth: [O] of cameras' dtype, z that was measured: adds the row depth_weight (1 / z - 1 / depth), z the depth
            of Y. It is 0 where depth is NaN, 0 or less. Not for "position".
        model: as above.
        depth_weight: 0 or more.

    Returns:
        residual [O, R] of cameras' dtype, R = 3 with depth or directions, else 2; and valid [O] bool: whether the
        point is in front of the camera, or for "position" s more than 1e-5. Behind it, the residual is that of the
        formula.

    Raises:
        RuntimeError: wrong dtypes or shapes; on a CPU also an index out of range. On a GPU such an observation is left
            out: its rows are 0.
    """
    return torch.ops.effk.ba_residual(
        cameras, points, observations, camera_index, point_index, depth, model=model, depth_weight=depth_weight
    )


@op(reference=reference.ba_jacobian, fake=_fake_jacobian, triton=None)
def ba_jacobian(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    depth_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residuals of `ba_residual` and their derivatives by camera and point.

    That by a camera is in its tangent (w, tau, iota), n = 6 + ni: R becomes exp(w) R, t + tau, intrinsics + iota, as
    `ba_retract` does, whichever numbers hold the rotation; of model "position" it is by the centre, n = 3, with s a
    function of d. Where s is kept at 1e-5 it is constant.

    Args:
        cameras, points, observations, camera_index, point_index, depth: as of `ba_residual`.
        model, depth_weight: likewise.

    Returns:
        residual [O, R], by cameras [O, R, n] and by points [O, R, 3], of cameras' dtype, and valid [O] bool.

    Raises:
        RuntimeError: as `ba_residual`.
    """
    return torch.ops.effk.ba_jacobian(
        cameras, points, observations, camera_index, point_index, depth, model=model, depth_weight=depth_weight
    )


@op(reference=reference.ba_cost, fake=_fake_cost, triton=None)
def ba_cost(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
) -> Tensor:
    """Half the sum of the robust squares of all residuals, as Ceres counts it.

    With s the squared norm of an observation's first two rows (all three of model "position") and a = loss_scale, an
    observation costs rho(s) / 2, and half the square of its row of depth. rho(s) is

    - "trivial": s;
    - "huber": s up to a^2, from there 2 a sqrt(s) - a^2;
    - "cauchy": a^2 log(1 + s / a^2);
    - "soft_l1": 2 a^2 (sqrt(1 + s / a^2) - 1);
    - "tukey": a^2 / 3 (1 - (1 - s / a^2)^3) up to a^2, from there a^2 / 3.

    Args:
        cameras, points, observations, camera_index, point_index, depth: as of `ba_residual`, in any order.
        model, depth_weight: likewise.
        loss: as above.
        loss_scale: a, in the residual's unit, more than 0.

    Returns:
        [] float64; NaN if an observation has NaN.

    Raises:
        RuntimeError: as `ba_residual`; on a GPU an observation with an index out of range costs nothing.
    """
    return torch.ops.effk.ba_cost(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        depth,
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
    )


@op(reference=reference.ba_build, fake=_fake_build, triton=None)
def ba_build(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the cost and the block diagonal of the normal equations (InstantSfM, arXiv:2510.13310).

    Of J^T J and J^T r, where the rows of r and J that have a loss are multiplied by sqrt(rho'(s)), as Ceres does where
    rho'' <= 0: the gradient is that of the robust cost.

    Args:
        cameras, points, observations, camera_index, depth: as of `ba_residual`.
        point_index: likewise, ascending.
        model, depth_weight: likewise.
        loss, loss_scale: as of `ba_cost`.

    Returns:
        cost [], camera_gradient [C, n], camera_hessian [C, n, n], point_gradient [P, 3], point_hessian [P, 3, 3], all
        float64; cameras in their tangents (see `ba_jacobian`). Zero for what isn't observed.

    Raises:
        RuntimeError: as `ba_residual`; on a CPU also a point_index that isn't ascending.
    """
    return torch.ops.effk.ba_build(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        depth,
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
    )


@op(reference=reference.ba_schur, fake=_fake_schur, triton=None)
def ba_schur(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    pairs: Tensor | None = None,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 1e4,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The normal equations with the points eliminated: S x = rhs for the cameras' step x.

    Of the normal equations, weighted as in `ba_build`, with blocks U of cameras, V of points and W between them:
    S = U - W V^-1 W^T and rhs = -(g_c - W V^-1 g_p). V is damped, by max(diag V, 1e-6) / radius; cameras aren't: what
    S needs for that, the caller adds to its diagonal (Agarwal et al., 2010; Ceres' Levenberg-Marquardt).

    Args:
        cameras, points, observations, camera_index, depth: as of `ba_residual`.
        point_index: likewise, ascending.
        pairs: [B, 2] int32 or int64: the blocks (a, b) of S that are wanted, a >= b, ascending by (a, b), none twice.
            None: the C diagonal ones.
        fixed_points: [P] bool: points that make no step and aren't eliminated. None: no point.
        model, depth_weight: as of `ba_residual`.
        loss, loss_scale: as of `ba_cost`.
        radius: of the trust region, more than 0; infinity damps nothing, and wants points that two cameras or more
            see.

    Returns:
        blocks [B or C, n, n], rhs [C, n], gradient [C, n] = g_c, diagonal [C, n] of U, point_gradient [], the largest
        |entry| of g_p of points that aren't fixed, and cost []; all float64. NaN in an observation spoils the cameras
        that see its point, point_gradient and cost.

    Raises:
        RuntimeError: as `ba_residual`; on a CPU also a point_index that isn't ascending, and pairs that aren't as
            wanted.
    """
    return torch.ops.effk.ba_schur(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        pairs,
        depth,
        fixed_points,
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
        radius=radius,
    )


@op(reference=reference.ba_schur_mv, fake=_fake_schur_mv, triton=None)
def ba_schur_mv(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    x: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 1e4,
) -> Tensor:
    """The Schur complement S of `ba_schur` times x, without S: as S x = U x - W (V^-1 (W^T x)).

    Args:
        cameras, points, observations, camera_index, depth: as of `ba_residual`.
        point_index: likewise, ascending.
        x: [C, n] float64, in the cameras' tangents.
        fixed_points, radius: as of `ba_schur`.
        model, depth_weight: as of `ba_residual`.
        loss, loss_scale: as of `ba_cost`.

    Returns:
        [C, n] float64.

    Raises:
        RuntimeError: as `ba_residual`; on a CPU also a point_index that isn't ascending.
    """
    return torch.ops.effk.ba_schur_mv(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        x,
        depth,
        fixed_points,
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
        radius=radius,
    )


@op(reference=reference.ba_backsubstitute, fake=_fake_backsubstitute, triton=None)
def ba_backsubstitute(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    camera_step: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """The step of the points that goes with a step of the cameras, and what the linear model promises of both.

    Args:
        cameras, points, observations, camera_index, depth: as of `ba_residual`.
        point_index: likewise, ascending.
        camera_step: [C, n] float64, in the cameras' tangents.
        fixed_points, radius: as of `ba_schur`.
        model, depth_weight: as of `ba_residual`.
        loss, loss_scale: as of `ba_cost`.

    Returns:
        point_step [P, 3] = -V^-1 (g_p + W^T camera_step), V damped as in `ba_schur`, 0 for points that are fixed or not
        observed; and model_change [] = 1/2 |r|^2 - 1/2 |r + J step|^2, of rows weighted as in `ba_build`. Both
        float64.

    Raises:
        RuntimeError: as `ba_residual`; on a CPU also a point_index that isn't ascending.
    """
    return torch.ops.effk.ba_backsubstitute(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        camera_step,
        depth,
        fixed_points,
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
        radius=radius,
    )


@op(reference=reference.ba_retract, fake=_fake_retract, triton=None)
def ba_retract(
    cameras: Tensor, points: Tensor, camera_step: Tensor, point_step: Tensor, *, model: str = "snavely"
) -> tuple[Tensor, Tensor]:
    """Cameras and points after a step in their tangents (see `ba_jacobian`).

    A rotation R becomes exp(w) R. As a vector it comes back with an angle of at most pi, as a quaternion with norm 1;
    a quaternion that is 0 becomes NaN. Computed in float64, rounded once.

    Args:
        cameras: as of `ba_residual`.
        points: likewise.
        camera_step: [C, n] float64.
        point_step: [P, 3] float64.
        model: as of `ba_residual`.

    Returns:
        cameras and points, shaped as they came, of their dtype.

    Raises:
        RuntimeError: wrong dtypes or shapes.
    """
    return torch.ops.effk.ba_retract(cameras, points, camera_step, point_step, model=model)


@op(reference=solver.ba_pcg, fake=_fake_pcg, triton=None, composite=True)
def ba_pcg(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    rhs: Tensor,
    inverse: Tensor,
    damping: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    radius: float = 1e4,
    tolerance: float = 0.1,
    max_iterations: int = 500,
) -> tuple[Tensor, Tensor]:
    """Solves (S + diag(damping)) x = rhs by preconditioned conjugate gradients, with S of `ba_schur` never made.

    Ends when the last step's share of the decrease of the quadratic model, times the number of steps, is below
    `tolerance` (Nash and Sofer, 1990), as Ceres does; the host waits for the device in each step.

    Args:
        cameras, points, observations, camera_index, depth: as of `ba_residual`.
        point_index: likewise, ascending.
        rhs: [C, n] float64.
        inverse: [C, n, n] float64, the preconditioner: inverses of S's damped diagonal blocks, or others that are
            symmetric and positive definite.
        damping: [C, n] float64, not negative.
        fixed_points, radius: as of `ba_schur`.
        model, depth_weight: as of `ba_residual`.
        loss, loss_scale: as of `ba_cost`.
        tolerance: see above, from 0 on.
        max_iterations: of conjugate gradients.

    Returns:
        x [C, n] float64, and how many steps were made, [] int64. Where rounding, NaN or a matrix that isn't positive
        definite make a step useless, what was reached before.

    Raises:
        RuntimeError: as `ba_schur_mv`; a tolerance or max_iterations below 0.
    """
    return torch.ops.effk.ba_pcg(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        rhs,
        inverse,
        damping,
        depth,
        fixed_points,
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
        radius=radius,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


@op(reference=solver.ba_solve, fake=_fake_solve, triton=None, composite=True)
def ba_solve(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None = None,
    fixed_points: Tensor | None = None,
    columns: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    model: str = "snavely",
    loss: str = "trivial",
    loss_scale: float = 1.0,
    depth_weight: float = 1.0,
    position_weight: float = 1.0,
    max_iterations: int = 100,
    function_tolerance: float = 1e-6,
    gradient_tolerance: float = 1e-10,
    parameter_tolerance: float = 1e-8,
    max_seconds: float | None = None,
    initial_radius: float = 1e4,
    linear_solver: str = "auto",
    linear_tolerance: float = 0.1,
    max_linear_iterations: int = 500,
) -> Tensor:
    """Bundle adjustment: cameras and points that make the cost of `ba_cost` least, in place, by Levenberg-Marquardt.

    The reduced system of `ba_schur` is solved for the cameras, and `ba_backsubstitute` gives the points. A step is
    kept when the cost falls by more than a thousandth of what the linear model promised, so that no accepted step
    raises it; the damping is the diagonal of J^T J over the trust region's radius, and only the radius remembers
    rejected steps (Agarwal, Mierle and others: Ceres Solver; InstantSfM, 2025). Parameters are kept in their dtype,
    and costs are those of the kept parameters. The host waits for the device in each iteration.

    Args:
        cameras: as of `ba_residual`; changed.
        points: likewise; changed.
        observations, camera_index, point_index, depth: as of `ba_residual`, in any order; a copy is sorted where they
            aren't ascending by point and then camera.
        fixed_points: [P] bool: points that stay where they are. None: no point.
        columns: [C, n] int32 or int64: for each entry of a camera's tangent the number of its free parameter, -1 where
            it is fixed; entries of the same number are tied, as shared intrinsics are. None: all are free.
        positions: [C, 3] of cameras' dtype: where the cameras' centres -R^T t are known to be, NaN where they aren't;
            adds position_weight (centre - position) to the residuals, without a loss. None: nowhere.
        model, depth_weight: as of `ba_residual`.
        loss, loss_scale: as of `ba_cost`.
        position_weight: of positions, from 0 on.
        max_iterations: steps tried at most.
        function_tolerance: ends when a step changes the cost by no more than this share.
        gradient_tolerance: ends when no entry of the gradient is larger.
        parameter_tolerance: ends when a step's norm is at most this share of the parameters'.
        max_seconds: ends after so long. None: never.
        initial_radius: of the trust region.
        linear_solver: "dense_schur" (Cholesky), "sparse_schur" (sparse Cholesky), both for up to 8192 cameras,
            "iterative_schur" (conjugate gradients, as `ba_pcg`), or "auto", by the number of free parameters and the
            work of a sparse factor.
        linear_tolerance, max_linear_iterations: of conjugate gradients; see `ba_pcg`.

    Returns:
        [max_iterations + 1, 6] float64, a row for the start and one an iteration: cost, change by the step (that of a
        rejected one too), largest |entry| of the gradient, norm of the step, radius, linear iterations. Rows of
        iterations that weren't needed are NaN.

    Raises:
        RuntimeError: wrong dtypes or shapes, options out of range; indices out of range, on any device; tied parameters
            with different values; a cost at the start that isn't finite, with the input to blame.
    """
    return torch.ops.effk.ba_solve(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        depth,
        fixed_points,
        columns,
        positions,
        model=model,
        loss=loss,
        loss_scale=loss_scale,
        depth_weight=depth_weight,
        position_weight=position_weight,
        max_iterations=max_iterations,
        function_tolerance=function_tolerance,
        gradient_tolerance=gradient_tolerance,
        parameter_tolerance=parameter_tolerance,
        max_seconds=max_seconds,
        initial_radius=initial_radius,
        linear_solver=linear_solver,
        linear_tolerance=linear_tolerance,
        max_linear_iterations=max_linear_iterations,
    )


@op(reference=solver.gp_solve, fake=_fake_gp_solve, triton=None, composite=True)
def gp_solve(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    fixed_points: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    loss: str = "huber",
    loss_scale: float = 0.1,
    max_iterations: int = 100,
    function_tolerance: float = 1e-6,
    gradient_tolerance: float = 1e-10,
    parameter_tolerance: float = 1e-8,
    max_seconds: float | None = None,
    initial_radius: float = 1e4,
    linear_solver: str = "auto",
    linear_tolerance: float = 0.1,
    max_linear_iterations: int = 500,
) -> Tensor:
    """Global positioning: camera centres c and points X from directions v alone, in place, from any start.

    Least squares on v - s (X - c) with a scale s of at least 1e-5 for each observation, which is eliminated: it is
    v.d / d.d of d = X - c wherever that is more, and the Jacobian takes it as a function of d (Zhuang, Cheong and Lee,
    2018: BATA; Pan et al., 2024: GLOMAP; Golub and Pereyra, 1973: variable projection). Otherwise as `ba_solve`; the
    model "position" of the other ops.

    Args:
        cameras: [C, 3] centres, float32 or float64; changed. Random ones do as a start.
        points: [P, 3] of cameras' dtype; changed.
        observations: [O, 3] of cameras' dtype: directions from camera to point in the world's frame, of norm 1.
        camera_index: [O] int32 or int64.
        point_index: likewise.
        fixed_points, columns: as of `ba_solve`; n is 3.
        loss, loss_scale: as of `ba_cost`.
        max_iterations, function_tolerance, gradient_tolerance, parameter_tolerance, max_seconds, initial_radius: as of
            `ba_solve`.
        linear_solver, linear_tolerance, max_linear_iterations: likewise.

    Returns:
        As `ba_solve`.

    Raises:
        RuntimeError: as `ba_solve`.
    """
    return torch.ops.effk.gp_solve(
        cameras,
        points,
        observations,
        camera_index,
        point_index,
        fixed_points,
        columns,
        loss=loss,
        loss_scale=loss_scale,
        max_iterations=max_iterations,
        function_tolerance=function_tolerance,
        gradient_tolerance=gradient_tolerance,
        parameter_tolerance=parameter_tolerance,
        max_seconds=max_seconds,
        initial_radius=initial_radius,
        linear_solver=linear_solver,
        linear_tolerance=linear_tolerance,
        max_linear_iterations=max_linear_iterations,
    )
