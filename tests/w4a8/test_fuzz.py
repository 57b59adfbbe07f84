"""Packed tensors of any contents never make the CPU kernels leave their buffers, or disagree among levels."""

import pytest
from effk import _library

from ..kit import fuzz

CASES = 10_000
SEED = 1


@pytest.mark.slow
@pytest.mark.xdist_group("fuzz")  # the first one compiles
@pytest.mark.parametrize("level", _library.supported_cpu_levels("w4a8"))
def test_ten_thousand_cases(level: str) -> None:
    words = fuzz.run(fuzz.build("w4a8"), level, CASES, SEED).split()
    mixed, tame = int(words[1]), int(words[3])
    assert mixed > CASES // 2  # with rows of both kinds
    assert CASES // 4 < tame < 3 * CASES // 4  # numbers that can be compared, and bits that can't
