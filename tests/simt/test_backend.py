"""The back end is there, and in CI it must be."""

import os

import effk
import pytest

from . import lora, lscd, missing, moe, w4a8


def test_every_op_with_cuda_kernels_runs_here() -> None:
    reason = missing()
    if reason and not os.environ.get("CI"):
        pytest.skip(reason)
    assert reason is None
    for op in (*lora.OPS, *lscd.OPS, *moe.OPS, *w4a8.OPS):
        assert "simt" in effk.backends(op)
