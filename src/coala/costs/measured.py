"""Seconds, joules and the highest use of memory, as they are measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any


class Stopwatch:
    """Wall seconds of a ``with`` block; ``seconds`` runs inside it and stands still after it. May be entered again."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds spent inside so far."""
        return self._spent + (0.0 if self._since is None else time.perf_counter() - self._since)

    def __enter__(self) -> Stopwatch:
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spent, self._since = self.seconds, None


class Meter(Stopwatch):
    """A stopwatch that also reads what energy the block took, where the machine tells.

    Of each NVIDIA GPU the driver's own counter (pynvml, if it is installed), else the power that ``nvidia-smi`` tells
    every second, times the time; of the processor the counters under ``powercap``, which often only root may read.
    Everything the machine does counts, not this process alone.
    """

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        super().__init__()
        self._powercap = powercap
        self._meters: dict[str, _Counter | _Sampler] = {}
        self._spent_joules: dict[str, float] = {}

    @property
    def joules(self) -> dict[str, float] | None:
        """Energy of the finished blocks by part, ``device`` and ``host``; None when nothing reports it."""
        return dict(self._spent_joules) or None

    def facts(self, tokens: int | None = None) -> dict[str, Any]:
        """Seconds, peak bytes, joules, and ``tokens`` a second where their number is given."""
        rate = {} if tokens is None or not self.seconds else {"tokens_per_second": tokens / self.seconds}
        return {"seconds": self.seconds, "peak_bytes": peak_memory(), "joules": self.joules, **rate}

    def __enter__(self) -> Meter:
        device, host = _gpu_energy(), _processor_energy(self._powercap)
        self._meters = {name: found for name, found in (("device", device), ("host", host)) if found is not None}
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for name, meter in self._meters.items():
            used = meter.used()
            if used is not None:
                self._spent_joules[name] = self._spent_joules.get(name, 0.0) + used
        self._meters = {}


class _Counter:
    """Joules since it was made, by counters that only rise but begin again behind their range."""

    def __init__(self, read: Callable[[], list[float]], ranges: Sequence[float]) -> None:
        self._read, self._ranges, self._first = read, ranges, read()

    def used(self) -> float | None:
        try:
            now = self._read()
        except Exception:  # noqa: BLE001  a driver raises its own; a reading lost is no reason to lose the work
            return None
        steps = zip(now, self._first, self._ranges, strict=True)
        return sum(b - a if b >= a else b - a + full for b, a, full in steps)


class _Sampler:
    """Joules since it was made, from watts asked for every second in a thread of its own."""

    def __init__(self, watts: Callable[[], float | None], first: float, every: float = 1.0) -> None:
        self._watts, self._every = watts, every
        self._joules, self._at, self._power = 0.0, time.perf_counter(), first
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            self._advance()

    def _advance(self) -> None:
        # Trapezes: the power between two readings is taken to be their mean.
        power, now = self._watts(), time.perf_counter()
        power = self._power if power is None else power
        self._joules += (now - self._at) * (power + self._power) / 2
        self._at, self._power = now, power

    def used(self) -> float | None:
        self._end.set()
        self._thread.join()
        self._advance()
        return self._joules


def _processor_energy(powercap: Path) -> _Counter | None:
    """The packages' and memory's counters. Cores and graphics lie inside a package and are not counted again."""
    zones = []
    try:
        for zone in sorted(powercap.glob("*/energy_uj")):
            name = (zone.parent / "name").read_text().strip()
            if name.startswith(("package", "dram")):
                zones.append((zone, float((zone.parent / "max_energy_range_uj").read_text()) / 1e6))
        if not zones:
            return None
        return _Counter(lambda: [float(zone.read_text()) / 1e6 for zone, _ in zones], [full for _, full in zones])
    except (OSError, ValueError):
        return None


def _gpu_energy() -> _Counter | _Sampler | None:
    if find_spec("pynvml") is not None:
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            cards = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            if cards:
                return _Counter(
                    lambda: [nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3 for card in cards],
                    [0.0] * len(cards),
                )
        except Exception:  # noqa: BLE001  NVML's own error class, known only where it is installed
            pass
    first = _gpu_watts()
    return None if first is None else _Sampler(_gpu_watts, first)


def _gpu_watts() -> float | None:
    found = ask_driver("power.draw")
    return sum(found) if found else None


def ask_driver(field: str) -> list[float]:
    """What ``nvidia-smi`` tells of ``field``, one number a GPU in its own unit; nothing without a driver or answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return [float(line) for line in done.stdout.split("\n") if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def machine() -> dict[str, str]:
    """What numbers are measured on, and the commit of this package where it is a checkout."""
    found = {"cores": str(os.cpu_count()), "Python": platform.python_version()}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found["processor"] = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        found["processor"] = platform.machine()
    for name in ("torch", "jax", "trl", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for name, command in (
        ("GPU", ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        ("commit", ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]),
    ):
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")
        except (OSError, subprocess.SubprocessError):
            continue
        if told[0].strip():
            found[name] = told[0].strip()
    return found


def peak_memory() -> dict[str, int]:
    """Highest use so far in bytes: ``host`` of this process, ``device`` of torch's allocator if CUDA is in use."""
    peak = {}
    host = _host_peak()
    if host is not None:
        peak["host"] = host
    # Looked up, never imported: measuring must not load a framework that the process does without.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["device"] = int(max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())))
    return peak


def _host_peak() -> int | None:
    try:
        # ru_maxrss survives exec on Linux, so a child of a large process would report its parent's peak.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # no such module on Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
