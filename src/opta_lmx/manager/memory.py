"""The memory ledger: what the machine says, what is promised, and the arithmetic of the cap.

``MemoryMonitor`` takes and caches readings and owns the promises; everything else is a pure function. Bytes are
exact ints. Who loads and stops models is ``residency.py``; which models make room is ``eviction.py``.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import msgspec
import psutil

from opta_lmx.config import MemoryConfig
from opta_lmx.errors import MemoryLimit
from opta_lmx.manager.catalog import is_encoder
from opta_lmx.manager.eviction import Resident, choose_victims, coming_bytes, waitable_bytes
from opta_lmx.manager.metal import MetalFacts
from opta_lmx.types import LoadOptions, MemoryProbe, MemoryReading, ModelFiles

# A worker with MLX, mlx-lm, vllm-mlx and transformers imported and the smallest of models loaded: a footprint
# (``footprint.py``) of 57.5 MiB (Linux x86-64, Python 3.11, MLX 0.32; a Mac's has not been measured).
WORKER_OVERHEAD_BYTES = 58 * 1024 * 1024

# A text model's tokenizer, for each entry of the vocabulary: tokens and merges in tables of their own, twice, and as
# Python strings. Measured: 860 bytes (SmolLM2, 49,152 entries), 680 (a made-up one of 150,000). An encoder's has no
# merges: 190 bytes (MiniLM, 30,522 entries).
_TOKENIZER_BYTES_PER_ENTRY = 850
_ENCODER_BYTES_PER_ENTRY = 190

# MLX keeps freed buffers for reuse, and a forward takes some of its own while it runs. A model needs no more than its
# own size of them; without a bound they grow to the allocation limit and never return (vllm-mlx issue 793).
MOST_BUFFER_BYTES = 512 * 1024 * 1024
_LEAST_BUFFER_BYTES = 64 * 1024 * 1024

# What a worker may use for KV before it has to ask; a tenth of a small model's weights would be used up by one prompt.
SMALL_KV_BYTES = 64 * 1024 * 1024

# K and V, two bytes each: the KV cache is kept in float16 or bfloat16 unless a load asks for fewer bits.
_KV_BYTES_PER_ELEMENT_PAIR = 2 * 2

# Status is asked for by several callers at once; what they see may be this old. Decisions always look again.
READING_AGE_SECONDS = 0.2


class SystemProbe:
    """Reads this machine by psutil; with ``metal`` it is a Mac whose GPU uses the same memory.

    ``footprints`` gives what the workers hold together. It is asked on Metal only: there psutil may show a GPU's
    buffers as available, while elsewhere its figure has the workers in it.
    """

    def __init__(
        self,
        metal: MetalFacts | None = None,
        footprints: Callable[[], int] = lambda: 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metal = metal
        self._footprints = footprints
        self._now = now

    def read(self) -> MemoryReading:
        """One look; takes some tens of microseconds."""
        memory = psutil.virtual_memory()
        used, metal = memory.total - memory.available, self._metal
        if metal is not None:
            used = max(used, self._footprints())
        working_set = None if metal is None else metal.working_set_bytes
        return MemoryReading(memory.total, used, working_set, self._now())


class Bound(StrEnum):
    """Which rule sets the cap: the configured share of the machine's memory, or Metal's working set."""

    MAX_MEMORY_PERCENT = "max_memory_percent"
    WORKING_SET = "working_set"


@dataclass(frozen=True, slots=True)
class LoadNeed:
    """What loading one model takes. ``held_bytes`` is the part that stays promised once the model is ready.

    ``overhead_bytes`` are the process and its tokenizer, ``buffer_bytes`` what MLX may take beside weights and caches.
    """

    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    prefix_cache_bytes: int = 0
    buffer_bytes: int = 0

    @property
    def footprint_bytes(self) -> int:
        """What the process holds once the model is ready: the part that can be measured then."""
        return self.weights_bytes + self.overhead_bytes

    @property
    def total_bytes(self) -> int:
        """What must be free under the cap before the load may start."""
        return self.footprint_bytes + self.held_bytes

    @property
    def held_bytes(self) -> int:
        """KV, prefix cache, buffers: empty when the model is ready, so no reading shows them until requests fill them.

        What requests have filled counts twice from then on, as promised and as used: the safe side.
        """
        return self.kv_bytes + self.prefix_cache_bytes + self.buffer_bytes

    def limit_worker(self, options: LoadOptions, working_set_bytes: int | None = None) -> LoadOptions:
        """The options with the bounds of the worker's MLX: all of the need but the process itself.

        Workers' bounds together stay under the cap, because their needs do. Wired are weights and caches, and only
        on Metal, whose working set is ``working_set_bytes``.
        """
        kept = self.weights_bytes + self.kv_bytes + self.prefix_cache_bytes
        return msgspec.structs.replace(
            options,
            kv_bytes=self.kv_bytes,
            memory_limit_bytes=kept + self.buffer_bytes,
            cache_limit_bytes=self.buffer_bytes,
            wired_limit_bytes=None if working_set_bytes is None else min(kept, working_set_bytes),
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """The machine at one moment: ``used_bytes`` by everybody, ``reserved_bytes`` promised on top."""

    total_bytes: int
    used_bytes: int
    reserved_bytes: int
    limit_bytes: int
    bound: Bound

    @property
    def free_bytes(self) -> int:
        """What may still be promised; negative when others have taken more than the cap leaves."""
        return self.limit_bytes - self.used_bytes - self.reserved_bytes


class Verdict(StrEnum):
    """What a load of this model would do now; only DOES_NOT_FIT is a refusal."""

    RESIDENT = "resident"
    FITS = "fits"
    FITS_AFTER_STOP = "fits_after_stop"
    FITS_AFTER_EVICTION = "fits_after_eviction"
    MUST_WAIT = "must_wait"
    DOES_NOT_FIT = "does_not_fit"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The arithmetic of one load: ``used + reserved + need <= limit``, what would be evicted, and the verdict."""

    model_id: str
    need: LoadNeed
    ledger: Ledger
    verdict: Verdict
    would_evict: tuple[str, ...] = ()

    @property
    def headroom_bytes(self) -> int:
        """What the load would leave under the cap; negative is what is missing."""
        return self.ledger.free_bytes - self.need.total_bytes

    def refusal(self) -> MemoryLimit:
        """The error of a load that must not start; it carries the arithmetic."""
        return MemoryLimit(self.model_id, self.need.total_bytes, self.ledger.free_bytes, self.as_dict())

    def as_dict(self) -> dict[str, object]:
        """Every number and the verdict, ready for JSON."""
        ledger, need = self.ledger, self.need.total_bytes
        relation = "<=" if self.headroom_bytes >= 0 else ">"
        return {
            "model_id": self.model_id,
            "verdict": self.verdict.value,
            "arithmetic": f"{ledger.used_bytes} used + {ledger.reserved_bytes} reserved + {need} needed "
            f"{relation} {ledger.limit_bytes} limit",
            **asdict(self.need),
            "need_bytes": need,
            **asdict(ledger),
            "bound": ledger.bound.value,
            "free_bytes": ledger.free_bytes,
            "headroom_bytes": self.headroom_bytes,
            "would_evict": list(self.would_evict),
        }


