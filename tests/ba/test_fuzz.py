"""Problems of any kind never make the CPU kernels leave their buffers, or sums their bound."""

import pytest
from effk import _library

from ..kit import fuzz

CASES = 3_000  # most of the time is that of the compiler
SEED = 1


@pytest.mark.slow
@pytest.mark.xdist_group("fuzz")  # the first one compiles
@pytest.mark.parametrize("level", _library.supported_cpu_levels("ba"))
def test_three_thousand_cases(level: str) -> None:
    words = fuzz.run(fuzz.build("ba"), level, CASES, SEED).split()
    counts = {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}
    assert set(counts) == {"observed", "tame", "dense", "numbers"}
    assert counts["observed"] > CASES // 2  # with something to compute
    assert CASES // 2 < counts["tame"] < CASES  # numbers that can be compared, and bits that can't
    assert counts["dense"] > CASES // 50  # points that are seen more often than a chunk holds
    assert counts["numbers"] > 500 * CASES  # results that are known to a millionth or better
