"""Everything that can go wrong, named by what is wrong. No HTTP in here.

LmxError
├── RequestRejected            the request is at fault; waiting will not help
│   ├── InvalidRequest         a field is missing, malformed or out of range
│   ├── UnsupportedParameter   a field this server or model cannot honour
│   ├── ModelNotFound          no model, alias or preset of that name
│   ├── LeaseNotFound          no lease of that id
│   └── ContextTooLong         the prompt does not fit the model's context
├── AccessDenied               missing or wrong key
├── Conflict                   the model's state forbids it now (loaded, leased, pinned)
├── Busy                       come back later
│   ├── QueueFull              too many requests wait already
│   ├── ModelLoading           the load takes longer than the caller may wait
│   └── Draining               the server is stopping
├── NoRoom                     a resource is too small
│   ├── MemoryLimit            the load would pass the memory cap
│   └── DiskFull               the download would not fit
├── WorkerError                a worker failed
│   ├── LoadFailed             the model could not be loaded
│   ├── WorkerLost             the process ended while it was needed
│   └── GenerationFailed       one request failed inside a living worker
└── DownloadError
    ├── IntegrityMismatch      a file is not what its record says
    └── HubUnreachable         the hub did not answer

Fields are facts; the message is made from them. ``api/errors.py`` maps each class to a status, once.
"""

from collections.abc import Sequence


class LmxError(Exception):
    """Any failure this server names. ``str(error)`` is safe to show: no prompt text, no key, no path of weights."""


class RequestRejected(LmxError):
    """The request cannot be served as it is. ``param`` names the field, ``code`` is OpenAI's word for it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequest(RequestRejected):
    """A field is missing, of the wrong type or out of range."""


class UnsupportedParameter(RequestRejected):
    """A field that is understood but cannot be honoured here."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="unsupported_parameter")


class ModelNotFound(RequestRejected):
    """No model answers to this name; ``nearest`` lists the closest ones."""

    def __init__(self, name: str, nearest: Sequence[str] = ()) -> None:
        hint = f" Did you mean {', '.join(repr(n) for n in nearest)}?" if nearest else ""
        super().__init__(
            f"The model {name!r} does not exist or you do not have access to it.{hint}",
            param="model",
            code="model_not_found",
        )
        self.name = name
        self.nearest = tuple(nearest)


class LeaseNotFound(RequestRejected):
    """No lease has this id, or none any more."""

    def __init__(self, lease_id: str) -> None:
        super().__init__(
            f"There is no lease {lease_id[:100]!r}; it may have ended.", param="lease_id", code="lease_not_found"
        )
        self.lease_id = lease_id


class ContextTooLong(RequestRejected):
    """The prompt leaves no room for one token of answer. Both numbers are tokens."""

    def __init__(self, prompt_tokens: int, context_length: int, *, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {context_length} tokens. "
            f"However, your {param} resulted in {prompt_tokens} tokens. Please reduce their length.",
            param=param,
            code="context_length_exceeded",
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class AccessDenied(LmxError):
    """The key is missing (``presented`` False) or not one of ours."""

    def __init__(self, *, presented: bool) -> None:
        super().__init__(
            "Incorrect API key provided."
            if presented
            else "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
        )
        self.presented = presented


class Conflict(LmxError):
    """The state of a model forbids the action; the message says which state and what to do."""


class Busy(LmxError):
    """The same request may succeed after ``retry_after_seconds``."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QueueFull(Busy):
    """As many requests wait for this model as are allowed to."""

    def __init__(self, model_id: str, waiting: int, retry_after_seconds: float) -> None:
        super().__init__(
            f"The queue of {model_id!r} is full ({waiting} requests wait). Try again later.", retry_after_seconds
        )


class ModelLoading(Busy):
    """The model is still loading."""


class Draining(Busy):
    """The server is shutting down and takes no new work."""


class NoRoom(LmxError):
    """A resource is too small for what was asked."""


class MemoryLimit(NoRoom):
    """Loading would pass the memory cap. ``plan`` carries the arithmetic, all in bytes."""

    def __init__(self, model_id: str, need_bytes: int, free_bytes: int, plan: dict[str, object]) -> None:
        super().__init__(
            f"Loading {model_id!r} needs {need_bytes:,} bytes but only {max(free_bytes, 0):,} are free "
            f"under the memory cap. Unload a model, or ask POST /admin/models/plan for the arithmetic."
        )
        self.need_bytes = need_bytes
        self.free_bytes = free_bytes
        self.plan = plan


class DiskFull(NoRoom):
    """The disk has less free space than the files need."""

    def __init__(self, need_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{need_bytes:,} bytes are needed on disk but only {free_bytes:,} are free.")
        self.need_bytes = need_bytes
        self.free_bytes = free_bytes


class WorkerError(LmxError):
    """A worker process failed."""


class LoadFailed(WorkerError):
    """The model's files could not be loaded; ``reason`` says what is wrong with them."""

    def __init__(self, model_id: str, reason: str) -> None:
        super().__init__(f"The model {model_id!r} could not be loaded: {reason}")
        self.model_id = model_id
        self.reason = reason


class WorkerLost(WorkerError):
    """The worker's process ended while requests depended on it."""

    def __init__(self, model_id: str, cause: str) -> None:
        super().__init__(f"The worker of {model_id!r} ended unexpectedly ({cause}).")
        self.model_id = model_id
        self.cause = cause


class GenerationFailed(WorkerError):
    """One request failed inside its worker; its neighbours go on."""


class DownloadError(LmxError):
    """A download did not end with verified files."""


class IntegrityMismatch(DownloadError):
    """A file's hash or size differs from its record."""

    def __init__(self, path: str, expected: str, actual: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {actual}.")
        self.path = path
        self.expected = expected
        self.actual = actual


class HubUnreachable(DownloadError):
    """The hub could not be reached, or refused."""
