"""Everything that can go wrong, named by what is wrong. No HTTP in here.

LmxError
├── RequestRejected            the request is at fault; waiting will not help
│   ├── InvalidRequest         a field is missing, malformed or out of range
│   ├── UnsupportedParameter   a field this server or model cannot honour
│   ├── ModelNotFound          no model, alias or preset of that name
│   ├── LeaseNotFound          no lease of that id
│   ├── DownloadNotFound       no download of that id
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
│   │   └── LostTwice          it did so twice with this request inside
│   ├── RestartsExhausted      it ended too often to be started again unasked
│   ├── GenerationFailed       one request failed inside a living worker
│   └── GenerationStalled      a living worker made no token for one request for too long
└── DownloadError
    ├── IntegrityMismatch      a file is not what its record says
    └── HubUnreachable         the hub did not answer

Fields are facts; the message is made from them. ``api/errors.py`` maps each class to a status, once.
"""

import traceback
from collections.abc import Iterator, Sequence


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


class DownloadNotFound(RequestRejected):
    """No download has this id, or none any more."""

    def __init__(self, download_id: str) -> None:
        super().__init__(
            f"There is no download {download_id[:100]!r}; only the last that ended are remembered.",
            param="download_id",
            code="download_not_found",
        )
        self.download_id = download_id


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

    def __init__(self, message: str = "The server is shutting down.", retry_after_seconds: float = 1.0) -> None:
        super().__init__(message, retry_after_seconds)


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
    """The model could not be loaded; ``reason`` says why. ``crashed``: its process ended, which need not be the files'
    fault."""

    def __init__(self, model_id: str, reason: str, *, crashed: bool = False) -> None:
        super().__init__(f"The model {model_id!r} could not be loaded: {reason}")
        self.model_id = model_id
        self.reason = reason
        self.crashed = crashed


class WorkerLost(WorkerError):
    """The worker's process ended while requests depended on it."""

    def __init__(self, model_id: str, cause: str) -> None:
        super().__init__(f"The worker of {model_id!r} ended unexpectedly ({cause}).")
        self.model_id = model_id
        self.cause = cause


class LostTwice(WorkerLost):
    """The worker ended twice before this request's first token: likelier its doing than its misfortune."""

    def __init__(self, model_id: str, cause: str) -> None:
        LmxError.__init__(
            self,
            f"The worker of {model_id!r} ended twice while it worked on this request ({cause}); it is not tried again.",
        )
        self.model_id = model_id
        self.cause = cause


class RestartsExhausted(WorkerError):
    """The model's workers ended too often within a time; ``cause`` is the last end."""

    def __init__(self, model_id: str, deaths: int, window_seconds: float, cause: str) -> None:
        super().__init__(
            f"The worker of {model_id!r} ended {deaths} times within {window_seconds:g} seconds (last: {cause}). "
            "POST /admin/models/load starts it again."
        )
        self.model_id = model_id
        self.cause = cause


class GenerationFailed(WorkerError):
    """One request failed inside its worker; its neighbours go on."""


class GenerationStalled(WorkerError):
    """A request got no new token for as long as ``server.request_inactivity_seconds`` allows."""

    def __init__(self, model_id: str, seconds: float) -> None:
        super().__init__(f"The model {model_id!r} made no token for this request within {seconds:g} seconds.")
        self.model_id = model_id
        self.seconds = seconds


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


def show_failure(error: BaseException) -> str:
    """The traceback of ``error`` and of what led to it, for logs: where it came from, and of what kind it is.

    Messages are left out, the system's own on files and sockets excepted: what a library or a bug says is often the
    value it stumbled over, and that may be somebody's prompt or key.
    """
    return "".join(_failure_lines(error, set())).rstrip("\n")


def _failure_lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    led = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if led is not None and id(led) not in seen:
        yield from _failure_lines(led, seen)
        yield "\nThat led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    yield f"{name}: {error.strerror}\n" if isinstance(error, OSError) and error.strerror else f"{name}\n"
    if isinstance(error, BaseExceptionGroup):
        for number, inner in enumerate(error.exceptions, start=1):
            if id(inner) not in seen:
                yield f"\nNumber {number} of the group:\n\n"
                yield from _failure_lines(inner, seen)
