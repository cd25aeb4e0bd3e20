"""The bounds of this process's MLX, as the server set them at the load, and as grants of KV memory move them.

What MLX does at each bound: past the memory limit an evaluation waits for running work to end before it starts more,
and an allocation only fails where the machine has no memory left; past the cache limit freed buffers go back to the
system at once; up to the wired limit (Metal only) the system does not page buffers out. A bound is a brake, not the
gate: that is the server's ledger.
"""

import mlx.core as mx

from opta_lmx.types import LoadOptions


class MemoryLimits:
    """Sets them once made; belongs to the owner thread. MLX's own remain where the options name none."""

    def __init__(self, options: LoadOptions) -> None:
        self._options = options
        self._grown = 0
        if options.cache_limit_bytes is not None:
            mx.set_cache_limit(options.cache_limit_bytes)
        self._set()

    def follow(self, granted_bytes: int | None) -> None:
        """Take what the caches may hold now: what that is above the load's ``kv_bytes`` is added to the bounds."""
        grown = max(0, (granted_bytes or 0) - (self._options.kv_bytes or 0))
        if grown != self._grown:
            self._grown = grown
            self._set()

    def _set(self) -> None:
        memory, wired = self._options.memory_limit_bytes, self._options.wired_limit_bytes
        if memory is not None:
            mx.set_memory_limit(memory + self._grown)
        if wired is not None and mx.metal.is_available():
            # Above the system's own limit MLX raises, and that may have been lowered since the server read it.
            most = int(mx.device_info()["max_recommended_working_set_size"])
            mx.set_wired_limit(min(wired + self._grown, most))
