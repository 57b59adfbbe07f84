"""Inputs of ba: small scenes of all models, with points in front of cameras and behind them, seen often, once or not
at all, rotations from none to beyond half a turn, outliers, any strides, and everything a call may leave out.

And the exact results, from formulas of their own, with what float64 may lose on the way to them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..kit.calls import Call, Invalid

FLOATS = (torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)
LOSSES = ("trivial", "huber", "cauchy", "soft_l1", "tukey")
INTRINSICS = {
    "snavely": 3,
    "simple_pinhole": 3,
    "pinhole": 4,
    "simple_radial": 4,
    "radial": 5,
    "opencv": 8,
    "position": 0,
}
MODELS = tuple(INTRINSICS)
PERSPECTIVE = MODELS[:-1]
SEEDS = st.integers(0, 2**20)
ANGLES = (0.0, 1e-200, 1e-12, 1e-5, 0.3, 2.0, math.pi - 1e-7, math.pi, 3.5, 5.0)

UNIT = 2.0**-53
# Roundings that any number goes through on the way from a camera and a point to a residual or derivative: 12 to a
# rotation matrix, 3 to the turned point, 1 to the one in the camera's frame, 2 to x and y, 10 for a polynomial with its
# derivatives, 4 for products with the rest. The exact results below are computed in float64 as well, by other formulas.
ROUNDINGS = 2 * 32


# Formulas ------------------------------------------------------------------------------------------------------------


def skew(w: Tensor) -> Tensor:
    """[..., 3, 3], the matrix of the cross product with w."""
    zero = torch.zeros_like(w[..., 0])
    x, y, z = w.unbind(-1)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def matrix_of(rotation: Tensor) -> Tensor:
    """[..., 3, 3] of vectors or quaternions."""
    if rotation.shape[-1] == 3:
        return torch.linalg.matrix_exp(skew(rotation))
    w, x, y, z = (rotation / rotation.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        *(w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
    ]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def pixels(model: str, y: Tensor, k: Tensor) -> Tensor:
    """Where points in the cameras' frames [..., 3] are seen, by intrinsics [..., ni]."""
    k = k[..., None]  # [..., ni, 1]
    p = y[..., :2] / y[..., 2:]
    n = (p * p).sum(-1, keepdim=True)
    if model == "snavely":
        return -k[..., 0, :] * p * (1 + k[..., 1, :] * n + k[..., 2, :] * n**2)
    if model == "simple_pinhole":
        return k[..., 0, :] * p + k[..., 1:3, 0]
    if model == "pinhole":
        return k[..., 0:2, 0] * p + k[..., 2:4, 0]
    if model == "simple_radial":
        return k[..., 0, :] * p * (1 + k[..., 3, :] * n) + k[..., 1:3, 0]
    if model == "radial":
        return k[..., 0, :] * p * (1 + k[..., 3, :] * n + k[..., 4, :] * n**2) + k[..., 1:3, 0]
    radial, both = 1 + k[..., 4, :] * n + k[..., 5, :] * n**2, 2 * p[..., :1] * p[..., 1:]
    p1p2 = k[..., 6:8, 0]
    return k[..., 0:2, 0] * (p * radial + both * p1p2 + (n + 2 * p * p) * p1p2.flip(-1)) + k[..., 2:4, 0]


def residual_in_frame(
    model: str, y: Tensor, k: Tensor, observations: Tensor, depth: Tensor | None, depth_weight: float
) -> Tensor:
    """[O, R], of points in the cameras' frames; of model "position", of d."""
    if model == "position":
        s = (observations * y).sum(-1, keepdim=True) / (y * y).sum(-1, keepdim=True)
        return observations - s.clamp(min=1e-5) * y
    rows = pixels(model, y, k) - observations
    if depth is None:
        return rows
    there = depth > 0
    ahead = -y[..., 2] if model == "snavely" else y[..., 2]
    row = torch.where(there, depth_weight / ahead - depth_weight / torch.where(there, depth, 1.0), 0.0)
    return torch.cat([rows, row[..., None]], -1)


def dense_residual(
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
    """ba_residual by a rotation matrix that is the exponential of another; differentiable in everything."""
    c, x = cameras[camera_index.long()], points[point_index.long()]
    if model == "position":
        d = x - c
        valid = (observations * d).sum(-1) > 1e-5 * (d * d).sum(-1)
        return residual_in_frame(model, d, c[:, 3:], observations, None, 1.0), valid
    numbers = cameras.shape[1] - INTRINSICS[model] - 3  # of a rotation
    _, t, k = c.split([numbers, 3, INTRINSICS[model]], 1)
    rotation = matrix_of(cameras[:, :numbers])[camera_index.long()]
    y = (rotation @ x[..., None])[..., 0] + t
    residual = residual_in_frame(model, y, k, observations, depth, depth_weight)
    return residual, y[:, 2] < 0 if model == "snavely" else y[:, 2] > 0


FORMULAS = {"ba_residual": dense_residual}


def derivatives(out: Tensor, by: Tensor) -> Tensor:
    """[O, .., m], of out [O, ..] by the numbers of the same observation, by [O, m]."""
    if len(by) == 0:
        return out.new_zeros(*out.shape, by.shape[1])
    size = math.prod(out.shape[1:])
    each = torch.eye(size, dtype=out.dtype).reshape(size, 1, *out.shape[1:]).expand(size, *out.shape)
    (rows,) = torch.autograd.grad(out, by, each, is_grads_batched=True, create_graph=True)
    return rows.movedim(0, 1).unflatten(1, out.shape[1:])


def robust(loss: str, a: float, s: Tensor) -> tuple[Tensor, Tensor]:
    """rho(s) and sqrt(rho'(s)), as in the documentation, but for the differences of nearly equal numbers."""
    x = s / a**2
    if loss == "huber":
        return torch.where(x <= 1, s, 2 * a * s.sqrt() - a**2), torch.where(x <= 1, 1.0, x.clamp(min=1) ** -0.25)
    if loss == "cauchy":
        return a**2 * x.log1p(), (1 + x) ** -0.5
    if loss == "soft_l1":
        return 2 * a**2 * (0.5 * x.log1p()).expm1(), (1 + x) ** -0.25
    if loss == "tukey":
        return torch.where(x <= 1, s * (x**2 / 3 - x + 1), a**2 / 3), (1 - x).clamp(min=0)
    return s, torch.ones_like(s)


# Results with bounds -------------------------------------------------------------------------------------------------


@dataclass
class Bound:
    """A value in float64, and how far a float64 computation may be from it."""

    value: Tensor
    error: Tensor

    def stored(self, dtype: torch.dtype) -> Bound:
        """Rounded once more, to the type of a tensor."""
        if dtype == torch.float64:
            return self
        return Bound(self.value, self.error + 2.0**-24 * (self.value.abs() + self.error) + 2.0**-149)

    def assert_holds(self, got: Tensor, what: str) -> None:
        assert got.shape == self.value.shape, f"{what}: shape {list(got.shape)}, wanted {list(self.value.shape)}"
        away = (got.double() - self.value).abs()
        outside = ~(away <= self.stored(got.dtype).error)  # NaN is
        if bool(outside.any()):
            at = tuple(outside.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int(outside.sum())} of {got.numel()} out of bounds, first at {at}: {got[at].item()!r}, "
                f"exact {self.value[at].item()!r}, off by {away[at].item():.3g}, wanted {self.error[at].item():.3g}"
            )


