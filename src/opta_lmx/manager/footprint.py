"""What one process really holds: the bytes that come back to the system when it ends.

Linux: the private pages it has written to, in memory or swapped out. Pages of program files are left out: they stay
in the page cache, which counts as available, and what of them is "unique" (psutil's USS) changes by 20 MB a worker
with who else has MLX loaded. macOS: the kernel's physical footprint, Activity Monitor's "Memory", in which the GPU's
buffers are counted; psutil cannot read it, and its USS needs root there. The macOS half is tested against recorded
bytes and has never run on a Mac.
"""

import ctypes
import re
import struct
import sys
from pathlib import Path

# struct rusage_info_v0 of <sys/resource.h>: a UUID of 16 bytes, then eight-byte numbers, of which the eighth is
# ri_phys_footprint; the whole is 96 bytes.
_RUSAGE_FLAVOR = 0
_RUSAGE_BYTES = 96
_FOOTPRINT_OFFSET = 16 + 7 * 8

_PRIVATE = re.compile(r"^(?:Private_Dirty|SwapPss): +(\d+) kB$", re.MULTILINE)


def footprint_bytes(pid: int) -> int:
    """The footprint of a process of this user, in bytes; 0 if it has gone.

    Linux walks the process's page tables: some 10 ms for each GB.
    """
    if sys.platform == "darwin":
        usage = _rusage(pid)
        return 0 if usage is None else phys_footprint(usage)
    try:
        return private_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def private_bytes(smaps_rollup: str) -> int:
    """The private pages in what Linux (4.14 and later) writes of a process."""
    return sum(int(kibibytes) * 1024 for kibibytes in _PRIVATE.findall(smaps_rollup))


def phys_footprint(usage: bytes) -> int:
    """The physical footprint in what proc_pid_rusage wrote; raises ValueError if that is too short."""
    if len(usage) < _RUSAGE_BYTES:
        raise ValueError(f"a rusage of {len(usage)} bytes, not {_RUSAGE_BYTES}")
    (footprint,) = struct.unpack_from("=Q", usage, _FOOTPRINT_OFFSET)
    return int(footprint)


def _rusage(pid: int) -> bytes | None:
    """What the kernel knows of a process's use; None if it has gone or belongs to another user."""
    buffer = ctypes.create_string_buffer(_RUSAGE_BYTES)
    failed: int = ctypes.CDLL(None).proc_pid_rusage(pid, _RUSAGE_FLAVOR, ctypes.byref(buffer))
    return None if failed else buffer.raw
