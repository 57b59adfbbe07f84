"""ba on the emulated device. As csrc/ba/ba.cu: it checks, allocates, sorts and launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from effk.ba import reference
from torch import Tensor

from . import Device, module
from .moe import _indices

# Of devices that there might be: a camera's observations are one block's, and are split.
NUM_SMS = (1, 132)
# Blocks that stride, and one for all.
MOST_BLOCKS = (2, 4096)


class Problem(NamedTuple):
    """What all ops but ba_retract get."""

    cameras: Tensor
    points: Tensor
    observations: Tensor
    camera_index: Tensor
    point_index: Tensor
    depth: Tensor | None = None
    fixed_points: Tensor | None = None
    step: Tensor | None = None
    model: str = "snavely"
    loss: str = "trivial"
    loss_scale: float = 1.0
    depth_weight: float = 1.0
    radius: float = 1e4

    @property
    def n(self) -> int:
        return reference.parameters(self.model)

    @property
    def rows(self) -> int:
        return 3 if self.model == reference.POSITION or self.depth is not None else 2

    def doubles(self, *sizes: int) -> Tensor:
        return self.cameras.new_empty(sizes, dtype=torch.float64)

    def check(self, op: str) -> None:
        tensors = (self.cameras, self.points, self.observations, self.camera_index, self.point_index)
        reference.check_problem(op, *tensors, self.depth, self.model, self.depth_weight)
        reference.check_loss(op, self.loss, self.loss_scale)
        reference.check_damping(op, self.fixed_points, self.points, self.radius)

    def place(self, device: Device, keys: Tensor | None = None, order: Tensor | None = None) -> tuple[Any, ...]:
        counts = len(self.cameras), len(self.points), len(self.observations)
        flags = self.cameras.dtype == torch.float64, _is_quaternion(self.cameras, self.model)
        kinds = reference.MODELS.index(self.model), reference.LOSSES.index(self.loss)
        sizes = [*kinds, *flags, *counts, *_launch(*counts)]
        named = {
            "cameras": self.cameras,
            "points": self.points,
            "observations": self.observations,
            "depth": self.depth,
            "fixed_points": self.fixed_points,
            "step": self.step,
            "keys": keys,
            "order": order,
        }
        return (
            sizes,
            [self.loss_scale, self.depth_weight, self.radius],
            [device.input(name, None if t is None else t.contiguous()) for name, t in named.items()],
            _indices(device, "camera_index", self.camera_index),
            _indices(device, "point_index", self.point_index),
        )

    def sorted(self) -> tuple[Tensor, Tensor]:
        """By camera: the keys, and which observations they are of."""
        keys = torch.empty(len(self.observations), dtype=torch.int32)
        with Device() as device:
            module().ba_keys(self.place(device), device.output("keys", keys))
        return keys.sort(stable=True)


def _launch(*counts: int) -> tuple[int, int]:
    """Number of multiprocessors, most blocks."""
    drawn = sum(counts)
    return NUM_SMS[drawn % len(NUM_SMS)], MOST_BLOCKS[drawn // len(NUM_SMS) % len(MOST_BLOCKS)]


def _is_quaternion(cameras: Tensor, model: str) -> bool:
    return cameras.shape[1] > reference.parameters(model)


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
    p = Problem(cameras, points, observations, camera_index, point_index, depth, model=model, depth_weight=depth_weight)
    p.check("ba_residual")
    residual = cameras.new_empty(len(observations), p.rows)
    valid = cameras.new_empty(len(observations), dtype=torch.bool)
    with Device() as device:
        to = device.output("residual", residual), device.output("valid", valid)
        module().ba_residual(p.place(device), *to, 0, 0)
    return residual, valid


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
    p = Problem(cameras, points, observations, camera_index, point_index, depth, model=model, depth_weight=depth_weight)
    p.check("ba_jacobian")
    count = len(observations)
    residual, valid = cameras.new_empty(count, p.rows), cameras.new_empty(count, dtype=torch.bool)
    jac_camera, jac_point = (cameras.new_empty(count, p.rows, columns) for columns in (p.n, 3))
    with Device() as device:
        to = device.output("residual", residual), device.output("valid", valid)
        jacobians = device.output("jac_camera", jac_camera), device.output("jac_point", jac_point)
        module().ba_residual(p.place(device), *to, *jacobians)
    return residual, jac_camera, jac_point, valid


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
    losses = {"model": model, "loss": loss, "loss_scale": loss_scale, "depth_weight": depth_weight}
    p = Problem(cameras, points, observations, camera_index, point_index, depth, **losses)  # type: ignore[arg-type]
    p.check("ba_cost")
    cost = p.doubles()
    with Device() as device:
        module().ba_cost(p.place(device), device.output("cost", cost))
    return cost


def _outputs(device: Device, names: str, tensors: tuple[Tensor, ...]) -> list[int]:
    return [device.output(name, t) for name, t in zip(names.split(), tensors, strict=True)]


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
) -> tuple[Tensor, ...]:
    losses = {"model": model, "loss": loss, "loss_scale": loss_scale, "depth_weight": depth_weight}
    p = Problem(cameras, points, observations, camera_index, point_index, depth, **losses)  # type: ignore[arg-type]
    p.check("ba_build")
    count, n = len(cameras), p.n
    of_cameras = p.doubles(count, n), p.doubles(count, n, n)
    out = p.doubles(), *of_cameras, p.doubles(len(points), 3), p.doubles(len(points), 3, 3)
    by_camera = p.sorted()
    with Device() as device:
        names = "cost camera_gradient camera_hessian point_gradient point_hessian"
        module().ba_build(p.place(device, *by_camera), _outputs(device, names, out))
    return out


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
) -> tuple[Tensor, ...]:
    given = (cameras, points, observations, camera_index, point_index, depth, fixed_points)
    p = Problem(*given, None, model, loss, loss_scale, depth_weight, radius)
    p.check("ba_schur")
    blocks, n = reference.check_pairs("ba_schur", pairs, cameras), p.n
    of_cameras = tuple(p.doubles(len(cameras), n) for _ in range(3))
    out = p.doubles(blocks, n, n), *of_cameras, p.doubles(), p.doubles()
    by_camera = p.sorted()
    with Device() as device:
        which = pairs is not None, _indices(device, "pairs", pairs), blocks
        names = "blocks rhs gradient diagonal point_gradient cost"
        module().ba_schur(p.place(device, *by_camera), which, _outputs(device, names, out))
    return out


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
    given = (cameras, points, observations, camera_index, point_index, depth, fixed_points, x)
    p = Problem(*given, model, loss, loss_scale, depth_weight, radius)
    p.check("ba_schur_mv")
    reference.check_step("ba_schur_mv", "x", x, len(cameras), p.n, cameras)
    y = p.doubles(len(cameras), p.n)
    by_camera = p.sorted()
    with Device() as device:
        module().ba_schur_mv(p.place(device, *by_camera), device.output("y", y))
    return y


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
) -> tuple[Tensor, ...]:
    given = (cameras, points, observations, camera_index, point_index, depth, fixed_points, camera_step)
    p = Problem(*given, model, loss, loss_scale, depth_weight, radius)
    p.check("ba_backsubstitute")
    reference.check_step("ba_backsubstitute", "camera_step", camera_step, len(cameras), p.n, cameras)
    out = p.doubles(len(points), 3), p.doubles()
    with Device() as device:
        module().ba_backsubstitute(p.place(device), _outputs(device, "point_step model_change", out))
    return out


def ba_retract(
    cameras: Tensor, points: Tensor, camera_step: Tensor, point_step: Tensor, *, model: str = "snavely"
) -> tuple[Tensor, Tensor]:
    reference.check_retract(cameras, points, camera_step, point_step, model)
    new_cameras, new_points = cameras.new_empty(cameras.shape), points.new_empty(points.shape)
    with Device() as device:
        flags = cameras.dtype == torch.float64, _is_quaternion(cameras, model)
        given = {"cameras": cameras, "points": points, "camera_step": camera_step, "point_step": point_step}
        module().ba_retract(
            [reference.MODELS.index(model), *flags, len(cameras), len(points), _launch(len(cameras), len(points))[1]],
            [
                *(device.input(name, t.contiguous()) for name, t in given.items()),
                device.output("new_cameras", new_cameras),
                device.output("new_points", new_points),
            ],
        )
    return new_cameras, new_points


OPS = {
    "ba_residual": ba_residual,
    "ba_jacobian": ba_jacobian,
    "ba_cost": ba_cost,
    "ba_build": ba_build,
    "ba_schur": ba_schur,
    "ba_schur_mv": ba_schur_mv,
    "ba_backsubstitute": ba_backsubstitute,
    "ba_retract": ba_retract,
}
