"""Levenberg-Marquardt over the steps of ops.py: what ba_solve, gp_solve and `effk.ba.solve` run, on any device.

The rules are Ceres Solver's (Agarwal, Mierle and others): the trust region's radius grows by how well the linear model
foretold the change of the true cost, robust loss included; a rejected step shrinks it, and nothing else of the damping.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_tensor
from . import reference
from .reference import check_damping, check_indices, check_loss, check_problem, check_step, parameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .multifrontal import SparseCholesky

MIN_RELATIVE_DECREASE = 1e-3  # of an accepted step: true change over foretold change
MAX_RADIUS, MIN_RADIUS = 1e16, 1e-32
MAX_FAILURES = 5  # steps in a row that can't be computed
# What auto goes by: free camera parameters for a dense factor and operations for a sparse one; cameras, and entries of
# blocks, for either.
MOST_DENSE, MOST_SPARSE, MOST_ENTRIES, MOST_FLOPS = 1500, 1 << 13, 2 * 10**7, 1e11
MOST_ITERATIONS = 10**6  # each is a row of the history

Step = tuple[Tensor, int]  # of the cameras [C, n], and the linear solver's iterations


class Iteration(NamedTuple):
    """One row of a solve's history; of a rejected step, cost is that before it."""

    cost: float
    change: float  # of the cost by the step; of a rejected step, what it would have been
    gradient: float  # largest absolute entry; where the step ends the solve, that of before it
    step: float  # norm
    radius: float  # of the trust region, after the step
    linear_iterations: int
    seconds: float  # since the start


COLUMNS = len(Iteration._fields) - 1  # of an op's result: all but the seconds, so that it is the same each time


@dataclass(frozen=True)
class Options:
    """Of a solve; see `ba_solve`."""

    model: str = "snavely"
    loss: str = "trivial"
    loss_scale: float = 1.0
    depth_weight: float = 1.0
    position_weight: float = 1.0
    max_iterations: int = 100
    function_tolerance: float = 1e-6
    gradient_tolerance: float = 1e-10
    parameter_tolerance: float = 1e-8
    max_seconds: float | None = None
    initial_radius: float = 1e4
    linear_solver: str = "auto"
    linear_tolerance: float = 0.1
    max_linear_iterations: int = 500


# --- Camera parameters that are fixed or tied -------------------------------------------------------------------------


class Columns:
    """The free parameters among the entries of all cameras' tangents: x[c, i] = free[columns[c, i]], 0 for -1."""

    def __init__(self, columns: Tensor | None, cameras: int, n: int):
        self.shape = cameras, n
        if columns is None:
            self.index = None
            self.count = cameras * n
        else:
            flat = columns.reshape(-1).long()
            free = flat >= 0
            numbers, dense = flat[free].unique(return_inverse=True)  # there may be gaps
            self.count = numbers.numel()
            self.index = torch.full_like(flat, self.count)  # one place more, for the fixed ones
            self.index[free] = dense

    def cameras(self, device: torch.device) -> Tensor:
        """Numbers of those that have free parameters, ascending."""
        return (self.numbers(device) < self.count).any(1).nonzero().squeeze(1)

    def numbers(self, device: torch.device) -> Tensor:
        """[C, n] int64 of free parameters; `count` for those that aren't."""
        index = torch.arange(self.count, device=device) if self.index is None else self.index
        return index.reshape(self.shape)

    def fold(self, x: Tensor) -> Tensor:
        """Sums of [C, n] by free parameter."""
        if self.index is None:
            return x.reshape(-1)
        return x.new_zeros(self.count + 1).index_add_(0, self.index, x.reshape(-1))[:-1]

    def spread(self, free: Tensor) -> Tensor:
        """[C, n] of free parameters; the opposite way."""
        if self.index is None:
            return free.reshape(self.shape)
        return torch.cat([free, free.new_zeros(1)])[self.index].reshape(self.shape)


# --- Positions of cameras that are known beforehand -------------------------------------------------------------------


def rotations(cameras: Tensor, n: int) -> Tensor:
    """Rotation matrices [C, 3, 3] float64."""
    turn = reference.parts(cameras, n)[0]
    return reference.rotate(turn[:, None].expand(-1, 3, -1), torch.eye(3).to(turn).expand(len(turn), -1, -1)).mT


