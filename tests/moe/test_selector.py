"""The cost model between grouped and dense GEMMs: its fit, its file, and that the kernels follow it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import effk
import pytest
import torch
from effk import _library
from effk.moe import selector

from ..kit.tensors import same_bits

LEVELS = _library.supported_cpu_levels("moe")[1:]  # the scalar one has no choice
NEVER = 1e30  # a cost


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """A level in force, and its costs put back in the end."""
    with effk._library.cpu_level(request.param):
        before = {dtype: selector.exchange_costs(dtype, (1.0,) * 5) for dtype in selector.FLOATS}
        for dtype, costs in before.items():
            selector.exchange_costs(dtype, costs)
        yield request.param
        for dtype, costs in before.items():
            selector.exchange_costs(dtype, costs)


def layer(rows: list[int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    experts, cols, inner = len(rows), 100, 40
    ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(rows))[:, None]
    return (
        torch.randn(len(ids), cols).to(dtype),
        torch.randn(experts, 2 * inner, cols).to(dtype),
        torch.randn(experts, cols, inner).to(dtype),
        torch.rand(len(ids), 1),
        ids,
    )


@pytest.mark.parametrize("dtype", selector.FLOATS)
def test_auto_follows_the_costs_for_each_expert(level: str, dtype: torch.dtype) -> None:
    """Costs under which 20 rows or more are cheaper dense: results have the bits of that way, expert by expert."""
    selector.exchange_costs(dtype, (0.0, 1.0, 19.5, 0.0, 0.0))
    args = layer([19, 20, 0, 64, 3], dtype)
    by = {gemm: effk.moe.mlp(*args, gemm=gemm) for gemm in ("auto", "grouped", "dense")}
    assert not same_bits(by["grouped"], by["dense"]) or dtype != torch.float32
    rows = args[-1][:, 0]
    few = (rows == 0) | (rows == 4)
    assert same_bits(by["auto"][few], by["grouped"][few])
    assert same_bits(by["auto"][~few], by["dense"][~few])


def test_the_grouped_gemm_follows_them_too(level: str) -> None:
    x, w, *_ = layer([64])
    offsets = torch.tensor([64])
    made = []
    for costs in ((0.0, NEVER, 1.0, 0.0, 0.0), (0.0, 1.0, NEVER, 0.0, 0.0)):
        selector.exchange_costs(x.dtype, costs)
        made.append(effk.moe.grouped_gemm(x, w, offsets))
    assert not same_bits(*made)
    torch.testing.assert_close(*made)


def test_fit_finds_the_costs_of_exact_times(level: str) -> None:
    costs = (100.0, 9.0, 150.0, 60.0, 2000.0)
    width = {"avx2": 8, "avx512": 16}[level]
    points: list[selector.Point] = []
    for experts, cols, inner in selector.SIZES:
        for rows in selector.ROWS:
            n, x = 3.0 * experts * cols * inner, float(experts * rows * cols)
            read, dot, lay_out, multiply, pack = costs
            points.append(("grouped", rows, n, x, n * max(read, dot * rows)))
            points.append(("dense", rows, n, x, n * (lay_out + multiply * math.ceil(rows / width)) + x * pack))
    assert selector.fit(points) == pytest.approx(costs, rel=1e-6)


def test_calibration_is_kept_and_found(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selector, "SIZES", ((2, 64, 32), (2, 32, 64)))
    monkeypatch.setattr(selector, "ROWS", (1, 4, 40))
    found = effk.moe.calibrate([torch.bfloat16], runs=1, progress=False)
    assert list(found) == ["bfloat16"] and all(c >= 0 for c in found["bfloat16"])
    kept = json.loads(selector.cache_file().read_text())
    assert kept[selector.machine()][level]["bfloat16"] == list(found["bfloat16"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "effk", selector.cache_file()]  # nothing beside it
    for dtype in selector.FLOATS:
        selector.exchange_costs(dtype, (1.0,) * 5)
    selector.load()
    assert selector.exchange_costs(torch.bfloat16, (1.0,) * 5) == found["bfloat16"]
    assert selector.exchange_costs(torch.float32, (1.0,) * 5) == (1.0,) * 5

    effk.moe.calibrate([torch.float32], runs=1, progress=False)
    assert set(json.loads(selector.cache_file().read_text())[selector.machine()][level]) == {"bfloat16", "float32"}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 10**6, '{"MACHINE": []}', '{"MACHINE": {"LEVEL": 1}}']
    + [
        f'{{"MACHINE": {{"LEVEL": {{"float32": {c}}}}}}}'
        for c in (
            "1",
            "[1, 2]",
            '["a", 1, 1, 1, 1]',
            "[-1, 1, 1, 1, 1]",
            "[true, 1, 1, 1, 1]",
            f"[{10**400}, 1, 1, 1, 1]",
        )
    ]
    + [
        '{"MACHINE": {"LEVEL": {"float32": [NaN, 1, 1, 1, 1]}}}',
        '{"MACHINE": {"LEVEL": {"float32": [Infinity, 1, 1, 1, 1]}}}',
    ],
)
def test_a_broken_file_changes_nothing(
    level: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = selector.cache_file()
    path.parent.mkdir()
    path.write_text(content.replace("MACHINE", selector.machine()).replace("LEVEL", level))
    costs = (5.0, 4.0, 3.0, 2.0, 1.0)
    selector.exchange_costs(torch.float32, costs)
    selector.load()
    assert selector.exchange_costs(torch.float32, costs) == costs
    monkeypatch.setattr(selector, "SIZES", ((2, 64, 32), (2, 32, 64)))
    monkeypatch.setattr(selector, "ROWS", (1, 4, 40))
    effk.moe.calibrate([torch.float32], runs=1, progress=False)  # writes a whole one
    assert len(selector.read(path)[selector.machine()][level]["float32"]) == 5


def test_the_scalar_level_has_no_choice() -> None:
    with effk._library.cpu_level("scalar"), pytest.raises(RuntimeError, match=r"scalar.*nothing to choose"):
        effk.moe.calibrate([torch.float32], save=False)
