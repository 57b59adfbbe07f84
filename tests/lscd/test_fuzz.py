"""Corrupt bitmaps, offsets and values never make the CPU kernels leave their buffers."""

import pytest
from effk import _library

from ..kit import fuzz

CASES = 10_000
SEED = 1


@pytest.mark.slow
@pytest.mark.xdist_group("fuzz")  # the first one compiles
@pytest.mark.parametrize("level", _library.supported_cpu_levels("lscd"))
def test_ten_thousand_corrupt_cases(level: str) -> None:
    words = fuzz.run(fuzz.build("lscd"), level, CASES, SEED).split()
    valid, corrupt = int(words[1]), int(words[3])
    assert valid + corrupt == CASES
    assert min(valid, corrupt) > CASES // 5  # both kinds are there in earnest
