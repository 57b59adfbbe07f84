"""Small scenes for tests of solvers, and solutions of their own to compare with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import effk
import numpy as np
import pytest
import torch
from effk.ba import Problem, generate
from effk.ba.levenberg_marquardt import Iteration
from torch import Tensor

from ..kit.tensors import generator
from .strategies import matrix_of, pixels, robust, skew

BAL = Path(__file__).parents[3] / "shared" / "data" / "bal"
SOLVERS = ("dense_schur", "sparse_schur", "iterative_schur")
# Steps of conjugate gradients as good as those of a factorization.
EXACT: dict[str, Any] = {"linear_tolerance": 0.0, "max_linear_iterations": 300}
MIN_DIAGONAL = 1e-6


def bal(name: str) -> Problem:
    path = BAL / f"{name}-pre.txt"
    if not path.exists():
        pytest.skip(f"{path} isn't here")
    return Problem.from_bal(path)


def given(problem: Problem) -> tuple[Tensor, ...]:
    return problem.cameras, problem.points, problem.observations, problem.camera_index, problem.point_index


def cost_of(problem: Problem, **options: Any) -> float:
    return float(effk.ba.cost(*given(problem), problem.depth, model=problem.model, **options))


def rotation_columns(problem: Problem) -> int:
    """How many numbers a rotation is."""
    return 3 + problem.cameras.shape[1] - problem.num_parameters


def centres(problem: Problem) -> Tensor:
    """[C, 3]"""
    if problem.model == "position":
        return problem.cameras.double()
    first = rotation_columns(problem)
    rotation = matrix_of(problem.cameras[:, :first].double())
    return -(rotation.mT @ problem.cameras[:, first : first + 3, None].double())[..., 0]


def with_centres(problem: Problem, wanted: Tensor) -> None:
    """Moves the cameras there."""
    first = rotation_columns(problem)
    rotation = matrix_of(problem.cameras[:, :first])
    problem.cameras[:, first : first + 3] = -(rotation @ wanted[..., None])[..., 0]


def cost_of_positions(problem: Problem, weight: float) -> float:
    """What knowing centres adds, of those that are known."""
    if problem.positions is None:
        return 0.0
    off = (centres(problem) - problem.positions)[~problem.positions.isnan().any(1)]
    return 0.5 * weight**2 * float(off.square().sum())


def seen_by(problem: Problem) -> Tensor:
    """The pixels of all observations, by formulas of the tests' own [O, 2]."""
    first = rotation_columns(problem)
    rotation, t, k = problem.cameras.double().split([first, 3, problem.cameras.shape[1] - first - 3], 1)
    camera = problem.camera_index.long()
    x = problem.points.double()[problem.point_index.long()]
    y = (matrix_of(rotation)[camera] @ x[..., None])[..., 0] + t[camera]
    return pixels(problem.model, y, k[camera])


def observe_again(problem: Problem, truth: Problem, noise: float, seed: int = 0) -> None:
    """Both get the observations that are true now."""
    seen = seen_by(truth)
    seen = seen + noise * torch.randn(seen.shape, generator=generator(seed), dtype=torch.float64)
    for p in (problem, truth):
        p.observations = seen.to(p.observations.dtype)


def shared_intrinsics(problem: Problem, truth: Problem, noise: float) -> None:
    """Makes all cameras have the first one's, and observes again."""
    first = rotation_columns(problem) + 3
    for p in (problem, truth):
        p.cameras[:, first:] = p.cameras[:1, first:].clone()
    observe_again(problem, truth, noise)
    problem.share_intrinsics()


def scene(cameras: int = 5, points: int = 25, *, kind: str = "ring", **options: Any) -> tuple[Problem, Problem]:
    """Every camera sees every point, unless said otherwise."""
    return generate(kind, cameras, points, options.pop("observations", cameras * points), **options)


def as_quaternions(problem: Problem) -> Problem:
    if problem.cameras.shape[1] > problem.num_parameters:
        return problem
    w = problem.cameras[:, :3].double()
    angle = w.norm(dim=1, keepdim=True)
    q = torch.cat([(angle / 2).cos(), (angle / 2).sin() * w / angle], 1)
    return replace(problem, cameras=torch.cat([q.to(w.dtype), problem.cameras[:, 3:]], 1).to(problem.cameras.dtype))