class PositionPrior:
    """weight (centre - known centre) of each camera whose known centre isn't NaN."""

    def __init__(self, positions: Tensor, weight: float, n: int):
        self.positions = positions.double()
        self.weights = torch.where(self.positions.isnan().any(1), 0.0, self.positions.new_tensor(weight))[:, None]
        self.n = n

    def residual(self, cameras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[C, 3], and rotations and translations."""
        turn, translation = rotations(cameras, self.n), reference.parts(cameras, self.n)[1]
        centre = -(turn.mT @ translation[..., None]).squeeze(-1)
        return self.weights * torch.nan_to_num(centre - self.positions), turn, translation

    def cost(self, cameras: Tensor) -> Tensor:
        return 0.5 * self.residual(cameras)[0].square().sum()

    def linearize(self, cameras: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [C, 3] and Jacobian [C, 3, 6]."""
        residual, turn, translation = self.residual(cameras)
        x, y, z = translation.unbind(1)
        o = torch.zeros_like(x)
        cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))
        jacobian = torch.cat([-turn.mT @ cross, -turn.mT], -1)
        return residual, self.weights[..., None] * jacobian


# --- Linear systems ---------------------------------------------------------------------------------------------------


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, int]:
    """Solves product(x) = rhs until the last step's share of the quadratic model's decrease, times the number of steps,
    is below `tolerance` (Nash and Sofer, 1990): a residual's norm says little about that."""
    x = torch.zeros_like(rhs)
    residual, direction, before, model = rhs, torch.zeros_like(rhs), 1.0, 0.0
    for i in range(1, max_iterations + 1):
        z = precondition(residual)
        now = float(residual @ z)
        if not now > 0 or not math.isfinite(now):
            return x, i - 1
        direction = z + (now / before) * direction
        of_direction = product(direction)
        curvature = float(direction @ of_direction)
        if not curvature > 0 or not math.isfinite(curvature):
            return x, i - 1
        step = now / curvature
        x = x + step * direction
        residual = residual - step * of_direction
        decrease = float(x @ (rhs + residual))
        if i * (decrease - model) < tolerance * decrease:
            return x, i
        before, model = now, decrease
    return x, max_iterations


class Linearized(NamedTuple):
    """What ba_schur gives, prior included."""

    blocks: Tensor
    rhs: Tensor
    gradient: Tensor
    diagonal: Tensor
    point_gradient: float
    cost: float


class Solver:
    """The reduced system of cameras: what it needs of ba_schur, and its solution."""

    name: str
    pairs: Tensor | None = None

    def __init__(self, steps: Steps):
        pass

    def solve(self, steps: Steps, lin: Linearized, damping: Tensor, radius: float) -> Step:
        raise NotImplementedError


class Entries:
    """Where the numbers of the blocks go in the reduced matrix of free parameters.

    Attributes:
        source: which numbers of the blocks count.
        rows, columns: of each, in either triangle; those for one place are added up.
    """

    def __init__(self, pairs: Tensor, numbers: Tensor, count: int):
        n = numbers.shape[1]
        row, column = (numbers[c] for c in pairs.unbind(1))
        row, column = row[:, :, None].expand(-1, n, n), column[:, None, :].expand(-1, n, n)
        on_diagonal = (pairs[:, 0] == pairs[:, 1])[:, None, None]
        # Of a block on the diagonal both triangles are there; of others the one above it isn't.
        kept = (row < count) & (column < count) & ~(on_diagonal & (row < column))
        twice = ((row == column) & ~on_diagonal & kept).reshape(-1).nonzero().squeeze(1)
        self.twice = twice if twice.numel() else None  # what ties bring to the diagonal
        self.source = kept.reshape(-1).nonzero().squeeze(1)
        self.rows, self.columns = row[kept], column[kept]

    def values(self, blocks: Tensor) -> Tensor:
        """All numbers of the blocks, of which `source` tells."""
        values = blocks.reshape(-1)
        return values if self.twice is None else values.index_add(0, self.twice, values[self.twice])


