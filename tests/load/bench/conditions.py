"""What the numbers were taken on, without which they mean nothing."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

from opta_lmx import __version__
from tests.load.bench.measure import Run

_PACKAGES: Final = ("mlx", "mlx-lm", "vllm-mlx", "uvicorn", "uvloop", "fastapi")
_CPUINFO: Final = Path("/proc/cpuinfo")


def read_conditions(run: Run, *, quick: bool) -> dict[str, Any]:
    """The machine, the versions and how the run was made, by name."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "CPU": _processor(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load average at the start": load_average(),
        "versions": ", ".join(f"{name} {version}" for name, version in {"opta-lmx": __version__, **versions}.items()),
        "python": platform.python_version(),
        "rounds": f"{run.rounds}, medians, raw and servers in turn{', quick' if quick else ''}",
        "seed": run.seed,
    }


def load_average() -> float:
    """Processes that want a core, over the last minute: above their number, everything here is too slow."""
    return round(os.getloadavg()[0], 2)


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
