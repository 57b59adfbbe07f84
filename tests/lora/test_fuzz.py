"""Weights, adapters and tokens of any shapes never make the CPU kernels leave their buffers, or sums their bound."""

import pytest
from effk import _library

from ..kit import fuzz

CASES = 10_000
SEED = 1


@pytest.mark.slow
@pytest.mark.xdist_group("fuzz")  # the first one compiles
@pytest.mark.parametrize("level", _library.supported_cpu_levels("lora"))
def test_ten_thousand_cases(level: str) -> None:
    words = fuzz.run(fuzz.build("lora"), level, CASES, SEED).split()
    merged, applied, tame = int(words[1]), int(words[3]), int(words[5])
    assert merged > CASES // 3 and applied > CASES // 3  # with adapters, and something to write
    assert CASES // 2 < tame < CASES  # numbers that can be compared, and bits that can't