class DenseSchur(Solver):
    """The whole reduced matrix and its Cholesky factor."""

    name = "dense_schur"

    def __init__(self, steps: Steps):
        free = steps.columns.cameras(steps.cameras.device)
        lower = torch.tril_indices(len(free), len(free), device=free.device)
        self.pairs: Tensor = free[lower.T.contiguous()]
        size = steps.columns.count
        entries = Entries(self.pairs, steps.columns.numbers(free.device), size)
        self.entries = entries
        self.place = torch.maximum(entries.rows, entries.columns) * size + torch.minimum(entries.rows, entries.columns)

    def solve(self, steps: Steps, lin: Linearized, damping: Tensor, radius: float) -> Step:
        matrix = lin.blocks.new_zeros(len(damping), len(damping))  # of which Cholesky takes the lower triangle
        matrix.view(-1).index_add_(0, self.place, self.entries.values(lin.blocks)[self.entries.source])
        matrix.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            return torch.full_like(lin.rhs, math.nan), 1
        solution = torch.cholesky_solve(steps.columns.fold(lin.rhs)[:, None], factor).squeeze(1)
        return steps.columns.spread(solution), 1


class SparseSchur(Solver):
    """The reduced matrix where two cameras see a point in common, and its sparse Cholesky factor."""

    name = "sparse_schur"

    def __init__(self, steps: Steps):
        device, count = steps.cameras.device, steps.cameras.shape[0]
        self.size, self.numbers = steps.columns.count, steps.columns.numbers(device)
        self.free = steps.columns.cameras(device)
        self.pairs: Tensor = covisible(steps.camera_index, steps.point_index, count, self.free, steps.group)

    @cached_property
    def plan(self) -> tuple[list[tuple[Any, int]], float]:
        """Free parameters by parts of the cameras, and at most how many operations a factor takes.

        Parameters that cameras share are the last part, which all others reach.
        """
        import numpy as np  # here, so that ops are there without it

        from .multifrontal import Graph, dissect, flops

        free, pairs = self.free.cpu().numpy(), self.pairs.cpu().numpy()
        of_free = np.zeros(self.numbers.shape[0], np.int64)
        of_free[free] = np.arange(free.size)
        edges, numbers = of_free[pairs], self.numbers.cpu().numpy()[free]
        places = np.where(numbers < self.size, numbers, -1)
        uses = np.zeros(self.size, np.int64)
        for camera in places:
            uses[np.unique(camera[camera >= 0])] += 1
        own = [np.unique(camera[camera >= 0]) for camera in places]
        own = [camera[uses[camera] == 1] for camera in own]
        shared = np.flatnonzero(uses > 1)
        of_cameras = dissect(Graph(edges, free.size), free.size)
        work = flops(edges, of_cameras, np.array([camera.size for camera in own], np.int64), shared.size)
        parts = [(np.concatenate([own[c] for c in nodes]) if nodes.size else nodes, p) for nodes, p in of_cameras]
        if shared.size:
            parts = [(part, parent if parent >= 0 else len(parts)) for part, parent in parts]
            parts.append((shared, -1))
        return parts, work

    @cached_property
    def entries(self) -> Entries:
        return Entries(self.pairs, self.numbers.int(), self.size)

    @cached_property
    def cholesky(self) -> SparseCholesky:
        from .multifrontal import SparseCholesky

        e = self.entries
        return SparseCholesky(e.source.int(), e.rows, e.columns, self.plan[0], self.size)

    def solve(self, steps: Steps, lin: Linearized, damping: Tensor, radius: float) -> Step:
        if not self.cholesky.factorize(self.entries.values(lin.blocks), damping):
            return torch.full_like(lin.rhs, math.nan), 1
        return steps.columns.spread(self.cholesky.solve(steps.columns.fold(lin.rhs))), 1


