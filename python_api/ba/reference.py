"""ba written for reading: what every back end must compute. Letters as in ops.py. All arithmetic is in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacfwd

from .._checks import INDICES, check_choice, check_range, check_sides, check_tensor
from .._sums import sum_rows
from .models import INTRINSICS

POSITION = "position"
MODELS = tuple(dict.fromkeys((*INTRINSICS, POSITION)))
LOSSES = ("trivial", "huber", "cauchy", "soft_l1", "tukey")
FLOATS = (torch.float32, torch.float64)
MIN_SCALE = 1e-5  # of a direction, in model "position"
MIN_DIAGONAL = 1e-6  # what damping takes for a smaller diagonal entry, as Ceres does; kMinDiagonal of kernels/ba/ba.h

# --- Checks that need no look at the contents ------------------------------------------------------------------------


def parameters(model: str) -> int:
    """n: the size of a camera's tangent."""
    return 3 if model == POSITION else 6 + len(INTRINSICS[model])


def check_cameras(op: str, cameras: Tensor, model: str) -> int:
    """n."""
    check_choice(op, "model", model, MODELS)
    check_tensor(op, "cameras", cameras, FLOATS, (None, None))
    n = parameters(model)
    wanted = f"[*, {n}]" if model == POSITION else f"[*, {n}] (angle-axis) or [*, {n + 1}] (quaternions)"
    torch._check(
        cameras.shape[1] == n or (model != POSITION and cameras.shape[1] == n + 1),
        lambda: f"effk::{op}: cameras has shape {list(cameras.shape)}; wanted {wanted} with model={model!r}",
    )
    check_sides(op, "cameras", cameras)
    return n


def check_problem(
    op: str,
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None,
    model: str,
    depth_weight: float,
) -> tuple[int, int]:
    """n and R."""
    n = check_cameras(op, cameras, model)
    check_tensor(op, "points", points, (cameras.dtype,), (None, 3), cameras)
    check_sides(op, "points", points)
    check_tensor(op, "observations", observations, (cameras.dtype,), (None, 3 if model == POSITION else 2), cameras)
    check_sides(op, "observations", observations)
    for name, index in (("camera_index", camera_index), ("point_index", point_index)):
        check_tensor(op, name, index, INDICES, (observations.shape[0],), cameras)
    torch._check(
        0 <= depth_weight < math.inf, lambda: f"effk::{op}: depth_weight is {depth_weight}; wanted a number from 0 on"
    )
    if depth is not None:
        torch._check(model != POSITION, lambda: f"effk::{op}: depth is given; wanted none with model={model!r}")
        check_tensor(op, "depth", depth, (cameras.dtype,), (observations.shape[0],), cameras)
    return n, 3 if model == POSITION or depth is not None else 2


def check_loss(op: str, loss: str, loss_scale: float) -> None:
    check_choice(op, "loss", loss, LOSSES)
    torch._check(loss_scale > 0, lambda: f"effk::{op}: loss_scale is {loss_scale}; wanted more than 0")


def check_damping(op: str, fixed_points: Tensor | None, points: Tensor, radius: float) -> None:
    if fixed_points is not None:
        check_tensor(op, "fixed_points", fixed_points, (torch.bool,), (points.shape[0],), points)
    torch._check(radius > 0, lambda: f"effk::{op}: radius is {radius}; wanted more than 0")


def check_pairs(op: str, pairs: Tensor | None, cameras: Tensor) -> int:
    """B: the number of blocks."""
    if pairs is None:
        return cameras.shape[0]
    check_tensor(op, "pairs", pairs, INDICES, (None, 2), cameras)
    check_sides(op, "pairs", pairs)
    return pairs.shape[0]


def check_step(op: str, name: str, step: Tensor, rows: int, columns: int, like: Tensor) -> None:
    check_tensor(op, name, step, (torch.float64,), (rows, columns), like)


def check_retract(cameras: Tensor, points: Tensor, camera_step: Tensor, point_step: Tensor, model: str) -> None:
    op = "ba_retract"
    n = check_cameras(op, cameras, model)
    check_tensor(op, "points", points, (cameras.dtype,), (None, 3), cameras)
    check_sides(op, "points", points)
    check_step(op, "camera_step", camera_step, cameras.shape[0], n, cameras)
    check_step(op, "point_step", point_step, points.shape[0], 3, cameras)


# --- Checks of the contents ------------------------------------------------------------------------------------------