def load_need(
    files: ModelFiles, context_length: int | None, kv_reserve_fraction: float, prefix_cache_bytes: int = 0
) -> LoadNeed:
    """What loading ``files`` takes, before a tensor is read.

    Weights are the exact sum of the tensors, of a GGUF not imported yet those of its import. KV is set aside for one
    sequence of ``context_length`` tokens (the model's own where None) but for at most ``kv_reserve_fraction`` of the
    weights: a 128k context would otherwise cost as much as the model and refuse what serves everyday prompts well.
    A small model gets SMALL_KV_BYTES of it in any case. Where the cache's shape or the context is unknown, it is that
    fraction. Weights and overhead together are within 5 % of the footprint of a model that has just been loaded.
    """
    weights = files.weights_bytes or files.size_bytes
    kv = int(weights * kv_reserve_fraction)
    tokens = context_length or files.context_length
    if tokens and files.layers and files.kv_heads and files.head_dim:
        per_token = files.layers * files.kv_heads * files.head_dim * _KV_BYTES_PER_ELEMENT_PAIR
        kv = min(max(kv, SMALL_KV_BYTES), per_token * tokens)
    return LoadNeed(weights, kv, overhead_bytes(files), prefix_cache_bytes, buffer_bytes(files))


def overhead_bytes(files: ModelFiles) -> int:
    """A worker's process and tokenizer."""
    each = _ENCODER_BYTES_PER_ENTRY if is_encoder(files) else _TOKENIZER_BYTES_PER_ENTRY
    return WORKER_OVERHEAD_BYTES + each * (files.vocab_size or 0)


def buffer_bytes(files: ModelFiles) -> int:
    """What MLX may keep of freed buffers, and a forward's own; an echo model has no MLX."""
    if files.echo is not None:
        return 0
    if is_encoder(files):  # every batch has another shape, so buffers are seldom used again
        return _LEAST_BUFFER_BYTES
    return min(MOST_BUFFER_BYTES, max(_LEAST_BUFFER_BYTES, files.weights_bytes or files.size_bytes))


def memory_limit(reading: MemoryReading, max_memory_percent: int) -> tuple[int, Bound]:
    """The cap in bytes and the rule that set it: the smaller of the configured percentage and Metal's working set."""
    share = reading.total_bytes * max_memory_percent // 100
    if reading.working_set_bytes is not None and reading.working_set_bytes < share:
        return reading.working_set_bytes, Bound.WORKING_SET
    return share, Bound.MAX_MEMORY_PERCENT