def covisible(
    camera_index: Tensor,
    point_index: Tensor,
    cameras: int,
    free: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """[B, 2] int64: the cameras (a, b), a >= b, that see a point in common, ascending; each with itself, too.

    Args:
        camera_index, point_index: ascending by point and then by camera.
        free: numbers of the cameras that count; all by default.
    """
    camera, point = camera_index.long(), point_index
    counts = torch.full((cameras,), free is None, device=camera.device)
    if free is not None:
        counts[free] = True
    first = torch.ones_like(camera, dtype=torch.bool)  # of a camera that sees a point more than once
    first[1:] = (camera[1:] != camera[:-1]) | (point[1:] != point[:-1])
    first &= counts[camera]
    camera, point = camera[first], point[first]
    together = counts.diag()
    at, apart = torch.arange(len(camera), device=camera.device), 0
    while at.numel():
        apart += 1
        at = at[at < len(camera) - apart]
        at = at[point[at + apart] == point[at]]
        together[camera[at + apart], camera[at]] = True
    if group is not None:
        bits = together.to(torch.uint8)
        torch.distributed.all_reduce(bits, torch.distributed.ReduceOp.MAX, group=group)
        together = bits > 0
    return together.nonzero()


class IterativeSchur(Solver):
    """Conjugate gradients with products of the reduced matrix, which is never made; its diagonal blocks help."""

    name = "iterative_schur"

    def solve(self, steps: Steps, lin: Linearized, damping: Tensor, radius: float) -> Step:
        columns = steps.columns
        blocks = lin.blocks + torch.diag_embed(columns.spread(damping))
        # A camera without observations, or with fixed parameters only, may have none to invert.
        factors, info = torch.linalg.cholesky_ex(blocks)
        factors = torch.where((info == 0)[:, None, None], factors, torch.eye(lin.rhs.shape[1]).to(factors))

        def precondition(x: Tensor) -> Tensor:
            return columns.fold(torch.cholesky_solve(columns.spread(x)[..., None], factors).squeeze(-1))

        def product(x: Tensor) -> Tensor:
            return columns.fold(steps.product(columns.spread(x), radius)) + damping * x

        o = steps.options
        x, iterations = conjugate_gradients(
            product, columns.fold(lin.rhs), precondition, o.linear_tolerance, o.max_linear_iterations
        )
        return columns.spread(x), iterations


SOLVERS: dict[str, type[Solver]] = {solver.name: solver for solver in (DenseSchur, SparseSchur, IterativeSchur)}


# --- The steps of an iteration ----------------------------------------------------------------------------------------


class Steps:
    """A problem sorted by points, and the ops on it; sums go over all ranks of a group."""

    def __init__(
        self,
        cameras: Tensor,
        points: Tensor,
        observations: Tensor,
        camera_index: Tensor,
        point_index: Tensor,
        depth: Tensor | None,
        fixed_points: Tensor | None,
        columns: Tensor | None,
        positions: Tensor | None,
        options: Options,
        group: ProcessGroup | None = None,
        op: str = "ba_solve",
    ):
        self.options, self.group, self.op = options, group, op
        self.state = cameras.contiguous(), points.contiguous()
        self._check_ranks()
        order = _sorted(camera_index, point_index, cameras.shape[0])
        self.observations, self.depth = observations, depth
        self.camera_index, self.point_index = camera_index.int(), point_index.int()
        self.order = order
        if order is not None:
            self.observations, self.camera_index = observations[order], self.camera_index[order]
            self.point_index = self.point_index[order]
            self.depth = None if depth is None else depth[order]
        self.fixed_points = fixed_points
        self.n = parameters(options.model)
        self.columns = Columns(columns, cameras.shape[0], self.n)
        self.prior = None if positions is None else PositionPrior(positions, options.position_weight, self.n)
        self.settings = {
            "model": options.model,
            "loss": options.loss,
            "loss_scale": options.loss_scale,
            "depth_weight": options.depth_weight,
        }

    @property
    def cameras(self) -> Tensor:
        return self.state[0]

    @property
    def points(self) -> Tensor:
        return self.state[1]

    @property
    def problem(self) -> tuple[Tensor, ...]:
        return self.cameras, self.points, self.observations, self.camera_index, self.point_index

    def _sum(self, *tensors: Tensor) -> None:
        if self.group is not None:
            for t in tensors:
                torch.distributed.all_reduce(t, group=self.group)

    def agree(self, *flags: bool) -> list[bool]:
        """What is true on any rank."""
        if self.group is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32, device=self.cameras.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in found.tolist()]

    def _check_ranks(self) -> None:
        """That all begin with the same cameras; otherwise sums would mix different places."""
        if self.group is None:
            return
        first = self.cameras.clone()
        torch.distributed.broadcast(first, torch.distributed.get_global_rank(self.group, 0), group=self.group)
        (differ,) = self.agree(not torch.equal(first, self.cameras))
        if differ:
            raise RuntimeError(f"effk::{self.op}: cameras differ between the ranks of the group; wanted the same")

    def cost(self, cameras: Tensor, points: Tensor) -> float:
        rest = self.observations, self.camera_index, self.point_index, self.depth
        cost = torch.ops.effk.ba_cost(cameras, points, *rest, **self.settings)
        self._sum(cost)
        return float(cost) + (0.0 if self.prior is None else float(self.prior.cost(cameras)))

    def linearize(self, pairs: Tensor | None, radius: float) -> Linearized:
        blocks, rhs, gradient, diagonal, most, cost = torch.ops.effk.ba_schur(
            *self.problem, pairs, self.depth, self.fixed_points, **self.settings, radius=radius
        )
        self._sum(blocks, rhs, gradient, diagonal, cost)
        if self.group is not None:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
        if self.prior is not None:
            residual, jacobian = self.prior.linearize(self.cameras)
            own = (jacobian.mT @ residual[..., None]).squeeze(-1)
            self.prior_blocks = jacobian.mT @ jacobian
            padded = torch.nn.functional.pad(self.prior_blocks, (0, self.n - 6, 0, self.n - 6))
            if pairs is None:
                blocks += padded
            else:
                place = torch.nonzero(pairs[:, 0] == pairs[:, 1]).squeeze(1)
                blocks[place] += padded[pairs[place, 0]]
            gradient[:, :6] += own
            rhs[:, :6] -= own
            diagonal += padded.diagonal(dim1=1, dim2=2)
            cost = cost + 0.5 * residual.square().sum()
        return Linearized(blocks, rhs, gradient, diagonal, float(most), float(cost))

    def product(self, x: Tensor, radius: float) -> Tensor:
        y: Tensor = torch.ops.effk.ba_schur_mv(
            *self.problem, x, self.depth, self.fixed_points, **self.settings, radius=radius
        )
        self._sum(y)
        if self.prior is not None:
            y[:, :6] += (self.prior_blocks @ x[:, :6, None]).squeeze(-1)
        return y

    def backsubstitute(self, step: Tensor, radius: float) -> tuple[Tensor, float]:
        """Steps of the points, and the decrease of the cost that the linear model promises."""
        point_step, change = torch.ops.effk.ba_backsubstitute(
            *self.problem, step, self.depth, self.fixed_points, **self.settings, radius=radius
        )
        self._sum(change)
        promised = float(change)
        if self.prior is not None:
            residual, jacobian = self.prior.linearize(self.cameras)
            after = residual + (jacobian @ step[:, :6, None]).squeeze(-1)
            promised += 0.5 * float((residual.square() - after.square()).sum())
        return point_step, promised

    def retract(self, camera_step: Tensor, point_step: Tensor) -> tuple[Tensor, Tensor]:
        cameras, points = torch.ops.effk.ba_retract(
            self.cameras, self.points, camera_step, point_step, model=self.options.model
        )
        if self.n > 3:
            # A rotation that is fixed, or of a camera that sees nothing, keeps its bits: it isn't written anew.
            still = (camera_step[:, :3] == 0).all(1)
            numbers = slice(cameras.shape[1] - self.n + 3)
            cameras[:, numbers] = torch.where(still[:, None], self.cameras[:, numbers], cameras[:, numbers])
        return cameras, points

    def what_is_not_finite(self) -> str:
        """Why there is no cost at the start, of finite numbers."""
        residual, _ = torch.ops.effk.ba_residual(
            *self.problem, self.depth, model=self.options.model, depth_weight=self.options.depth_weight
        )
        bad = (~residual.isfinite()).any(1).nonzero()
        (any_bad,) = self.agree(bool(bad.numel()))
        if not bad.numel():
            if any_bad:
                return "residuals of another rank of the group aren't finite"
            return "the cost at the start is too large for float64, or its derivatives are"
        camera, point = int(self.camera_index[bad[0]]), int(self.point_index[bad[0]])
        return f"camera {camera} can't see point {point}, which is in its plane or overflows; wanted finite residuals"

    def norm(self, cameras: Tensor, points: Tensor) -> float:
        """Of all parameters, the points of all ranks."""
        square = torch.linalg.vector_norm(points, dtype=torch.float64) ** 2
        self._sum(square)
        return math.hypot(math.sqrt(float(square)), float(torch.linalg.vector_norm(cameras, dtype=torch.float64)))


