"""The example runs; it exits with an error where effk's logits aren't those of the model's own code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