def fits(reading: MemoryReading, reserved_bytes: int, need_bytes: int, limit_bytes: int) -> bool:
    """True if loading ``need_bytes`` more keeps the machine within ``limit_bytes``.

    used + reserved + need <= limit. A running load counts twice, as reservation and as footprint, until it is
    ready: the safe side.
    """
    return reading.used_bytes + reserved_bytes + need_bytes <= limit_bytes


def plan_load(model_id: str, need: LoadNeed, ledger: Ledger, residents: Sequence[Resident], *, evict: bool) -> LoadPlan:
    """What a load of ``need`` would do now. ``evict`` False leaves every resident alone.

    1. It fits: load.  2. It will fit once what is being stopped has gone: wait for that.  3. Stopping idle models
    makes room: evict them.  4. Models that are loading or busy could make room: wait.  5. Refuse.
    """
    need_bytes, free = need.total_bytes, ledger.free_bytes
    coming = coming_bytes(residents)
    victims: tuple[str, ...] = ()
    if need_bytes <= free:  # 1
        verdict = Verdict.FITS
    elif need_bytes <= free + coming:  # 2
        verdict = Verdict.FITS_AFTER_STOP
    elif evict and (chosen := choose_victims(need_bytes, free + coming, residents)):  # 3
        verdict, victims = Verdict.FITS_AFTER_EVICTION, chosen
    elif need_bytes <= min(ledger.limit_bytes, free + waitable_bytes(residents, evict=evict)):  # 4
        verdict = Verdict.MUST_WAIT
    else:  # 5
        verdict = Verdict.DOES_NOT_FIT
    return LoadPlan(model_id, need, ledger, verdict, victims)


class MemoryMonitor:
    """Takes readings in one place, and owns what has been promised on top of them.

    ``reserve`` does not ask whether there is room: ``residency.py`` does, by ``plan_load``, in the same step.
    """

    def __init__(self, config: MemoryConfig, probe: MemoryProbe, now: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._probe = probe
        self._now = now
        self._reserved: dict[str, int] = {}
        self._grown: dict[str, int] = {}
        self._reading: MemoryReading | None = None
        self._read_at = 0.0

    def reconfigure(self, config: MemoryConfig) -> None:
        """Take changed settings; what is promised stays promised, even above a lower cap."""
        self._config = config

    def reading(self, max_age_seconds: float = READING_AGE_SECONDS) -> MemoryReading:
        """A look at the machine less than ``max_age_seconds`` old; 0 always looks again, as every decision must."""
        reading = self._reading
        if reading is None or self._now() - self._read_at >= max_age_seconds:
            reading = self._reading = self._probe.read()
            self._read_at = self._now()
        return reading

    def ledger(self, max_age_seconds: float = READING_AGE_SECONDS) -> Ledger:
        """The promises now, on a reading of at most that age."""
        reading = self.reading(max_age_seconds)
        limit, bound = memory_limit(reading, self._config.max_memory_percent)
        return Ledger(reading.total_bytes, reading.used_bytes, self.reserved_bytes, limit, bound)

    def need(self, files: ModelFiles, options: LoadOptions) -> LoadNeed:
        """What loading ``files`` with ``options`` takes."""
        return load_need(files, options.context_length, self._config.kv_reserve_fraction, options.prefix_cache_bytes)

    @property
    def limit_bytes(self) -> int:
        """The cap; ``ledger().bound`` says which rule set it."""
        return self.ledger().limit_bytes

    @property
    def reserved_bytes(self) -> int:
        """Everything promised: loads not yet ready, and the KV and prefix caches of the ready."""
        return sum(self._reserved.values()) + self.grown_bytes

    @property
    def grown_bytes(self) -> int:
        """The part promised to running requests beyond what their models' loads had set aside."""
        return sum(self._grown.values())

    def reserved_by(self, owner: str) -> int:
        """What ``owner`` is promised; 0 if nothing."""
        return self._reserved.get(owner, 0)

    def grown_by(self, owner: str) -> int:
        """What ``owner``'s running requests are promised beyond that; 0 if nothing."""
        return self._grown.get(owner, 0)

    def reserve(self, owner: str, size_bytes: int) -> None:
        """Promise ``owner`` this much from now on, in place of what it was promised before."""
        if size_bytes < 0:
            raise ValueError(f"a reservation of {size_bytes} bytes for {owner!r}")
        self._reserved[owner] = size_bytes

    def release(self, owner: str) -> None:
        """End the promise to ``owner``; harmless if there is none."""
        self._reserved.pop(owner, None)
        self._grown.pop(owner, None)

    def grow_kv(self, owner: str, base_bytes: int, wanted_bytes: int | None) -> int:
        """What ``owner``'s KV caches may take from now on: ``wanted_bytes``, or as much of it as the cap leaves.

        ``base_bytes`` were set aside at its load. None says that it is idle, which gives back all beyond those.
        """
        extra = max(0, (wanted_bytes or 0) - base_bytes)
        held = self._grown.get(owner, 0)
        if extra > held:
            extra = min(extra, held + max(0, self.ledger(0).free_bytes))
        self._grown[owner] = extra
        return base_bytes + extra
