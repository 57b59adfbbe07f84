"""Problems, and the files that hold them: golden bytes, round trips, real problems, damaged files, pycolmap."""

from __future__ import annotations

import bz2
import gzip
import itertools
import math
import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from effk.ba import colmap, solve
from effk.ba.models import INTRINSICS
from effk.ba.problem import Problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..kit.tensors import same_bits

BAL = Path(__file__).parents[3] / "shared" / "data" / "bal"
TENSORS = ("cameras", "points", "observations", "camera_index", "point_index", "depth", "fixed_points", "columns")
PLENTY = 2**25  # bytes of memory that no small file needs


def assert_same(a: Problem, b: Problem) -> None:
    assert a.model == b.model
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None) and (x is None or same_bits(x, y)), name


def small(model: str = "snavely", quaternions: bool = False, dtype: torch.dtype = torch.float64) -> Problem:
    """3 cameras, 4 points, 7 observations, of no sense."""
    g = torch.Generator().manual_seed(3)
    cameras = torch.randn(3, 6 + quaternions + len(INTRINSICS[model]), generator=g, dtype=torch.float64)
    return Problem(
        cameras,
        torch.randn(4, 3, generator=g, dtype=torch.float64),
        torch.randn(7, 2, generator=g, dtype=torch.float64) * 100,
        torch.tensor([0, 1, 2, 0, 2, 1, 1], dtype=torch.int32),
        torch.tensor([0, 0, 0, 1, 1, 2, 3], dtype=torch.int32),
        model,
    ).to(dtype)


def read_or_refuse(read: Callable[[Path], Problem], path: Path) -> None:
    """Whatever the file holds: a good problem or a ValueError that names it, and never much memory."""
    tracemalloc.start()
    try:
        read(path).check()
    except ValueError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < PLENTY


@st.composite
def damaged(draw: st.DrawFn, data: bytes, word: int = 0) -> bytes:
    """Data cut short, with a byte changed, or with two tokens (or words of so many bytes) swapped or one repeated."""
    at = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from(["cut", "byte", "swap", "repeat"]))
    if kind == "cut":
        return data[:at]
    if kind == "byte":
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    tokens = [data[i : i + word] for i in range(0, len(data), word)] if word else re.split(rb"(\s+)", data)
    i, j = (draw(st.integers(0, len(tokens) - 1)) for _ in range(2))
    tokens[i], tokens[j] = tokens[j], tokens[j if kind == "repeat" else i]
    return b"".join(tokens)


# ---- BAL


GOLDEN_BAL = b"""\
2 3 4
0 0 0.5 -1.25
1 0 2 3
1 1 -0 1e-300
0 2 -4 0.10000000000000001
1
2
3
4
5
6
700
0.125
-0.25
-1
-2
-3
-4
-5
-6
800
0
4.9406564584124654e-324
1
2
3
0.5
0.25
0.125
-1
-2
1.7976931348623157e+308
"""


def golden_bal() -> Problem:
    def doubles(*rows: list[float]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    return Problem(
        doubles([1, 2, 3, 4, 5, 6, 700, 0.125, -0.25], [-1, -2, -3, -4, -5, -6, 800, 0, 5e-324]),
        doubles([1, 2, 3], [0.5, 0.25, 0.125], [-1, -2, 1.7976931348623157e308]),
        doubles([0.5, -1.25], [2, 3], [-0.0, 1e-300], [-4, 0.1]),
        torch.tensor([0, 1, 1, 0], dtype=torch.int32),
        torch.tensor([0, 0, 1, 2], dtype=torch.int32),
    )


def test_golden_bal(tmp_path: Path) -> None:
    path = tmp_path / "golden.txt"
    path.write_bytes(GOLDEN_BAL)
    problem = Problem.from_bal(path)
    assert_same(problem, golden_bal())
    (tmp_path / "loose").write_bytes(b"\n " + b"\t\r\n ".join(GOLDEN_BAL.split()))
    assert_same(Problem.from_bal(str(tmp_path / "loose")), golden_bal())
    problem.to_bal(path)
    assert path.read_bytes() == GOLDEN_BAL


@pytest.mark.parametrize("name", ["a.txt", "b.txt.bz2", "c.GZ"])
@settings(max_examples=30)
@given(numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=9, max_size=9))
def test_bal_round_trip_is_exact(name: str, numbers: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / name
    problem = small()
    for t in (problem.cameras, problem.points, problem.observations):
        t.flatten()[-9:] = torch.tensor(numbers, dtype=torch.float64)
    problem.to_bal(path)
    assert_same(Problem.from_bal(path), problem)
    magic = {"a.txt": b"3 4 7", "b.txt.bz2": b"BZh", "c.GZ": b"\x1f\x8b"}[name]
    assert path.read_bytes().startswith(magic)


def test_bal_in_float32(tmp_path: Path) -> None:
    problem = small(dtype=torch.float32)
    problem.to_bal(tmp_path / "p")
    assert_same(Problem.from_bal(tmp_path / "p", torch.float32), problem)
    (tmp_path / "large").write_bytes(b"0 1 0 1 1e39 1")
    assert Problem.from_bal(tmp_path / "large").points[0, 1] == 1e39
    with pytest.raises(ValueError, match="large: points isn't finite in row 0"):
        Problem.from_bal(tmp_path / "large", torch.float32)
    with pytest.raises(ValueError, match=r"dtype is torch\.float16; wanted torch\.float32 or torch\.float64"):
        Problem.from_bal(tmp_path / "p", torch.float16)


def test_bal_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").write_bytes(GOLDEN_BAL)
    (tmp_path / "p.gz").write_bytes(gzip.compress(GOLDEN_BAL))
    for chunk in (22, 23, 24, 25, 30, 300):  # the longest token has 22 characters
        monkeypatch.setattr("effk.ba.files.CHUNK", chunk)
        assert_same(Problem.from_bal(tmp_path / "p"), golden_bal())
        assert_same(Problem.from_bal(tmp_path / "p.gz"), golden_bal())
    bad = GOLDEN_BAL.replace(b"800", b"8x0")
    (tmp_path / "p").write_bytes(bad)
    with pytest.raises(ValueError, match="line 21: '8x0'"):
        Problem.from_bal(tmp_path / "p")
    monkeypatch.setattr("effk.ba.files.BLOCK", 2)
    golden_bal().to_bal(tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == GOLDEN_BAL


def test_observations_come_by_points(tmp_path: Path) -> None:
    lines = GOLDEN_BAL.splitlines(keepends=True)
    # Of point 0 camera 1 first, as it is in the file.
    (tmp_path / "p").write_bytes(b"".join([lines[0], lines[4], lines[3], lines[2], lines[1], *lines[5:]]))
    problem, wanted = Problem.from_bal(tmp_path / "p"), golden_bal()
    order = torch.tensor([1, 0, 2, 3])
    for name in ("observations", "camera_index", "point_index"):
        assert same_bits(getattr(problem, name), getattr(wanted, name)[order])


def test_quaternions_become_angle_axes(tmp_path: Path) -> None:
    problem = small(quaternions=True)
    half = math.sqrt(0.5)
    problem.cameras[:, :4] = torch.tensor([[2, 0, 0, 0], [-half, 0, half, 0], [3, 0, 0, 3e-20]], dtype=torch.float64)
    problem.to_bal(tmp_path / "p")
    read = Problem.from_bal(tmp_path / "p")
    wanted = torch.tensor([[0, 0, 0], [0, -math.pi / 2, 0], [0, 0, 2e-20]], dtype=torch.float64)
    torch.testing.assert_close(read.cameras[:, :3], wanted, rtol=1e-15, atol=0)
    assert same_bits(read.cameras[:, 3:], problem.cameras[:, 4:])


def bal_cost(problem: Problem) -> float:
    """By Rodrigues' formula."""
    camera = problem.cameras[problem.camera_index.long()]
    x = problem.points[problem.point_index.long()]
    w, t, (f, k1, k2) = camera[:, :3], camera[:, 3:6], camera[:, 6:].T
    angle = w.norm(dim=1, keepdim=True)
    axis = w / angle
    y = (
        x * angle.cos()
        + axis.cross(x, dim=1) * angle.sin()
        + axis * (axis * x).sum(1, keepdim=True) * (1 - angle.cos())
    )
    p = -(y + t)[:, :2] / (y + t)[:, 2:]
    n = p.square().sum(1)
    pixels = (f * (1 + k1 * n + k2 * n**2))[:, None] * p
    return 0.5 * (pixels - problem.observations).square().sum().item()


@pytest.mark.parametrize(
    "name, sizes, cost",
    [
        ("problem-16-22106-pre.txt", (16, 22106, 83718), 4.18566e6),
        ("problem-21-11315-pre.txt", (21, 11315, 36455), 4.41324e6),
    ],
)
def test_real_problems(name: str, sizes: tuple[int, int, int], cost: float, tmp_path: Path) -> None:
    """Costs are those that Ceres starts from."""
    if not (BAL / name).exists():
        pytest.skip(f"{BAL / name} isn't there")
    problem = Problem.from_bal(BAL / name)
    assert (len(problem.cameras), len(problem.points), len(problem.observations)) == sizes
    assert bal_cost(problem) == pytest.approx(cost, rel=2e-6)
    problem.to_bal(tmp_path / name)
    assert_same(Problem.from_bal(tmp_path / name), problem)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "begins with 0 tokens; wanted counts"),
        (b"1 2", "begins with 2 tokens; wanted counts"),
        (b"1 -2 3", "tells of '-2' points; wanted 0 to 2\\^30"),
        (b"1.0 2 3", "tells of '1.0' cameras"),
        (b"1 2 1e3", "tells of '1e3' observations"),
        (b"1 2 99999999999999999999999", "tells of '9{23}' observations"),
        (b"1073741825 2 3", "tells of '1073741825' cameras"),
        (b"1073741824 2 3", "has 14 bytes, too few for the 9663676437 numbers"),
        (b"0 1 0\n1\n2", "too few for the 6 numbers|line 3: ends after 5 of 6 numbers"),
        (b"0 1 0\n1.5\n2.5\n", "line 4: ends after 5 of 6 numbers"),
        (b"0 1 0\n1\n2\n3\n4\n", "line 5: wanted the end, after 6 numbers"),
        (b"0 1 0\n1\n2\n3 \x00", "line 4: wanted the end"),
        (b"0 1 0\n1\n2\x00\n3", "line 3: '2\\\\x00' isn't a number"),
        (b"0 1 0\n1\nnan\n3", "line 3: 'nan' isn't a number"),
        (b"0 1 0\n1\n-inf\n3", "line 3: '-inf'"),
        (b"0 1 0\n1 1e999\n3", "line 2: '1e999'"),
        (b"0 1 0\n1 1_0\n3", "line 2: '1_0'"),
        (b"0 1 0\n1 0x1\n3", "line 2: '0x1'"),
        (b"0 1 0\n1 2-3\n3", "line 2: '2-3'"),
        (b"0 1 0\n1 .\n3", "line 2: '.'"),
        ("0 1 0\n1 \u0663\n3".encode(), "line 2: '\u0663'"),
        (b"0 1 0\n1 2 " + b"9" * 400, "line 2: '9{40}"),
        (GOLDEN_BAL.replace(b"0 2 -4", b"2 2 -4"), "observation 3 is of camera 2; wanted 0 to 1"),
        (GOLDEN_BAL.replace(b"0 2 -4", b"0 3 -4"), "observation 3 is of point 3; wanted 0 to 2"),
        (GOLDEN_BAL.replace(b"0 2 -4", b"0 -1 -4"), "observation 3 is of point -1"),
        (GOLDEN_BAL.replace(b"0 2 -4", b"0.5 2 -4"), "observation 3 is of camera 0.5"),
        (b"0 0 1 0 0 1 1", "observation 0 is of camera 0; wanted 0 to -1"),
    ],
)
def test_malformed_bal(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*({message})"):
        Problem.from_bal(path)


def test_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"0 0 0")
    problem = Problem.from_bal(tmp_path / "p")
    assert problem.cameras.shape == (0, 9) and problem.points.shape == (0, 3) and problem.observations.shape == (0, 2)
    problem.share_intrinsics()
    problem.fix_intrinsics()
    problem.fix_cameras([])
    problem.check()