def product(a: Bound, b: Bound, terms: int) -> Bound:
    """a @ b, each entry a sum of so many products."""
    (x, y), (dx, dy) = (a.value.abs(), b.value.abs()), (a.error, b.error)
    error = dx @ y + x @ dy + dx @ dy + (terms + ROUNDINGS) * UNIT * (x @ y)
    return Bound(a.value @ b.value, error)


@dataclass
class Rows:
    """Residuals and derivatives of each observation: [O, R], [O, R, n], [O, R, 3]."""

    residual: Bound
    of_camera: Bound
    of_point: Bound


@dataclass
class System:
    """The weighted normal equations of a problem as a dense one: A [m, C n + 3 P], b [m], of m = O R rows.

    Points that are fixed have their columns, but take no part in what is eliminated.
    """

    a: Bound
    b: Bound
    split: int  # C n
    of_points: Tensor  # [P, m] float64: 1 where a row is a point's
    free: Tensor  # [P] bool: not fixed
    moves: Tensor  # [P] bool: not fixed and observed
    radius: float

    @property
    def points(self) -> int:
        return len(self.free)

    @functools.cached_property
    def hessian(self) -> Bound:
        at = Bound(self.a.value.mT, self.a.error.mT)
        return product(at, self.a, len(self.b.value))

    @functools.cached_property
    def gradient(self) -> Bound:
        at = Bound(self.a.value.mT, self.a.error.mT)
        found = product(at, Bound(self.b.value[:, None], self.b.error[:, None]), len(self.b.value))
        return Bound(found.value[:, 0], found.error[:, 0])

    def block(self, bound: Bound, points: bool, size: int) -> Bound:
        """The diagonal blocks of a square matrix's part of cameras or points, [C or P, size, size]."""

        def of(t: Tensor) -> Tensor:
            part = t[self.split :, self.split :] if points else t[: self.split, : self.split]
            count = part.shape[0] // size
            at = torch.arange(count)
            return part.reshape(count, size, count, size)[at, :, at]

        return Bound(of(bound.value), of(bound.error))

    @functools.cached_property
    def damped(self) -> Tensor:
        """V with its damping, [P, 3, 3]."""
        v = self.block(self.hessian, True, 3).value
        return v + (v.diagonal(dim1=1, dim2=2).clamp(min=1e-6) / self.radius).diag_embed()

    @functools.cached_property
    def scale(self) -> Tensor:
        """sqrt(diag V), [P, 3]; 1 where nothing is known."""
        d = self.damped.diagonal(dim1=1, dim2=2).sqrt()
        return torch.where(self.moves[:, None], d, 1.0)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """[P, 3, 3], zero where a point makes no step."""
        v = torch.where(self.moves[:, None, None], self.damped, torch.eye(3).double())
        scaled = v / self.scale[:, :, None] / self.scale[:, None, :]
        inverse = torch.linalg.inv(scaled) / self.scale[:, :, None] / self.scale[:, None, :]
        return torch.where(self.moves[:, None, None], inverse, 0.0)

    @functools.cached_property
    def condition(self) -> Tensor:
        """[P]: of V, scaled to a diagonal of ones, since that is what a Cholesky factorization loses by (Demmel)."""
        v = torch.where(self.moves[:, None, None], self.damped, torch.eye(3).double())
        scaled = v / self.scale[:, :, None] / self.scale[:, None, :]
        return 1 / torch.linalg.eigvalsh(scaled)[:, 0].clamp(min=1e-300)

    @functools.cached_property
    def relative(self) -> Tensor:
        """[P]: how far off the rows of A at a point's columns are, where these are scaled as V is."""
        off = (self.a.error[:, self.split :].reshape(len(self.b.value), self.points, 3) / self.scale).square().sum(-1)
        return (self.of_points * off.mT).sum(1).sqrt()

    @functools.cached_property
    def lost(self) -> Tensor:
        """[P]: what the elimination of a point loses, relative to the rows that it couples.

        With Q = A_p V^-1/2, whose norm is below 1, S has A_c^T (1 - Q Q^T) A_c of each point, and rhs likewise. What is
        off by u in V, relative to its diagonal, is off by u cond(V) in Q Q^T, and what is off by e in scaled A_p
        is off by 2 e sqrt(cond(V)) there and as much again through V. Products of A_p and W with a V^-1 that was
        formed lose u cond(V), too.
        """
        rounded = (len(self.b.value) + 3 * ROUNDINGS) * UNIT * self.condition
        return torch.where(self.moves, rounded + 4 * self.relative * self.condition.sqrt(), 0.0)

    @functools.cached_property
    def schur(self) -> tuple[Bound, Bound]:
        """S [C n, C n] and rhs [C n]."""
        ac, ap = self.a.value[:, : self.split], self.a.value[:, self.split :]
        w = (ac.mT @ ap).reshape(self.split, self.points, 3)
        solved = torch.einsum("ipx,pxy->ipy", w, self.inverse)
        s = ac.mT @ ac - torch.einsum("ipx,jpx->ij", solved, w)
        gradient = self.gradient.value
        rhs = torch.einsum("ipx,px->i", solved, gradient[self.split :].reshape(self.points, 3)) - gradient[: self.split]
        # Of each point, sums over its rows; a row without one isn't there.
        size, off = self.of_points @ ac.abs(), self.of_points @ self.a.error[:, : self.split]
        right = self.of_points @ self.b.value.abs()
        right_off = self.of_points @ self.b.error
        plain = (len(self.b.value) + ROUNDINGS) * UNIT
        whole = self.lost + plain
        s_error = size.mT @ (whole[:, None] * size) + off.mT @ size + size.mT @ off
        rhs_error = size.mT @ (whole * right + right_off) + off.mT @ right
        return Bound(s, s_error), Bound(rhs, rhs_error)

    def times(self, x: Tensor) -> Bound:
        """S x, of x [C n]."""
        s = self.schur[0]
        size = self.of_points @ self.a.value[:, : self.split].abs()
        summed = (self.split + len(self.b.value)) * UNIT * (size.mT @ (size @ x.abs()))
        return Bound(s.value @ x, s.error @ x.abs() + summed)

    def back(self, x: Tensor) -> Bound:
        """The points' step [P, 3], of x [C n].

        y = -V^-1 A_p^T u with u = b + A_c x. V is off as in `lost`, which moves D y, where D^2 = diag V, by cond(V)
        |D y|; what is off in u by sqrt(cond(V)), since V^-1/2 A_p^T is below 1; and A_p^T by cond(V) |u|.
        """
        ac, ap = self.a.value[:, : self.split], self.a.value[:, self.split :]
        u = self.b.value + ac @ x
        right = (ap.mT @ u).reshape(self.points, 3)
        y = -(self.inverse @ right[..., None])[..., 0]
        terms = self.b.value.abs() + ac.abs() @ x.abs()
        off = self.b.error + self.a.error[:, : self.split] @ x.abs() + (self.split + ROUNDINGS) * UNIT * terms

        def norm(t: Tensor) -> Tensor:
            return (self.of_points @ t.square()).sqrt()

        rounded = (len(self.b.value) + 3 * ROUNDINGS) * UNIT
        scaled = (self.scale * y).norm(dim=1)
        error = (rounded + 4 * self.relative) * self.condition * (scaled + norm(terms))
        error = error + self.condition.sqrt() * norm(off)
        return Bound(y, torch.where(self.moves[:, None], error[:, None] / self.scale, 0.0))

    def change(self, step: Tensor) -> Bound:
        """1/2 |b|^2 - 1/2 |b + A step|^2, of a whole step [C n + 3 P]."""
        b, after = self.b.value, self.b.value + self.a.value @ step
        terms = b.abs() + self.a.value.abs() @ step.abs()
        off = self.b.error + self.a.error @ step.abs() + (self.split + ROUNDINGS) * UNIT * terms
        error = (b.abs() + after.abs()) @ off + (len(b) + ROUNDINGS) * UNIT * (b @ b + after @ after)
        return Bound(0.5 * (b @ b - after @ after), error)

    def whole(self, camera_damping: Tensor) -> Tensor:
        """The damped normal equations' matrix; rows and columns of points that make no step are there, too."""
        out = self.hessian.value.clone()
        out[: self.split, : self.split] += camera_damping.diag()
        for p in range(self.points):
            own = slice(self.split + 3 * p, self.split + 3 * p + 3)
            out[own, own] = self.damped[p]
        return out


