"""The selector's logic, with tables and clocks that are made up: nothing here depends on how long anything takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from effk.lora import Adapter, AdapterBank, Selector
from effk.lora.selector import interpolate
from torch import nn

from ..kit.tensors import same_bits


def make_bank(keep_base: bool = True) -> tuple[nn.Module, AdapterBank]:
    """Three layers of one shape and one of another, and adapters of ranks 2, 4 and 4."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(10, 4), nn.Linear(6, 8)])
    sizes = {str(j): (m.in_features, m.out_features) for j, m in enumerate(model)}
    adapters = {
        str(i): Adapter({path: (torch.randn(r, cols), torch.randn(rows, r)) for path, (cols, rows) in sizes.items()})
        for i, r in enumerate([2, 4, 4])
    }
    return model, AdapterBank(model, adapters, keep_base=keep_base)


def ticking(step: float = 1.0) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


# ---- predictions


@pytest.mark.parametrize("x, wanted", [(2, 10), (4, 20), (3, 15), (8, 60), (6, 40), (10, 80), (1, 5), (0, 0)])
def test_interpolation_goes_through_the_points_and_on(x: float, wanted: float) -> None:
    assert interpolate([(2, 10), (4, 20), (8, 60)], x) == wanted


def test_a_single_point_is_a_constant() -> None:
    assert interpolate([(3, 7.0)], 100) == 7.0


def selector(in_place: bool = False) -> Selector:
    """A switch takes 8 + rank, a pass (1 + rank / 4) * tokens."""
    switch = ((0, 8.0), (10, 18.0), (40, 48.0))
    return Selector(switch, {t: ((0, t), (20, 6.0 * t)) for t in (1, 3, 8)}, in_place)


def test_predictions() -> None:
    s = selector()
    assert s.switch_seconds([4, 4]) == 16 and s.switch_seconds([]) == 8 and s.switch_seconds([50]) == 58
    assert s.apply_seconds(1, [8]) == 3 and s.apply_seconds(5, [4, 4]) == 15 and s.apply_seconds(16, [8]) == 48
    assert s.switch_seconds([4], [30]) == 12 and s.unmerge_seconds([30]) == 8  # from copies
    s = selector(in_place=True)
    assert s.switch_seconds([4], [30]) == 42 and s.unmerge_seconds([30]) == 38 and s.switch_seconds([4]) == 12


def test_predictions_are_never_negative() -> None:
    s = Selector(((10, 1.0), (20, 5.0)), {4: ((10, 1.0), (20, 5.0))})
    assert s.switch_seconds([]) == s.apply_seconds(1, []) == s.unmerge_seconds([]) == 0


@pytest.mark.parametrize(
    "tokens, steps, ranks, wanted",
    [
        (1, 5, [8], "token"),  # 15 to 16
        (1, 6, [8], "merged"),  # 18 to 16
        (2, 3, [4, 4], "merged"),
        (2, 2, [4, 4], "token"),
        (1, 0, [8], "token"),
        (1, 8, [], "token"),  # 8 to 8
        (1, 12, [], "merged"),
    ],
)
def test_the_cheaper_way_is_chosen(tokens: int, steps: float, ranks: list[int], wanted: str) -> None:
    assert selector().choose(tokens, steps, ranks) == wanted


def test_what_is_merged_counts() -> None:
    s = selector()
    assert s.choose(1, 3, [8], merged=[8]) == "merged"  # 16 to 9 + 8
    assert s.choose(1, 2, [8], merged=[8]) == "token"
    s = selector(in_place=True)
    assert s.choose(1, 3, [8], merged=[8]) == "merged"  # 24 to 9 + 16
    assert s.choose(1, 2, [8], merged=[8]) == "token"


def test_no_points() -> None:
    for switch, apply in [((), {1: ((0, 1.0),)}), (((0, 1.0),), {}), (((0, 1.0),), {1: ()})]:
        with pytest.raises(ValueError, match="no measured points"):
            Selector(switch, apply)


