"""The model of how long a layer over ranks takes: limits that any such model must keep, and EPS-MoE's formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from effk.moe.overlap import MOST_STAGES, Costs, Load, best_stages, predict
from hypothesis import given
from hypothesis import strategies as st

COSTS = Costs(latency=2e-5, byte=5e-12, flop=2e-15, read=4e-13, stage=1e-5, hidden=1.0)
LOAD = Load(tokens=1024, ranks=8, experts=64, pairs=4, cols=2048, inner=1024)

costs = st.builds(
    Costs,
    latency=st.floats(0, 1e-3),
    byte=st.floats(0, 1e-8),
    flop=st.floats(1e-16, 1e-10),
    read=st.floats(0, 1e-9),
    stage=st.floats(0, 1e-3),
    hidden=st.floats(0, 1),
)
loads = st.builds(
    Load,
    tokens=st.just(0.0) | st.floats(1, 1e5),
    ranks=st.sampled_from((1, 2, 4, 8, 64)),
    experts=st.sampled_from((64, 128, 256)),
    pairs=st.integers(1, 8),
    cols=st.sampled_from((64, 2048)),
    inner=st.sampled_from((64, 1024)),
    gated=st.booleans(),
    element=st.sampled_from((2, 4)),
)
stages = st.integers(1, MOST_STAGES)


@given(loads, costs, stages)
def test_times_are_within_what_can_be(load: Load, costs: Costs, stages: int) -> None:
    """No layer is faster than its products or its exchanges, or slower than one after the other."""
    p = predict(load, costs, stages)
    slack = 1e-9 * (p.compute + p.communication)
    assert max(p.compute, p.waiting) <= p.total + slack
    assert p.total <= p.compute + p.communication + slack
    assert p.total >= p.communication * (1 - costs.hidden) - slack
    assert -1e-6 <= p.waiting / p.communication <= 1 + 1e-6 if p.communication else p.waiting == 0


@given(loads, costs)
def test_one_stage_hides_nothing(load: Load, costs: Costs) -> None:
    p = predict(load, costs, 1)
    assert p.total == pytest.approx(p.compute + p.communication, rel=1e-9)
    assert p.waiting == pytest.approx(p.communication, rel=1e-9)


@given(loads, costs, stages)
def test_bytes_dont_depend_on_stages(load: Load, costs: Costs, stages: int) -> None:
    """Only latencies do: a token visits a rank once."""
    more = predict(load, costs, stages).communication - predict(load, costs, 1).communication
    assert more == pytest.approx(2 * costs.latency * (stages - 1), rel=1e-6, abs=1e-9)


@given(loads, costs)
def test_the_best_number_is_the_best(load: Load, costs: Costs) -> None:
    best = best_stages(load, costs)
    most = min(MOST_STAGES, load.local)
    assert 1 <= best <= max(1, most)
    times = [predict(load, costs, n).total for n in range(1, most + 1)]
    assert times[best - 1] <= times[0]
    assert min(times) >= 0.994 * times[best - 1]


@given(loads, costs)
def test_it_turns_itself_off(load: Load, costs: Costs) -> None:
    """Where nothing is to be hidden, nothing can be, or a stage costs more than all exchanges."""
    assert best_stages(replace(load, ranks=1), replace(costs, latency=0.0)) == 1
    assert best_stages(load, replace(costs, hidden=0.0)) == 1
    assert best_stages(load, replace(costs, latency=0.0, stage=predict(load, costs, 1).communication + 1e-9)) == 1


def test_one_expert_a_visit_is_the_formula_of_the_paper() -> None:
    """C / N + k N is least at sqrt(C / k), where products outweigh exchanges."""
    load = replace(LOAD, pairs=1, experts=512)
    for stage in (1e-6, 1e-5, 1e-4):
        costs = replace(COSTS, latency=0.0, byte=5e-11, stage=stage, flop=1e-13)
        exchanges = predict(load, costs, 1).communication
        wanted = math.sqrt(exchanges / stage)
        assert 1 < wanted < 64
        found = best_stages(load, costs)
        assert abs(found - min(wanted, MOST_STAGES)) <= max(1.0, 0.1 * wanted)


def test_more_experts_a_visit_leave_more_to_wait_for() -> None:
    """With two stages nearly all visits begin with the first and end with the last."""
    few, many = (predict(replace(LOAD, pairs=pairs), replace(COSTS, latency=0.0, flop=1e-13), 2) for pairs in (1, 32))
    assert few.waiting / few.communication < 0.6 < 0.7 < many.waiting / many.communication


def test_hidden_share() -> None:
    p = predict(LOAD, replace(COSTS, flop=1e-13), 4)
    assert 0 < p.hidden < 1
    assert p.hidden == pytest.approx(1 - (p.total - p.compute) / p.communication)
    slowed = predict(LOAD, replace(COSTS, flop=1e-13, hidden=0.5), 4)
    assert slowed.hidden == pytest.approx(p.hidden / 2, rel=1e-6)