def check_indices(op: str, cameras: Tensor, points: Tensor, camera_index: Tensor, point_index: Tensor) -> None:
    check_range(op, "camera_index", camera_index, 0, len(cameras) - 1)
    check_range(op, "point_index", point_index, 0, len(points) - 1)


def check_ascending(op: str, point_index: Tensor) -> None:
    falls = point_index[1:] < point_index[:-1]
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        before, after = point_index[at : at + 2].tolist()
        raise RuntimeError(f"effk::{op}: point_index holds {after} behind {before}; wanted it ascending")


def check_order_of_pairs(op: str, pairs: Tensor, cameras: int) -> None:
    check_range(op, "pairs", pairs, 0, cameras - 1)
    wide = pairs.long()
    upper, keys = wide[:, 0] < wide[:, 1], wide[:, 0] * cameras + wide[:, 1]
    if bool(upper.any()):
        raise RuntimeError(f"effk::{op}: pairs holds {wide[upper][0].tolist()}; wanted the larger camera first")
    if bool((keys[1:] <= keys[:-1]).any()):
        raise RuntimeError(f"effk::{op}: pairs isn't ascending; wanted each pair once, behind those before it")


# --- Rotations -------------------------------------------------------------------------------------------------------


def exponential(w: Tensor) -> Tensor:
    """The unit quaternion [..., 4] of a rotation by the angle |w| about w."""
    angle = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    half_sine = 0.5 * torch.sinc(angle / (2 * math.pi))  # sin(angle / 2) / angle, 1/2 at 0
    return torch.cat([(angle / 2).cos(), half_sine * w], -1)


def logarithm(q: Tensor) -> Tensor:
    """The angle-axis vector of a unit quaternion: the one with an angle up to pi."""
    q = torch.where(q[..., :1] < 0, -q, q)
    cosine, axis = q[..., :1], q[..., 1:]
    sine = torch.linalg.vector_norm(axis, dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, cosine)
    return torch.where(sine == 0, 2 / cosine, angle / torch.where(sine == 0, 1.0, sine)) * axis


def product(a: Tensor, b: Tensor) -> Tensor:
    """Of quaternions: the rotation b, then a."""
    a0, av, b0, bv = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    real = a0 * b0 - (av * bv).sum(-1, keepdim=True)
    return torch.cat([real, a0 * bv + b0 * av + torch.linalg.cross(av, bv)], -1)


def rotate(q: Tensor, x: Tensor) -> Tensor:
    twice = 2 * torch.linalg.cross(q[..., 1:], x)
    return x + q[..., :1] * twice + torch.linalg.cross(q[..., 1:], twice)


def unit(q: Tensor) -> Tensor:
    return q / torch.linalg.vector_norm(q, dim=-1, keepdim=True)


