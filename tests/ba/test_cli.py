"""python -m effk.ba, in this process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from effk.ba import Problem, solve
from effk.ba.__main__ import main

from ..kit.tensors import same_bits
from . import solver_strategies as kit
from .solver_strategies import cost_of, scene


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A BAL file."""
    path = tmp_path / "problem.txt"
    scene(5, 25, seed=1)[0].to_bal(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A COLMAP model whose images are of one camera."""
    problem, truth = scene(5, 25, model="opencv", seed=1)
    kit.shared_intrinsics(problem, truth, 0.5)
    problem.to_colmap(tmp_path / "sparse")
    return tmp_path / "sparse"


def numbers(out: str) -> tuple[float, float]:
    """The costs of the summary."""
    words = next(line for line in reversed(out.splitlines()) if line.startswith("cost ")).split()
    return float(words[1]), float(words[3])


@pytest.mark.parametrize("end", ["", ".gz", ".bz2"])
def test_bal(file: Path, capsys: pytest.CaptureFixture[str], end: str) -> None:
    source, result = file.with_name(f"in.txt{end}"), file.with_name(f"out.txt{end}")
    problem = Problem.from_bal(file)
    problem.to_bal(source)
    before = source.read_bytes()
    assert main([str(source), "-o", str(result)]) == 0
    out, err = capsys.readouterr()
    summary = solve(problem)
    found = Problem.from_bal(result)
    assert same_bits(found.cameras, problem.cameras) and same_bits(found.points, problem.points)
    assert same_bits(found.observations, problem.observations)
    assert source.read_bytes() == before and err == ""
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["iter", "cost"] and len(lines) == 1 + len(summary.history) + 3
    assert numbers(out) == pytest.approx((summary.initial_cost, summary.final_cost), rel=1e-6)


def test_colmap(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result"
    problem = Problem.from_colmap(folder)
    assert problem.columns is not None and int(problem.columns.max()) + 1 == 5 * 6 + 8
    assert main([str(folder), "--output", str(result)]) == 0
    summary = solve(problem)
    found = Problem.from_colmap(result)
    torch.testing.assert_close(found.cameras, problem.cameras, rtol=1e-14, atol=1e-15)
    assert same_bits(found.points, problem.points)
    assert cost_of(found) == pytest.approx(summary.final_cost, rel=1e-9)
    assert "cost" in capsys.readouterr().out


def test_quiet(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The summary, and a bar rather than lines; without -o nothing is written."""
    bars: list[bool] = []

    def bar(description: str, total: int, enabled: bool) -> Any:
        bars.append(enabled)
        return contextlib.nullcontext(lambda: None)

    monkeypatch.setattr(sys.modules["effk.ba.solve"], "progress_bar", bar)
    before = sorted(file.parent.iterdir())
    assert main([str(file), "-q"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and err == ""
    assert out.startswith("5 cameras, 25 points, 125 observations; dense_schur")
    assert sorted(file.parent.iterdir()) == before
    assert main([str(file)]) == 0 and bars == [True, False]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--loss", "huber", "--loss-scale", "0.3"], {"loss": "huber", "loss_scale": 0.3}),
        (["--linear-solver", "iterative_schur"], {"linear_solver": "iterative_schur"}),
        (["--max-iterations", "2"], {"max_iterations": 2}),
        (["--max-seconds", "0"], {"max_seconds": 0.0}),
        (["--function-tolerance", "0.5"], {"function_tolerance": 0.5}),
    ],
)
def test_options(file: Path, capsys: pytest.CaptureFixture[str], options: list[str], wanted: dict[str, object]) -> None:
    """Each changes what comes out, as it does for solve."""
    problem = Problem.from_bal(file)
    plain = solve(problem.clone())
    summary = solve(problem, **wanted)
    assert main([str(file), "-q", *options]) == 0
    out = capsys.readouterr().out
    assert numbers(out) == pytest.approx((summary.initial_cost, summary.final_cost), rel=1e-6)
    assert out.splitlines()[0] == str(summary).splitlines()[0]
    assert out.splitlines()[2] == summary.termination
    assert str(plain).splitlines()[0] != out.splitlines()[0] or plain.termination != summary.termination


def test_fix_and_share_intrinsics(file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "out.txt"
    assert main([str(file), "-q", "--fix-intrinsics", "-o", str(result)]) == 0
    before, after = Problem.from_bal(file), Problem.from_bal(result)
    assert same_bits(before.cameras[:, 6:], after.cameras[:, 6:])
    assert bool((before.cameras[:, 3:6] != after.cameras[:, 3:6]).all())
    # Those of a file differ, which are refused.
    capsys.readouterr()
    assert main([str(file), "-q", "--share-intrinsics"]) == 1
    assert "columns ties f of camera 0" in capsys.readouterr().err
    before.cameras[:, 6:] = before.cameras[:1, 6:].clone()
    before.to_bal(file)
    assert main([str(file), "-q", "--share-intrinsics", "-o", str(result)]) == 0
    own = Problem.from_bal(result).cameras[:, 6:]
    assert same_bits(own, own[:1].repeat(5, 1)) and not same_bits(own, before.cameras[:, 6:])


def test_position(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From rotations, whatever the rest of the file says."""
    problem, _ = scene(5, 25, seed=1, perturbation=0.0)
    problem.cameras[:, 3:6] = 0.0
    problem.points.zero_()
    problem.to_bal(file)
    assert main([str(file), "-q"]) == 1  # points in the planes of all cameras
    capsys.readouterr()
    assert main([str(file), "--position", "-o", str(tmp_path / "out.txt")]) == 0
    final = solve(scene(5, 25, seed=1)[0]).final_cost
    out = capsys.readouterr().out
    assert numbers(out)[1] == pytest.approx(final, rel=1e-4)
    assert out.count("iter ") == 2  # of both solves


def test_device(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "-q", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([str(file), "-q", "--device", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_wrong_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, and a line that names the file; no output file."""
    broken, empty = tmp_path / "broken.txt", tmp_path / "empty"
    broken.write_text(file.read_text().replace("\n0 1 ", "\n0 99 ", 1))
    empty.mkdir()
    for path in (tmp_path / "absent.txt", broken, empty):
        assert main([str(path), "-o", str(tmp_path / "out.txt")]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and str(path) in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.txt").exists()
    # A place where nothing can be written.
    assert main([str(file), "-q", "-o", str(tmp_path / "absent" / "out.txt")]) == 1
    assert "absent" in capsys.readouterr().err


def test_wrong_options(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--loss", "l2"], ["--max-iterations", "many"], ["--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main([str(file), *options])
        assert caught.value.code == 2
        assert options[0] in capsys.readouterr().err
    assert main([str(file), "-q", "--max-iterations", "-1"]) == 1
    assert "max_iterations is -1" in capsys.readouterr().err
    assert main([str(file), "-q", "--loss-scale", "0"]) == 1
    assert "loss_scale is 0" in capsys.readouterr().err


def test_plot(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([str(file), "-q", "--plot", str(tmp_path / "cost.png")]) == 0
    assert (tmp_path / "cost.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_without_matplotlib(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is solved or written."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out.txt"
    assert main([str(file), "-q", "-o", str(out), "--plot", str(tmp_path / "cost.png")]) == 1
    assert "matplotlib" in capsys.readouterr().err and not out.exists()


def test_as_a_module(file: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "effk.ba", str(file), "-q"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("5 cameras"), done.stderr