# Problems ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A problem of ba, and how it is given.

    Points lie around the origin, within a sphere of radius 1 that cameras look at from a distance of about 5: nothing
    is near a camera, and it is well known which way everything is.
    """

    model: str = "snavely"
    quaternion: bool = False
    cameras: int = 3
    points: int = 5
    observations: int = 12
    dtype: torch.dtype = torch.float64
    index: torch.dtype = torch.int64
    with_depth: bool = False
    with_fixed: bool = False
    loss: str = "trivial"
    spread: float = 1.0  # loss_scale over the size of usual residuals
    depth_weight: float = 1.0
    radius: float = 1e4
    layout: str = "contiguous"
    behind: bool = False  # some cameras have everything behind them
    full: bool = False  # every camera sees every point
    ordered: bool = True
    outliers: bool = True
    focal: float = 1.0
    size: float = 1.0  # of the scene
    angle: float | None = None  # of all rotations; None: any of ANGLES
    seed: int = 0

    @property
    def n(self) -> int:
        return 3 if self.model == "position" else 6 + INTRINSICS[self.model]

    @property
    def noise(self) -> float:
        return 0.02 if self.model == "position" else 0.02 * self.focal

    @property
    def loss_scale(self) -> float:
        return self.spread * self.noise

    @property
    def seen(self) -> int:
        """O."""
        if self.cameras * self.points == 0:
            return 0
        return self.cameras * self.points if self.full else self.observations

    @property
    def has_depth(self) -> bool:
        return self.with_depth and self.model != "position"

    def _random(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=tensors.generator(self.seed + seed), dtype=torch.float64)

    def _uniform(self, seed: int, *shape: int) -> Tensor:
        return torch.rand(shape, generator=tensors.generator(self.seed + seed), dtype=torch.float64)

    @functools.cached_property
    def vectors(self) -> Tensor:
        """Angle-axis [C, 3]."""
        axes = torch.nn.functional.normalize(self._random(1, self.cameras, 3), dim=1)
        choice = (self._uniform(2, self.cameras) * len(ANGLES)).long().clamp(max=len(ANGLES) - 1)
        angles = torch.tensor(ANGLES, dtype=torch.float64)[choice]
        return axes * (angles if self.angle is None else torch.full_like(angles, self.angle))[:, None]

    @functools.cached_property
    def numbers(self) -> dict[str, Tensor]:
        """The contents of cameras, points, observations, depth and fixed_points, before they are stored."""
        x = self._random(3, self.points, 3)
        x = self.size * x / (1 + x.norm(dim=1, keepdim=True))
        camera, point = self.indices
        fixed = self._uniform(22, self.points) < 0.3
        if self.model == "position":
            centres = 5 * self.size * torch.nn.functional.normalize(self._random(4, self.cameras, 3), dim=1)
            v = torch.nn.functional.normalize(x[point] - centres[camera], dim=1)
            v = v + self.noise * self._random(5, self.seen, 3)
            if self.behind:
                v = torch.where(self._uniform(6, self.seen, 1) < 0.2, -v, v)
            return {"cameras": centres, "points": x, "observations": v, "fixed_points": fixed}
        away = torch.cat([0.3 * self._random(4, self.cameras, 2), 5 + self._uniform(6, self.cameras, 1)], 1)
        if self.behind:
            away = torch.where(self._uniform(7, self.cameras, 1) < 0.4, -away, away)
        t = self.size * (-away if self.model == "snavely" else away)
        k = {
            "f": self.focal * (1.2 + self._uniform(8, self.cameras, 2)),
            "c": 0.3 * self.focal * self._random(9, self.cameras, 2),
            "k": torch.tensor([0.1, 0.03], dtype=torch.float64) * self._random(10, self.cameras, 2),
            "p": 0.02 * self._random(11, self.cameras, 2),
        }
        intrinsics = {
            "snavely": lambda: [k["f"][:, :1], k["k"]],
            "simple_pinhole": lambda: [k["f"][:, :1], k["c"]],
            "pinhole": lambda: [k["f"], k["c"]],
            "simple_radial": lambda: [k["f"][:, :1], k["c"], k["k"][:, :1]],
            "radial": lambda: [k["f"][:, :1], k["c"], k["k"]],
            "opencv": lambda: [k["f"], k["c"], k["k"], k["p"]],
        }[self.model]()
        rotation = self.vectors
        if self.quaternion:
            angle = rotation.norm(dim=1, keepdim=True)
            axis = torch.where(angle > 0, rotation / angle.clamp(min=1e-300), 0.0)
            rotation = torch.cat([(angle / 2).cos(), (angle / 2).sin() * axis], 1)
            rotation = rotation * (0.5 + self._uniform(12, self.cameras, 1)) * self._random(13, self.cameras, 1).sign()
        cameras = torch.cat([rotation, t, *intrinsics], 1)
        y = (matrix_of(self.vectors)[camera] @ x[point][..., None])[..., 0] + t[camera]
        seen = pixels(self.model, y, torch.cat(intrinsics, 1)[camera])
        noise = self.noise * self._random(5, self.seen, 2)
        if self.outliers:
            noise = torch.where(self._uniform(14, self.seen, 1) < 0.15, 30 * noise, noise)
        z = y[:, 2].abs() * (1 + 0.05 * self._random(15, self.seen))
        none = torch.tensor([math.nan, 0.0, -self.size, -math.inf], dtype=torch.float64)
        choice = (self._uniform(16, self.seen) * 16).long()
        z = torch.where(choice < 4, none[choice.clamp(max=3)], z)
        return {"cameras": cameras, "points": x, "observations": seen + noise, "depth": z, "fixed_points": fixed}

    @functools.cached_property
    def indices(self) -> tuple[Tensor, Tensor]:
        """Of cameras and points, [O] int64. Some come twice, and with luck some never."""
        if self.cameras * self.points == 0:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        if self.full:
            point = torch.arange(self.points).repeat_interleave(self.cameras)
            camera = torch.arange(self.cameras).repeat(self.points)
        else:
            g = tensors.generator(self.seed + 20)
            camera = torch.randint(0, self.cameras, (self.seen,), generator=g)
            point = torch.randint(0, self.points, (self.seen,), generator=g).sort().values
        if not self.ordered:
            order = torch.randperm(self.seen, generator=tensors.generator(self.seed + 21))
            camera, point = camera[order], point[order]
        return camera, point

    def reordered(
        self,
        order: Tensor | None = None,
        cameras: Tensor | None = None,
        points: Tensor | None = None,
    ) -> Case:
        """The same with other observations, the new i-th the old order[i]-th; likewise cameras and points."""
        count = (len(self.indices[0]), self.cameras, self.points)
        order, cameras, points = (
            torch.arange(n) if t is None else t for n, t in zip(count, (order, cameras, points), strict=True)
        )
        by = {"cameras": cameras, "points": points, "fixed_points": points}
        copy = replace(self)
        copy.__dict__.update(  # where cached properties are
            indices=tuple(
                labels.argsort()[t][order] for labels, t in zip((cameras, points), self.indices, strict=True)
            ),
            numbers={name: t[by.get(name, order)] for name, t in self.numbers.items()},
        )
        return copy

    def with_numbers(self, **numbers: Tensor) -> Case:
        """The same with other contents of some tensors."""
        copy = replace(self)
        copy.__dict__.update(indices=self.indices, numbers=self.numbers | numbers)
        return copy

    def stored(self, name: str) -> Tensor:
        return tensors.lay_out(self.numbers[name].to(self.dtype), self.layout)

    @functools.cached_property
    def given(self) -> dict[str, Tensor | None]:
        """The tensors of a call, by name."""
        narrow = "strided" if self.layout == "strided" else "contiguous"
        camera, point = (tensors.lay_out(t.to(self.index), narrow) for t in self.indices)
        return {
            **{name: self.stored(name) for name in ("cameras", "points", "observations")},
            "camera_index": camera,
            "point_index": point,
            "depth": tensors.lay_out(self.numbers["depth"].to(self.dtype), narrow) if self.has_depth else None,
            "fixed_points": tensors.lay_out(self.numbers["fixed_points"], narrow) if self.with_fixed else None,
        }

    @property
    def x(self) -> Tensor:
        """A vector of the cameras' tangents [C, n]: a step that is not too large."""
        step = 0.01 * self._random(23, self.cameras, self.n)
        if self.model == "position":
            return self.size * step
        step[:, 3:6] *= self.size
        return step

    @property
    def all_pairs(self) -> Tensor:
        return torch.tril_indices(self.cameras, self.cameras).T.to(self.index)

    @property
    def free(self) -> Tensor:
        fixed = self.given["fixed_points"]
        return torch.ones(self.points, dtype=torch.bool) if fixed is None else ~fixed

    def problem(self, **changed: Any) -> tuple[Tensor, ...]:
        names = ("cameras", "points", "observations", "camera_index", "point_index")
        return tuple(changed.get(name, self.given[name]) for name in names)

    def options(self, op: str) -> dict[str, Any]:
        """The keyword arguments of op."""
        options: dict[str, Any] = {"model": self.model}
        if op != "ba_retract":
            options["depth_weight"] = self.depth_weight
        if op not in ("ba_residual", "ba_jacobian", "ba_retract"):
            options |= {"loss": self.loss, "loss_scale": self.loss_scale}
        if op in ("ba_schur", "ba_schur_mv", "ba_backsubstitute"):
            options["radius"] = self.radius
        return options

    def run(self, backend: Backend, op: str, **changed: Any) -> Any:
        """A call of one of the ops that take a problem, with other arguments in the place of some."""
        names: tuple[str, ...] = {
            "ba_schur": ("pairs", "depth", "fixed_points"),
            "ba_schur_mv": ("x", "depth", "fixed_points"),
            "ba_backsubstitute": ("camera_step", "depth", "fixed_points"),
        }.get(op, ("depth",))
        own = {"x": self.x, "camera_step": self.x, "pairs": None, **self.given}
        options = {k: changed.get(k, v) for k, v in self.options(op).items()}
        return backend.run(op, *self.problem(**changed), *(changed.get(k, own[k]) for k in names), **options)

    # Exact results.

    def exact_numbers(self) -> dict[str, Tensor]:
        """What the tensors hold, as float64."""
        return {name: t.double() for name, t in self.given.items() if t is not None and t.is_floating_point()}

    @functools.cached_property
    def valid(self) -> Tensor:
        given = self.exact_numbers()
        problem = (given["cameras"], given["points"], given["observations"], *self.indices, given.get("depth"))
        return dense_residual(*problem, model=self.model)[1]

    @functools.cached_property
    def rows(self) -> Rows:
        """Residuals and derivatives.

        First of all what is off in the points in the cameras' frames, y = q + t with q = R x: by roundings of x and t.
        The residual r(y, k) and its derivatives move with y and k by their own derivatives; and every product and sum
        on the way is rounded relative to terms that are either such products or at most the results.
        """
        given, k_count = self.exact_numbers(), INTRINSICS[self.model]
        camera, point = self.indices
        c, x, v = given["cameras"][camera], given["points"][point], given["observations"]
        u = ROUNDINGS * UNIT
        if self.model == "position":
            t, q, k, rotation = -c, x, c[:, 3:], torch.eye(3).double().expand(len(c), 3, 3)
            off_q = 0 * x
        else:
            _, t, k = c.split([c.shape[1] - k_count - 3, 3, k_count], 1)
            rotation = matrix_of(given["cameras"][:, : c.shape[1] - k_count - 3])[camera]
            q = (rotation @ x[..., None])[..., 0]
            off_q = u * x.abs().sum(1, keepdim=True).expand_as(x)
        y, off_y = q + t, off_q + u * (q.abs() + t.abs())

        e = torch.cat([y, k], 1).requires_grad_()
        r = residual_in_frame(self.model, e[:, :3], e[:, 3:], v, given.get("depth"), self.depth_weight)
        by = derivatives(r, e)
        second = derivatives(by, e).detach()
        r, by = r.detach(), by.detach()
        off = torch.cat([off_y, u * k.abs()], 1)  # [O, 3 + ni]
        own = torch.cat([y.abs(), k.abs()], 1)
        off_r = torch.einsum("ori,oi->or", by.abs(), off) + u * r.abs()
        off_by = torch.einsum("orij,oj->ori", second.abs(), off) + u * by.abs()
        # Within a derivative by one coordinate of y, that by another times x or y is a term.
        off_by = off_by + u * torch.einsum("orij,oj->ori", second.abs(), own)
        if self.model == "position":  # s = v.d / d.d, and what becomes of it in the derivative
            d2 = y.square().sum(1)[:, None]
            s = (v.abs() * y.abs()).sum(1, keepdim=True) / d2
            off_r = off_r + u * (v.abs() + s * y.abs())
            off_by = off_by + u * (
                s[..., None] + y.abs()[:, :, None] * (v.abs() + 2 * s * y.abs())[:, None] / d2[..., None]
            )
        else:
            off_r[:, :2] += u * v.abs()
            if self.has_depth:
                there = given["depth"] > 0
                inverse = 1 / y[:, 2].abs() + 1 / torch.where(there, given["depth"], 1.0)
                off_r[:, 2] += torch.where(there, u * self.depth_weight * inverse, 0.0)
        of_y, of_k = by[..., :3], by[..., 3:]
        off_of_y, off_of_k = off_by[..., :3], off_by[..., 3:]
        if self.model == "position":
            return Rows(Bound(r, off_r), Bound(-of_y, off_of_y), Bound(of_y, off_of_y))
        # exp(w) q = q + w x q: the derivative by w is that by y times -[q]x.
        turn = -skew(q)
        off_turn = skew(off_q).abs() + u * turn.abs()
        of_w = of_y @ turn
        off_w = off_of_y @ turn.abs() + of_y.abs() @ off_turn
        off_x = off_of_y @ rotation.abs() + u * of_y.abs().sum(-1, keepdim=True)
        return Rows(
            Bound(r, off_r),
            Bound(torch.cat([of_w, of_y, of_k], -1), torch.cat([off_w, off_of_y, off_of_k], -1)),
            Bound(of_y @ rotation, off_x.expand_as(of_y)),
        )

    @property
    def loss_rows(self) -> int:
        return 3 if self.model == "position" else 2

    @functools.cached_property
    def factors(self) -> tuple[Tensor, Bound]:
        """The cost of each observation [O], and what its rows are multiplied by [O, R]."""
        r = self.rows.residual
        s = r.value[:, : self.loss_rows].square().sum(1)
        rho, factor = robust(self.loss, self.loss_scale, s)
        of_rows = torch.ones_like(r.value)
        of_rows[:, : self.loss_rows] = factor[:, None]
        # sqrt(rho') has a slope of at most 1 / a^2.
        off_s = ((2 * r.value.abs() + r.error) * r.error)[:, : self.loss_rows].sum(1) + ROUNDINGS * UNIT * s
        slope = 0.0 if self.loss == "trivial" else 1 / self.loss_scale**2
        off = torch.zeros_like(r.value)
        off[:, : self.loss_rows] = (slope * off_s + ROUNDINGS * UNIT * factor)[:, None]
        cost = 0.5 * rho + 0.5 * r.value[:, self.loss_rows :].square().sum(1)
        return cost, Bound(of_rows, off)

    @functools.cached_property
    def cost(self) -> Bound:
        cost, factor = self.factors
        r = self.rows.residual
        off = (factor.value**2 * r.value.abs() * r.error).sum() + (r.error**2).sum()
        return Bound(cost.sum(), off + (len(cost) + ROUNDINGS) * UNIT * cost.sum())

    @functools.cached_property
    def system(self) -> System:
        _, factor = self.factors
        rows = self.rows

        def weighted(b: Bound, dims: int) -> Bound:
            f, off = (t.reshape(*t.shape, *[1] * dims) for t in (factor.value, factor.error))
            return Bound(f * b.value, f * b.error + off * (b.value.abs() + b.error))

        r, of_camera, of_point = weighted(rows.residual, 0), weighted(rows.of_camera, 1), weighted(rows.of_point, 1)
        camera, point = self.indices
        count, width = r.value.shape
        split = self.cameras * self.n

        def dense(of_cameras: Tensor, of_points: Tensor) -> Tensor:
            a = torch.zeros(count, width, split + 3 * self.points, dtype=torch.float64)
            for o in range(count):
                at, to = int(camera[o]) * self.n, split + 3 * int(point[o])
                a[o, :, at : at + self.n] = of_cameras[o]
                a[o, :, to : to + 3] = of_points[o]
            return a.flatten(0, 1)

        of_points = torch.nn.functional.one_hot(point, max(1, self.points)).double()[:, : self.points]
        of_points = of_points.repeat_interleave(width, 0).mT
        seen = torch.bincount(point, minlength=self.points) > 0
        return System(
            a=Bound(dense(of_camera.value, of_point.value), dense(of_camera.error, of_point.error)),
            b=Bound(r.value.flatten(), r.error.flatten()),
            split=split,
            of_points=of_points,
            free=self.free,
            moves=self.free & seen,
            radius=self.radius,
        )


