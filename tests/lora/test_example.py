"""The examples run, and find what they claim: the first exits with an error where the ways don't agree."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MISSING = [name for name in ("transformers", "peft", "safetensors") if importlib.util.find_spec(name) is None]


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see requirements-dev.txt)")
def test_router_example_runs() -> None:
    out = run("lora_router.py", "--quick")
    rows = re.findall(r"^  (\S[\w ]*?) +(\d+\.\d\d)(?: +-?\d+\.\d\d +\d+\.\d\dx)?$", out, re.M)
    assert [name for name, _ in rows] == [
        "no adapters",
        "merged",
        "token by token",
        "auto",
        "PEFT merged",
        "PEFT token by token",
    ]
    assert all(float(ms) > 0 for _, ms in rows) and "as it was, bit by bit" in out


def test_selector_example_runs() -> None:
    out = run("lora_selector.py", "--quick")
    assert re.search(r"^regret: mean \d+\.\d%, by time \d+\.\d%, worst \d+\.\d%", out, re.M)
    rows = re.findall(r"^ +\d+ +\d+ +\d+ +\d+ +\d+ .*(merged|token) +(merged|token) +(\d+\.\d)%$", out, re.M)
    assert rows and all(chosen != better for chosen, better, regret in rows if regret != "0.0")
