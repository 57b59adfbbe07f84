"""Energy: joules, by counters that processors and GPUs keep themselves.

What a span took is the difference of two readings. They count a whole package or board: all that runs there, and what
it takes when idle; memory beside a package isn't counted. And they step: RAPL's about every millisecond, NVML's every
20 to 100 ms, so a span has to be SPAN long at least to be known to a tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .problem import not_installed

SPAN = 1.0  # seconds
POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    what: str  # is metered, for the report

    def joules(self) -> float:
        """Since an origin that stays the same."""
        ...


class Rapl:
    """The packages' counters. Each starts over at a range of its own, after minutes: read it more often than that."""

    def __init__(self, domains: Sequence[Path]):
        self.what = f"RAPL, {len(domains)} package{'s' * (len(domains) > 1)}"
        self.files = [domain / "energy_uj" for domain in domains]
        self.ranges = [int((domain / "max_energy_range_uj").read_text()) for domain in domains]
        self.last, self.total = self._read(), 0

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file in self.files]

    def joules(self) -> float:
        now = self._read()
        self.total += sum((a - b) % size for a, b, size in zip(now, self.last, self.ranges, strict=True))
        self.last = now
        return self.total / 1e6


class Nvml:
    """A board's counter, which starts when the driver is loaded."""

    what = "NVML, the board"

    def __init__(self, read: Callable[[], int]):
        self.read = read

    def joules(self) -> float:
        return self.read() / 1e3


def _rapl(device: torch.device, root: Path) -> Meter | str:
    if not root.is_dir():
        return f"no {root}, where Linux shows RAPL, if neither a virtual machine nor a container hides it"
    try:
        # Not "psys", which has the packages in it, nor the domains in a package.
        domains = [d for d in sorted(root.glob("intel-rapl:*")) if (d / "name").read_text().startswith("package")]
        return Rapl(domains) if domains else f"no package's counter in {root}"
    except PermissionError as error:
        return f"{error.filename}: permission denied (Linux lets root alone read it)"
    except (OSError, ValueError) as error:
        return str(error)


def _nvml(device: torch.device, root: Path) -> Meter | str:
    if reason := not_installed("pynvml", get="pip install nvidia-ml-py"):
        return reason
    import pynvml

    try:
        pynvml.nvmlInit()
        # By its UUID: torch's numbers are those of CUDA_VISIBLE_DEVICES.
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    return Nvml(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(board))


METERS: dict[str, Callable[[torch.device, Path], Meter | str]] = {"cpu": _rapl, "cuda": _nvml}


def meter_for(device: torch.device, root: Path = POWERCAP) -> Meter | str:
    """A device's meter, or why there is none. `root` is where Linux shows a CPU's."""
    return METERS[device.type](device, root)