# Strategies ----------------------------------------------------------------------------------------------------------


def _small(backend: Backend | None) -> bool:
    """Interpreted or emulated: not too large, please."""
    return backend is not None and (backend.slow or backend.name == "simt")


@st.composite
def cases(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    models: tuple[str, ...] = MODELS,
    losses: tuple[str, ...] = LOSSES,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    ordered: bool = True,
    least: int = 0,
    full: bool = False,
) -> Case:
    """Problems.

    Args:
        ordered: only such as have ascending points.
        least: cameras, points and observations.
        full: every camera sees every point, from the front, and there are at least three and four of them.
    """
    model = draw(st.sampled_from(models))
    small = _small(backend)
    least_cameras, least_points = (3, 4) if full else (least, least)
    return Case(
        model=model,
        quaternion=model != "position" and draw(st.booleans()),
        cameras=draw(st.integers(least_cameras, 4 if small else 6)),
        points=draw(st.integers(least_points, 6 if small else 12)),
        observations=draw(st.integers(least, 12 if small else 40)),
        dtype=draw(st.sampled_from(dtypes)),
        index=draw(st.sampled_from(INDICES)),
        with_depth=draw(st.booleans()),
        with_fixed=not full and draw(st.booleans()),
        loss=draw(st.sampled_from(losses)),
        spread=draw(st.sampled_from((0.3, 1.0, 3.0))),
        depth_weight=draw(st.sampled_from((1.0, 0.3))),
        radius=draw(st.sampled_from((1e4, 1e4, 1.0, 1e-3))),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        behind=not full and draw(st.booleans()),
        full=full,
        ordered=ordered or draw(st.booleans()),
        focal=draw(st.sampled_from((1.0, 600.0))),
        size=draw(st.sampled_from((1.0, 1.0, 1e5))) if not full else 1.0,
        seed=draw(SEEDS),
    )


