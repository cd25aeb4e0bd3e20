"""What a Mac's GPU may use of its memory: facts by ``sysctl``, and the working set that follows from them.

The server asks the system instead of MLX, which it never imports. Read once at the start: whoever changes
``iogpu.wired_limit_mb`` restarts the server. Tested against recorded outputs; never run on a Mac.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

# Gives the value of one sysctl name as text; None where the system does not know the name.
ReadSysctl: TypeAlias = Callable[[str], str | None]

# A sysctl answers in milliseconds; one that hangs must not keep the server from starting.
_SYSCTL_SECONDS = 2.0

# Metal's recommended working set where nobody has set a limit: two thirds of small machines' memory and three quarters
# of others', by what Metal reports on 16 and 32 GB (66.7 %), and on 36, 48, 64 and 192 GB (75 %). Machines of 512 GB
# may be allowed more; then iogpu.wired_limit_mb says so exactly.
_SMALL_MACHINE_BYTES = 36 * 1024**3


@dataclass(frozen=True, slots=True)
class MetalFacts:
    """An Apple Silicon machine. ``wired_limit_bytes`` is None where the system knows no such limit, 0 if none is set.

    ``chip`` is the processor's name, for people.
    """

    chip: str
    memory_bytes: int
    wired_limit_bytes: int | None

    @property
    def default_working_set_bytes(self) -> int:
        """What Metal recommends where nobody has set a limit."""
        if self.memory_bytes < _SMALL_MACHINE_BYTES:
            return self.memory_bytes * 2 // 3
        return self.memory_bytes * 3 // 4

    @property
    def working_set_bytes(self) -> int:
        """The most that Metal buffers of all processes together may keep in memory.

        A limit that was set takes the default's place, in both directions, up to the memory there is.
        """
        if self.wired_limit_bytes:
            return min(self.wired_limit_bytes, self.memory_bytes)
        return self.default_working_set_bytes


def read_metal(platform: str = sys.platform, sysctl: ReadSysctl | None = None) -> MetalFacts | None:
    """This machine's facts; None where there is no Metal that MLX could use (not a Mac, or an Intel one)."""
    if platform != "darwin":
        return None
    read = sysctl or _sysctl
    memory = _number(read("hw.memsize"))
    if not memory or _number(read("hw.optional.arm64")) != 1:
        return None
    limit = _number(read("iogpu.wired_limit_mb"))
    return MetalFacts(
        chip=read("machdep.cpu.brand_string") or "unknown",
        memory_bytes=memory,
        wired_limit_bytes=None if limit is None else max(0, limit) * 1024**2,
    )


def _number(text: str | None) -> int | None:
    """None for what is absent or no number."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=_SYSCTL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