def parts(cameras: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of cameras [.., n or n + 1]: rotation as a unit quaternion, translation, intrinsics."""
    rotation, translation, intrinsics = cameras.double().split([cameras.shape[-1] - n + 3, 3, n - 6], -1)
    return unit(rotation) if rotation.shape[-1] == 4 else exponential(rotation), translation, intrinsics


# --- Residuals -------------------------------------------------------------------------------------------------------


def project(model: str, y: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Of points in the camera's frame [.., 3]: pixels [.., 2], and how far in front of the camera they are [..]."""
    k = dict(zip(INTRINSICS[model], intrinsics.unbind(-1), strict=True))
    zero = torch.zeros_like(intrinsics[..., 0])
    z = -y[..., 2] if model == "snavely" else y[..., 2]
    u, v = y[..., 0] / z, y[..., 1] / z
    n = u * u + v * v
    radial = 1 + n * (k.get("k1", k.get("k", zero)) + n * k.get("k2", zero))
    p1, p2 = k.get("p1", zero), k.get("p2", zero)
    x = u * radial + 2 * p1 * u * v + p2 * (n + 2 * u * u)
    y = v * radial + 2 * p2 * u * v + p1 * (n + 2 * v * v)
    fx, fy = (k.get(name, k.get("f", zero)) for name in ("fx", "fy"))
    return torch.stack([fx * x + k.get("cx", zero), fy * y + k.get("cy", zero)], -1), z


@dataclass
class Observed:
    """Each observation [O, ..] with its camera and point."""

    model: str
    camera: Tensor
    point: Tensor
    observation: Tensor
    depth: Tensor | None
    depth_weight: float

    def residual(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals [O, R] and valid [O] when every camera and point has made a step [n + 3] in its tangent.

        Right to first order in the step: the exponential of a rotation w is taken as the identity and the cross
        product with w.
        """
        n = parameters(self.model)
        point = self.point + step[n:]
        if self.model == POSITION:
            d = point - (self.camera + step[:3])
            free = (self.observation * d).sum(-1, keepdim=True) / (d * d).sum(-1, keepdim=True)
            scale = torch.where(free > MIN_SCALE, free, MIN_SCALE)  # also where a point is in the centre: 0 / 0
            return self.observation - scale * d, free[:, 0] > MIN_SCALE
        rotation, translation, intrinsics = parts(self.camera, n)
        turned = rotate(rotation, point)
        turned = turned + torch.linalg.cross(step[None, :3], turned)
        pixel, z = project(self.model, turned + translation + step[3:6], intrinsics + step[6:n])
        residual = pixel - self.observation
        if self.depth is not None:
            there = self.depth > 0
            row = self.depth_weight * (1 / z - 1 / torch.where(there, self.depth, 1.0))
            residual = torch.cat([residual, torch.where(there, row, 0.0)[:, None]], -1)
        return residual, z > 0


def observed(
    op: str,
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None,
    model: str,
    depth_weight: float,
) -> Observed:
    check_indices(op, cameras, points, camera_index, point_index)
    camera, point = cameras[camera_index.long()].double(), points[point_index.long()].double()
    return Observed(
        model, camera, point, observations.double(), None if depth is None else depth.double(), depth_weight
    )


def linearized(seen: Observed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual [O, R], derivatives by the camera [O, R, n] and by the point [O, R, 3], valid [O]."""

    def function(step: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        residual, valid = seen.residual(step)
        return residual, (residual, valid)

    n = parameters(seen.model)
    jacobian, (residual, valid) = jacfwd(function, has_aux=True)(seen.point.new_zeros(n + 3))
    return residual, jacobian[..., :n], jacobian[..., n:], valid


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
    op, problem = "ba_residual", (cameras, points, observations, camera_index, point_index, depth)
    n, _ = check_problem(op, *problem, model, depth_weight)
    seen = observed(op, *problem, model, depth_weight)
    residual, valid = seen.residual(seen.point.new_zeros(n + 3))
    return residual.to(cameras.dtype).contiguous(), valid


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
    op, problem = "ba_jacobian", (cameras, points, observations, camera_index, point_index, depth)
    check_problem(op, *problem, model, depth_weight)
    *numbers, valid = linearized(observed(op, *problem, model, depth_weight))
    residual, of_camera, of_point = (t.to(cameras.dtype).contiguous() for t in numbers)
    return residual, of_camera, of_point, valid


# --- Costs and the normal equations ----------------------------------------------------------------------------------


def robust(loss: str, loss_scale: float, s: Tensor) -> tuple[Tensor, Tensor]:
    """rho(s) and rho'(s), without the cancellations of the formulas as they are usually written."""
    square = loss_scale * loss_scale
    x = s / square
    if loss == "huber":
        norm = s.sqrt()
        return torch.where(s > square, 2 * loss_scale * norm - square, s), torch.where(s > square, loss_scale / norm, 1)
    if loss == "cauchy":
        return square * x.log1p(), 1 / (1 + x)
    if loss == "soft_l1":
        root = (1 + x).sqrt()
        return 2 * s / (1 + root), 1 / root
    if loss == "tukey":
        return torch.where(s > square, square / 3, s * (1 - x + x * x / 3)), torch.where(s > square, 0, (1 - x) ** 2)
    return s, torch.ones_like(s)


def loss_rows(model: str) -> int:
    """How many rows of a residual the loss is on."""
    return 3 if model == POSITION else 2


def costs(residual: Tensor, model: str, loss: str, loss_scale: float) -> tuple[Tensor, Tensor]:
    """The cost of each observation [O], and what its rows are multiplied by in the normal equations [O, R]."""
    rows = loss_rows(model)
    rho, slope = robust(loss, loss_scale, residual[:, :rows].square().sum(-1))
    factor = torch.ones_like(residual)
    factor[:, :rows] = slope.sqrt()[:, None]
    return 0.5 * rho + 0.5 * residual[:, rows:].square().sum(-1), factor


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
    op, problem = "ba_cost", (cameras, points, observations, camera_index, point_index, depth)
    n, _ = check_problem(op, *problem, model, depth_weight)
    check_loss(op, loss, loss_scale)
    seen = observed(op, *problem, model, depth_weight)
    residual, _ = seen.residual(seen.point.new_zeros(n + 3))
    return costs(residual, model, loss, loss_scale)[0].sum()


def sums(rows: Tensor, place: Tensor, size: int) -> Tensor:
    """[size, ..]: the sums of the rows [O, ..] that go to each place [O]."""
    return sum_rows(rows.flatten(1), place, size).unflatten(1, rows.shape[1:])


@dataclass
class Normal:
    """The normal equations, their rows multiplied by what the loss wants, for ascending points."""

    cost: Tensor
    residual: Tensor  # [O, R]
    of_camera: Tensor  # [O, R, n]
    of_point: Tensor  # [O, R, 3]
    camera: Tensor  # [O] int64
    point: Tensor
    cameras: int
    points: int
    fixed_points: Tensor | None

    def camera_gradient(self) -> Tensor:
        return sums((self.of_camera.mT @ self.residual[..., None])[..., 0], self.camera, self.cameras)

    def camera_hessian(self) -> Tensor:
        """U [C, n, n]."""
        return sums(self.of_camera.mT @ self.of_camera, self.camera, self.cameras)

    def point_gradient(self) -> Tensor:
        return sums((self.of_point.mT @ self.residual[..., None])[..., 0], self.point, self.points)

    def point_hessian(self) -> Tensor:
        """V [P, 3, 3]."""
        return sums(self.of_point.mT @ self.of_point, self.point, self.points)

    def moves(self) -> Tensor:
        """Which points are eliminated [P] bool: those that are observed and not fixed."""
        observed = torch.bincount(self.point, minlength=self.points) > 0
        return observed if self.fixed_points is None else observed & ~self.fixed_points

    def coupling(self) -> Tensor:
        """Of each observation its part of W [O, n, 3]; points that aren't eliminated have none."""
        return torch.where(self.moves()[self.point][:, None, None], self.of_camera.mT @ self.of_point, 0.0)

    def inverse(self, radius: float) -> Tensor:
        """V^-1 of damped points [P, 3, 3]."""
        hessian = self.point_hessian()
        damping = hessian.diagonal(dim1=1, dim2=2).clamp(min=MIN_DIAGONAL) / radius
        chol, failed = torch.linalg.cholesky_ex(hessian + damping.diag_embed())
        inverse = torch.where((failed == 0)[:, None, None], torch.cholesky_inverse(chol), torch.nan)
        return torch.where(self.moves()[:, None, None], inverse, 0.0)

    def solved(self, radius: float, b: Tensor) -> Tensor:
        """V^-1 b [P, 3], of b [P, 3]; 0 for points that make no step."""
        b = torch.where(self.moves()[:, None], b, 0.0)
        return (self.inverse(radius) @ b[..., None])[..., 0]

    def applied(self, of_points: Tensor) -> Tensor:
        """W b [C, n], of b [P, 3]."""
        rows = self.coupling() @ of_points[self.point][..., None]
        return sums(rows[..., 0], self.camera, self.cameras)

    def transposed(self, of_cameras: Tensor) -> Tensor:
        """W^T x [P, 3], of x [C, n]."""
        rows = self.coupling().mT @ of_cameras[self.camera][..., None]
        return sums(rows[..., 0], self.point, self.points)

    def partners(self) -> tuple[Tensor, Tensor]:
        """All ordered pairs of observations of the same point."""
        count = torch.bincount(self.point, minlength=self.points)
        begin, repeats = (count.cumsum(0) - count)[self.point], count[self.point]
        left = torch.arange(len(self.point), device=self.point.device).repeat_interleave(repeats)
        nth = torch.arange(len(left), device=left.device) - (repeats.cumsum(0) - repeats)[left]
        return left, begin[left] + nth


def normal(
    op: str,
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None,
    model: str,
    loss: str,
    loss_scale: float,
    depth_weight: float,
    fixed_points: Tensor | None = None,
) -> Normal:
    seen = observed(op, cameras, points, observations, camera_index, point_index, depth, model, depth_weight)
    check_ascending(op, point_index)
    residual, of_camera, of_point, _ = linearized(seen)
    cost, factor = costs(residual, model, loss, loss_scale)
    return Normal(
        cost=cost.sum(),
        residual=factor * residual,
        of_camera=factor[..., None] * of_camera,
        of_point=factor[..., None] * of_point,
        camera=camera_index.long(),
        point=point_index.long(),
        cameras=len(cameras),
        points=len(points),
        fixed_points=fixed_points,
    )


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
    op, problem = "ba_build", (cameras, points, observations, camera_index, point_index, depth)
    check_problem(op, *problem, model, depth_weight)
    check_loss(op, loss, loss_scale)
    equations = normal(op, *problem, model, loss, loss_scale, depth_weight)
    return (
        equations.cost,
        equations.camera_gradient(),
        equations.camera_hessian(),
        equations.point_gradient(),
        equations.point_hessian(),
    )


# --- The Schur complement: points eliminated -------------------------------------------------------------------------


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
    op, problem = "ba_schur", (cameras, points, observations, camera_index, point_index, depth)
    check_problem(op, *problem, model, depth_weight)
    check_loss(op, loss, loss_scale)
    check_damping(op, fixed_points, points, radius)
    check_pairs(op, pairs, cameras)
    equations = normal(op, *problem, model, loss, loss_scale, depth_weight, fixed_points)
    if pairs is None:
        pairs = torch.arange(len(cameras), device=cameras.device)[:, None].expand(-1, 2)
    else:
        check_order_of_pairs(op, pairs, len(cameras))

    gradient, hessian = equations.camera_gradient(), equations.camera_hessian()
    of_points = equations.point_gradient()
    rhs = equations.applied(equations.solved(radius, of_points)) - gradient

    # Of two observations of a point, by cameras a and b: W_a V^-1 W_b^T is taken from the block (a, b), if wanted.
    wanted = pairs[:, 0].long() * len(cameras) + pairs[:, 1].long()
    blocks = torch.where((pairs[:, 0] == pairs[:, 1])[:, None, None], hessian[pairs[:, 0].long()], 0.0)
    left, right = equations.partners()
    key = equations.camera[left] * len(cameras) + equations.camera[right]
    there = torch.isin(key, wanted)
    left, right, place = left[there], right[there], torch.searchsorted(wanted, key[there])
    coupling = equations.coupling()
    half = coupling @ equations.inverse(radius)[equations.point]
    blocks = blocks - sums(half[left] @ coupling[right].mT, place, len(pairs))

    free = torch.ones(len(points), dtype=torch.bool, device=points.device) if fixed_points is None else ~fixed_points
    largest = torch.cat([of_points.new_zeros(1), of_points[free].abs().flatten()]).amax()
    diagonal = hessian.diagonal(dim1=1, dim2=2).contiguous()
    return blocks, rhs, gradient, diagonal, largest, equations.cost


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
    op, problem = "ba_schur_mv", (cameras, points, observations, camera_index, point_index, depth)
    n, _ = check_problem(op, *problem, model, depth_weight)
    check_loss(op, loss, loss_scale)
    check_damping(op, fixed_points, points, radius)
    check_step(op, "x", x, cameras.shape[0], n, cameras)
    equations = normal(op, *problem, model, loss, loss_scale, depth_weight, fixed_points)
    of_cameras = (equations.camera_hessian() @ x[..., None])[..., 0]
    return of_cameras - equations.applied(equations.solved(radius, equations.transposed(x)))


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
    op, problem = "ba_backsubstitute", (cameras, points, observations, camera_index, point_index, depth)
    n, _ = check_problem(op, *problem, model, depth_weight)
    check_loss(op, loss, loss_scale)
    check_damping(op, fixed_points, points, radius)
    check_step(op, "camera_step", camera_step, cameras.shape[0], n, cameras)
    equations = normal(op, *problem, model, loss, loss_scale, depth_weight, fixed_points)
    right = equations.point_gradient() + equations.transposed(camera_step)
    point_step = equations.solved(radius, -right)
    # By how much the linear model changes each row; 1/2 r^2 - 1/2 (r + c)^2 = -c (r + c / 2)
    change = equations.of_camera @ camera_step[equations.camera][..., None]
    change = (change + equations.of_point @ point_step[equations.point][..., None])[..., 0]
    return point_step, (-change * (equations.residual + change / 2)).sum()


# --- Steps -----------------------------------------------------------------------------------------------------------


def ba_retract(
    cameras: Tensor, points: Tensor, camera_step: Tensor, point_step: Tensor, *, model: str = "snavely"
) -> tuple[Tensor, Tensor]:
    check_retract(cameras, points, camera_step, point_step, model)
    moved = (points.double() + point_step).to(points.dtype).contiguous()
    if model == POSITION:
        return (cameras.double() + camera_step).to(cameras.dtype).contiguous(), moved
    n = parameters(model)
    rotation, *rest = parts(cameras, n)
    rotation = unit(product(exponential(camera_step[:, :3]), rotation))
    if cameras.shape[1] == n:
        rotation = logarithm(rotation)
    return torch.cat([rotation, torch.cat(rest, -1) + camera_step[:, 3:]], -1).to(cameras.dtype), moved