@dataclass(frozen=True)
class Steps:
    """A call of ba_retract."""

    case: Case
    turn: float = 0.3  # the angle of the steps' rotations

    @functools.cached_property
    def camera_step(self) -> Tensor:
        """[C, n]"""
        step = self.case.x
        if self.case.model != "position":
            step[:, :3] = self.turn * torch.nn.functional.normalize(step[:, :3], dim=1)
        return tensors.lay_out(step, self.case.layout)

    @functools.cached_property
    def point_step(self) -> Tensor:
        step = (
            0.1
            * self.case.size
            * torch.randn(self.case.points, 3, generator=tensors.generator(self.case.seed + 30), dtype=torch.float64)
        )
        return tensors.lay_out(step, self.case.layout)

    def run(self, backend: Backend, **changed: Tensor) -> tuple[Tensor, Tensor]:
        own = {"camera_step": self.camera_step, "point_step": self.point_step, **self.case.given}
        names = ("cameras", "points", "camera_step", "point_step")
        return backend.run("ba_retract", *(changed.get(k, own[k]) for k in names), model=self.case.model)


def steps(backend: Backend | None = None, **options: Any) -> st.SearchStrategy[Steps]:
    return st.builds(Steps, cases(backend, **options), st.sampled_from((0.0, *ANGLES[1:])))


