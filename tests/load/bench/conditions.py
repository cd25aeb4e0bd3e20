"""What the numbers were taken on, without which they mean nothing."""

import os
import platform
import resource
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import psutil

from opta_lmx import __version__
from tests.load.bench.measure import Run

_PACKAGES: Final = ("mlx", "mlx-lm", "vllm-mlx", "uvicorn", "uvloop", "starlette")
_CPUINFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU seconds used so far: by the whole machine, and by this process and its children that have ended."""

    at: float
    machine: float
    own: float

    def cores_of_others(self, later: "CpuReading") -> float:
        """How many cores other processes kept busy between two readings with no child alive at either."""
        others = (later.machine - self.machine) - (later.own - self.own)
        return max(0.0, others / (later.at - self.at))


def read_cpu() -> CpuReading:
    """The machine's CPU use now; time a virtual machine was kept waiting counts as used by others."""
    times = psutil.cpu_times()._asdict()
    # On Linux these two are part of user and nice.
    counted_twice = ("guest", "guest_nice")
    machine = sum(value for name, value in times.items() if name not in ("idle", "iowait", *counted_twice))
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return CpuReading(perf_counter(), machine, sum(usage.ru_utime + usage.ru_stime for usage in usages))


def read_conditions(run: Run) -> dict[str, Any]:
    """The machine, the versions and how the run was made, by name."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "CPU": _processor(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": ", ".join(f"{name} {version}" for name, version in {"opta-lmx": __version__, **versions}.items()),
        "python": platform.python_version(),
        "rounds": f"{run.rounds}, medians, raw and servers in turn{', quick' if run.quick else ''}",
        "seed": run.seed,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The CPU's own name; what the system calls it where that is not to be had."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
