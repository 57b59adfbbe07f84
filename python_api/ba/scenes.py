"""Made-up bundle adjustment problems of any size, with the truth beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import reference
from .models import INTRINSICS
from .problem import Problem

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]

# Cameras, points and observations of problems of "Bundle Adjustment in the Large" (Agarwal et al., 2010).
SIZES = {
    "ladybug-49": (49, 7776, 31843),
    "ladybug-539": (539, 65220, 277273),
    "ladybug-1197": (1197, 126327, 563734),
    "ladybug-1723": (1723, 156502, 678718),
    "trafalgar-21": (21, 11315, 36455),
    "trafalgar-126": (126, 40037, 148328),
    "trafalgar-257": (257, 65132, 225911),
    "dubrovnik-16": (16, 22106, 83718),
    "dubrovnik-88": (88, 64298, 383937),
    "dubrovnik-356": (356, 226730, 1255268),
    "venice-52": (52, 64053, 347173),
    "venice-427": (427, 310384, 1699145),
    "venice-951": (951, 708276, 3748892),
    "venice-1778": (1778, 993923, 5001946),
    "final-394": (394, 100368, 534408),
    "final-871": (871, 527480, 2785977),
    "final-961": (961, 187103, 1692975),
    "final-1936": (1936, 649673, 5213733),
    "final-3068": (3068, 310854, 1653812),
    "final-4585": (4585, 1324582, 9125125),
    "final-13682": (13682, 4456117, 28987644),
}

WIDTH, HEIGHT, FOCAL = 2000.0, 1500.0, 1600.0  # of images, in pixels
NEAR = 4.0  # depth of the nearest points
# Points lie within this share of the images of perfect cameras, so that they stay in those of the true ones, which are
# moved, turned and distorted.
SHARE = 0.7
RIGHT, DOWN = (SHARE * size / 2 / FOCAL for size in (WIDTH, HEIGHT))  # offset by depth
MOVED = 0.02 * NEAR  # at most, along each axis
TURNED = 0.02  # radians, at most, about each axis
CHUNK = 2**18  # observations made at once


def generate(
    kind: str,
    cameras: int,
    points: int,
    observations: int | None = None,
    *,
    noise: float = 0.5,
    outliers: float = 0.0,
    model: str = "snavely",
    perturbation: float = 0.01,
    loop: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Problem, Problem]:
    """Makes a problem, and what its solution should be near to.

    Each point is seen by 2 cameras or more that are next to each other, in front of all of them and within an image of
    WIDTH x HEIGHT pixels; most points by few, some by many. Observations come in order of points and then of cameras,
    points along the way of the cameras. With twice as many points as cameras, all hangs together. The same arguments
    give the same numbers.

    Args:
        kind: "ring", cameras around an object; "street", cameras that look ahead on a winding street, and points on
            the houses along it; "aerial", strips of cameras that look down on hills.
        cameras: 2 or more.
        points: 1 or more.
        observations: as many, or as near to it as can be: each point is seen by 2 to all cameras. By default 5 times
            the points.
        noise: standard deviation, in pixels.
        outliers: share of observations that are anywhere in their image.
        model: of `effk.ba.models.INTRINSICS`. Rotations are angle-axes for "snavely", quaternions for the others.
        perturbation: standard deviation of the problem from the truth: of rotations in radians, of positions as a share
            of the depth of the nearest points, of focal lengths as a share of them; of other intrinsics less.
        loop: whether the street ends where it begins.
        seed: of all that is random.
        dtype: float32 or float64.

    Returns:
        The problem, and the same with true cameras and points. They share observations and indices, which are int32.

    Raises:
        ValueError: an argument isn't as above, or the cameras are too few for a loop.
    """
    for name, value, choices in (("kind", kind, KINDS), ("model", model, INTRINSICS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(choices)}")
    if cameras < 2 or points < 1:
        raise ValueError(f"cameras is {cameras} and points {points}; wanted 2 or more, and 1 or more")
    if not (0 <= noise < math.inf and 0 <= outliers <= 1 and 0 <= perturbation < math.inf):
        raise ValueError(
            f"noise is {noise}, outliers {outliers}, perturbation {perturbation}; wanted 0 or more and finite, of "
            "outliers up to 1"
        )
    if loop and kind != "street":
        raise ValueError(f"loop is True and kind {kind!r}; wanted 'street'")
    rng = np.random.default_rng(seed)
    total = min(max(5 * points if observations is None else observations, 2 * points), cameras * points)
    lengths = _lengths(rng, cameras, points, total)
    # Points' places on the way, evenly spread.
    way = (np.arange(points) + rng.uniform(size=points)) / points
    scene = KINDS[kind](rng, cameras, lengths, way, loop)
    turns = torch.from_numpy(rng.uniform(-TURNED, TURNED, (cameras, 3)))
    rotations = reference.product(reference.exponential(turns), scene.rotations)
    centres = scene.centres + torch.from_numpy(rng.uniform(-MOVED, MOVED, (cameras, 3)))
    intrinsics = torch.from_numpy(_intrinsics(rng, cameras, model))
    truth = Problem(
        _cameras(rotations, centres, intrinsics, model),
        scene.points,
        torch.empty(total, 2, dtype=dtype),
        torch.empty(total, dtype=torch.int32),
        torch.from_numpy(np.repeat(np.arange(points, dtype=np.int32), lengths)),
        model,
    )
    _observe(rng, truth, scene.seers, lengths, noise)
    wrong = torch.from_numpy(rng.choice(total, round(outliers * total), replace=False))
    anywhere = rng.uniform(0, [WIDTH, HEIGHT], (len(wrong), 2))
    if model == "snavely":
        anywhere -= [WIDTH / 2, HEIGHT / 2]
    truth.observations[wrong] = torch.from_numpy(anywhere).to(dtype)

    def normal(rows: int, *scales: float) -> Tensor:
        return perturbation * torch.from_numpy(rng.standard_normal((rows, len(scales))) * scales)

    rotations = reference.product(reference.exponential(normal(cameras, 1, 1, 1)), rotations)
    centres = centres + normal(cameras, NEAR, NEAR, NEAR)
    intrinsics = intrinsics + normal(cameras, *(UNSURE[name[0]] for name in INTRINSICS[model]))
    problem = replace(
        truth,
        cameras=_cameras(rotations, centres, intrinsics, model),
        points=truth.points + normal(points, NEAR, NEAR, NEAR),
    )
    return problem.to(dtype), truth.to(dtype)


# Intrinsics by the first letter of their names: how far a perturbation of 1 takes them.
UNSURE = {"f": FOCAL, "c": FOCAL / 10, "k": 0.1, "p": 0.01}


def _intrinsics(rng: np.random.Generator, cameras: int, model: str) -> Floats:
    ranges = {
        "f": (0.98 * FOCAL, 1.02 * FOCAL),
        "cx": (0.49 * WIDTH, 0.51 * WIDTH),
        "cy": (0.49 * HEIGHT, 0.51 * HEIGHT),
        "k": (-0.05, 0.05),
        "p": (-0.001, 0.001),
    }
    columns = [rng.uniform(*ranges[name if name in ranges else name[0]], cameras) for name in INTRINSICS[model]]
    return np.stack(columns, 1)


def _cameras(rotations: Tensor, centres: Tensor, intrinsics: Tensor, model: str) -> Tensor:
    """Rows of a Problem, from rotations [C, 4] into frames that look along z and have y down."""
    if model == "snavely":  # along -z, and y up
        rotations = reference.product(rotations.new_tensor([[0, 1, 0, 0]]), rotations)
    translations = -reference.rotate(rotations, centres)
    if model == "snavely":
        rotations = reference.logarithm(rotations)
    return torch.cat([rotations, translations, intrinsics], 1)


def _lengths(rng: np.random.Generator, cameras: int, points: int, total: int) -> Indices:
    """By how many cameras each point is seen: 2 or more, mostly few, in all `total`."""
    mean = total / points
    most = min(cameras, max(math.ceil(4 * mean), 8))
    lengths = np.minimum(1 + rng.geometric(1 / (mean - 1), points), most)
    while missing := total - int(lengths.sum()):
        able = np.flatnonzero(lengths < most if missing > 0 else lengths > 2)
        chosen = rng.choice(able, min(abs(missing), len(able)), replace=False)
        lengths[chosen] += np.sign(missing)
    return lengths


def _observe(
    rng: np.random.Generator, truth: Problem, seers: Callable[[slice], Indices], lengths: Indices, noise: float
) -> None:
    """Fills in observations and camera_index, some points at a time."""
    ends = np.cumsum(lengths)
    rotations, translations, intrinsics = reference.parts(truth.cameras, truth.num_parameters)
    count = len(truth.cameras)
    first = start = 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, start + CHUNK)))
        end = int(ends[last - 1])
        point = np.repeat(np.arange(first, last), lengths[first:last])
        keys = point * count + seers(slice(first, last))
        keys.sort()
        camera = torch.from_numpy(keys % count)
        seen = reference.rotate(rotations[camera], truth.points[torch.from_numpy(point)]) + translations[camera]
        pixels, _ = reference.project(truth.model, seen, intrinsics[camera])
        pixels += noise * torch.from_numpy(rng.standard_normal(pixels.shape))
        truth.observations[start:end] = pixels
        truth.camera_index[start:end] = camera
        first, start = last, end


# ---- kinds of scenes


@dataclass
class _Scene:
    """Perfect cameras, and points."""

    rotations: Tensor  # [C, 4], into frames that look along z and have y down
    centres: Tensor  # [C, 3]
    points: Tensor  # [P, 3]
    seers: Callable[[slice], Indices]  # of points one after the other, all cameras that see them


def _looking_along(heading: Floats) -> Tensor:
    """Rotations [C, 4] of upright cameras, from a world with z up."""
    half = torch.from_numpy(heading) / 2
    zero = torch.zeros_like(half)
    ahead = half.new_tensor([[0.5, 0.5, -0.5, 0.5]])  # x right, y down, z ahead; from x ahead, y left, z up
    return reference.product(ahead, torch.stack([half.cos(), zero, zero, -half.sin()], -1))


def _run(first: Indices, lengths: Indices, cameras: int) -> Callable[[slice], Indices]:
    """Of cameras one after the other, the first again after the last."""

    def seers(points: slice) -> Indices:
        n = lengths[points]
        nth = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        return (np.repeat(first[points], n) + nth) % cameras

    return seers


def _ring(rng: np.random.Generator, cameras: int, lengths: Indices, way: Floats, loop: bool) -> _Scene:
    """Cameras on a circle of radius r that look at its centre, and points in the outer part of a disc around it.

    A point at the radius q r, seen from an angle a off its own, is off the middle of the image by
    q sin a / (1 - q cos a). That is at most RIGHT for all a if q <= sin b, b = atan RIGHT, and else for a up to where
    q sin(a + b) = sin b. Few cameras see small objects so, many a part of a large one each.
    """
    most = lengths.max()
    step = 2 * np.pi / cameras
    view = math.atan(RIGHT)
    share = math.sin(view) / math.sin(min(most * step / 2 + view, np.pi / 2))
    radius = NEAR / (1 - share)
    depth = NEAR + rng.uniform(size=len(lengths)) * min(NEAR, share * radius)
    first = (way * cameras).astype(np.int64)
    angle = (first + (lengths - 1) / 2 + rng.uniform(-0.5, 0.5, len(lengths))) * step
    up = rng.uniform(-DOWN, DOWN, len(lengths)) * depth
    points = np.stack([(radius - depth) * np.cos(angle), (radius - depth) * np.sin(angle), up], 1)
    angles = np.arange(cameras) * step
    centres = radius * np.stack([np.cos(angles), np.sin(angles), np.zeros(cameras)], 1)
    return _Scene(
        _looking_along(angles + np.pi),
        torch.from_numpy(centres),
        torch.from_numpy(points),
        _run(first, lengths, cameras),
    )


def _street(rng: np.random.Generator, cameras: int, lengths: Indices, way: Floats, loop: bool) -> _Scene:
    """Cameras that look ahead, and points to the left and right, ahead of the last of their cameras."""
    most, count = int(lengths.max()), len(lengths)
    step = NEAR / 5
    far = 2 * NEAR + most * step
    sides = 0.8 * RIGHT  # offset by depth, at most; the rest is for bends
    bend = 2 * (RIGHT - sides) / far  # radians by length, at most
    length = cameras * step
    along = np.arange(0, cameras + math.ceil(far / step) + 1, 1 / 8) * step
    if loop:
        if length * bend < 2 * np.pi:
            raise ValueError(
                f"loop is True with {cameras} cameras; wanted {math.ceil(2 * np.pi / bend / step)} or more"
            )
        along = np.linspace(0, length, 8 * cameras + 1)
        # Whatever the amplitude, waves of a whole number of periods, 2 or more, keep a circle closed.
        turn = 2 * np.pi * along / length
        heading = turn + min(0.2, (length * bend / (2 * np.pi) - 1) / 5) * np.sin(5 * turn)
    else:
        waves = along * bend / (1 + 1 / 1.7) * 2
        heading = 0.5 * np.sin(waves + rng.uniform(0, 7)) + 0.5 * np.sin(waves / 1.7 + rng.uniform(0, 7))
    ahead = np.stack([np.cos(heading), np.sin(heading)], 1)
    path = np.zeros_like(ahead)
    path[1:] = np.cumsum((ahead[1:] + ahead[:-1]) / 2 * np.diff(along)[:, None], 0)

    def at(where: Floats) -> tuple[Floats, Floats]:
        """Place and heading."""
        where = where % length if loop else where
        x, y, angle = (np.interp(where, along, values) for values in (*path.T, heading))
        return np.stack([x, y], 1), angle

    first = (way * (cameras if loop else cameras - lengths + 1)).astype(np.int64)
    depth = NEAR * rng.uniform(1, 2, count)
    aside = sides * depth * rng.choice([-1, 1], count)
    place, angle = at((first + lengths - 1 + rng.uniform(size=count)) * step + depth)
    place = place + aside[:, None] * np.stack([-np.sin(angle), np.cos(angle)], 1)
    up = rng.uniform(-0.5, 0.9, count) * DOWN * depth
    centres, headings = at(np.arange(cameras) * step)
    return _Scene(
        _looking_along(headings),
        torch.from_numpy(np.concatenate([centres, np.zeros((cameras, 1))], 1)),
        torch.from_numpy(np.concatenate([place, up[:, None]], 1)),
        _run(first, lengths, cameras),
    )


def _aerial(rng: np.random.Generator, cameras: int, lengths: Indices, way: Floats, loop: bool) -> _Scene:
    """Cameras in strips, flown to and fro. A point is seen by two that follow each other, and by any others around."""
    most, count = int(lengths.max()), len(lengths)
    strips = max(1, round(math.sqrt(cameras)))
    sizes = np.full(strips, cameras // strips)
    sizes[: cameras % strips] += 1
    starts = np.cumsum(sizes) - sizes
    # A point's cameras are among those of a window of so many strips and so many cameras of each. It may lie in a
    # corner of it.
    window = 5
    while most > (cameras if window >= max(strips, sizes[0]) else min(strips, window) * min(sizes[-1], window)):
        window += 1
    side = DOWN * NEAR / (window - 0.5) * sizes[-1] / (cameras / strips)  # of a camera's square
    length = side * cameras / strips
    strip = np.repeat(np.arange(strips), sizes)
    nth = np.arange(cameras) - starts[strip] + 0.5
    places = np.stack([length * nth / sizes[strip], side * (strip + 0.5)], 1)
    back = strip % 2 == 1
    places[back, 0] = length - places[back, 0]
    relief = 0.3 * NEAR
    pair = (way * (cameras - 1)).astype(np.int64)
    ground = (places[pair] + places[pair + 1]) / 2 + rng.uniform(-0.5, 0.5, (count, 2)) * side
    hills = [np.sin(ground @ rng.uniform(-1, 1, 2) / NEAR + rng.uniform(0, 7)) for _ in range(3)]
    up = relief * (0.4 + 0.4 * np.mean(hills, 0) + 0.2 * rng.uniform(size=count))
    rows, columns = min(strips, window), min(int(sizes[0]), window)

    def seers(points: slice) -> Indices:
        at, n, two = ground[points], lengths[points], pair[points]
        low = np.clip(np.floor(at[:, 1] / side).astype(np.int64) - rows // 2, 0, strips - rows)
        row = low[:, None] + np.arange(rows)
        # Along a strip, in the direction of x; then by number.
        size = sizes[row]
        left = np.rint(at[:, :1] / length * size - columns / 2).astype(np.int64).clip(0, (size - columns).clip(0))
        nth = left[..., None] + np.arange(columns)
        there = nth < size[..., None]
        nth = np.where(row[..., None] % 2 == 1, size[..., None] - 1 - nth, nth)
        number = np.where(there, starts[row][..., None] + nth, 0).reshape(len(at), -1)
        turn = rng.uniform(size=number.shape)
        turn[(number == two[:, None]) | (number == two[:, None] + 1)] = -1
        turn[~there.reshape(len(at), -1)] = np.inf
        order = np.argsort(turn, 1)
        return np.take_along_axis(number, order, 1)[np.arange(number.shape[1]) < n[:, None]]

    down = torch.tensor([[0, 0.5**0.5, -(0.5**0.5), 0]], dtype=torch.float64)  # x right, y back, z down
    return _Scene(
        down.expand(cameras, -1),
        torch.from_numpy(np.concatenate([places, np.full((cameras, 1), NEAR + relief)], 1)),
        torch.from_numpy(np.concatenate([ground, up[:, None]], 1)),
        seers,
    )


KINDS: dict[str, Callable[[np.random.Generator, int, Indices, Floats, bool], _Scene]] = {
    "ring": _ring,
    "street": _street,
    "aerial": _aerial,
}
