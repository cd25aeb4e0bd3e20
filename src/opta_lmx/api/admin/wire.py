"""The admin API's JSON shapes. Requests with unknown keys are refused: an operator's typo must not pass unseen.

``_gb`` fields are GiB rounded to 0.1, for people; ``_bytes`` fields are exact. ``*_at`` are seconds since 1970.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from opta_lmx.manager.integrity import Verdict
from opta_lmx.monitoring.timing import Phase
from opta_lmx.types import Lane, ModelState

_GIB = 1024**3


def to_gib(size_bytes: int) -> float:
    """A size as people read it."""
    return round(size_bytes / _GIB, 1)


class Wire(BaseModel):
    """A JSON object of the admin API."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


ModelName = Annotated[str, Field(min_length=1, max_length=512, examples=["smollm2-135m-instruct"])]


class ModelRequest(Wire):
    """Which model to load, pin or unpin."""

    model_id: ModelName


class UnloadRequest(ModelRequest):
    """Which model to unload; ``force`` ends its pin and its leases first."""

    force: bool = False


class PlanRequest(ModelRequest):
    """Which load to plan; ``context_length`` in tokens, None for the model's own."""

    context_length: Annotated[int, Field(ge=1)] | None = None


class VerifyRequest(Wire):
    """Which model to hash; None for all."""

    model_id: ModelName | None = None


# A week: longer than any job of a bot, and what is meant to stay is pinned.
_LONGEST_LEASE_SECONDS = 7 * 86400


class LeaseRequest(ModelRequest):
    """Which model to keep in memory, for how long, and who asks."""

    seconds: Annotated[float, Field(gt=0, le=_LONGEST_LEASE_SECONDS)]
    owner: Annotated[str, Field(min_length=1, max_length=128, examples=["nightly-report"])]


class Health(Wire):
    """The server process lives; ``reason`` says what is wrong with it if it is degraded."""

    status: Literal["ok", "degraded"]
    version: str
    reason: str | None = None


class Ready(Wire):
    """A request would be served now."""

    status: Literal["ready"] = "ready"


class LoadedModel(Wire):
    """A model in memory, on its way in or out, or kept out of it by a failure that ``reason`` names."""

    id: str
    state: ModelState
    memory_bytes: int
    loaded_at: float | None
    last_used_at: float | None
    request_count: int
    pinned: bool
    leases: int
    ttl: float | None
    reason: str | None


class LoadedModels(Wire):
    """The answer of GET /admin/models."""

    models: list[LoadedModel]


class ModelChanged(Wire):
    """A model has come to ``state``, by a stop's ``cause`` or for a ``reason`` that nobody asked for."""

    at: float
    model_id: str
    state: ModelState
    cause: str | None
    reason: str | None


class AvailableModel(Wire):
    """A model on disk; ``problem`` says why it cannot be used, if it cannot."""

    id: str
    path: str
    size_bytes: int
    format: Literal["mlx", "gguf"]
    quantization: str | None
    context_length: int | None
    verified: bool
    problem: str | None


class AvailableModels(Wire):
    """The answer of GET /admin/models/available."""

    models: list[AvailableModel]


class Loaded(Wire):
    """The answer to a load, once the model is ready."""

    success: Literal[True] = True
    model_id: str
    memory_after_load_gb: float
    time_to_load_ms: float


class Unloaded(Wire):
    """The answer to an unload, once the process has gone."""

    success: Literal[True] = True
    model_id: str
    memory_freed_gb: float


class Pinned(Wire):
    """The answer to a pin or its end."""

    success: Literal[True] = True
    model_id: str
    pinned: bool


class Deleted(Wire):
    """The answer to a deletion; ``freed_bytes`` are those of the files removed."""

    success: Literal[True] = True
    model_id: str
    freed_bytes: int


class Leased(Wire):
    """The answer to a lease."""

    lease_id: str
    model_id: str
    expires_at: float


class Lease(Wire):
    """A lease that lasts."""

    lease_id: str
    model_id: str
    owner: str
    expires_at: float


class Leases(Wire):
    """The answer of GET /admin/leases."""

    leases: list[Lease]


class LeaseEnded(Wire):
    """The answer to the end of a lease."""

    success: Literal[True] = True
    lease_id: str


class VerifiedFile(Wire):
    """One file beside its record; a hash is None where there is no record, or no file that can be read."""

    name: str
    verdict: Verdict
    expected_sha256: str | None
    actual_sha256: str | None


class VerifiedModel(Wire):
    """A model's files; ``unrecorded``: models.lock does not know it, so there is nothing to compare."""

    model_id: str
    verdict: Literal["verified", "mismatch", "unrecorded"]
    files: list[VerifiedFile]


class Verification(Wire):
    """The answer of POST /admin/models/verify; ``success``: no file differs from its record."""

    success: bool
    models: list[VerifiedModel]


class Ledger(Wire):
    """Where the memory is, in bytes.

    ``weights`` and ``kv_reserved`` are those of models in memory, ``reservations`` everything promised and not yet in
    use, ``other_processes`` what is used by neither.
    """

    total_bytes: int
    used_bytes: int
    limit_bytes: int
    limited_by: str
    free_bytes: int
    weights_bytes: int
    kv_reserved_bytes: int
    prefix_cache_bytes: int
    reservations_bytes: int
    other_processes_bytes: int


class Memory(Wire):
    """The machine's memory and the cap on it."""

    total_gb: float
    used_gb: float
    available_gb: float
    limit_gb: float
    threshold_percent: int
    ledger: Ledger


class ModelStatus(Wire):
    """A model and what it does now; ``reason`` says why it is not in memory where that was not asked for."""

    id: str
    state: ModelState
    pid: int | None
    memory_bytes: int
    requests_running: int
    requests_waiting: int
    restarts: int
    reason: str | None


class ImportStatus(Wire):
    """A GGUF that is being imported, in bytes of its tensors; 0 of 0 until its header has been read."""

    model_id: str
    done_bytes: int
    total_bytes: int


class Line(Wire):
    """Requests of one caller that wait for a place in one model's batch; ``caller`` is empty where no keys are set."""

    model_id: str
    lane: Lane
    caller: str
    requests: int


class Status(Wire):
    """The server at a glance."""

    version: str
    uptime_seconds: float
    draining: bool
    requests_running: int
    requests_waiting: int
    lines: list[Line]
    models: list[ModelStatus]
    imports: list[ImportStatus]
    memory: Memory


class LiveRequest(Wire):
    """A request that has not ended; seconds, and null for what has not come yet.

    ``phase``: in line for a slot (queue), waiting for its model (load), its prompt being read (prefill), making tokens
    (decode). ``completion_tokens`` have been taken by the reader; the rate is theirs, after the first ones.
    """

    request_id: str
    model_id: str | None
    phase: Phase
    age_seconds: float
    queue_seconds: float | None
    ttft_seconds: float | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int
    tokens_per_second: float | None
    choices: int


class LiveRequests(Wire):
    """The answer of GET /admin/requests, the oldest first."""

    requests: list[LiveRequest]


class ConfigReload(Wire):
    """What a reload has changed: sections, and settings by dotted key, by when they take effect."""

    success: bool
    updated: list[str]
    applied: list[str]
    at_next_load: list[str]
    restart_required: list[str]