def _sorted(camera_index: Tensor, point_index: Tensor, cameras: int) -> Tensor | None:
    """The order by point and then camera; None if that is the order there is."""
    key = point_index.long() * max(cameras, 1) + camera_index
    return None if bool((key[1:] >= key[:-1]).all()) else torch.argsort(key, stable=True)


def choose(steps: Steps) -> Solver:
    """The linear solver for a problem: dense for few cameras, sparse where that is cheap, iterative for the rest."""
    if steps.cameras.shape[0] <= MOST_SPARSE:
        width = len(steps.columns.cameras(steps.cameras.device)) * steps.n
        if steps.columns.count <= MOST_DENSE and width**2 / 2 <= MOST_ENTRIES:
            return DenseSchur(steps)
        sparse = SparseSchur(steps)
        if len(sparse.pairs) * steps.n**2 <= MOST_ENTRIES and sparse.plan[1] <= MOST_FLOPS:
            return sparse
    return IterativeSchur(steps)


class Result(NamedTuple):
    history: list[Iteration]
    termination: str
    linear_solver: str
    free_parameters: int  # of cameras


def minimize(
    cameras: Tensor,
    points: Tensor,
    steps: Steps,
    callback: Callable[[Iteration], bool | None] | None = None,
) -> Result:
    """Levenberg-Marquardt. `cameras` and `points` get each accepted step, and are whole whenever this is interrupted.

    Args:
        callback: of each iteration, the first being the start; True ends the solve.
    """
    start = time.perf_counter()
    o = steps.options
    solver = choose(steps) if o.linear_solver == "auto" else SOLVERS[o.linear_solver](steps)
    radius, shrink, failures = o.initial_radius, 2.0, 0
    history: list[Iteration] = []

    def note(cost: float, change: float, gradient: float, step: float, linear_iterations: int) -> str:
        seconds = time.perf_counter() - start
        row = Iteration(cost, change, gradient, step, radius, linear_iterations, seconds)
        history.append(row)
        stopped = callback is not None and bool(callback(row))
        over = o.max_seconds is not None and seconds >= o.max_seconds
        stopped, over = steps.agree(stopped, over)
        return "stopped by the callback" if stopped else f"max_seconds ({o.max_seconds:g}) is over" if over else ""

    lin = steps.linearize(solver.pairs, radius)
    # Some losses are finite of infinite residuals; their gradients aren't. A rhs that isn't may be with less radius.
    if not math.isfinite(lin.cost + lin.point_gradient + float(lin.gradient.abs().sum())):
        raise RuntimeError(f"effk::{steps.op}: {steps.what_is_not_finite()}")
    cost = lin.cost
    gradient = _largest(steps, lin)
    ended = note(cost, 0.0, gradient, 0.0, 0)
    while not ended:
        if gradient <= o.gradient_tolerance:
            ended = f"gradient_tolerance: the largest entry is {gradient:.2e}"
            break
        if len(history) > o.max_iterations:
            ended = f"max_iterations ({o.max_iterations}) is reached"
            break
        damping = steps.columns.fold(lin.diagonal).clamp_min(reference.MIN_DIAGONAL) / radius
        camera_step, linear_iterations = solver.solve(steps, lin, damping, radius)
        point_step, promised = steps.backsubstitute(camera_step, radius)
        new_cameras, new_points = steps.retract(camera_step, point_step)
        new_cost = steps.cost(new_cameras, new_points)
        step = steps.norm(camera_step, point_step)
        change = cost - new_cost
        valid = promised > 0 and math.isfinite(new_cost) and math.isfinite(step)
        failures = 0 if valid else failures + 1
        quality = change / promised if valid else -1.0
        if valid and step <= o.parameter_tolerance * (steps.norm(steps.cameras, steps.points) + o.parameter_tolerance):
            ended = f"parameter_tolerance: the step's norm is {step:.2e}"
        elif valid and abs(change) <= o.function_tolerance * cost:
            ended = f"function_tolerance: the relative change is {abs(change) / cost if cost else 0.0:.2e}"
        if quality > MIN_RELATIVE_DECREASE:
            steps.state = new_cameras, new_points
            cameras.copy_(new_cameras)
            points.copy_(new_points)
            cost = new_cost
            radius = min(MAX_RADIUS, radius / max(1 / 3, 1 - (2 * quality - 1) ** 3))
            shrink = 2.0
        else:
            radius /= shrink
            shrink *= 2
            if failures >= MAX_FAILURES:
                ended = ended or f"failure: {failures} steps in a row couldn't be computed"
            elif radius < MIN_RADIUS:
                ended = ended or "failure: the trust region vanished"
        if not ended:
            # After a rejected step the same place, with its points damped otherwise.
            lin = steps.linearize(solver.pairs, radius)
            gradient = _largest(steps, lin)
        said = note(cost, change, gradient, step, linear_iterations)
        ended = ended or said
    return Result(history, ended, solver.name, steps.columns.count)