# For the walks over all ops ------------------------------------------------------------------------------------------


@st.composite
def _calls(draw: st.DrawFn, op: str) -> Call:
    model = draw(st.sampled_from(MODELS))
    case = Case(
        model=model,
        quaternion=model != "position" and draw(st.booleans()),
        cameras=draw(st.sampled_from((2, 3))),
        points=draw(st.sampled_from((3, 5))),
        observations=draw(st.sampled_from((7, 13))),
        dtype=draw(st.sampled_from(FLOATS)),
        index=draw(st.sampled_from(INDICES)),
        with_depth=draw(st.booleans()),
        with_fixed=draw(st.booleans()),
        loss=draw(st.sampled_from(LOSSES)),
        depth_weight=draw(st.sampled_from((1.0, 0.3))),
        radius=draw(st.sampled_from((1e4, 1.0))),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        seed=draw(SEEDS),
    )
    options = case.options(op)
    if draw(st.booleans()):  # said or left out
        options = {k: v for k, v in options.items() if v not in ("snavely", "trivial", 1.0, 1e4)}
    if op == "ba_retract":
        made = Steps(case)
        return Call(op, (case.given["cameras"], case.given["points"], made.camera_step, made.point_step), options)
    problem = case.problem()
    if op == "ba_residual" and draw(st.booleans()):
        problem = (*(t.detach().requires_grad_() for t in problem[:3]), *problem[3:])
    rest: tuple[Any, ...] = (case.given["depth"],)
    if op == "ba_schur":
        rest = (case.all_pairs[1:] if draw(st.booleans()) else None, *rest, case.given["fixed_points"])
    elif op in ("ba_schur_mv", "ba_backsubstitute"):
        rest = (tensors.lay_out(case.x, case.layout), *rest, case.given["fixed_points"])
    while rest and rest[-1] is None and draw(st.booleans()):
        rest = rest[:-1]
    return Call(op, (*problem, *rest), options)


def blocks(case: Case) -> Tensor:
    """[C, n, n], symmetric and positive definite."""
    g = tensors.generator(case.seed + 40)
    half = torch.randn(case.cameras, case.n, case.n, generator=g, dtype=torch.float64)
    return half @ half.mT / case.n + torch.eye(case.n)


def some_columns(case: Case, kind: str) -> Tensor | None:
    """Cameras that are all free, or but for the first one, or turn together, from wherever they look."""
    if kind == "free":
        return None
    columns = torch.arange(case.cameras * case.n, dtype=case.index).view(case.cameras, case.n)
    if kind == "fixed":
        return (columns - case.n).clamp(min=-1)
    columns[1:, :3] = columns[:1, :3]
    return columns.unique(return_inverse=True)[1].to(case.index)  # from 0 on, without gaps


