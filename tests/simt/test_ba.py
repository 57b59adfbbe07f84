"""Shapes that take ba's kernels through what small ones don't reach, in several orders of threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ..ba.strategies import MODELS, Bound, Case, Steps
from ..kit import tensors
from ..kit.backends import Backend
from . import ba, missing, seeded

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SIMT = Backend("simt")


def on_device(monkeypatch: pytest.MonkeyPatch, num_sms: int, most_blocks: int = 4096) -> None:
    monkeypatch.setattr(ba, "NUM_SMS", (num_sms,))
    monkeypatch.setattr(ba, "MOST_BLOCKS", (most_blocks,))


def shaped(bound: Bound, *shape: int) -> Bound:
    return Bound(bound.value.reshape(shape), bound.error.reshape(shape))


def blocks_of(case: Case, pairs: Tensor) -> Bound:
    """Of pairs that are there, in any order."""
    a, b = pairs.long().T
    s = shaped(case.system.schur[0], case.cameras, case.n, case.cameras, case.n)
    return Bound(s.value[a, :, b], s.error[a, :, b])


def run(case: Case, pairs: Tensor | None, **changed: Any) -> dict[str, Any]:
    """What every op makes of a problem."""
    ops = ("ba_residual", "ba_jacobian", "ba_cost", "ba_build", "ba_schur", "ba_schur_mv", "ba_backsubstitute")
    return {op: case.run(SIMT, op, pairs=pairs, **changed) for op in ops}


def assert_right(case: Case, pairs: Tensor | None, made: dict[str, Any]) -> None:
    """All but what each observation has for itself."""
    system, x = case.system, case.x.flatten()
    case.cost.assert_holds(made["ba_cost"], "cost")
    cost, of_cameras, u, of_points, v = made["ba_build"]
    case.cost.assert_holds(cost, "cost")
    system.gradient.assert_holds(torch.cat([of_cameras.flatten(), of_points.flatten()]), "gradient")
    system.block(system.hessian, False, case.n).assert_holds(u, "U")
    system.block(system.hessian, True, 3).assert_holds(v, "V")
    blocks, rhs, gradient, diagonal, largest, cost = made["ba_schur"]
    wanted = torch.arange(case.cameras)[:, None].expand(-1, 2) if pairs is None else pairs
    blocks_of(case, wanted).assert_holds(blocks, "S")
    system.schur[1].assert_holds(rhs.flatten(), "rhs")
    case.cost.assert_holds(cost, "cost")
    # As of build, whose sums are taken in the same order.
    assert tensors.same_bits(gradient, of_cameras)
    assert tensors.same_bits(diagonal, u.diagonal(dim1=1, dim2=2))
    assert largest == of_points[case.free].abs().max()
    system.times(x).assert_holds(made["ba_schur_mv"].flatten(), "S x")
    point_step, change = made["ba_backsubstitute"]
    system.back(x).assert_holds(point_step, "step of points")
    system.change(torch.cat([x, point_step.flatten()])).assert_holds(change, "change")


# Points of several tiles of 128 observations, and cameras that see a point many times; several blocks of points, and
# cameras of several tiles; cameras whose observations several blocks share; cameras that see more points together than
# a block takes at a time; and such of which a search finds few.
SIZES: dict[str, dict[str, Any]] = {
    "long": {"cameras": 3, "points": 4, "observations": 420},
    "points": {"cameras": 3, "points": 290, "observations": 500, "with_depth": True},
    "shares": {"cameras": 1, "points": 30, "observations": 803},
    "together": {"cameras": 2, "points": 300, "full": True, "with_fixed": False},
    "apart": {"cameras": 9, "points": 400, "observations": 700},
}


@pytest.mark.parametrize("size", SIZES)
def test_tiles_and_shares(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small devices and large ones, with blocks that stride and without."""
    case = Case(dtype=torch.float32, index=torch.int32, with_fixed=True, loss="cauchy", radius=10.0, layout="offset")
    case = replace(case, seed=len(size), **SIZES[size])
    for num_sms, most_blocks in ((1, 1), (132, 4096)):
        on_device(monkeypatch, num_sms, most_blocks)
        pairs = case.all_pairs if num_sms == 1 else None
        with seeded(num_sms):
            assert_right(case, pairs, run(case, pairs))


@pytest.mark.parametrize("model", MODELS)
def test_all_models_with_full_tiles(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, 132)
    for with_depth in (False, True) if model != "position" else (False,):
        case = Case(model=model, cameras=1, points=130, full=True, with_depth=with_depth, loss="huber", spread=3.0)
        made = run(case, case.all_pairs)
        assert_right(case, case.all_pairs, made)
        residual, jac_camera, jac_point, valid = made["ba_jacobian"]
        bounds = (case.rows.residual, case.rows.of_camera, case.rows.of_point)
        for bound, got in zip(bounds, (residual, jac_camera, jac_point), strict=True):
            bound.assert_holds(got, "derivatives")
        assert all(map(tensors.same_bits, made["ba_residual"], (residual, valid)))


