"""The examples run. They exit with an error where a model's logits aren't those of its own code, or where experts over
ranks compute something else than together."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..kit.ranks import needs_gloo

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="not installed: transformers (see requirements-dev.txt)"
)
def test_example_runs() -> None:
    command = [sys.executable, EXAMPLES / "moe_transformers.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (\w+) +(\d\.\d\de-\d\d) +(\d+\.\d\d) +(\d+\.\d\d)$", done.stdout, re.M)
    assert [name for name, *_ in rows] == ["eager", "grouped_mm", "effk"]
    assert all(float(number) > 0 for _, *numbers in rows for number in numbers)


def torchrun(ranks: int, *args: str | Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_gloo
def test_expert_parallel_example(tmp_path: Path) -> None:
    """Its loss falls, its layers are those of gathered experts, and the picture is one."""
    small = ("--tokens", "32", "--experts", "8", "--cols", "64", "--inner", "32")
    picture = tmp_path / "timeline.png"
    with_picture = ("--timeline", picture) if importlib.util.find_spec("matplotlib") else ()
    said = torchrun(2, EXAMPLES / "moe_expert_parallel.py", "--steps", "25", *small, *with_picture)
    first, last = map(float, re.findall(r"loss (\d\.\d+) -> (\d\.\d+)", said)[0])
    assert last < 0.8 * first
    assert len(re.findall(r"rank \d: layers are off those of gathered experts by \d\.\de-\d\d", said)) == 2
    assert not with_picture or picture.read_bytes().startswith(b"\x89PNG")


@needs_gloo
def test_overlap_example_measures() -> None:
    small = ("--tokens", "1", "16", "--experts", "8", "--cols", "64", "--inner", "32", "--pairs", "2", "--runs", "2")
    said = torchrun(2, EXAMPLES / "moe_overlap.py", *small)
    assert said.count("(chosen)") == 2 and "Costs(call=" in said


def test_overlap_example_predicts() -> None:
    """From 8 to 1024 ranks; nothing is gained where exchanges take as much from products as they last."""

    def gains(*args: str) -> dict[tuple[int, int], float]:
        command = [sys.executable, EXAMPLES / "moe_overlap.py", "--tokens", "1024", *args]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "DeepSeek-V2" in done.stdout, done.stderr
        rows = re.findall(r"│ (\d+) +│ (\d+) +│ [\d.]+ ms │ [\d.]+ ms │ \d+ +│ (\d+\.\d)% +│", done.stdout)
        return {(int(ranks), int(tokens)): float(gain) for ranks, tokens, gain in rows}

    usual, busy = gains(), gains("--hidden", "0")
    assert [ranks for ranks, _ in usual] == [8, 16, 32, 64, 128, 256, 512, 1024] == [ranks for ranks, _ in busy]
    assert usual[8, 1024] > 0 == max(busy.values())