@pytest.mark.parametrize("value", [-1, float("nan"), "1"])
def test_amounts_that_cannot_be(value: Any) -> None:
    for name in ("tokens", "steps"):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; wanted a number that is not negative"):
            selector().choose(**({"tokens": 1, "steps": 1, "ranks": [8]} | {name: value}))


# ---- calibration


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"runs": 0}, "runs is 0; wanted a positive integer"),
        ({"runs": -3}, "runs is -3"),
        ({"runs": 2.0}, "runs is 2.0"),
        ({"seconds": -1}, "seconds is -1; wanted a number that is not negative"),
        ({"tokens": ()}, r"tokens is \(\); wanted positive integers"),
        ({"tokens": (1, 0)}, r"tokens is \(1, 0\)"),
        ({"tokens": (1.5,)}, r"tokens is \(1.5,\)"),
    ],
)
def test_calibrations_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    _, bank = make_bank()
    with pytest.raises(ValueError, match=message):
        Selector.calibrate(bank, **wrong)


def test_one_run_is_enough() -> None:
    _, bank = make_bank()
    ticks = ticking()
    assert Selector.calibrate(bank, tokens=(1,), runs=1, clock=lambda: next(ticks)).switch[0] == (0, 2.0)


@pytest.mark.parametrize("keep_base", [True, False])
def test_calibration_counts_all_layers(keep_base: bool) -> None:
    """By a clock that moves by one each time it is looked at, a call takes one and a merge two."""
    _, bank = make_bank(keep_base)
    ticks = ticking()
    s = Selector.calibrate(bank, tokens=(3, 1), clock=lambda: next(ticks))
    assert s.switch == tuple((rank, 2.0) for rank in (0, 2, 4, 8, 10))
    assert s.apply == {t: tuple((rank, 4.0) for rank in (0, 2, 4, 8, 10)) for t in (1, 3)}
    assert s.in_place == (not keep_base)


def test_a_sample_stands_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each shape: 48 and 40 of 3 * 48 + 40 weights."""
    monkeypatch.setattr("effk.lora.selector.SAMPLE_BYTES", {"cpu": 1})
    _, bank = make_bank()
    ticks = ticking()
    s = Selector.calibrate(bank, tokens=(1,), clock=lambda: next(ticks))
    assert s.switch[0] == (0, pytest.approx(1 + (3 * 48 + 40) / (48 + 40)))
    assert s.apply[1][0] == (0, 4.0)


def test_runs_end_in_time() -> None:
    """With no time there are three runs and one that warms up: 5 merges with 3 looks at the clock, 20 calls with 2."""
    _, bank = make_bank()
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return 0.0

    Selector.calibrate(bank, tokens=(1,), clock=clock, seconds=0)
    assert looks == 4 * (5 * 3 + 2 * 20 * 2)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_calibration_leaves_the_weights(keep_base: bool, merged: bool) -> None:
    model, bank = make_bank(keep_base)
    if merged:
        bank.switch(["0", "2"], [0.3, 0.4])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    Selector.calibrate(bank, tokens=(1,), seconds=0)
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())

    looks = iter(range(300))  # into the second turn: weights have been written to

    def interrupted() -> float:
        if next(looks) == 299:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        Selector.calibrate(bank, tokens=(1,), clock=interrupted)
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())
    bank.switch(["1"])  # and the bank knows them
    assert not bank.chosen


def test_auto_calibrates_once() -> None:
    _, bank = make_bank()
    assert bank.selector is None
    bank.apply_mode("auto")
    found = bank.selector
    assert found is not None and set(found.apply) == {1, 4, 16}
    bank.apply_mode("merged")
    bank.apply_mode("auto")
    bank.route(["1"], steps=1000)
    assert bank.selector is found
    bank.remove()
    with pytest.raises(RuntimeError, match="the bank was removed"):
        Selector.calibrate(bank)