def test_fix_intrinsics_by_name() -> None:
    problem = small("opencv")
    problem.cameras[:, 6:] = problem.cameras[0, 6:]
    problem.share_intrinsics()
    problem.fix_intrinsics(["cx", "p2"])
    assert problem.columns is not None
    fixed = (problem.columns < 0).all(0)
    assert fixed.tolist() == [False] * 6 + [False, False, True, False, False, False, False, True]
    assert ((problem.columns < 0) == fixed).all()
    problem.check()
    problem.fix_intrinsics("k1")
    assert (problem.columns < 0).any(0).nonzero().flatten().tolist() == [8, 10, 13]
    problem.fix_intrinsics([])
    with pytest.raises(ValueError, match="names holds 'f'; 'opencv' has fx, fy, cx"):
        problem.fix_intrinsics(["k1", "f"])
    assert (problem.columns < 0).any(0).sum() == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Problem.from_bal(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="isn't a regular file"):
        Problem.from_bal(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo isn't a regular file"):
        Problem.from_bal(tmp_path / "fifo")
    for name, data in {
        "text.gz": GOLDEN_BAL,
        "text.bz2": GOLDEN_BAL,
        "short.gz": gzip.compress(GOLDEN_BAL)[:-1],
        "short.bz2": bz2.compress(GOLDEN_BAL)[:-1],
        "after.gz": gzip.compress(GOLDEN_BAL) + b"x",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} can't be decompressed"):
            Problem.from_bal(tmp_path / name)


@pytest.mark.parametrize(
    "counts, repeated, message",
    [
        ("1 1 1073741824", "", "has 34 bytes, too few for the 4294967311 numbers it tells of"),
        ("1 1 3000", "", "ends after 3 of"),
        ("0 0 1 ", " ", "bytes and more for 7 numbers"),
        ("0 0 1 ", "1 ", "wanted the end, after 7 numbers"),
        ("0 0 1 ", "1", "has more than 500 characters"),
    ],
)
def test_a_small_file_takes_little_memory(counts: str, repeated: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress((counts + repeated * 10**7).encode()))
    assert path.stat().st_size < 30_000
    read_or_refuse(Problem.from_bal, path)
    with pytest.raises(ValueError, match=message):
        Problem.from_bal(path)


def test_a_compressed_file_takes_memory_by_its_size(tmp_path: Path) -> None:
    """bz2 makes gigabytes of four kilobytes."""
    path = tmp_path / "bomb.bz2"
    path.write_bytes(bz2.compress(b"0 0 500000000" + b" 0" * 10**7))
    assert path.stat().st_size < 2000
    read_or_refuse(Problem.from_bal, path)
    with pytest.raises(ValueError, match="too few for the 2000000003 numbers"):
        Problem.from_bal(path)


@pytest.mark.parametrize("ascending", [True, False])
def test_reading_takes_little_more_than_the_result(ascending: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """A quarter more, and what a piece takes; observations that have to be sorted are there twice."""
    monkeypatch.setattr("effk.ba.files.CHUNK", 2**14)
    points = 6000
    index = range(points) if ascending else range(points)[::-1]
    lines = [b"1 6000 60000", *(b"0 %d 0.5 %d" % (i, j) for i in index for j in range(10)), *[b"1"] * (9 + 3 * points)]
    path = tmp_path / "p"
    path.write_bytes(b"\n".join(lines))
    del lines
    tracemalloc.start()
    problem = Problem.from_bal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (problem.point_index[1:] >= problem.point_index[:-1]).all()
    assert problem.observations[:10, 1].tolist() == list(range(10)) and (problem.cameras == 1).all()
    size = 60_000 * 24 + 8 * (9 + 3 * points)
    assert peak < (1.25 if ascending else 2) * size + 2**20


def test_bal_cut_short(tmp_path: Path) -> None:
    """Anywhere before the last number begins."""
    path = tmp_path / "p"
    for end in range(GOLDEN_BAL.rindex(b"1.797")):
        path.write_bytes(GOLDEN_BAL[:end])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Problem.from_bal(path)


@pytest.mark.parametrize("suffix", [".txt", ".bz2", ".gz"])
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_bal(suffix: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    packed = {".txt": GOLDEN_BAL, ".bz2": bz2.compress(GOLDEN_BAL), ".gz": gzip.compress(GOLDEN_BAL, mtime=0)}[suffix]
    path.write_bytes(data.draw(damaged(packed, 0 if suffix == ".txt" else 4)))
    read_or_refuse(Problem.from_bal, path)


class DiskFullError(OSError):
    pass


@pytest.mark.parametrize("error", [DiskFullError, KeyboardInterrupt])
@pytest.mark.parametrize("suffix", [".txt", ".gz", ".bz2"])
def test_what_was_there_outlives_a_failed_write(
    suffix: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"p{suffix}"
    small().to_bal(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("effk.ba.problem.write_rows", full)
    for target in (path, path.with_name(f"new{suffix}")):
        with pytest.raises(error):
            golden_bal().to_bal(target)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_a_replaced_file_keeps_its_rights_and_links(tmp_path: Path) -> None:
    path, link = tmp_path / "p", tmp_path / "link"
    small().to_bal(path)
    path.chmod(0o640)
    link.symlink_to(path)
    golden_bal().to_bal(link)
    assert link.is_symlink() and path.read_bytes() == GOLDEN_BAL and path.stat().st_mode & 0o777 == 0o640
    golden_bal().to_bal("/dev/null")
    assert Path("/dev/null").is_char_device()
    for target, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "none" / "p", FileNotFoundError),
        (path / "p", NotADirectoryError),
    ):
        with pytest.raises(error, match=re.escape(str(target))):
            small().to_bal(target)
    first, second = tmp_path / "a.gz", tmp_path / "b.gz"
    for target in (first, second):
        small().to_bal(target)
    assert b"part" not in first.read_bytes() and first.read_bytes()[10:] == second.read_bytes()[10:]


def test_bal_holds_snavely_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is 'radial'; a BAL file holds 'snavely'"):
        small("radial").to_bal(tmp_path / "p")
    problem = small()
    problem.points[1, 2] = math.nan
    with pytest.raises(ValueError, match="points isn't finite in row 1"):
        problem.to_bal(tmp_path / "p")
    assert not (tmp_path / "p").exists()


# ---- COLMAP

# Two images share camera 3; nothing has camera 1. Image 7 has a 2D point of no 3D point.
GOLDEN_TEXT = {
    "cameras": b"""\
# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]
3 SIMPLE_RADIAL 640 480 512 256 128 0.125
1 SIMPLE_RADIAL 800 600 64 32 16 -0.25
""",
    "images": b"""\
# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME
# POINTS2D[] as (X, Y, POINT3D_ID)
7 1 0 0 0 0.5 -1 2 3 a.jpg
8 16 5 0.5 4 -1 2 0.25 9
2 0.5 -0.5 0.5 0.5 0 0 4 3 b/c.jpg
32 64 9 1 2 5
""",
    "points3D": b"""\
# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)
9 1 -2 8 255 0 7 0.5 2 0 7 2
5 -1 0.25 4 1 2 3 -1 7 0 2 1
""",
}

DOUBLES = {
    "0": "0000000000000000",
    "1/8": "000000000000c03f",
    "1/4": "000000000000d03f",
    "-1/4": "000000000000d0bf",
    "1/2": "000000000000e03f",
    "-1/2": "000000000000e0bf",
    "1": "000000000000f03f",
    "-1": "000000000000f0bf",
    "2": "0000000000000040",
    "-2": "00000000000000c0",
    "4": "0000000000001040",
    "8": "0000000000002040",
    "16": "0000000000003040",
    "32": "0000000000004040",
    "64": "0000000000005040",
    "128": "0000000000006040",
    "256": "0000000000007040",
    "512": "0000000000008040",
}


def doubles(text: str) -> str:
    return "".join(DOUBLES[number] for number in text.split())


GOLDEN_BINARY = {
    "cameras": bytes.fromhex(
        "0200000000000000"
        # id, model, width, height
        "03000000 02000000 8002000000000000 e001000000000000" + doubles("512 256 128 1/8"),
    )
    + bytes.fromhex("01000000 02000000 2003000000000000 5802000000000000" + doubles("64 32 16 -1/4")),
    "images": bytes.fromhex("0200000000000000 07000000" + doubles("1 0 0 0 1/2 -1 2") + "03000000")
    + b"a.jpg\0"
    + bytes.fromhex("0300000000000000")
    + bytes.fromhex(doubles("8 16") + "0500000000000000")
    + bytes.fromhex(doubles("1/2 4") + "ffffffffffffffff")
    + bytes.fromhex(doubles("2 1/4") + "0900000000000000")
    + bytes.fromhex("02000000" + doubles("1/2 -1/2 1/2 1/2 0 0 4") + "03000000")
    + b"b/c.jpg\0"
    + bytes.fromhex("0200000000000000")
    + bytes.fromhex(doubles("32 64") + "0900000000000000")
    + bytes.fromhex(doubles("1 2") + "0500000000000000"),
    "points3D": bytes.fromhex("0200000000000000")
    # id, place, colour, error, track
    + bytes.fromhex("0900000000000000" + doubles("1 -2 8") + "ff0007" + doubles("1/2"))
    + bytes.fromhex("0200000000000000 02000000 00000000 07000000 02000000")
    + bytes.fromhex("0500000000000000" + doubles("-1 1/4 4") + "010203" + doubles("-1"))
    + bytes.fromhex("0200000000000000 07000000 00000000 02000000 01000000"),
}

GOLDEN = {".txt": GOLDEN_TEXT, ".bin": GOLDEN_BINARY}
FORMS = pytest.mark.parametrize("suffix", [".txt", ".bin"])


def write_model(folder: Path, suffix: str, files: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (GOLDEN[suffix] | (files or {})).items():
        (folder / f"{name}{suffix}").write_bytes(content)
    return folder


def read_model(folder: Path, suffix: str) -> dict[str, bytes]:
    assert len(list(folder.iterdir())) == 3
    return {name: (folder / f"{name}{suffix}").read_bytes() for name in GOLDEN_TEXT}


def golden_colmap() -> Problem:
    def doubles(*rows: list[float]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    return Problem(
        doubles(
            [1, 0, 0, 0, 0.5, -1, 2, 512, 256, 128, 0.125],
            [0.5, -0.5, 0.5, 0.5, 0, 0, 4, 512, 256, 128, 0.125],
        ),
        doubles([1, -2, 8], [-1, 0.25, 4]),
        doubles([32, 64], [2, 0.25], [8, 16], [1, 2]),
        torch.tensor([1, 0, 0, 1], dtype=torch.int32),
        torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        "simple_radial",
        columns=torch.tensor([[*range(10)], [*range(10, 16), 6, 7, 8, 9]]),
    )


@FORMS
def test_golden_colmap(suffix: str, tmp_path: Path) -> None:
    problem = Problem.from_colmap(write_model(tmp_path / "model", suffix))
    problem.check()
    assert_same(problem, golden_colmap())
    for form, golden in GOLDEN.items():
        problem.to_colmap(tmp_path / form, binary=form == ".bin")
        assert read_model(tmp_path / form, form) == golden
        problem.to(torch.float32).clone().to_colmap(tmp_path / form, binary=form == ".bin")
        assert read_model(tmp_path / form, form) == golden


def test_text_as_others_write_it(tmp_path: Path) -> None:
    """Comments, empty lines, spaces, other ends of lines, and a second line that is empty."""
    files = {name: content.replace(b"\n", b" \r\n") for name, content in GOLDEN_TEXT.items()}
    files["cameras"] = b"\n" + files["cameras"].replace(b" ", b"  ") + b"# the end"
    files["images"] = files["images"] + b"#\n\n9 1 0 0 0 0 0 0 1 far away.jpg\n\n"
    files["points3D"] = files["points3D"] + b"4 0 0 0 0 0 0 0\n"
    problem = Problem.from_colmap(write_model(tmp_path / "model", ".txt", files))
    assert problem.cameras[:, 7].tolist() == [512, 512, 64] and len(problem.observations) == 4
    assert same_bits(problem.cameras[:2], golden_colmap().cameras) and problem.points[2].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"name 'far away\.jpg', which a text file can't hold"):
        problem.to_colmap(tmp_path / "text", binary=False)
    assert not (tmp_path / "text").exists()
    problem.to_colmap(tmp_path / "binary")
    assert b"far away.jpg\0" in (tmp_path / "binary" / "images.bin").read_bytes()
    assert_same(Problem.from_colmap(tmp_path / "binary"), problem)


@pytest.mark.parametrize(
    "number, model", list(enumerate(("simple_pinhole", "pinhole", "simple_radial", "radial", "opencv")))
)
def test_models_of_colmap(number: int, model: str, tmp_path: Path) -> None:
    values = list(range(2, 2 + len(INTRINSICS[model])))
    line = b"1 %s 10 20 %s\n" % (model.upper().encode(), b" ".join(b"%d" % v for v in values))
    nothing = {"cameras": line, "images": b"1 1 0 0 0 0 0 0 1 a\n\n", "points3D": b""}
    problem = Problem.from_colmap(write_model(tmp_path / "text", ".txt", nothing))
    assert problem.model == model and problem.cameras[0, 7:].tolist() == values and problem.columns is None
    problem.to_colmap(tmp_path / "binary")
    assert (tmp_path / "binary" / "cameras.bin").read_bytes()[12:16] == bytes([number, 0, 0, 0])
    assert_same(Problem.from_colmap(tmp_path / "binary"), problem)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_changed_is_written(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    problem = Problem.from_colmap(write_model(tmp_path / "model", suffix)).to(dtype).clone()
    problem.cameras[0, :4] = torch.tensor([2, 2, -2, 2])  # comes back as a unit
    problem.cameras[1, 4] = 7
    problem.cameras[:, 8] = 255
    problem.points[1, 2] = 5
    problem.observations[2, 0] = 9
    problem.to_colmap(tmp_path / "new", binary=suffix == ".bin")
    wanted = golden_colmap()
    wanted.cameras[0, :4] = torch.tensor([0.5, 0.5, -0.5, 0.5])
    wanted.cameras[1, 4] = 7
    wanted.cameras[:, 8] = 255
    wanted.points[1, 2] = 5
    wanted.observations[2, 0] = 9
    new = Problem.from_colmap(tmp_path / "new")
    assert_same(new, wanted)
    # All else is as it was.
    for t, old in ((new.cameras, golden_colmap().cameras), (new.points, golden_colmap().points)):
        t.copy_(old)
    new.observations[2, 0] = 8
    new.to_colmap(tmp_path / "again", binary=suffix == ".bin")
    assert read_model(tmp_path / "again", suffix) == GOLDEN[suffix]


@FORMS
def test_a_replaced_field_keeps_the_rest_of_the_model(suffix: str, tmp_path: Path) -> None:
    problem = Problem.from_colmap(write_model(tmp_path / "model", suffix))
    changed = replace(problem, points=problem.points.clone())
    changed.to_colmap(tmp_path / "new", binary=suffix == ".bin")
    assert read_model(tmp_path / "new", suffix) == GOLDEN[suffix]


def test_what_has_not_changed_is_written_as_it_was(tmp_path: Path) -> None:
    """Numbers that float32 rounds, and a quaternion of few digits, which isn't quite a unit."""
    files = {
        "cameras": GOLDEN_TEXT["cameras"].replace(b"512", b"512.10000000000002"),
        "images": GOLDEN_TEXT["images"]
        .replace(b"1 0 0 0 0.5", b"0.80000000000000004 0.59899999999999998 0 0 0.10000000000000001")
        .replace(b"8 16 5", b"8.0999999999999996 16 5"),
        "points3D": GOLDEN_TEXT["points3D"].replace(b"1 -2 8", b"0.29999999999999999 -2 8"),
    }
    problem = Problem.from_colmap(write_model(tmp_path / "model", ".txt", files)).to(torch.float32)
    problem.to_colmap(tmp_path / "new", binary=False)
    assert read_model(tmp_path / "new", ".txt") == files
    problem = problem.clone()
    problem.cameras[0, 1] = 0.6
    problem.to_colmap(tmp_path / "new", binary=False)
    turned = Problem.from_colmap(tmp_path / "new").cameras
    torch.testing.assert_close(turned[0, :4].norm().item(), 1.0, rtol=0, atol=1e-15)
    assert turned[0, 4] == 0.1 and turned[0, 7] == 512.1


def test_angle_axes_become_quaternions(tmp_path: Path) -> None:
    problem = Problem.from_colmap(write_model(tmp_path / "model", ".bin"))
    turns = torch.tensor([[0, 0, 0], [math.pi / 2, 0, 0]], dtype=torch.float64)
    problem.cameras = torch.cat([turns, problem.cameras[:, 4:]], 1)
    problem.to_colmap(tmp_path / "new")
    half = math.sqrt(0.5)
    wanted = torch.tensor([[1, 0, 0, 0], [half, half, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(Problem.from_colmap(tmp_path / "new").cameras[:, :4], wanted, rtol=0, atol=1e-15)


def test_what_colmap_cannot_take(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", ".bin")

    def refused(message: str, **changes: Any) -> None:
        problem = Problem.from_colmap(folder).clone()
        for name, value in changes.items():
            setattr(problem, name, value)
        with pytest.raises(ValueError, match=message):
            problem.to_colmap(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    problem = golden_colmap()
    other = problem.cameras.clone()
    other[1, 7] = 511
    refused("cameras 0 and 1 are images of COLMAP's camera 3 and differ in intrinsics", cameras=other, columns=None)
    refused("columns ties f of camera 0, which is 512, to f of camera 1, which is 511", cameras=other)
    refused("aren't those of the COLMAP model", camera_index=problem.camera_index.roll(1))
    refused("aren't those of the COLMAP model", point_index=problem.point_index.flip(0))
    refused("aren't those of the COLMAP model", points=torch.cat([problem.points, problem.points]))
    refused("aren't those of the COLMAP model", model="pinhole")
    with pytest.raises(ValueError, match="model is 'snavely'; COLMAP has simple_pinhole"):
        small().to_colmap(tmp_path / "new")


def test_folders_of_colmap(tmp_path: Path) -> None:
    problem = Problem.from_colmap(write_model(tmp_path / "model", ".bin"))
    write_model(tmp_path / "model", ".txt", {"images": b"what?"})
    assert_same(Problem.from_colmap(tmp_path / "model"), problem)  # binary comes first
    (tmp_path / "model" / "images.bin").unlink()
    with pytest.raises(ValueError, match=r"images\.txt, line 1: 1 tokens"):
        Problem.from_colmap(tmp_path / "model")
    (tmp_path / "model" / "points3D.txt").unlink()
    with pytest.raises(FileNotFoundError, match="model lacks some of cameras, images, points3D"):
        Problem.from_colmap(tmp_path / "model")
    for binary, rival in ((True, "rigs.bin"), (True, "frames.bin"), (False, "frames.txt"), (False, "images.bin")):
        folder = tmp_path / f"{binary}{rival}"
        folder.mkdir()
        (folder / rival).touch()
        with pytest.raises(ValueError, match=rf"has {rival}, which would contradict the model"):
            problem.to_colmap(folder, binary)
        problem.to_colmap(folder, not binary) if rival != "images.bin" else None
    # Rigs and frames beside a model aren't looked at.
    folder = write_model(tmp_path / "rigs", ".bin")
    (folder / "rigs.bin").write_bytes(b"\xff")
    assert_same(Problem.from_colmap(folder), problem)


@FORMS
def test_a_model_outlives_a_failed_write(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, whichever file fails."""
    folder = write_model(tmp_path / "model", suffix)
    problem = Problem.from_colmap(folder)
    problem.points += 1
    real = colmap.write_binary if suffix == ".bin" else colmap.write_text

    def interrupted(at: int) -> Any:
        def files(source: Any) -> Any:
            made = [list(parts) for parts in real(source)]
            made[at] = itertools.chain(made[at], (_ for _ in [0] if 1 / 0))
            return made

        return files

    for at in range(3):
        monkeypatch.setattr(colmap, real.__name__, interrupted(at))
        with pytest.raises(ZeroDivisionError):
            problem.to_colmap(folder, binary=suffix == ".bin")
        assert read_model(folder, suffix) == GOLDEN[suffix]


@FORMS
@pytest.mark.parametrize("model", ["simple_pinhole", "opencv"])
def test_no_cameras_at_all(suffix: str, model: str, tmp_path: Path) -> None:
    """A model without cameras tells of no model of theirs."""
    none = torch.empty(0, dtype=torch.int32)
    empty = torch.empty(0, 7 + len(INTRINSICS[model])), torch.ones(2, 3), torch.empty(0, 2)
    Problem(*empty, none, none, model).to_colmap(tmp_path / "model", binary=suffix == ".bin")
    read = Problem.from_colmap(tmp_path / "model")
    assert read.cameras.shape == (0, 10) and read.points.tolist() == [[1, 1, 1]] * 2
    read.to_colmap(tmp_path / "again", binary=suffix == ".bin")
    assert read_model(tmp_path / "again", suffix) == read_model(tmp_path / "model", suffix)


def test_numbers_that_numpy_1_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.fromiter

    def wrapping(numbers: Any, dtype: Any, count: int) -> Any:
        if np.issubdtype(dtype, np.integer):
            return np.array(list(numbers), object).astype(np.int64).astype(dtype)
        return real(numbers, dtype, count)

    monkeypatch.setattr(np, "fromiter", wrapping)
    assert_same(Problem.from_colmap(write_model(tmp_path / "model", ".txt")), golden_colmap())
    for name, old, new in (
        ("points3D", b"255 0 7", b"300 0 7"),
        ("points3D", b"255 0 7", b"255 -1 7"),
        ("cameras", b"\n1 SIMPLE", b"\n-1 SIMPLE"),
        ("images", b"4 -1", b"4 -18446744073709551617"),
    ):
        folder = write_model(tmp_path / "model", ".txt", {name: change(old, new)(GOLDEN_TEXT[name])})
        with pytest.raises(ValueError, match="isn't a number that is wanted there"):
            Problem.from_colmap(folder)


def change(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        assert content.count(old) >= 1
        return content.replace(old, new, 1)

    return changed


@pytest.mark.parametrize(
    "name, changed, message",
    [
        ("cameras", lambda c: b"", "model: camera 3 isn't there"),
        (
            "cameras",
            change(b"3 SIMPLE_RADIAL", b"3 OPENCV_FISHEYE"),
            "line 2: camera 3 is OPENCV_FISHEYE; wanted one of",
        ),
        ("cameras", change(b"3 SIMPLE_RADIAL", b"3 simple_radial"), "line 2: camera 3 is simple_radial"),
        ("cameras", change(b" -0.25", b" -0.25 1"), "line 3: 9 tokens; wanted 8 for SIMPLE_RADIAL"),
        (
            "cameras",
            change(b"1 SIMPLE_RADIAL", b"1 PINHOLE"),
            "line 3: cameras 3 and 1 are SIMPLE_RADIAL and PINHOLE; wanted one model",
        ),
        ("cameras", change(b"640", b"-640"), "line 2: '-640' isn't a number"),
        ("cameras", change(b"512", b"nan"), "line 2: 'nan'"),
        ("cameras", change(b"\n1 SIMPLE", b"\n3 SIMPLE"), "model: camera 3 is there twice"),
        ("cameras", change(b"3 SIMPLE", b"4 SIMPLE"), "model: camera 3 isn't there"),
        ("cameras", change(b"3 SIMPLE", b"4294967296 SIMPLE"), "line 2: '4294967296'"),
        ("images", change(b" 3 a.jpg", b" 3"), "line 3: 9 tokens; wanted IMAGE_ID"),
        ("images", change(b"7 1 0", b"7.0 1 0"), "line 3: '7.0'"),
        ("images", change(b"7 1 0", b"7 0 0"), "model: cameras has a quaternion of norm 0 in row 0"),
        ("images", change(b"8 16 5", b"8 16"), "line 4: 8 tokens; wanted X, Y, POINT3D_ID"),
        ("images", change(b"8 16 5", b"8 16 -5"), "line 4: the 3D point -5; wanted an id, or -1"),
        ("images", change(b"8 16 5", b"8 16 6"), "track of point 5 has 2D point 0 of image 7, which is of point 6"),
        ("images", change(b"4 -1", b"4 9"), "point 9 isn't there, or lacks a 2D point of it in its track"),
        ("images", change(b"\n2 0.5", b"\n7 0.5"), "model: image 7 is there twice"),
        ("images", change(b"32 64 9 1 2 5\n", b""), "line 5: ends before the 2D points of the last image"),
        ("points3D", change(b"255", b"256"), "line 2: '256'"),
        ("points3D", change(b" 7 2", b" 7"), "line 2: 11 tokens; wanted IMAGE_ID, POINT2D_IDX"),
        ("points3D", change(b" 7 2", b" 8 2"), "model: image 8 isn't there"),
        ("points3D", change(b" 7 2", b" 7 3"), "track of point 9 has 2D point 3 of image 7, which there isn't"),
        ("points3D", change(b" 7 2", b" 7 1"), "which is of point 18446744073709551615"),
        ("points3D", change(b" 7 2", b""), "point 9 isn't there, or lacks a 2D point of it in its track"),
        ("points3D", change(b" 7 2", b" 7 2 7 2"), "a track has a 2D point twice"),
        ("points3D", change(b"\n5 -1", b"\n9 -1"), "model: point 9 is there twice"),
        ("points3D", change(b"1 -2 8", b"1 1e400 8"), "line 2: '1e400'"),
    ],
)
def test_malformed_text(name: str, changed: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", ".txt", {name: changed(GOLDEN_TEXT[name])})
    with pytest.raises(ValueError, match=message):
        Problem.from_colmap(folder)


def test_the_id_of_no_point(tmp_path: Path) -> None:
    files = {
        "images": GOLDEN_TEXT["images"].replace(b"0.25 9", b"0.25 -1").replace(b"64 9", b"64 -1"),
        "points3D": GOLDEN_TEXT["points3D"].replace(b"\n9 1", b"\n18446744073709551615 1"),
    }
    with pytest.raises(ValueError, match="track of point 18446744073709551615 has 2D point 0 of image 2"):
        Problem.from_colmap(write_model(tmp_path / "model", ".txt", files))


NAN = bytes.fromhex("000000000000f87f")
HUGE = b"\xff\xff\xff\xff\xff\xff\xff\x0f"


@pytest.mark.parametrize(
    "name, changed, message",
    [
        ("cameras", lambda c: b"", r"cameras\.bin, byte 0: ends 8 bytes too early"),
        ("cameras", lambda c: bytes(8), "camera 3 isn't there"),
        ("cameras", lambda c: c[:-1], "byte 88: ends 1 bytes too early"),
        ("cameras", lambda c: c + b"\0", "byte 120: wanted the end"),
        ("cameras", lambda c: HUGE + c[8:], "tells of 1152921504606846975 entries and has 112 bytes for them"),
        ("cameras", lambda c: c[:12] + b"\5" + c[13:], "camera 3 is of model 5; wanted one of SIMPLE_PINHOLE"),
        ("cameras", lambda c: c[:12] + b"\xff\xff\xff\xff" + c[16:], "camera 3 is of model -1"),
        ("cameras", change(bytes.fromhex(DOUBLES["256"]), NAN), "intrinsics aren't all finite"),
        ("images", lambda c: HUGE + c[8:], "entries and has"),
        ("images", change(b"a.jpg\0\3\0\0\0\0\0\0\0", b"a.jpg\0" + HUGE), r"images\.bin, byte 86: .*entries and has"),
        ("images", lambda c: c[: c.index(b"c.jpg")] + b"x" * 20, "ends within a name"),
        ("images", lambda c: c + bytes(1), "wanted the end"),
        ("images", change(bytes.fromhex(DOUBLES["16"]), NAN), "xy aren't all finite"),
        ("images", change(bytes.fromhex(DOUBLES["2"]), NAN), "poses aren't all finite"),
        ("points3D", lambda c: HUGE + c[8:], "entries and has"),
        ("points3D", lambda c: c[:51] + HUGE + c[59:], r"points3D\.bin, byte 59: .*entries and has"),
        ("points3D", lambda c: c + bytes(8), "wanted the end"),
        ("points3D", change(bytes.fromhex(DOUBLES["8"]), NAN), "xyz aren't all finite"),
        ("points3D", change(bytes.fromhex(DOUBLES["1/2"]), NAN), "errors aren't all finite"),
        ("points3D", lambda c: c[:8] + b"\xff" * 8 + c[16:], "track of point 18446744073709551615"),
    ],
)
def test_malformed_binary(name: str, changed: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", ".bin", {name: changed(GOLDEN_BINARY[name])})
    with pytest.raises(ValueError, match=message):
        Problem.from_colmap(folder)
    read_or_refuse(Problem.from_colmap, folder)


@FORMS
def test_colmap_cut_short(suffix: str, tmp_path: Path) -> None:
    """Binary anywhere; text before the last token, and in cameras before the last of the camera that has images."""
    folder = write_model(tmp_path / "model", suffix)
    ends = {"cameras": b"0.125\n", "images": b"5\n", "points3D": b"1\n"}
    for name, content in GOLDEN[suffix].items():
        path = folder / f"{name}{suffix}"
        for at in range(content.rindex(ends[name]) if suffix == ".txt" else len(content)):
            path.write_bytes(content[:at])
            with pytest.raises(ValueError, match="model"):
                Problem.from_colmap(folder)
        path.write_bytes(content)


@FORMS
@settings(max_examples=200)
@given(data=st.data())
def test_damaged_colmap(suffix: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(GOLDEN_TEXT)))
    word = data.draw(st.sampled_from([1, 4, 8])) if suffix == ".bin" else 0
    content = data.draw(damaged(GOLDEN[suffix][name], word))
    folder = write_model(tmp_path_factory.getbasetemp() / "damaged", suffix, {name: content})
    for other in set(GOLDEN) - {suffix}:
        for path in folder.glob(f"*{other}"):
            path.unlink()
    read_or_refuse(Problem.from_colmap, folder)


def test_problems_from_elsewhere(tmp_path: Path) -> None:
    """Ids from 1 on, cameras where intrinsics are tied, images large enough for what is seen."""
    problem = small("simple_pinhole", quaternions=True)
    problem.cameras[:, 7:] = torch.tensor([[100, 50, 40], [100, 50, 40], [90, 40.25, 30]])
    problem.observations[:] = torch.arange(14).view(7, 2) * 10.0
    problem.share_intrinsics([0, 0, 1])
    problem.point_index = problem.point_index.flip(0).contiguous()  # not in order
    for binary in (True, False):
        problem.to_colmap(tmp_path / str(binary), binary)
        read = Problem.from_colmap(tmp_path / str(binary))
        order = problem.point_index.argsort(stable=True)
        for name in ("observations", "camera_index", "point_index"):
            assert same_bits(getattr(read, name), getattr(problem, name)[order])
        assert same_bits(read.points, problem.points) and same_bits(read.cameras[:, 4:], problem.cameras[:, 4:])
        assert read.columns is not None and torch.equal(read.columns, problem.columns)
        unit = problem.cameras[:, :4] / problem.cameras[:, :4].norm(dim=1, keepdim=True)
        torch.testing.assert_close(read.cameras[:, :4], unit, rtol=0, atol=1e-15)
    lines = (tmp_path / "False" / "cameras.txt").read_bytes().splitlines()
    assert lines[1:] == [b"1 SIMPLE_PINHOLE 120 130 100 50 40", b"2 SIMPLE_PINHOLE 81 90 90 40.25 30"]
    assert b" 000003.png\n" in (tmp_path / "False" / "images.txt").read_bytes()
    # Fixed intrinsics may differ.
    problem.fix_intrinsics()
    problem.to_colmap(tmp_path / "own", binary=False)
    assert len((tmp_path / "own" / "cameras.txt").read_bytes().splitlines()) == 4


# ---- pycolmap


class Pose:
    """What pycolmap.Rigid3d has that is needed."""

    class Rotation:
        def __init__(self, quat: Any):
            self.quat = [float(q) for q in quat]

    def __init__(self, rotation: Pose.Rotation, translation: Any):
        self.rotation, self.translation = rotation, [float(t) for t in translation]


class Frame:
    def __init__(self, pose: Pose):
        self.pose = pose

    def set_cam_from_world(self, camera: int, pose: Pose) -> None:
        self.pose = pose


def reconstruction() -> Any:
    """The golden model as pycolmap has it, and an image without a pose."""
    none = 2**64 - 1

    def camera(number: int, size: tuple[int, int], params: list[float]) -> Any:
        return SimpleNamespace(
            camera_id=number, model_name="SIMPLE_RADIAL", width=size[0], height=size[1], params=params
        )

    def image(number: int, pose: list[float], name: str, seen: list[tuple[float, float, int]]) -> Any:
        frame = Frame(Pose(Pose.Rotation([*pose[1:4], pose[0]]), pose[4:]))
        return SimpleNamespace(
            image_id=number,
            camera_id=3,
            name=name,
            points2D=[SimpleNamespace(xy=(x, y), point3D_id=i) for x, y, i in seen],
            frame=frame,
            frame_id=number + 10,
            cam_from_world=lambda: frame.pose,
        )

    def point(xyz: list[float], colour: list[int], error: float, *track: tuple[int, int]) -> Any:
        elements = [SimpleNamespace(image_id=i, point2D_idx=at) for i, at in track]
        return SimpleNamespace(xyz=xyz, color=colour, error=error, track=SimpleNamespace(elements=elements))

    images = [
        image(7, [1, 0, 0, 0, 0.5, -1, 2], "a.jpg", [(8, 16, 5), (0.5, 4, none), (2, 0.25, 9)]),
        image(2, [0.5, -0.5, 0.5, 0.5, 0, 0, 4], "b/c.jpg", [(32, 64, 9), (1, 2, 5)]),
        image(4, [1, 0, 0, 0, 0, 0, 0], "lost.jpg", []),
    ]
    return SimpleNamespace(
        cameras={3: camera(3, (640, 480), [512, 256, 128, 0.125]), 1: camera(1, (800, 600), [64, 32, 16, -0.25])},
        images={i.image_id: i for i in images},
        reg_image_ids=lambda: [7, 2],
        points3D={
            9: point([1, -2, 8], [255, 0, 7], 0.5, (2, 0), (7, 2)),
            5: point([-1, 0.25, 4], [1, 2, 3], -1, (7, 0), (2, 1)),
        },
    )


def test_a_reconstruction_there_and_back(tmp_path: Path) -> None:
    problem = Problem.from_pycolmap(reconstruction())
    golden = golden_colmap()
    # In order of ids: image 2 before 7, point 5 before 9.
    assert same_bits(problem.cameras, golden.cameras.flip(0)) and same_bits(problem.points, golden.points.flip(0))
    assert problem.observations.tolist() == [[8, 16], [1, 2], [32, 64], [2, 0.25]]
    assert problem.camera_index.tolist() == [1, 0, 0, 1] and problem.point_index.tolist() == [0, 0, 1, 1]
    problem.to_colmap(tmp_path / "model", binary=False)
    files = read_model(tmp_path / "model", ".txt")
    assert {n: sorted(c.splitlines()) for n, c in files.items()} == {
        n: sorted(c.splitlines()) for n, c in GOLDEN_TEXT.items()
    }
    problem.cameras[0] = torch.tensor([0, 2, 0, 0, 1, 2, 3, 511, 256, 128, 0.25])
    problem.cameras[1, 7:] = problem.cameras[0, 7:]
    problem.points[1] = torch.tensor([3, 2, 1])
    target = reconstruction()
    problem.to_pycolmap(target)
    assert target.images[2].frame.pose.rotation.quat == [1, 0, 0, 0]
    assert target.images[2].frame.pose.translation == [1, 2, 3]
    assert target.images[7].frame.pose.rotation.quat == [0, 0, 0, 1]
    assert list(target.cameras[3].params) == [511, 256, 128, 0.25] and list(target.cameras[1].params) == [
        64,
        32,
        16,
        -0.25,
    ]
    assert list(target.points3D[9].xyz) == [3, 2, 1] and list(target.points3D[5].xyz) == [-1, 0.25, 4]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.cameras.pop(3), "reconstruction has no camera 3"),
        (lambda r: r.images.pop(2), "reconstruction has no image 2"),
        (lambda r: r.points3D.pop(9), "reconstruction has no point 9"),
        (lambda r: setattr(r.images[2], "frame_id", 17), "images 2 and 7 in frame 17"),
    ],
)
def test_another_reconstruction(change: Callable[[Any], Any], message: str) -> None:
    problem = Problem.from_pycolmap(reconstruction())
    problem.points[:] = 7
    target = reconstruction()
    change(target)
    with pytest.raises(ValueError, match=message):
        problem.to_pycolmap(target)
    assert list(target.points3D[5].xyz) == [-1, 0.25, 4]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.cameras.clear(), "reconstruction: camera 3 isn't there"),
        (lambda r: setattr(r.cameras[1], "model_name", "FOV"), "reconstruction: camera 1 is FOV; wanted one of"),
        (lambda r: setattr(r.points3D[5], "xyz", [0, math.nan, 0]), "reconstruction: xyz aren't all finite"),
        (lambda r: setattr(r, "reg_image_ids", lambda: [2]), "reconstruction: image 7 isn't there"),
    ],
)
def test_bad_reconstructions(change: Callable[[Any], Any], message: str) -> None:
    target = reconstruction()
    change(target)
    with pytest.raises(ValueError, match=message):
        Problem.from_pycolmap(target)


PARAMS = {
    "SIMPLE_PINHOLE": [1280, 512, 384],
    "PINHOLE": [1280, 1270, 512, 384],
    "SIMPLE_RADIAL": [1280, 512, 384, 0.05],
    "RADIAL": [1280, 512, 384, 0.05, 0.01],
    "OPENCV": [1280, 1270, 512, 384, 0.05, 0.01, 0.001, -0.002],
}


@pytest.mark.parametrize("model", PARAMS)
def test_beside_pycolmap(model: str, tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig, options.num_points3D = 2, 1, 3, 30
    options.camera_model_id, options.camera_params = getattr(pycolmap.CameraModelId, model), PARAMS[model]
    made = pycolmap.synthesize_dataset(options)
    problem = Problem.from_pycolmap(made)
    assert problem.cameras.shape == (6, 7 + len(PARAMS[model])) and problem.columns is not None
    (tmp_path / "text").mkdir()
    (tmp_path / "binary").mkdir()
    made.write_text(str(tmp_path / "text"))
    made.write_binary(str(tmp_path / "binary"))
    for folder in ("text", "binary"):
        assert_same(Problem.from_colmap(tmp_path / folder), problem)
    problem.points[0] += 1
    problem.cameras[2, 4:7] += 2
    problem.cameras[2, :4] = torch.tensor([0.5, 0.5, -0.5, 0.5])
    problem.cameras[problem.cameras[:, 7] == problem.cameras[0, 7], 7] += 3
    for binary in (True, False):
        problem.to_colmap(tmp_path / f"new {binary}", binary)
        assert_same(Problem.from_pycolmap(pycolmap.Reconstruction(str(tmp_path / f"new {binary}"))), problem)
    problem.to_pycolmap(made)
    assert_same(Problem.from_pycolmap(made), problem)
    # Written by pycolmap, by effk, byte for byte the same.
    (tmp_path / "theirs").mkdir()
    made.write_binary(str(tmp_path / "theirs"))
    for name in GOLDEN_TEXT:
        assert (tmp_path / "theirs" / f"{name}.bin").read_bytes() == (
            tmp_path / "new True" / f"{name}.bin"
        ).read_bytes()


def test_rigs_beside_pycolmap() -> None:
    pycolmap = pytest.importorskip("pycolmap")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig = 1, 2, 2
    made = pycolmap.synthesize_dataset(options)
    problem = Problem.from_pycolmap(made)
    assert len(problem.cameras) == 4
    with pytest.raises(ValueError, match="so that their poses depend on each other"):
        problem.to_pycolmap(made)


@pytest.mark.parametrize("loss", ["trivial", "huber"])
@pytest.mark.parametrize("model", PARAMS)
def test_the_optimum_is_pycolmaps(model: str, loss: str) -> None:
    """A noisy reconstruction in, the adjusted one out: as good as what pycolmap.bundle_adjustment makes of it."""
    pycolmap = pytest.importorskip("pycolmap")
    pycolmap.set_random_seed(1)
    options, noise = pycolmap.SyntheticDatasetOptions(), pycolmap.SyntheticNoiseOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig, options.num_points3D = 2, 1, 4, 150
    options.camera_model_id, options.camera_params = getattr(pycolmap.CameraModelId, model), PARAMS[model]
    noise.point2D_stddev, noise.point3D_stddev = 1.0, 0.05
    noise.rig_from_world_rotation_stddev, noise.rig_from_world_translation_stddev = 0.3, 0.03
    start = pycolmap.synthesize_dataset(options)
    pycolmap.synthesize_noise(noise, start)

    theirs = pycolmap.Reconstruction(start)
    settings = pycolmap.BundleAdjustmentOptions()
    settings.print_summary = False
    settings.ceres.loss_function_type = getattr(pycolmap.LossFunctionType, loss.upper())
    settings.ceres.solver_options.max_num_iterations = 500
    pycolmap.bundle_adjustment(theirs, settings)

    ours = pycolmap.Reconstruction(start)
    problem = Problem.from_pycolmap(ours)
    problem.fix_intrinsics([name for name in ("cx", "cy") if name in INTRINSICS[problem.model]])
    summary = solve(problem, loss=loss, function_tolerance=1e-14, max_iterations=500)
    problem.to_pycolmap(ours)

    def cost(reconstruction: Any) -> float:
        return solve(Problem.from_pycolmap(reconstruction), loss=loss, max_iterations=0).initial_cost

    assert cost(start) > 5 * cost(theirs)
    assert cost(ours) == pytest.approx(summary.final_cost, rel=1e-9)
    assert cost(ours) == pytest.approx(cost(theirs), rel=1e-6)
    for i in theirs.cameras:  # which don't depend on where the origin is
        got, wanted, before = (r.cameras[i].params for r in (ours, theirs, start))
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        kept = [name in ("cx", "cy") for name in INTRINSICS[problem.model]]
        assert (got == before).tolist() == kept
    for r in (ours, theirs):
        r.update_point_3d_errors()
    assert ours.compute_mean_reprojection_error() == pytest.approx(theirs.compute_mean_reprojection_error(), rel=1e-4)


# ---- what a problem is


@pytest.mark.parametrize("model", [*INTRINSICS, "position"])
def test_parameters(model: str) -> None:
    sizes = {"snavely": 9, "simple_pinhole": 9, "pinhole": 10, "simple_radial": 10, "radial": 11, "opencv": 14}
    if model == "position":
        problem = Problem(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(1, 3), *torch.zeros(2, 1).int(), model)
        problem.check()
        problem.fix_cameras(1)
        assert problem.num_parameters == 3 and problem.columns is not None
        assert problem.columns.tolist() == [[0, 1, 2], [-1, -1, -1]]
        return
    for quaternions, dtype in itertools.product((False, True), (torch.float32, torch.float64)):
        problem = small(model, quaternions, dtype)
        problem.check()
        assert problem.num_parameters == sizes[model]


def test_check() -> None:
    nan, inf = math.nan, math.inf
    cameras, points, columns = small().cameras, small().points, torch.arange(27).view(3, 9)

    def at(t: Tensor, place: Any, value: float) -> Tensor:
        changed = t.clone()
        changed[place] = value
        return changed

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": "fisheye"}, "model is 'fisheye'; wanted one of snavely"),
        ({"cameras": None}, "cameras is a NoneType; wanted a tensor"),
        ({"points": [[1.0, 2, 3]]}, "points is a list; wanted a tensor"),
        ({"depth": 1.0}, "depth is a float; wanted a tensor"),
        ({"cameras": cameras.half()}, "cameras has dtype torch.float16"),
        ({"cameras": cameras[:, :8]}, r"cameras has shape \[3, 8\]; wanted \[\*, 9\]"),
        ({"model": "opencv"}, r"cameras has shape \[3, 9\]; wanted \[\*, 14\]"),
        ({"points": points.float()}, "points has dtype torch.float32; wanted torch.float64"),
        ({"points": points[:, :2]}, r"points has shape \[4, 2\]; wanted \[\*, 3\]"),
        ({"observations": torch.zeros(7, 3).double()}, r"observations has shape \[7, 3\]; wanted \[\*, 2\]"),
        ({"camera_index": torch.zeros(6).int()}, r"camera_index has shape \[6\]; wanted \[7\]"),
        ({"point_index": torch.zeros(7)}, "point_index has dtype torch.float32"),
        ({"camera_index": torch.full((7,), 3)}, "camera_index holds 3; wanted 0 to 2"),
        ({"point_index": torch.full((7,), -1)}, "point_index holds -1; wanted 0 to 3"),
        ({"cameras": at(cameras, (2, 1), nan)}, "cameras isn't finite in row 2"),
        ({"points": at(points, (3, 0), inf)}, "points isn't finite in row 3"),
        ({"observations": torch.full((7, 2), -inf).double()}, "observations isn't finite in row 0"),
        ({"cameras": torch.zeros(3, 10).double()}, "cameras has a quaternion of norm 0 in row 0"),
        ({"depth": torch.zeros(6).double()}, r"depth has shape \[6\]; wanted \[7\]"),
        ({"depth": torch.zeros(7)}, "depth has dtype torch.float32"),
        ({"depth": torch.full((7,), inf).double()}, "depth holds infinity"),
        ({"fixed_points": torch.zeros(3).bool()}, r"fixed_points has shape \[3\]; wanted \[4\]"),
        ({"fixed_points": torch.zeros(4)}, "fixed_points has dtype torch.float32; wanted torch.bool"),
        ({"columns": columns.int()}, "columns has dtype torch.int32; wanted torch.int64"),
        ({"columns": columns[:, :8]}, r"columns has shape \[3, 8\]; wanted \[3, 9\]"),
        ({"columns": at(columns, (0, 0), -2)}, "columns holds -2; wanted -1 to 26"),
        ({"columns": at(columns, (0, 0), 2**62)}, f"columns holds {2**62}; wanted -1 to 26"),
        ({"columns": at(columns, (0, 4), -1)}, "columns lacks the number 4"),
        ({"columns": at(columns, (2, 8), 17)}, "columns ties k2 of camera 1, which is .* to k2 of camera 2, which is"),
        ({"columns": at(columns, (2, 8), 3)}, "columns lacks the number 26|columns ties tx of camera 0"),
    ]
    for changes, message in wrong:
        problem = small()
        for name, value in changes.items():
            setattr(problem, name, value)
        with pytest.raises(ValueError, match=f"^({message})"):
            problem.check()
    good = small()
    good.depth = torch.tensor([nan, -1, 0, -inf, 2, 3, 4]).double()
    good.fixed_points = torch.tensor([True, False, True, False])
    good.columns = at(columns, (2, slice(0, 3)), -1).clamp(max=-1)
    good.check()
    # Turns may be tied, whatever the rotations are.
    good.columns = at(columns, (2, slice(6, 9)), -1)
    good.columns[1, :3] = good.columns[0, :3]
    good.columns = good.columns.unique(return_inverse=True)[1] - 1
    good.check()


def test_copies() -> None:
    problem = small()
    problem.depth, problem.fixed_points = torch.ones(7).double(), torch.zeros(4).bool()
    problem.fix_cameras(0)
    copy = problem.clone()
    assert_same(copy, problem)
    for name in TENSORS:
        assert getattr(copy, name).data_ptr() != getattr(problem, name).data_ptr(), name
    single = problem.to(torch.float32)
    for name in ("cameras", "points", "observations", "depth"):
        assert same_bits(getattr(single, name), getattr(problem, name).float())
    for name in ("camera_index", "point_index", "fixed_points", "columns"):
        assert getattr(single, name) is getattr(problem, name)
    assert problem.to(torch.float64).cameras is problem.cameras
    with pytest.raises(ValueError, match=r"dtype is torch\.int32"):
        problem.to(torch.int32)
    with pytest.raises(ValueError, match="target is 'float32'; wanted a dtype or a device"):
        problem.to("float32")


def columns_of(problem: Problem) -> list[list[int]]:
    problem.check()
    assert problem.columns is not None and problem.columns.dtype == torch.int64
    return problem.columns.tolist()


def test_fixing_and_sharing() -> None:
    problem = small("pinhole")
    problem.cameras[:, 6:] = torch.tensor([500, 501, 320, 240])
    problem.fix_cameras(1)
    free = list(range(10))
    assert columns_of(problem) == [free, [-1] * 6 + [10, 11, 12, 13], [n + 14 for n in free]]
    problem.share_intrinsics()
    shared = [6, 7, 8, 9]
    assert columns_of(problem) == [free, [-1] * 6 + shared, [*range(10, 16), *shared]]
    problem.share_intrinsics(torch.tensor([5, -3, 5]))  # in place of what was
    assert columns_of(problem) == [free, [-1] * 6 + [10, 11, 12, 13], [*range(14, 20), *shared]]
    problem.fix_cameras([2], pose=False, intrinsics=True)  # what is tied to it is fixed too
    assert columns_of(problem) == [[*range(6), *[-1] * 4], [-1] * 6 + [6, 7, 8, 9], [*range(10, 16), *[-1] * 4]]
    problem.share_intrinsics()
    assert columns_of(problem) == [[*range(6), *[-1] * 4], [-1] * 10, [*range(6, 12), *[-1] * 4]]
    problem.fix_cameras(torch.tensor([True, False, False]), pose=True)
    assert columns_of(problem) == [[-1] * 10, [-1] * 10, [*range(6), *[-1] * 4]]
    problem.columns = None
    problem.fix_intrinsics()
    assert columns_of(problem) == [[*range(n, n + 6), *[-1] * 4] for n in (0, 6, 12)]
    problem.columns = None
    problem.fix_cameras(range(3), pose=False)
    assert columns_of(problem) == [[*range(n, n + 10)] for n in (0, 10, 20)]


def test_sharing_what_differs() -> None:
    problem = small("pinhole")
    problem.cameras[:, 6:] = torch.tensor([[500, 501, 320, 240], [500, 501, 320, 240], [500, 502, 320, 240]])
    problem.fix_cameras(2, intrinsics=True)
    before = problem.columns.clone() if problem.columns is not None else None
    with pytest.raises(ValueError, match="columns ties fy of camera 0, which is 501, to fy of camera 2, which is 502"):
        problem.share_intrinsics()
    assert before is not None and columns_of(problem) == before.tolist()
    problem.share_intrinsics([0, 0, 1])
    assert columns_of(problem)[1][6:] == columns_of(problem)[0][6:]
    problem.cameras[1, 8] = 321
    with pytest.raises(ValueError, match="columns ties cx of camera 0, which is 320, to cx of camera 1, which is 321"):
        problem.check()


def test_wrong_cameras_and_groups() -> None:
    problem = small()
    for index in (3, -1, [0, 5], torch.tensor([7])):
        with pytest.raises(ValueError, match=r"index holds .*; wanted 0 to 2"):
            problem.fix_cameras(index)
    for bad in (1.5, torch.tensor([True, False])):
        with pytest.raises(ValueError, match=r"index is .*; wanted numbers, or bool"):
            problem.fix_cameras(bad)  # type: ignore[arg-type]
    for bad in ("a", None, [[1], 2], [2**70]):
        with pytest.raises(ValueError, match=r"index is .*; wanted numbers"):
            problem.fix_cameras(bad)  # type: ignore[arg-type]
        if bad is not None:
            with pytest.raises(ValueError, match=r"groups is .*; wanted numbers"):
                problem.share_intrinsics(bad)  # type: ignore[arg-type]
    for groups in ([0, 1], [0.5, 1, 1], [[0, 1, 2]]):
        with pytest.raises(ValueError, match=r"groups is .*; wanted integers \[3\]"):
            problem.share_intrinsics(groups)  # type: ignore[arg-type]
    assert problem.columns is None
