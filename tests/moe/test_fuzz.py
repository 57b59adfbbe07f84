"""Rows, weights and pairs of any sizes never make the CPU kernels leave their buffers, or sums their bound."""

import pytest
from effk import _library

from ..kit import fuzz

CASES = 10_000
SEED = 1


@pytest.mark.slow
@pytest.mark.xdist_group("fuzz")  # the first one compiles
@pytest.mark.parametrize("level", _library.supported_cpu_levels("moe"))
def test_ten_thousand_cases(level: str) -> None:
    words = fuzz.run(fuzz.build("moe"), level, CASES, SEED).split()
    counts = {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}
    assert set(counts) == {"linear", "mlp", "wgrad", "route", "combine", "tame"}
    for name, count in counts.items():
        assert count > CASES // 3, name  # with something to write
    assert CASES // 2 < counts["tame"] < CASES  # numbers that can be compared, and bits that can't