@st.composite
def _solver_calls(draw: st.DrawFn, op: str) -> Call:
    """Of ops made of the others, a few iterations.

    Solves go on to the last of them: rows that aren't reached would hold NaN, which opcheck takes for different. So
    tolerances are 0, and the loss leaves most observations a slope.
    """
    model = "position" if op == "gp_solve" else draw(st.sampled_from(MODELS))
    perspective = model != "position"
    case = Case(
        model=model,
        quaternion=perspective and draw(st.booleans()),
        cameras=draw(st.sampled_from((2, 3))),
        points=draw(st.sampled_from((3, 5))),
        observations=draw(st.sampled_from((13, 20))),
        dtype=draw(st.sampled_from(FLOATS)),
        index=draw(st.sampled_from(INDICES)),
        with_depth=draw(st.booleans()),
        with_fixed=draw(st.booleans()),
        loss=draw(st.sampled_from(LOSSES)),
        spread=3.0,
        depth_weight=draw(st.sampled_from((1.0, 0.3))),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        ordered=op == "ba_pcg" or draw(st.booleans()),
        seed=draw(SEEDS),
    )
    options: dict[str, Any] = {"loss": case.loss, "loss_scale": case.loss_scale}
    if op != "gp_solve":
        options |= {"model": model, "depth_weight": case.depth_weight}
    if op == "ba_pcg":
        options |= {
            "radius": draw(st.sampled_from((1e4, 1.0))),
            "tolerance": draw(st.sampled_from((0.1, 1e-6, 0.0))),
            "max_iterations": draw(st.sampled_from((500, 3, 0))),
        }
        system = (tensors.lay_out(t, case.layout) for t in (case.x, blocks(case), case.x.abs() + 1.0))
        rest: tuple[Any, ...] = (*system, case.given["depth"], case.given["fixed_points"])
    else:
        options |= {
            "max_iterations": draw(st.integers(1, 4)),
            "initial_radius": draw(st.sampled_from((1e4, 1.0))),
            "linear_solver": draw(st.sampled_from(("auto", "dense_schur", "sparse_schur", "iterative_schur"))),
        }
        options |= dict.fromkeys(("function_tolerance", "gradient_tolerance", "parameter_tolerance"), 0.0)
        kinds = ("free", "fixed", "tied") if perspective else ("free", "fixed")
        rest = (case.given["fixed_points"], some_columns(case, draw(st.sampled_from(kinds))))
    if op == "ba_solve":
        options |= {"max_seconds": draw(st.sampled_from((None, 1e4)))}
        positions = None
        if perspective and draw(st.booleans()):
            options |= {"position_weight": draw(st.sampled_from((1.0, 0.1)))}
            known = torch.randn(case.cameras, 3, generator=tensors.generator(case.seed + 41))
            known[0, 0] = math.nan
            positions = tensors.lay_out(known.to(case.dtype), case.layout)
        rest = (case.given["depth"], *rest, positions)
    if draw(st.booleans()):  # said or left out
        defaults = ("snavely", "trivial", "auto", 1.0, 1e4, None)
        options = {k: v for k, v in options.items() if v not in defaults or k == "max_iterations"}
    while rest and rest[-1] is None and draw(st.booleans()):
        rest = rest[:-1]
    return Call(op, (*case.problem(), *rest), options)


OPS = (
    "ba_residual",
    "ba_jacobian",
    "ba_cost",
    "ba_build",
    "ba_schur",
    "ba_schur_mv",
    "ba_backsubstitute",
    "ba_retract",
)
SOLVERS = ("ba_pcg", "ba_solve", "gp_solve")
CALLS = {**{op: _calls(op) for op in OPS}, **{op: _solver_calls(op) for op in SOLVERS}}

FAR = 2**30 + 1