def _largest(steps: Steps, lin: Linearized) -> float:
    of_cameras = steps.columns.fold(lin.gradient)
    return max(lin.point_gradient, float(of_cameras.abs().max()) if of_cameras.numel() else 0.0)


# --- The ops ----------------------------------------------------------------------------------------------------------


def check_pcg(
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    rhs: Tensor,
    inverse: Tensor,
    damping: Tensor,
    depth: Tensor | None,
    fixed_points: Tensor | None,
    model: str,
    loss: str,
    loss_scale: float,
    depth_weight: float,
    radius: float,
    tolerance: float,
    max_iterations: int,
) -> None:
    op = "ba_pcg"
    n, _ = check_problem(op, cameras, points, observations, camera_index, point_index, depth, model, depth_weight)
    check_loss(op, loss, loss_scale)
    check_damping(op, fixed_points, points, radius)
    count = cameras.shape[0]
    for name, tensor in (("rhs", rhs), ("damping", damping)):
        check_step(op, name, tensor, count, n, cameras)
    check_tensor(op, "inverse", inverse, (torch.float64,), (count, n, n), cameras)
    _check_from_0(op, "tolerance", tolerance)
    _check_from_0(op, "max_iterations", max_iterations)


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
    radius: float = 10000.0,
    tolerance: float = 0.1,
    max_iterations: int = 500,
) -> tuple[Tensor, Tensor]:
    problem = cameras, points, observations, camera_index, point_index
    settings: dict[str, Any] = {
        "model": model,
        "loss": loss,
        "loss_scale": loss_scale,
        "depth_weight": depth_weight,
        "radius": radius,
    }
    systems = rhs, inverse, damping, depth, fixed_points
    check_pcg(*problem, *systems, **settings, tolerance=tolerance, max_iterations=max_iterations)

    def product(x: Tensor) -> Tensor:
        x = x.reshape(rhs.shape)
        return (torch.ops.effk.ba_schur_mv(*problem, x, depth, fixed_points, **settings) + damping * x).reshape(-1)

    def precondition(x: Tensor) -> Tensor:
        return (inverse @ x.reshape(*rhs.shape, 1)).reshape(-1)

    step, iterations = conjugate_gradients(product, rhs.reshape(-1), precondition, tolerance, max_iterations)
    return step.reshape(rhs.shape), torch.tensor(iterations, device=rhs.device)