def test_a_step_of_many_cameras_and_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that stride, and have cameras and points: the same as one by one."""
    steps = Steps(Case(cameras=270, points=100, observations=0, quaternion=True), 0.3)
    on_device(monkeypatch, 1, 4096)
    wanted = steps.run(SIMT)
    on_device(monkeypatch, 1, 1)
    assert all(map(tensors.same_bits, steps.run(SIMT), wanted))
    part = {"cameras": steps.case.stored("cameras")[7:9], "camera_step": steps.camera_step[7:9]}
    assert tensors.same_bits(steps.run(SIMT, **part)[0], wanted[0][7:9])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_hostile_indices_are_left_out(index: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cameras anywhere, of points where they still ascend; all others are as without them."""
    on_device(monkeypatch, 132, 2)
    case = Case(cameras=4, points=140, observations=300, index=index, with_depth=True, with_fixed=True, seed=3)
    info = torch.iinfo(index)
    most = 2**32 if index == torch.int64 else info.max  # a right number in 32 bits
    camera, point = (t.to(index, copy=True) for t in case.indices)
    camera[[5, 77, 130, 290]] = torch.tensor([most, -1, 4, info.min], dtype=index)
    point[:2] = torch.tensor([info.min, -1], dtype=index)
    point[-3:] = torch.tensor([140, 141, most], dtype=index)
    left = (camera >= 0) & (camera < 4) & (point >= 0) & (point < 140)
    kept = case.reordered(left.nonzero()[:, 0])
    made = run(case, case.all_pairs, camera_index=camera, point_index=point)
    assert_right(kept, case.all_pairs, made)
    for op in ("ba_residual", "ba_jacobian"):
        for got, wanted in zip(made[op], kept.run(SIMT, op), strict=True):
            assert tensors.same_bits(got[left], wanted)
            assert not bool(got[~left].any())


def test_nothing_reaches_out_of_bounds() -> None:
    """Points in any order, most of them wrong: whatever comes out."""
    case = Case(cameras=3, points=300, observations=400, with_depth=True, with_fixed=True)
    draw = tensors.generator(8)
    kinds = (torch.randint(-5, 310, (400,), generator=draw), torch.randint(-(2**63), 2**63 - 1, (400,), generator=draw))
    for seed, points in enumerate((*kinds, torch.arange(399, -1, -1), torch.where(kinds[0] % 2 == 0, *kinds))):
        with seeded(seed):
            made = run(case, case.all_pairs, point_index=points, camera_index=points.roll(7) % 5)
        assert made["ba_schur"][0].shape == (6, 9, 9)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_hostile_pairs(index: torch.dtype) -> None:
    """In any order, each one its block; none of cameras that aren't there."""
    case = Case(cameras=4, points=20, observations=50, with_fixed=True)
    info = torch.iinfo(index)
    there = [[3, 1], [0, 0], [1, 3], [3, 1], [2, 2], [0, 3]]
    wrong = [[4, 0], [0, -1], [info.max, info.max], [info.min, 2], [-1, -1]]
    pairs = torch.tensor([pair for both in zip(there, [*wrong, [4, 4]], strict=True) for pair in both], dtype=index)
    blocks = case.run(SIMT, "ba_schur", pairs=pairs)[0]
    blocks_of(case, pairs[::2]).assert_holds(blocks[::2], "S")
    assert not bool(blocks[1::2].any())


def test_nan_in_one_part_of_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoils the camera, and no other; those that see the point, too, in what is left when it is eliminated."""
    case = Case(cameras=2, points=70, observations=1060, seed=5)
    observations = case.stored("observations").clone()
    o = 700
    observations[o, 1] = torch.nan
    camera, point = (int(t[o]) for t in case.indices)
    for num_sms in (1, 132):
        on_device(monkeypatch, num_sms)
        made = run(case, None, observations=observations)
        assert made["ba_cost"].isnan() and made["ba_build"][0].isnan() and made["ba_schur"][4].isnan()
        _, of_cameras, _, of_points, _ = made["ba_build"]
        assert of_cameras.isnan().all(1).tolist() == [c == camera for c in range(2)]
        assert of_points.isnan().any(1).nonzero().tolist() == [[point]]
        assert bool(made["ba_schur"][1].isnan().all())  # both cameras see each point, some 15 times
        step, change = made["ba_backsubstitute"]
        assert step.isnan().any(1).nonzero().tolist() == [[point]] and change.isnan()


def test_no_report_and_the_same_bits_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, 132, 2)
    case = Case(cameras=3, points=40, observations=150, with_depth=True, with_fixed=True, loss="soft_l1")
    cases = [case, Case(model="position", cameras=1, points=3, observations=520), replace(case, model="opencv")]
    results: list[list[Tensor]] = []
    for seed in range(6):
        with seeded(seed):
            made = [run(case, case.all_pairs) for case in cases]
            results.append([*tensors.tensors_in(made)])
    assert len(results[0]) == 3 * 21
    assert all(tensors.same_bits(*pair) for r in results for pair in zip(r, results[0], strict=True))