def _invalid() -> dict[str, list[Invalid]]:
    case = Case(quaternion=False, with_depth=True, with_fixed=True)  # C = 3, P = 5, O = 12, n = 9
    given = case.given
    cameras, points, observations, camera_index, point_index = case.problem()
    made = Steps(case)
    extra = {
        "ba_schur": {"pairs": case.all_pairs, "fixed_points": given["fixed_points"]},
        "ba_schur_mv": {"x": case.x, "fixed_points": given["fixed_points"]},
        "ba_backsubstitute": {"camera_step": case.x, "fixed_points": given["fixed_points"]},
        "ba_pcg": {
            "rhs": case.x,
            "inverse": blocks(case),
            "damping": case.x.abs(),
            "fixed_points": given["fixed_points"],
        },
        "ba_solve": {
            "fixed_points": given["fixed_points"],
            "columns": some_columns(case, "fixed"),
            "positions": torch.zeros(3, 3).double(),
        },
    }
    tangents = ("x", "camera_step", "rhs", "damping")  # [C, n]

    def wrong(call: Call, name: str, t: Tensor, where: str | None = None) -> list[Invalid]:
        """Dtypes and devices. Of a tensor that is elsewhere than the rest, either may be meant."""
        dtypes = {"half": torch.float16, "integer": torch.int16, "boolean": torch.bool, "float": torch.float32}
        if t.dtype == torch.bool:
            dtypes = {"float": torch.float32, "of 8 bits": torch.uint8, "integer": torch.int64}
        elif not t.is_floating_point():
            dtypes = {"float": torch.float32, "double": torch.float64, "of 8 bits": torch.uint8, "boolean": torch.bool}
        found = [
            Invalid(f"{name} {what}", call.with_(**{name: t.to(dtype)}), where or name)
            for what, dtype in dtypes.items()
        ]
        return [
            *found,
            Invalid(f"{name} device", call.with_(**{name: t.to("meta")}), f"{name}|cameras|{where or name}"),
        ]

    def shapes(call: Call, name: str, t: Tensor, where: str | None = None, **sizes: tuple[int, ...]) -> list[Invalid]:
        return [
            Invalid(f"{name} {what}", call.with_(**{name: torch.zeros((), dtype=t.dtype).expand(size)}), where or name)
            for what, size in sizes.items()
        ]

    def numbers(call: Call, name: str, *values: float) -> list[Invalid]:
        return [Invalid(f"{name} {value}", call.with_(**{name: value}), name) for value in (*values, math.nan)]

    def of_scene(call: Call) -> list[Invalid]:
        """Of cameras and points."""
        # Where the first tensor has another type, all others are what doesn't fit.
        return [
            *wrong(call, "cameras", cameras, "cameras|points"),
            *shapes(call, "cameras", cameras, vector=(9,), narrow=(3, 8), wide=(3, 11), cubic=(3, 9, 1), far=(FAR, 9)),
            *wrong(call, "points", points),
            *shapes(call, "points", points, vector=(3,), narrow=(5, 2), wide=(5, 4), cubic=(5, 3, 1)),
            *shapes(call, "points", points, "points|point_step", far=(FAR, 3)),
            Invalid("model unknown", call.with_(model="fisheye"), "model"),
            Invalid("model empty", call.with_(model=""), "model"),
            Invalid("model of more columns", call.with_(model="opencv"), "cameras"),
            Invalid("model of fewer columns", call.with_(model="position"), "cameras"),
        ]

    def of_problem(op: str) -> list[Invalid]:
        call = Call(op, (cameras, points, observations, camera_index, point_index))
        call = call.with_(depth=given["depth"], **extra.get(op, {}))
        directions = call.with_(
            cameras=torch.zeros(3, 3).double(),
            observations=torch.zeros(12, 3).double(),
            model="position",
            **{name: torch.zeros(3, 3).double() for name in tangents if name in extra.get(op, {})},
        )
        found = [
            *of_scene(call),
            *wrong(call, "observations", observations),
            *shapes(call, "observations", observations, vector=(12,), narrow=(12, 1), wide=(12, 3), cubic=(12, 2, 1)),
            *shapes(call, "observations", observations, "observations|camera_index", long=(13, 2), far=(FAR, 2)),
            *wrong(call, "camera_index", camera_index),
            *shapes(call, "camera_index", camera_index, scalar=(), short=(11,), matrix=(12, 1)),
            *wrong(call, "point_index", point_index),
            *shapes(call, "point_index", point_index, scalar=(), short=(11,), matrix=(12, 1)),
            *wrong(call, "depth", given["depth"]),
            *shapes(call, "depth", given["depth"], scalar=(), short=(11,), matrix=(12, 1)),
            Invalid("depth with directions", directions, "depth"),
            *numbers(call, "depth_weight", -1.0, math.inf),
        ]
        if op not in ("ba_residual", "ba_jacobian"):
            found += [
                Invalid("loss unknown", call.with_(loss="l2"), "loss"),
                Invalid("loss empty", call.with_(loss=""), "loss"),
                *numbers(call, "loss_scale", 0.0, -1.0),
            ]
        if op in extra:
            found += [
                *wrong(call, "fixed_points", given["fixed_points"]),
                *shapes(call, "fixed_points", given["fixed_points"], scalar=(), short=(4,), matrix=(5, 1)),
                *numbers(call, "initial_radius" if op == "ba_solve" else "radius", 0.0, -1.0),
            ]
        for name in tangents:
            if name in extra.get(op, {}):
                found += [
                    *wrong(call, name, case.x),
                    *shapes(call, name, case.x, vector=(27,), short=(2, 9), wide=(3, 10), cubic=(3, 9, 1)),
                ]
        if op == "ba_schur":
            found += [
                *wrong(call, "pairs", case.all_pairs),
                *shapes(call, "pairs", case.all_pairs, vector=(2,), wide=(6, 3), cubic=(6, 2, 1), far=(FAR, 2)),
            ]
        if op == "ba_pcg":
            found += [
                *wrong(call, "inverse", blocks(case)),
                *shapes(
                    call, "inverse", blocks(case), matrix=(9, 9), short=(2, 9, 9), wide=(3, 9, 10), diagonal=(3, 9)
                ),
                *numbers(call, "tolerance", -1.0, math.inf),
                Invalid("max_iterations -1", call.with_(max_iterations=-1), "max_iterations"),
            ]
        if op == "ba_solve":
            found += [
                *of_options(call, extra[op]["columns"]),
                *wrong(call, "positions", extra[op]["positions"]),
                *shapes(call, "positions", cameras, vector=(3,), short=(2, 3), wide=(3, 4), cubic=(3, 3, 1)),
                *numbers(call, "position_weight", -1.0, math.inf),
                Invalid("positions with directions", directions.with_(depth=None, columns=None), "positions"),
            ]
        return found

    def of_options(call: Call, columns: Tensor) -> list[Invalid]:
        """Of ba_solve and gp_solve."""
        n = columns.shape[1]
        tolerances = ("function_tolerance", "gradient_tolerance", "parameter_tolerance", "linear_tolerance")
        return [
            *wrong(call, "columns", columns),
            *shapes(call, "columns", columns, vector=(3 * n,), short=(2, n), wide=(3, n + 1), cubic=(3, n, 1)),
            *(i for name in (*tolerances, "max_seconds") for i in numbers(call, name, -1.0, math.inf)),
            Invalid("max_iterations -1", call.with_(max_iterations=-1), "max_iterations"),
            Invalid("max_linear_iterations -1", call.with_(max_linear_iterations=-1), "max_linear_iterations"),
            Invalid("linear_solver unknown", call.with_(linear_solver="cholesky"), "linear_solver"),
            Invalid("linear_solver empty", call.with_(linear_solver=""), "linear_solver"),
        ]

    def of_positions() -> list[Invalid]:
        """Of gp_solve."""
        seen = Case(model="position", with_fixed=True)
        centres, points, v, camera_index, point_index = seen.problem()
        columns = torch.arange(9).view(3, 3)
        call = Call("gp_solve", seen.problem(), {"fixed_points": seen.given["fixed_points"], "columns": columns})
        return [
            *wrong(call, "cameras", centres, "cameras|points"),
            *shapes(call, "cameras", centres, vector=(3,), narrow=(3, 2), wide=(3, 9), cubic=(3, 3, 1), far=(FAR, 3)),
            *wrong(call, "points", points),
            *shapes(call, "points", points, vector=(3,), narrow=(5, 2), wide=(5, 4), cubic=(5, 3, 1), far=(FAR, 3)),
            *wrong(call, "observations", v),
            *shapes(call, "observations", v, vector=(12,), narrow=(12, 2), wide=(12, 4), cubic=(12, 3, 1)),
            *shapes(call, "observations", v, "observations|camera_index", long=(13, 3), far=(FAR, 3)),
            *wrong(call, "camera_index", camera_index),
            *shapes(call, "camera_index", camera_index, scalar=(), short=(11,), matrix=(12, 1)),
            *wrong(call, "point_index", point_index),
            *shapes(call, "point_index", point_index, scalar=(), short=(11,), matrix=(12, 1)),
            *wrong(call, "fixed_points", seen.given["fixed_points"]),
            *shapes(call, "fixed_points", seen.given["fixed_points"], scalar=(), short=(4,), matrix=(5, 1)),
            Invalid("loss unknown", call.with_(loss="l2"), "loss"),
            *numbers(call, "loss_scale", 0.0, -1.0),
            *numbers(call, "initial_radius", 0.0, -1.0),
            *of_options(call, columns),
        ]

    retract = Call("ba_retract", (cameras, points, made.camera_step, made.point_step))
    return {
        **{op: of_problem(op) for op in (*OPS, "ba_pcg", "ba_solve") if op != "ba_retract"},
        "gp_solve": of_positions(),
        "ba_retract": [
            *of_scene(retract),
            *wrong(retract, "camera_step", made.camera_step),
            *shapes(retract, "camera_step", made.camera_step, vector=(27,), short=(2, 9), wide=(3, 10)),
            *wrong(retract, "point_step", made.point_step),
            *shapes(retract, "point_step", made.point_step, vector=(15,), short=(4, 3), wide=(5, 4)),
        ],
    }


INVALID = _invalid()
