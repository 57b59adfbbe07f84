"""The model of how long a layer over ranks takes: limits that any such model must keep, and EPS-MoE's formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from effk.moe.overlap import MOST_STAGES, Costs, Load, best_stages, predict
from hypothesis import given
from hypothesis import strategies as st

COSTS = Costs(call=1e-4, stage=1e-5, byte=5e-12, hidden=1.0, products=((1.0, 4e-13), (100.0, 4e-13)))
SLOW = ((1.0, 1e-12), (100.0, 1e-10))  # products that outweigh exchanges
LOAD = Load(tokens=1024, ranks=8, experts=64, pairs=4, cols=2048, inner=1024)

costs = st.builds(
    Costs,
    call=st.floats(0, 1e-3, allow_subnormal=False),
    stage=st.floats(0, 1e-3, allow_subnormal=False),
    byte=st.floats(0, 1e-8, allow_subnormal=False),
    hidden=st.floats(0, 1, allow_subnormal=False),
    products=st.builds(
        lambda least, more: ((1.0, least), (8.0, least), (64.0, least + more)),
        st.floats(1e-16, 1e-9),
        st.floats(0, 1e-7, allow_subnormal=False),
    ),
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
    slack = 1e-9 * (p.call + p.compute + p.communication)
    assert max(p.compute, p.waiting) + p.call <= p.total + slack
    assert p.total <= p.call + p.compute + p.communication + slack
    assert p.total >= p.communication * (1 - costs.hidden) - slack
    assert -slack <= p.waiting <= p.communication + slack


@given(loads, costs)
def test_one_stage_hides_nothing(load: Load, costs: Costs) -> None:
    p = predict(load, costs, 1)
    assert p.total == pytest.approx(p.call + p.compute + p.communication, rel=1e-9)
    assert p.waiting == pytest.approx(p.communication, rel=1e-9)


@given(loads, costs, stages)
def test_bytes_dont_depend_on_stages(load: Load, costs: Costs, stages: int) -> None:
    """A token visits a rank once."""
    one, many = predict(load, costs, 1), predict(load, costs, stages)
    assert many.communication == pytest.approx(one.communication, rel=1e-6, abs=1e-12)
    assert many.compute - one.compute == pytest.approx(costs.stage * (stages - 1), rel=1e-6, abs=1e-9 * one.compute)


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
    assert best_stages(replace(load, ranks=1), costs) == 1
    assert best_stages(load, replace(costs, hidden=0.0)) == 1
    assert best_stages(load, replace(costs, stage=predict(load, costs, 1).communication + 1e-9)) == 1


def test_one_expert_a_visit_is_the_formula_of_the_paper() -> None:
    """C / N + k N is least at sqrt(C / k), where products outweigh exchanges."""
    load = replace(LOAD, pairs=1, experts=512)
    for stage in (1e-6, 1e-5, 1e-4):
        costs = replace(COSTS, byte=5e-11, stage=stage, products=SLOW)
        exchanges = predict(load, costs, 1).communication
        wanted = math.sqrt(exchanges / stage)
        assert 1 < wanted < 64
        found = best_stages(load, costs)
        assert abs(found - min(wanted, MOST_STAGES)) <= max(1.0, 0.1 * wanted)


def test_more_experts_a_visit_leave_more_to_wait_for() -> None:
    """With two stages nearly all visits begin with the first and end with the last."""
    few, many = (predict(replace(LOAD, pairs=pairs), replace(COSTS, products=SLOW), 2) for pairs in (1, 32))
    assert few.waiting / few.communication < 0.6 < 0.7 < many.waiting / many.communication


def test_hidden_share() -> None:
    p = predict(LOAD, replace(COSTS, products=SLOW), 4)
    assert 0 < p.hidden < 1
    assert p.hidden == pytest.approx(1 - (p.total - p.call - p.compute) / p.communication)
    slowed = predict(LOAD, replace(COSTS, products=SLOW, hidden=0.5), 4)
    assert slowed.hidden == pytest.approx(p.hidden / 2, rel=1e-6)


def test_time_of_an_element_by_rows() -> None:
    """Between the rows that were measured, and in proportion beyond."""
    costs = replace(COSTS, products=((1.0, 2.0), (4.0, 2.0), (16.0, 8.0)))
    assert [costs.of_element(r) for r in (0.5, 1, 3, 4, 10, 16, 32)] == [2, 2, 2, 2, 5, 8, 16]


def test_costs_of_limits() -> None:
    """Reading below the rows at which products outweigh it."""
    costs = Costs.of_limits(0, 0, 0, 1, flops=4e14, bandwidth=2e12)
    for rows in (1, 50, 200):
        assert costs.of_element(rows) == pytest.approx(2 / 2e12)
    for rows in (200, 1000):
        assert costs.of_element(rows) == pytest.approx(2 * rows / 4e14)


def test_ranks_are_waited_for() -> None:
    """The fewer tokens there are, the more the ranks' loads differ."""
    few, many = (predict(replace(LOAD, tokens=tokens), COSTS, 1).compute / tokens for tokens in (1e4, 1e6))
    assert 1.001 * many < few < 1.1 * many