def check_solve(
    op: str,
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None,
    fixed_points: Tensor | None,
    columns: Tensor | None,
    positions: Tensor | None,
    options: Options,
) -> None:
    o = options
    n, _ = check_problem(op, cameras, points, observations, camera_index, point_index, depth, o.model, o.depth_weight)
    check_loss(op, o.loss, o.loss_scale)
    square = o.loss_scale * o.loss_scale
    torch._check(
        0 < square < math.inf,
        lambda: f"effk::{op}: loss_scale is {o.loss_scale}, its square {square}; wanted neither 0 nor infinity",
    )
    check_damping(op, fixed_points, points, 1.0)
    torch._check(o.initial_radius > 0, lambda: f"effk::{op}: initial_radius is {o.initial_radius}; wanted more than 0")
    count = cameras.shape[0]
    if columns is not None:
        check_tensor(op, "columns", columns, (torch.int32, torch.int64), (count, n), cameras)
    if positions is not None:
        torch._check(
            o.model != "position", lambda: f"effk::{op}: positions is given with model 'position'; wanted none"
        )
        check_tensor(op, "positions", positions, (cameras.dtype,), (count, 3), cameras)
    for name in (
        "position_weight",
        "max_iterations",
        "function_tolerance",
        "gradient_tolerance",
        "parameter_tolerance",
        "linear_tolerance",
        "max_linear_iterations",
    ):
        _check_from_0(op, name, getattr(o, name))
    torch._check(
        o.max_iterations <= MOST_ITERATIONS,
        lambda: f"effk::{op}: max_iterations is {o.max_iterations}; wanted at most {MOST_ITERATIONS}",
    )
    if o.max_seconds is not None:
        _check_from_0(op, "max_seconds", o.max_seconds)
    names = ("auto", *SOLVERS)
    torch._check(
        o.linear_solver in names,
        lambda: f"effk::{op}: linear_solver is {o.linear_solver!r}; wanted one of {', '.join(names)}",
    )
    torch._check(
        count <= MOST_SPARSE or SOLVERS.get(o.linear_solver, IterativeSchur) is IterativeSchur,
        lambda: (
            f"effk::{op}: linear_solver is {o.linear_solver!r} with {count} cameras; wanted at most {MOST_SPARSE}, "
            "or iterative_schur"
        ),
    )


