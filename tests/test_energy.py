"""Meters of energy, on made-up counters."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from effk.perf.harness.energy import meter_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RANGE = 1_000_000


def domain(root: Path, name: str, called: str, microjoules: int = 0) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in (("name", called), ("energy_uj", microjoules), ("max_energy_range_uj", RANGE)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_all_packages_are_added_and_nothing_else(tmp_path: Path) -> None:
    packages = [domain(tmp_path, f"intel-rapl:{i}", f"package-{i}", 100) for i in (0, 1)]
    core = domain(tmp_path, "intel-rapl:0:0", "core", 5)
    psys = domain(tmp_path, "intel-rapl:2", "psys", 7)
    other_way = domain(tmp_path, "intel-rapl-mmio:0", "package-0", 9)
    meter = meter_for(CPU, tmp_path)
    assert not isinstance(meter, str) and meter.what == "RAPL, 2 packages"
    before = meter.joules()
    for file in (core, psys, other_way):
        file.write_text("500000")
    packages[0].write_text("200100")
    packages[1].write_text("50100")
    assert meter.joules() - before == pytest.approx(0.25)


def test_counters_start_over(tmp_path: Path) -> None:
    """Each at its own time, and again."""
    first, second = (domain(tmp_path, f"intel-rapl:{i}", f"package-{i}", RANGE - 10) for i in (0, 1))
    meter = meter_for(CPU, tmp_path)
    assert not isinstance(meter, str)
    begin = meter.joules()
    for value in (20, RANGE - 1, 19):  # 30, then nearly a whole range, then 20
        first.write_text(str(value))
        last = meter.joules()
    assert last - begin == pytest.approx((30 + (RANGE - 21) + 20) / 1e6)
    second.write_text("0")
    assert meter.joules() - last == pytest.approx(10 / 1e6)


def test_why_a_cpu_has_no_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(meter_for(CPU, tmp_path / "none")).startswith(f"no {tmp_path / 'none'}, where Linux shows RAPL")
    domain(tmp_path, "intel-rapl:0", "psys")
    assert meter_for(CPU, tmp_path) == f"no package's counter in {tmp_path}"
    file = domain(tmp_path, "intel-rapl:1", "package-0")
    file.write_text("")
    assert "invalid literal" in str(meter_for(CPU, tmp_path))

    def denied(self: Path) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", denied)  # a test may run as root, who may read all
    assert meter_for(CPU, tmp_path) == f"{file}: permission denied (Linux lets root alone read it)"


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of that name, whose board's counter is in a file beside it."""
    (tmp_path / "pynvml.py").write_text(
        f"""
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != "GPU-1-2": raise NVMLError("Not Found")
    return "board"
def nvmlDeviceGetTotalEnergyConsumption(board):
    assert board == "board"
    return int(open({str(tmp_path / "mJ")!r}).read())
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    counter = tmp_path / "mJ"
    counter.write_text("5000")
    return counter


def test_a_board_counts_millijoules(nvml: Path) -> None:
    meter = meter_for(CUDA)
    assert not isinstance(meter, str)
    before = meter.joules()
    nvml.write_text("7500")
    assert meter.joules() - before == pytest.approx(2.5)


def test_why_a_gpu_has_no_meter(nvml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="another"))
    assert meter_for(CUDA) == "NVML: Not Found"
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert meter_for(CUDA) == "pynvml not installed (pip install nvidia-ml-py)"
