"""The checker finds bugs that were planted for it, whatever order the threads run in, and nothing where there is none.

The kernels are in planted.cpp.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import Device, missing, module, seeded

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SEEDS = range(20)
CLEAN_SEEDS = range(50)

SHARED_RACE = r"race on shared memory"
GLOBAL_RACE = r"race on global memory"
BARRIER = r"barrier not reached by all threads"
LANES = r"lanes of a warp at different operations"
COPY = r"asynchronous copy not waited for"
TWO_THREADS = r"byte \d+ of dynamic shared memory\n  thread \d+ .* at simt/planted.cpp:\d+\n  thread \d+ .* at simt/pl"
COPY_PLACES = r"thread \d+ .* reads at simt/planted.cpp.*\n  thread \d+ .* started the copy at simt/planted.cpp"
PAST_END = r"bytes 256 to 259 of .*, which has 256\n  thread 63 .* "

# Kernel -> what a report says first, and what it says below.
PLANTED = {
    "no_sync_block": (SHARED_RACE, TWO_THREADS),
    "sync_warp_for_block": (SHARED_RACE, TWO_THREADS),
    "no_sync_warp": (SHARED_RACE, TWO_THREADS),
    "shuffle_for_sync_warp": (SHARED_RACE, TWO_THREADS),
    "overwritten_too_early": (SHARED_RACE, TWO_THREADS),
    "two_writers": (SHARED_RACE, TWO_THREADS),
    "no_atomic": (SHARED_RACE, TWO_THREADS),
    "named_barrier_of_others": (SHARED_RACE, TWO_THREADS),
    "blocks_write_the_same": (
        GLOBAL_RACE,
        r"of out\n  thread .* writes .*\n  thread .*, block \([01], 0, 0\), wrote",
    ),
    "uninitialised_shared": (r"read of uninitialised shared memory", r"byte 20 of dynamic .*\n  thread 58 .* reads"),
    "uninitialised_output": (r"read of uninitialised global memory", r"of out\n"),
    "past_shared": (
        r"out of bounds of shared memory",
        PAST_END + "writes",
    ),
    "past_static_shared": (r"out of bounds of shared memory", r"of tile, which has 128\n"),
    "past_address": (
        r"out of bounds of shared memory",
        PAST_END + "reads",
    ),
    "past_global": (r"out of bounds of global memory", PAST_END + "reads"),
    "before_global": (r"out of bounds of global memory", r"bytes -4 to -1 of out, 4 before .*\n  thread 0 .* writes"),
    "null_pointer": (r"out of bounds of global memory", r"far from all tensors"),
    "writes_input": (r"write to an input", r"of in\n"),
    "misaligned": (r"misaligned access", r"load_once wants 16 aligned bytes"),
    "misaligned_pointer": (r"misaligned access", r"thread \d+ .* accesses .* at simt/planted.cpp"),
    "barrier_in_a_branch": (BARRIER, r"threads 0-31: at sync_block, .*\n  threads 32-63: returned"),
    "returns_before_barrier": (BARRIER, r"threads 0-62: at sync_block, .*\n  threads 63: returned"),
    "barriers_crossed": (BARRIER, r"threads 0-63: at sync_threads"),
    "half_a_warp_at_the_barrier": (BARRIER, r"threads 1, 3, .*: at sync_block, .*\n  threads 0, 2, .*: at sync_warp"),
    "shuffle_from_returned_lane": (
        r"shuffle from an inactive lane",
        r"wants the value of lane (1[6-9]|2\d|3[01])",
    ),
    "shuffle_in_a_branch": (LANES, r"is at shuffle"),
    "shuffle_of_some": (LANES, r"is at shuffle"),
    "copy_without_wait": (COPY, COPY_PLACES),
    "copy_waited_for_too_few": (
        COPY,
        COPY_PLACES,
    ),
    "copy_without_commit": (COPY, COPY_PLACES),
    "copy_without_barrier": (SHARED_RACE, TWO_THREADS),
    "copy_over_what_is_read": (SHARED_RACE, TWO_THREADS),
    "copy_never_waited_for": (COPY, r"started the copy at simt/planted.cpp:\d+, and returned"),
}
CLEAN = {
    "clean": lambda x: x,
    "clean_pipeline": lambda x: x.view(4, 16).flip(1).flatten(),
}


def run(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's input and output."""
    x = torch.arange(64, dtype=torch.int32) * 3 + 1
    out = torch.zeros_like(x)
    with seeded(seed), Device() as device:
        module().planted(name, device.input("in", x), device.output("out", out))
    return x, out


def test_no_kernel_is_forgotten() -> None:
    assert set(module().planted_names()) == {*PLANTED, *CLEAN}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(name: str) -> None:
    """With every seed, and as what it is: the kernel, the place and the threads."""
    what, details = PLANTED[name]
    for seed in SEEDS:
        with pytest.raises(module().Report) as caught:
            run(name, seed)
        report = str(caught.value)
        assert re.match(rf"simt: {what}\n  in {name}, block \([01], 0, 0\) of .*, seed {seed}\n", report), report
        assert re.search(details, report), report


@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernel_passes(name: str) -> None:
    for seed in CLEAN_SEEDS:
        x, out = run(name, seed)
        assert torch.equal(out, CLEAN[name](x)), seed


def test_report_names_the_line() -> None:
    lines = Path(__file__).with_name("planted.cpp").read_text().splitlines()
    with pytest.raises(module().Report) as caught:
        run("no_sync_block", 0)
    for verb, text in (
        ("(reads|read)", "a.out[t] = shared_ints()[kThreads - 1 - t];"),
        ("(writes|wrote)", "= a.in[t];"),
    ):
        line = re.search(rf"{verb} at simt/planted.cpp:(\d+)", str(caught.value))
        assert line and lines[int(line[2]) - 1].endswith(text)


def test_same_seed_same_report() -> None:
    def report(seed: int) -> str:
        with pytest.raises(module().Report) as caught:
            run("no_sync_block", seed)
        return str(caught.value)

    assert report(3) == report(3)
    assert len({report(seed) for seed in SEEDS}) > 1  # the order is another one


def test_seed_of_the_environment() -> None:
    code = "from tests import simt; print(simt.module().seed())"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env={**os.environ, "EFFK_SIMT_SEED": "7"}, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr
