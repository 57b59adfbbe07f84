"""The wheel, built, looked into, installed and used on a machine with no compiler and no Triton."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from ..kit.needs import need

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).parent / "smoke.py"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one wheel for all of them


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, of a copy of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    listed = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    make = f"import setuptools.build_meta; setuptools.build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", make, cwd=folder / "source")
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built for older systems; without CUDA for speed (the same lines link that library)."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "-w", sdist.parent)
    run(*pip, sdist, env={**os.environ, "EFFK_CUDA": "0", "EFFK_GLIBC": "2.28"})
    (built,) = sdist.parent.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with effk from the wheel, and of this one only torch and what it imports."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    shared = Path(torch.__file__).parents[1]
    left_out = re.compile(r"effk|triton|__editable__|.*\.pth$|pip|setuptools|_distutils_hack")
    for entry in shared.iterdir():
        if not left_out.match(entry.name) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return python


def call(python: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the new environment's Python elsewhere, with nothing on PATH and nothing inherited."""
    (folder / "empty").mkdir(exist_ok=True)
    clean = {"PATH": str(folder / "empty"), "HOME": str(folder), **environment}
    return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=folder, env=clean)


USE = """
import torch, effk, importlib.util, shutil
assert importlib.util.find_spec("triton") is None and shutil.which("g++") is None
w = torch.tensor([[1.0, 0, -2], [0, 0, 0.5]])
packed = torch.ops.effk.lscd_pack(w)
y = torch.ops.effk.lscd_linear(torch.ones(1, 3), *packed, 2, 3)
assert y.tolist() == [[-1.0, 0.5]], y
print(effk.__file__)
"""


def test_tag(wheel: Path, tmp_path: Path) -> None:
    """One wheel for every Python 3 and every Linux that a manylinux tag promises, as its auditor finds too."""
    platform = f"manylinux_2_28_{os.uname().machine}"
    assert re.fullmatch(rf"effk-[\d.]+-py3-none-{platform}\.whl", wheel.name)
    audit = (sys.executable, "-m", "auditwheel", "repair", "--plat", platform, "--exclude", "libtorch_cpu.so")
    run(*audit, "-w", tmp_path, wheel)
    (repaired,) = tmp_path.glob("*.whl")
    libraries = {n for n in zipfile.ZipFile(repaired).namelist() if ".so" in n}
    assert libraries == {"effk/lib/libeffk_cpu.so"}, "something had to be brought along"


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"effk/py.typed", "effk/schemas.txt", "effk/lib/libeffk_cpu.so"}
    for source, target in (("python_api", "effk"), ("kernels", "effk/kernels"), ("perf", "effk/perf")):
        for path in (ROOT / source).rglob("*"):
            if path.suffix in (".py", ".h", ".cuh", ".cpp", ".html") and "__pycache__" not in path.parts:
                wanted.add(f"{target}/{path.relative_to(ROOT / source)}")
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    extra = {n for n in names - wanted if ".dist-info/" not in n}
    assert all(n.startswith("effk/perf/") or n.startswith("effk/lib/") for n in extra), sorted(extra)
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_library_needs_only_torch_and_the_system(wheel: Path, tmp_path: Path) -> None:
    """No libpython (any Python will do) and no OpenMP of its own (a second one breaks torch's)."""
    library = Path(zipfile.ZipFile(wheel).extract("effk/lib/libeffk_cpu.so", tmp_path))
    dynamic = run("readelf", "-d", library)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    allowed = re.compile(r"libtorch_cpu\.so|libc10\.so|lib(c|m|stdc\+\+|gcc_s|dl|pthread|rt)\.so\.\d+|ld-linux-.*")
    assert "libtorch_cpu.so" in needed
    assert not [n for n in needed if not allowed.fullmatch(n)], needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_of_torch_it_uses_the_stable_interface_alone(wheel: Path, tmp_path: Path) -> None:
    """Functions of C, which torch keeps from 2.10 on, and no symbol of its C++ that changes with each version."""
    library = Path(zipfile.ZipFile(wheel).extract("effk/lib/libeffk_cpu.so", tmp_path))
    names = [line.split() for line in run("nm", "-D", library).splitlines()]
    of_torch = {name for *_, kind, name in names if kind == "U" and "@" not in name}
    assert of_torch and not [name for name in of_torch if not re.match(r"(aoti_)?torch_\w+$", name)], sorted(of_torch)
    defined = {name for *_, kind, name in names if kind not in "Uw"}
    assert defined and all(name.startswith("effk_") for name in defined), sorted(defined)