def as_vectors(problem: Problem) -> Problem:
    if problem.cameras.shape[1] == problem.num_parameters:
        return problem
    q = problem.cameras[:, :4].double()
    q = torch.where(q[:, :1] < 0, -q, q)
    sine = q[:, 1:].norm(dim=1, keepdim=True)
    w = 2 * torch.atan2(sine, q[:, :1]) * q[:, 1:] / sine
    return replace(problem, cameras=torch.cat([w.to(problem.cameras.dtype), problem.cameras[:, 4:]], 1))


def similarity(moved: Tensor, to: Tensor) -> tuple[float, Tensor, Tensor]:
    """Scale, rotation and shift that bring points [N, 3] nearest to others (Umeyama, 1991)."""
    a, b = moved.mean(0), to.mean(0)
    u, s, vt = torch.linalg.svd((to - b).T @ (moved - a))
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.linalg.det(u @ vt))
    scale = float((s * sign).sum() / (moved - a).square().sum())
    rotation = u @ sign.diag() @ vt
    return scale, rotation, b - scale * rotation @ a


def away(found: Problem, truth: Problem, aligned: bool = True) -> float:
    """Root mean square distance of points and centres from the true ones, up to a similarity, relative to the scene."""
    a, b = (torch.cat([p.points.double(), centres(p)]) for p in (found, truth))
    if aligned:
        scale, rotation, shift = similarity(a, b)
        a = scale * a @ rotation.T + shift
    return float((a - b).square().sum(1).mean().sqrt() / (b - b.mean(0)).square().sum(1).mean().sqrt())


# Dense solutions -----------------------------------------------------------------------------------------------------


class Dense:
    """The whole normal equations of a problem, from ba_jacobian alone."""

    def __init__(self, problem: Problem, loss: str = "trivial", loss_scale: float = 1.0, position_weight: float = 1.0):
        self.problem, self.loss, self.loss_scale, self.weight = problem, loss, loss_scale, position_weight
        r, of_camera, of_point, _ = effk.ba.jacobian(*given(problem), problem.depth, model=problem.model)
        count, rows = r.shape
        with_loss = 3 if problem.model == "position" else 2
        rho, factor = robust(loss, loss_scale, r[:, :with_loss].square().sum(1))
        weight = torch.ones_like(r)
        weight[:, :with_loss] = factor[:, None]
        self.cost = float(0.5 * rho.sum() + 0.5 * r[:, with_loss:].square().sum())
        self.cost += cost_of_positions(problem, position_weight)
        self.n, self.cameras, self.points = problem.num_parameters, len(problem.cameras), len(problem.points)
        split = self.cameras * self.n
        j = torch.zeros(count, rows, split + 3 * self.points, dtype=torch.float64)
        for o in range(count):
            c, p = int(problem.camera_index[o]), int(problem.point_index[o])
            j[o, :, c * self.n : (c + 1) * self.n] += weight[o, :, None] * of_camera[o]
            j[o, :, split + 3 * p : split + 3 * p + 3] += weight[o, :, None] * of_point[o]
        self.j, self.r = j.flatten(0, 1), (weight * r).flatten()
        if problem.positions is not None:
            known = problem.positions.isnan().logical_not().all(1).nonzero().flatten()
            first = rotation_columns(problem)
            back = -matrix_of(problem.cameras[known, :first]).mT
            rows = torch.zeros(len(known), 3, self.j.shape[1], dtype=torch.float64)
            of_rotation = back @ skew(problem.cameras[known, first : first + 3])
            for i, c in enumerate(known.tolist()):
                rows[i, :, c * self.n : c * self.n + 6] = position_weight * torch.cat([of_rotation[i], back[i]], 1)
            self.j = torch.cat([self.j, rows.flatten(0, 1)])
            off = position_weight * (centres(problem) - problem.positions)[known]
            self.r = torch.cat([self.r, off.flatten()])
        # Columns of free parameters; those of the same number are one.
        columns = torch.arange(split) if problem.columns is None else problem.columns.flatten().long()
        size = int(columns.max()) + 1 if len(columns) else 0
        self.free = torch.zeros(split + 3 * self.points, size + 3 * self.points, dtype=torch.float64)
        at = (columns >= 0).nonzero().flatten()
        self.free[at, columns[at]] = 1.0
        moves = torch.ones(self.points, dtype=torch.bool) if problem.fixed_points is None else ~problem.fixed_points
        at = moves.repeat_interleave(3).nonzero().flatten()
        self.free[split + at, size + at] = 1.0
        self.j = self.j @ self.free

    @property
    def gradient(self) -> Tensor:
        return self.j.T @ self.r

    @property
    def diagonal(self) -> Tensor:
        return self.j.square().sum(0).clamp(min=MIN_DIAGONAL)

    def step(self, radius: float) -> Tensor:
        matrix = self.j.T @ self.j + (self.diagonal / radius).diag()
        # A point or camera that isn't free has a column of zeros, damped.
        return -torch.linalg.solve(matrix, self.gradient)

    def promised(self, step: Tensor) -> float:
        after = self.r + self.j @ step
        return 0.5 * float(self.r @ self.r - after @ after)

    def moved(self, step: Tensor) -> tuple[Tensor, Tensor, float]:
        """Cameras and points after a step, and its norm in all tangents."""
        whole = self.free @ step
        split = self.cameras * self.n
        of_cameras, of_points = whole[:split].view(self.cameras, self.n), whole[split:].view(self.points, 3)
        p = self.problem
        cameras, points = effk.ba.ops.ba_retract(p.cameras, p.points, of_cameras, of_points, model=p.model)
        return cameras, points, float(whole.norm())

    def iteration(self, row: Iteration, rejected: int) -> tuple[Iteration, int]:
        """What Levenberg-Marquardt does next from a row of the history, after so many rejected steps in a row."""
        step = self.step(row.radius)
        cameras, points, norm = self.moved(step)
        trial = replace(self.problem, cameras=cameras, points=points)
        new = cost_of(trial, loss=self.loss, loss_scale=self.loss_scale) + cost_of_positions(trial, self.weight)
        quality = (self.cost - new) / self.promised(step)
        if quality > 1e-3 and math.isfinite(new):
            radius = row.radius / max(1 / 3, 1 - (2 * quality - 1) ** 3)
            return row._replace(cost=new, change=self.cost - new, step=norm, radius=min(radius, 1e16)), 0
        return row._replace(change=self.cost - new, step=norm, radius=row.radius / 2 ** (rejected + 1)), rejected + 1


