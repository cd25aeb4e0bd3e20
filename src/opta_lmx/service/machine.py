"""The checks of ``opta-lmx doctor`` on the machine: disk, memory, what Metal may use of it, and what is installed.

Pure, as ``findings.py``. Sizes are bytes.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from opta_lmx.service.findings import Finding, Level

# Logs, models.lock and the starter's import need some hundreds of megabytes; a model of 7 billion parameters at 4 bits
# takes 4 GiB.
_NO_DISK_BYTES: Final = 1 * 1024**3
_LITTLE_DISK_BYTES: Final = 10 * 1024**3

# What a raised limit should leave to macOS and other programs: a tenth, as the memory cap does, and on small machines
# what an idle desktop holds. A Mac whose GPU memory takes more than there is stops answering.
_SYSTEM_SHARE: Final = 0.1
_SYSTEM_LEAST_BYTES: Final = 6 * 1024**3

# Weights are not all: caches, buffers and the process. By the test models and the KV reserve of the settings.
_NEED_PER_WEIGHTS: Final = 1.15


class GpuMemory(Protocol):
    """What ``manager/metal.py`` knows of a Mac: ``wired_limit_bytes`` is 0 if none is set, None if there is no such."""

    @property
    def chip(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def wired_limit_bytes(self) -> int | None: ...
    @property
    def working_set_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LargestModel:
    """The model on disk with the most weights."""

    id: str
    weights_bytes: int

    @property
    def need_bytes(self) -> int:
        """About what it takes when loaded; ``opta-lmx plan`` says it exactly."""
        return int(self.weights_bytes * _NEED_PER_WEIGHTS)


def check_disk(directory: Path, free_bytes: int) -> Finding:
    """Free space where the models are."""
    what = f"{_gib(free_bytes)} free at {directory}"
    if free_bytes >= _LITTLE_DISK_BYTES:
        return Finding("disk", Level.OK, what)
    remedy = "opta-lmx ls shows the models with their sizes, opta-lmx rm MODEL removes one"
    return Finding("disk", Level.WARN if free_bytes >= _NO_DISK_BYTES else Level.FAIL, what, remedy)


def check_memory(total_bytes: int, limit_bytes: int, largest: LargestModel | None) -> Finding:
    """The cap beside the largest model; ``limit_bytes`` is the smaller of the settings' cap and Metal's."""
    what = f"{_gib(total_bytes)}, of which at most {_gib(limit_bytes)} are used"
    if largest is None:
        return Finding("memory", Level.OK, f"{what}; no models on disk")
    what += f"; the largest model, {largest.id}, needs about {_gib(largest.need_bytes)}"
    if largest.need_bytes <= limit_bytes:
        return Finding("memory", Level.OK, what)
    return Finding("memory", Level.WARN, what, f"opta-lmx plan {largest.id} shows the arithmetic; take fewer bits")


def check_metal(gpu: GpuMemory | None, cap_bytes: int, largest: LargestModel | None) -> Finding:
    """Metal's working set, and whether ``iogpu.wired_limit_mb`` should be set; ``cap_bytes`` is the settings' cap."""
    if gpu is None:
        return Finding("metal", Level.OK, "no Metal here: MLX runs on the processor")
    what = f"{gpu.chip}: Metal may use {_gib(gpu.working_set_bytes)} of {_gib(gpu.memory_bytes)}"
    left = max(int(gpu.memory_bytes * _SYSTEM_SHARE), _SYSTEM_LEAST_BYTES)
    most = min(cap_bytes, gpu.memory_bytes - left)
    if gpu.wired_limit_bytes and gpu.wired_limit_bytes > gpu.memory_bytes - left:
        what += f" (iogpu.wired_limit_mb is set), which leaves less than {_gib(left)} to macOS"
        return Finding("metal", Level.WARN, what, _set_limit(max(most, 0)))
    if largest is None or largest.need_bytes <= gpu.working_set_bytes:
        return Finding("metal", Level.OK, what)
    what += f", too little for {largest.id}"
    if gpu.wired_limit_bytes is None:
        return Finding("metal", Level.WARN, f"{what}; this macOS cannot be told otherwise", "macOS 14 and later can")
    if largest.need_bytes <= most:
        return Finding("metal", Level.WARN, what, _set_limit(most))
    return Finding("metal", Level.WARN, f"{what}, and so is this machine", "take a model with fewer bits")


def check_versions(
    python: str, pins: Mapping[str, Set[str]], installed: Mapping[str, str | None], shown: Set[str]
) -> Iterator[Finding]:
    """What is installed against the versions this release was tested with; ``shown`` are named when all is well."""
    sound = True
    for name, wanted in sorted(pins.items()):
        version = installed.get(name)
        if version in wanted:
            continue
        sound = False
        pin = f"{name}=={max(wanted)}"
        remedy = f"uv sync, or pip install --no-deps {pin}"
        if version is None:
            yield Finding("versions", Level.FAIL, f"{name} is not installed", remedy)
        else:
            yield Finding("versions", Level.WARN, f"{name} {version} is not the tested {pin}", remedy)
    if sound:
        engine = ", ".join(f"{name} {installed[name]}" for name in sorted(shown & pins.keys()))
        yield Finding("versions", Level.OK, f"Python {python}; {engine}; all as pinned")


def _set_limit(limit_bytes: int) -> str:
    return (
        f"sudo sysctl iogpu.wired_limit_mb={limit_bytes // 1024**2} (gone when the Mac starts anew: "
        "docs/guides/service.md makes it last), then restart the server"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.1f} GiB"