def test_no_path_of_the_build_inside(wheel: Path, tmp_path: Path) -> None:
    library = Path(zipfile.ZipFile(wheel).extract("effk/lib/libeffk_cpu.so", tmp_path)).read_bytes()
    for place in (wheel.parent, ROOT, Path(torch.__file__).parent, Path.home()):
        assert len(place.parts) < 2 or os.fsencode(place) + b"/" not in library, place


def test_works_without_compiler_and_triton(installed: Path, tmp_path: Path) -> None:
    done = call(installed, tmp_path, "-c", USE)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed.parents[1])


def test_status_command(installed: Path, tmp_path: Path) -> None:
    done = call(installed, tmp_path, "-m", "effk")
    assert done.returncode == 0, done.stderr
    assert '"cpu_level"' in done.stdout and "triton" in done.stdout


def test_reference_can_be_forced(installed: Path, tmp_path: Path) -> None:
    done = call(installed, tmp_path, "-c", USE, EFFK_BACKEND="reference")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "variable, value",
    [
        ("EFFK_CPU_LEVEL", "nonsense"),
        ("EFFK_BACKEND", "nonsense"),
        ("EFFK_BACKEND", "triton"),
        ("EFFK_BACKEND", "cpu-nonsense"),
    ],
)
def test_forcing_what_is_absent_raises(installed: Path, tmp_path: Path, variable: str, value: str) -> None:
    done = call(installed, tmp_path, "-c", "import effk", **{variable: value})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"(RuntimeError|ValueError): effk: ", last) and value in last


def test_every_level_can_be_forced(installed: Path, tmp_path: Path) -> None:
    code = "import effk; print(*effk.status()['cpu_levels'])"
    for level in call(installed, tmp_path, "-c", code).stdout.split():
        code = f"import effk; assert effk.status()['cpu_level'] == {level!r}"
        for variable, value in (("EFFK_CPU_LEVEL", level), ("EFFK_BACKEND", f"cpu-{level}")):
            done = call(installed, tmp_path, "-c", code, **{variable: value})
            assert done.returncode == 0, done.stderr


def without_library(installed: Path, tmp_path: Path) -> Path:
    """A folder with the package, to run in: it comes before the installed one."""
    package = Path(call(installed, tmp_path, "-c", "import effk; print(effk.__file__)").stdout.strip()).parent
    shutil.copytree(package, tmp_path / "effk", ignore=shutil.ignore_patterns("lib"))
    return tmp_path


def test_missing_library_is_no_import_error(installed: Path, tmp_path: Path) -> None:
    """It is a fact for effk.status()."""
    folder = without_library(installed, tmp_path)
    done = call(installed, folder, "-c", "import effk; print(effk.status()['libraries']['cpu'])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "missing: not built" and "slow references answer" in done.stderr


def test_references_answer_where_there_is_no_library(installed: Path, tmp_path: Path) -> None:
    """As on a platform that none is built for."""
    shutil.copy(SMOKE, tmp_path / "smoke.py")
    done = call(installed, without_library(installed, tmp_path), "smoke.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "" and "effk::lscd_linear has no kernel for cpu" in done.stderr


def test_every_family_works(installed: Path, tmp_path: Path) -> None:
    done = call(installed, tmp_path, str(SMOKE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "scalar"


@pytest.mark.parametrize("processor, levels", [("Westmere", "scalar"), ("Haswell", "scalar avx2")])
def test_an_older_processor_meets_no_instruction_of_a_newer_one(
    installed: Path, tmp_path: Path, processor: str, levels: str
) -> None:
    """In an emulator, which ends a program that uses what the processor hasn't."""
    emulator = f"qemu-{os.uname().machine}"
    need(programs=[emulator], get="Debian: apt-get install qemu-user")
    done = subprocess.run([emulator, "-cpu", processor, installed, SMOKE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == levels
