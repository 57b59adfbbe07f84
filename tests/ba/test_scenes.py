"""Made-up problems: what is asked of them, looked at with projections of the tests' own."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import pytest
import torch
from effk.ba.models import INTRINSICS
from effk.ba.problem import Problem
from effk.ba.scenes import HEIGHT, SIZES, WIDTH, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..kit.tensors import same_bits

KINDS = ("ring", "street", "aerial")
BOTH = pytest.mark.parametrize("kind", KINDS)


def matrices(turns: Tensor) -> Tensor:
    """Rotation matrices of angle-axes [C, 3] or unit quaternions [C, 4]."""
    if turns.shape[1] == 3:
        zero = torch.zeros(len(turns), dtype=turns.dtype)
        a, b, c = turns.T
        rows = [zero, -c, b, c, zero, -a, -b, a, zero]
        return torch.linalg.matrix_exp(torch.stack(rows, 1).view(-1, 3, 3))
    w, x, y, z = turns.T
    rows = [
        w * w + x * x - y * y - z * z,
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        w * w - x * x + y * y - z * z,
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        w * w - x * x - y * y + z * z,
    ]
    return torch.stack(rows, 1).view(-1, 3, 3)


def pixels(problem: Problem) -> tuple[Tensor, Tensor]:
    """Where points are seen [O, 2], and how far in front of their cameras [O]."""
    camera = problem.camera_index.long()
    turns, t, k = problem.cameras.double().split(
        [3 if problem.model == "snavely" else 4, 3, len(INTRINSICS[problem.model])], 1
    )
    x = problem.points.double()[problem.point_index.long()]
    y = (matrices(turns)[camera] @ x[..., None])[..., 0] + t[camera]
    k = k[camera].T
    z = -y[:, 2] if problem.model == "snavely" else y[:, 2]
    u, v = y[:, 0] / z, y[:, 1] / z
    r = u**2 + v**2
    if problem.model == "snavely":
        f, k1, k2 = k
        seen = [f * (1 + k1 * r + k2 * r**2) * u, f * (1 + k1 * r + k2 * r**2) * v]
    elif problem.model == "simple_pinhole":
        f, cx, cy = k
        seen = [f * u + cx, f * v + cy]
    elif problem.model == "pinhole":
        fx, fy, cx, cy = k
        seen = [fx * u + cx, fy * v + cy]
    elif problem.model == "simple_radial":
        f, cx, cy, k1 = k
        seen = [f * (1 + k1 * r) * u + cx, f * (1 + k1 * r) * v + cy]
    elif problem.model == "radial":
        f, cx, cy, k1, k2 = k
        seen = [f * (1 + k1 * r + k2 * r**2) * u + cx, f * (1 + k1 * r + k2 * r**2) * v + cy]
    else:
        fx, fy, cx, cy, k1, k2, p1, p2 = k
        d = 1 + k1 * r + k2 * r**2
        seen = [
            fx * (u * d + 2 * p1 * u * v + p2 * (r + 2 * u**2)) + cx,
            fy * (v * d + 2 * p2 * u * v + p1 * (r + 2 * v**2)) + cy,
        ]
    return torch.stack(seen, 1), z


def parts_of(problem: Problem) -> int:
    """How many parts hang together, of cameras and points."""
    links = torch.stack([problem.camera_index.long(), len(problem.cameras) + problem.point_index.long()])
    label = torch.arange(len(problem.cameras) + len(problem.points))
    while True:
        least = label[links].amin(0)
        new = label.scatter_reduce(0, links.flatten(), least.repeat(2), "amin")
        new = new[new]
        if torch.equal(new, label):
            return len(label.unique())
        label = new


def assert_sound(problem: Problem, truth: Problem) -> None:
    """Whatever the arguments, without outliers."""
    truth.check()
    problem.check()
    for name in ("observations", "camera_index", "point_index"):
        assert getattr(problem, name) is getattr(truth, name)
    assert truth.camera_index.dtype == truth.point_index.dtype == torch.int32
    seen, depth = pixels(truth)
    assert (depth > 0).all()
    inside = seen + torch.tensor([WIDTH, HEIGHT]) / 2 if truth.model == "snavely" else seen
    assert (inside > 0).all() and (inside < torch.tensor([WIDTH, HEIGHT])).all()
    key = truth.point_index.long() * len(truth.cameras) + truth.camera_index
    assert (key[1:] > key[:-1]).all()  # in order, and none twice
    assert (truth.point_index.long().bincount(minlength=len(truth.points)) >= 2).all()


@BOTH
@pytest.mark.parametrize("model", INTRINSICS)
def test_truth_is_off_by_the_noise(kind: str, model: str) -> None:
    problem, truth = generate(kind, 30, 2000, 12_000, noise=0.25, model=model)
    assert_sound(problem, truth)
    assert len(truth.cameras) == 30 and len(truth.points) == 2000 and len(truth.observations) == 12_000
    off = truth.observations - pixels(truth)[0]
    # 24,000 normal numbers: their deviation is off by 1/220 of it, their mean by 1/155.
    assert abs(off.std().item() / 0.25 - 1) < 0.03 and off.mean(0).abs().max() < 0.01
    assert off.abs().max() < 0.25 * 6
    exact, _ = generate(kind, 30, 2000, 12_000, noise=0, perturbation=0, model=model)
    torch.testing.assert_close(exact.observations, pixels(exact)[0], rtol=0, atol=1e-9)


@BOTH
@settings(max_examples=40)
@given(data=st.data())
def test_all_sizes(kind: str, data: st.DataObject) -> None:
    cameras = data.draw(st.integers(2, 80) | st.sampled_from([2, 3, 257, 701]), "cameras")
    points = data.draw(st.integers(1, 300), "points")
    wanted = data.draw(st.none() | st.integers(0, 40 * points), "observations")
    model = data.draw(st.sampled_from(["snavely", "opencv"]), "model")
    seed = data.draw(st.integers(0, 99), "seed")
    problem, truth = generate(kind, cameras, points, wanted, noise=0, model=model, seed=seed)
    assert_sound(problem, truth)
    asked = 5 * points if wanted is None else wanted
    assert len(truth.observations) == min(max(asked, 2 * points), cameras * points)
    if points >= 2 * cameras:
        assert parts_of(truth) == 1


@BOTH
def test_the_smallest(kind: str) -> None:
    problem, truth = generate(kind, 2, 1)
    assert_sound(problem, truth)
    assert truth.camera_index.tolist() == [0, 1]
    problem, truth = generate(kind, 3, 10)
    assert len(truth.observations) == 30 and parts_of(truth) == 1


@BOTH
def test_few_points_are_seen_by_many(kind: str) -> None:
    _, truth = generate(kind, 200, 5000, 30_000)
    lengths = truth.point_index.long().bincount().double()
    assert lengths.mean() == 6 and lengths.median() < 6 and lengths.max() > 18
    assert truth.camera_index.long().bincount(minlength=200).min() >= 20


@pytest.mark.parametrize("kind, far", [("ring", 24), ("street", 24), ("aerial", 75)])
def test_cameras_of_a_point_are_neighbours(kind: str, far: int) -> None:
    """By number on a ring (where the last is next to the first) or street, and within 4 strips of 14 or 15."""
    _, truth = generate(kind, 200, 1000, 6000)
    for _, group in itertools.groupby(
        zip(truth.point_index.tolist(), truth.camera_index.tolist(), strict=True), lambda p: p[0]
    ):
        cameras = [camera for _, camera in group]
        gaps = [b - a for a, b in itertools.pairwise(cameras)] + [cameras[0] + 200 - cameras[-1]]
        if kind == "street":
            assert max(gaps[:-1]) == 1
        if kind == "ring":
            assert sorted(gaps)[-2] == 1
        assert 200 - max(gaps) < far


def test_a_loop_is_closed() -> None:
    problem, truth = generate("street", 1300, 4000, loop=True)
    assert_sound(problem, truth)
    first, last = (truth.camera_index == c for c in (0, 1299))
    assert set(truth.point_index[first].tolist()) & set(truth.point_index[last].tolist())
    centre = -(matrices(truth.cameras[:, :3]).mT @ truth.cameras[:, 3:6, None])[..., 0]
    steps = (centre - centre.roll(1, 0)).norm(dim=1)
    assert steps.max() < 1.1 and (centre.max(0).values - centre.min(0).values).max() > 200
    _, open_ended = generate("street", 1300, 4000)
    first, last = (open_ended.camera_index == c for c in (0, 1299))
    assert not set(open_ended.point_index[first].tolist()) & set(open_ended.point_index[last].tolist())
    with pytest.raises(ValueError, match=r"loop is True with 100 cameras; wanted 1\d\d\d or more"):
        generate("street", 100, 4000, loop=True)


@BOTH
def test_the_same_again(kind: str) -> None:
    def made(**options: Any) -> list[Tensor]:
        return [
            t
            for p in generate(kind, 20, 100, outliers=0.1, **options)
            for t in (p.cameras, p.points, p.observations, p.camera_index, p.point_index)
        ]

    assert all(itertools.starmap(same_bits, zip(made(), made(), strict=True)))
    assert not any(torch.equal(a, b) for a, b in zip(made(), made(seed=1), strict=True))
    single = made(dtype=torch.float32)
    for a, b in zip(single, made(), strict=True):
        assert same_bits(a, b.float() if b.is_floating_point() else b)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        _, whole = generate(kind, 20, 100, noise=0)
        monkeypatch.setattr("effk.ba.scenes.CHUNK", 7)
        _, pieces = generate(kind, 20, 100, noise=0)
        monkeypatch.undo()
        if kind != "aerial":  # which draws cameras piece by piece
            assert same_bits(whole.camera_index, pieces.camera_index)
        assert_sound(pieces, pieces)
        torch.testing.assert_close(pieces.observations, pixels(pieces)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", ["snavely", "radial"])
def test_outliers(model: str) -> None:
    _, truth = generate("ring", 10, 1000, 6000, outliers=0.125, noise=0.1, model=model)
    off = (truth.observations - pixels(truth)[0]).norm(dim=1)
    out = off > 1
    # Of 750, few land within a pixel.
    assert 740 <= out.sum() <= 750
    where = truth.observations[out] + (torch.tensor([WIDTH, HEIGHT]) / 2 if model == "snavely" else 0)
    assert (where >= 0).all() and (where <= torch.tensor([WIDTH, HEIGHT])).all()
    torch.testing.assert_close(where.mean(0), torch.tensor([WIDTH, HEIGHT]).double() / 2, rtol=0.1, atol=0)
    _, all_out = generate("ring", 10, 1000, 6000, outliers=1, model=model)
    assert ((all_out.observations - pixels(all_out)[0]).norm(dim=1) > 1).float().mean() > 0.99


@BOTH
def test_perturbation(kind: str) -> None:
    sizes = []
    for perturbation in (0, 0.001, 0.01):
        problem, truth = generate(kind, 20, 400, noise=0, perturbation=perturbation)
        off = (problem.observations - pixels(problem)[0]).square().mean().sqrt().item()
        sizes.append(off)
        assert (
            same_bits(problem.cameras, truth.cameras) == same_bits(problem.points, truth.points) == (not perturbation)
        )
        assert (problem.points - truth.points).std().item() == pytest.approx(4 * perturbation, rel=0.1, abs=1e-12)
        assert (problem.cameras[:, 6] - truth.cameras[:, 6]).std().item() == pytest.approx(
            1600 * perturbation, rel=0.5, abs=1e-9
        )
    assert sizes[0] < 1e-9 and 1 < sizes[1] < 5 and 10 < sizes[2] < 50


def test_memory_is_that_of_the_result() -> None:
    """numpy's; torch's isn't traced."""
    cameras, points, seen = size = (1000, 200_000, 1_200_000)
    result = 8 * 2 * (9 * cameras + 3 * points + seen) + 4 * 2 * seen
    tracemalloc.start()
    generate("aerial", *size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * result


def test_sizes() -> None:
    for name, (cameras, points, observations) in SIZES.items():
        assert int(name.rpartition("-")[2]) == cameras
        assert 2 * points < observations < 40 * points and cameras < points
    assert SIZES["dubrovnik-16"] == (16, 22106, 83718) and SIZES["trafalgar-21"] == (21, 11315, 36455)
    assert SIZES["final-13682"] == (13682, 4456117, 28987644) and SIZES["venice-1778"] == (1778, 993923, 5001946)
    problem, truth = generate("aerial", *SIZES["ladybug-49"])
    assert (len(problem.cameras), len(problem.points), len(problem.observations)) == SIZES["ladybug-49"]
    assert_sound(problem, truth)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "cave"}, "kind is 'cave'; wanted one of ring, street, aerial"),
        ({"model": "position"}, "model is 'position'; wanted one of snavely"),
        ({"cameras": 1}, "cameras is 1 and points 5"),
        ({"points": 0}, "cameras is 5 and points 0"),
        ({"noise": -1}, "noise is -1"),
        ({"outliers": 1.5}, r"outliers 1\.5"),
        ({"noise": float("inf")}, "noise is inf"),
        ({"perturbation": float("nan")}, "perturbation nan"),
        ({"perturbation": float("inf")}, "perturbation inf"),
        ({"loop": True}, "loop is True and kind 'ring'; wanted 'street'"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"kind": "ring", "cameras": 5, "points": 5} | arguments)
