"""python -m effk.ba, in this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from effk.ba import Problem, position_globally, solve
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
    assert main([str(folder), "-q", "--fix-principal-point", "-o", str(tmp_path / "sparse 2")]) == 0
    before, after = Problem.from_colmap(folder), Problem.from_colmap(tmp_path / "sparse 2")
    assert (before.cameras == after.cameras).all(0).nonzero().flatten().tolist() == [9, 10]
    capsys.readouterr()
    assert main([str(file), "-q", "--fix-principal-point"]) == 1 and "no principal point" in capsys.readouterr().err
    # Those of a file differ, which are refused.
    before = Problem.from_bal(file)
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


@pytest.mark.parametrize("end", ["other.svg", "other"])
def test_pictures_of_a_kind(file: Path, end: str) -> None:
    pytest.importorskip("matplotlib")
    assert main([str(file), "-q", "--plot", str(file.with_name(end))]) == 0
    assert file.with_name(end if "." in end else f"{end}.png").stat().st_size > 1000


def test_what_is_wrong_is_said_before_a_solve(
    file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left behind."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("effk.ba.__main__.solve", None)
    rigs = tmp_path / "rigs"
    rigs.mkdir()
    (rigs / "rigs.bin").touch()
    named = tmp_path / "named"
    Problem.from_colmap(folder).to_colmap(named, binary=False)
    names = (named / "images.txt").read_text()
    (named / "images.txt").write_text(names.replace("000002.png", "far away.png"))
    before = sorted(tmp_path.rglob("*"))
    for source, options, message in (
        (file, ["-o", str(tmp_path / "absent" / "out.txt")], "absent/out.txt"),
        (file, ["-o", str(folder)], "Is a directory"),
        (file, ["-o", str(file / "out.txt")], "Not a directory"),
        (folder, ["-o", str(file)], "Not a directory"),
        (folder, ["-o", str(file / "new" / "out")], "Not a directory"),
        (folder, ["-o", str(rigs)], "has rigs.bin, which would contradict the model"),
        (named, ["-o", str(folder)], "has cameras.bin, images.bin, points3D.bin, which would contradict"),
        (named, ["-o", str(tmp_path / "new")], "name 'far away.png', which a text file can't hold"),
        (file, ["--plot", str(tmp_path / "cost.what")], "cost.what ends in .what; wanted one of"),
        (file, ["--plot", str(tmp_path / "absent" / "cost.png")], "absent/cost.png"),
    ):
        assert main([str(source), *options]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_there(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "-q", "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_text_stays_text(folder: Path, tmp_path: Path) -> None:
    """In its own folder too, where nothing old stays behind."""
    text = tmp_path / "text"
    Problem.from_colmap(folder).to_colmap(text, binary=False)
    before = Problem.from_colmap(text)
    assert main([str(text), "-q", "-o", str(text)]) == 0
    assert sorted(path.name for path in text.iterdir()) == ["cameras.txt", "images.txt", "points3D.txt"]
    assert cost_of(Problem.from_colmap(text)) < 0.9 * cost_of(before)


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, iterations: int) -> None:
    """Ctrl-C in that of the functions, after so many."""
    real = getattr(sys.modules["effk.ba.__main__"], name)

    def interrupted(problem: Problem, callback: Any = None, **options: Any) -> None:
        calls: list[object] = []

        def counted(i: Any) -> None:
            if callback:
                callback(i)
            calls.append(i)
            if len(calls) > iterations:
                raise KeyboardInterrupt

        real(problem, callback=counted, **options)

    monkeypatch.setattr(f"effk.ba.__main__.{name}", interrupted)


@pytest.mark.parametrize("iterations", [0, 2])
def test_interrupted(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, iterations: int
) -> None:
    pytest.importorskip("matplotlib")
    wanted, picture, out = Problem.from_bal(file), file.with_name("cost.png"), file.with_name("out.txt")
    solve(wanted, max_iterations=iterations)
    interrupt(monkeypatch, "solve", iterations)
    assert main([str(file), "-o", str(out), "--plot", str(picture)]) == 130
    found = Problem.from_bal(out)
    assert same_bits(found.cameras, wanted.cameras) and same_bits(found.points, wanted.points)
    assert picture.stat().st_size > 1000 and capsys.readouterr().err == "interrupted\n"


def test_interrupted_while_positioning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, out = Problem.from_bal(file), file.with_name("out.txt")
    position_globally(wanted, max_iterations=2)
    interrupt(monkeypatch, "position_globally", 2)
    assert main([str(file), "-q", "--position", "-o", str(out)]) == 130
    found = Problem.from_bal(out)
    assert same_bits(found.cameras, wanted.cameras) and same_bits(found.points, wanted.points)


def test_options_of_both_solves(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def noted(problem: Problem, **options: Any) -> None:
        given.append(options)
        time.sleep(0.05)

    for name in ("position_globally", "solve"):
        monkeypatch.setattr(f"effk.ba.__main__.{name}", noted)
    options = ["--linear-solver", "sparse_schur", "--max-iterations", "7", "--max-seconds", "1"]
    assert main([str(file), "--position", *options]) == 0
    assert [g["linear_solver"] for g in given] == ["sparse_schur"] * 2 and [g["max_iterations"] for g in given] == [
        7,
        7,
    ]
    assert given[0]["max_seconds"] == 1 and 0 < given[1]["max_seconds"] < 0.96


@pytest.mark.parametrize("options", [[], ["-q"]])
def test_nobody_reads_on(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """As with `| head`: the result is written all the same, without a word, and nothing is left to flush."""
    out = file.with_name("out.txt")
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main([str(file), "-o", str(out), *options]) == 0
    assert capsys.readouterr().err == "" and cost_of(Problem.from_bal(out)) < cost_of(Problem.from_bal(file))


def test_as_a_module(file: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "effk.ba", str(file), "-q"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("5 cameras"), done.stderr