def _check_from_0(op: str, name: str, value: float) -> None:
    torch._check(0 <= value < math.inf, lambda: f"effk::{op}: {name} is {value}; wanted a number from 0 on")


def check_finite(op: str, cameras: Tensor, points: Tensor, observations: Tensor) -> None:
    for name, t in (("cameras", cameras), ("points", points), ("observations", observations)):
        bad = (~t.isfinite()).any(1).nonzero()
        torch._check(
            not bad.numel(),
            lambda name=name, bad=bad: (
                f"effk::{op}: {name}[{int(bad[0])}] holds NaN or infinity; wanted finite numbers"
            ),
        )


def check_columns(op: str, columns: Tensor | None, cameras: Tensor, n: int) -> None:
    """Contents: numbers of parameters, and that those which are tied have equal values to start with."""
    if columns is None or columns.numel() == 0:
        return
    low, high = int(columns.min()), int(columns.max())
    torch._check(
        low >= -1 and high < columns.numel(),
        lambda: f"effk::{op}: columns holds {low if low < -1 else high}; wanted -1 to {columns.numel() - 1}",
    )
    # All but rotations, which turn alike and may differ.
    told = n if n == 3 else n - 3
    flat, values = columns[:, n - told :].reshape(-1).long(), cameras[:, cameras.shape[1] - told :].reshape(-1)
    there = flat >= 0
    first = torch.full((high + 2,), math.nan, dtype=values.dtype, device=values.device)
    first[flat[there]] = values[there]
    torch._check(
        bool((first[flat[there]] == values[there]).all()),
        lambda: (
            f"effk::{op}: columns ties parameters of cameras with different values; wanted equal ones to start with"
        ),
    )


@contextmanager
def refusing_together(op: str, group: ProcessGroup | None, cameras: Any) -> Iterator[None]:
    """Where a rank of a group raises inside, all of them do, rather than wait for it."""
    wrong: Exception | None = None
    try:
        yield
    except Exception as error:
        wrong = error
    if group is not None:
        none = group.size()
        first = torch.tensor(none if wrong is None else group.rank(), device=getattr(cameras, "device", None))
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN, group=group)
        if wrong is None and int(first) < none:
            wrong = RuntimeError(f"effk::{op}: rank {int(first)} of the group refused its arguments")
    if wrong is not None:
        raise wrong


def run(
    op: str,
    cameras: Tensor,
    points: Tensor,
    observations: Tensor,
    camera_index: Tensor,
    point_index: Tensor,
    depth: Tensor | None,
    fixed_points: Tensor | None,
    columns: Tensor | None,
    positions: Tensor | None,
    options: Options,
    *,
    group: ProcessGroup | None = None,
    callback: Callable[[Iteration], bool | None] | None = None,
) -> Result:
    """Checks everything and solves, in place. Where a rank of a group refuses its arguments, all of them raise."""
    problem = cameras, points, observations, camera_index, point_index, depth, fixed_points, columns, positions
    with refusing_together(op, group, cameras):
        check_solve(op, *problem, options)
        check_indices(op, cameras, points, camera_index, point_index)
        check_finite(op, cameras, points, observations)
        check_columns(op, columns, cameras, parameters(options.model))
    with torch.no_grad():
        steps = Steps(*problem, options, group, op)
        try:
            return minimize(cameras, points, steps, callback)
        except BaseException:  # which may have come between the two that are written
            cameras.copy_(steps.cameras)
            points.copy_(steps.points)
            raise


def table(history: list[Iteration], max_iterations: int, like: Tensor) -> Tensor:
    """[max_iterations + 1, COLUMNS] float64; rows that weren't reached are NaN."""
    rows = like.new_full((max_iterations + 1, COLUMNS), math.nan, dtype=torch.float64)
    rows[: len(history)] = torch.tensor([row[:COLUMNS] for row in history], dtype=torch.float64)
    return rows


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
    initial_radius: float = 10000.0,
    linear_solver: str = "auto",
    linear_tolerance: float = 0.1,
    max_linear_iterations: int = 500,
) -> Tensor:
    options = Options(
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
    return table(run("ba_solve", *problem, options).history, max_iterations, cameras)


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
    initial_radius: float = 10000.0,
    linear_solver: str = "auto",
    linear_tolerance: float = 0.1,
    max_linear_iterations: int = 500,
) -> Tensor:
    options = Options(
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
    return table(run("gp_solve", *problem, options).history, max_iterations, cameras)