def scipy_minimum(
    problem: Problem,
    *,
    loss: str = "trivial",
    loss_scale: float = 1.0,
    position_weight: float = 1.0,
    columns: Tensor,
) -> float:
    """The least cost that scipy finds from where the problem is, by differences, without a loss of its own.

    Its parameters are the problem's numbers: points, and of the cameras' those that `columns`, shaped as cameras,
    names from 0 on, which may be the same for several.
    """
    optimize = pytest.importorskip("scipy.optimize")
    columns = columns.flatten()
    known = None
    if problem.positions is not None:
        known = torch.where(problem.positions.isnan().any(1, keepdim=True), math.nan, problem.positions)
    first = torch.stack([(columns == i).nonzero()[0, 0] for i in range(int(columns.max()) + 1)])
    count = len(first)

    def rows(x: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(x)
        trial = replace(
            problem,
            cameras=torch.where(columns < 0, problem.cameras.flatten(), flat[columns.clamp(min=0)]).view_as(
                problem.cameras
            ),
            points=flat[count:].view_as(problem.points),
        )
        r, _ = effk.ba.residual(*given(trial), problem.depth, model=problem.model)
        with_loss = 3 if problem.model == "position" else 2
        s = r[:, :with_loss].square().sum(1)
        # Rows whose squares add up to the loss.
        factor = torch.where(s > 0, (robust(loss, loss_scale, s)[0] / s.clamp(min=1e-300)).sqrt(), 1.0)
        found = [(factor[:, None] * r[:, :with_loss]).flatten(), r[:, with_loss:].flatten()]
        if known is not None:
            found.append((position_weight * (centres(trial) - known)).nan_to_num(0.0).flatten())
        return torch.cat(found).numpy()

    start = torch.cat([problem.cameras.flatten()[first], problem.points.flatten()]).numpy()
    best = optimize.least_squares(rows, start, method="trf", x_scale="jac", ftol=1e-13, xtol=1e-13, gtol=1e-12)
    return float(best.cost)
