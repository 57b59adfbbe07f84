"""Keys, codes and lists of any sizes never make the CPU kernels leave their buffers, or sums their bound."""

import effk
import pytest

from ..kit import fuzz

CASES = 10_000
SEED = 1


@pytest.mark.slow
@pytest.mark.xdist_group("fuzz")  # the first one compiles
@pytest.mark.parametrize("level", effk.status()["cpu_levels"])
def test_ten_thousand_cases(level: str) -> None:
    words = fuzz.run(fuzz.build("vq"), level, CASES, SEED).split()
    counts = {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}
    assert set(counts) == {"encode", "lut", "score", "topk", "attend", "wrope", "tame"}
    for name, count in counts.items():
        assert count > CASES // 3, name  # with something to compute
    assert CASES // 2 < counts["tame"] < CASES  # numbers that can be compared, and bits that can't
