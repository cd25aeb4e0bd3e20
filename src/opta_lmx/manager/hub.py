"""What a download takes from a hub's repository, and the lines its two processes speak; nothing here does any work.

``download.py`` runs in the server, ``fetch.py`` in a child. The child's standard input begins with an Order, then
each empty line lets it begin one more file; its standard output carries the other structs, one JSON object a line.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final, TypeAlias

import msgspec

from opta_lmx.errors import (
    Conflict,
    DiskFull,
    DownloadError,
    HubUnreachable,
    IntegrityMismatch,
    InvalidRequest,
    LmxError,
    ModelNotFound,
)

DEFAULT_ENDPOINT: Final = "https://huggingface.co"

# The directory a download grows in is its target's name and this.
INCOMPLETE_SUFFIX: Final = ".incomplete"

# Only data is ever downloaded: no pickle, no code, whatever a caller's patterns say.
_DATA_PATTERNS: Final = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "tokenizer.model", "*.txt")

# The hub's own rule for names (at most 96 characters, no "--", no ".."), and a publisher, whom it allows to be absent.
_REPO_ID: Final = re.compile(
    r"(?=.{3,193}\Z)(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII
)
_REVISION: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./+-]{0,254}", re.ASCII)

_MAX_PATH_CHARACTERS: Final = 512
# The largest published models have a few hundred files.
_MAX_FILES: Final = 2000


class Patience(msgspec.Struct, frozen=True):
    """How long a hub is waited for. ``attempts`` failures in a row, with no byte in between, end a download."""

    silence_seconds: float = 10.0
    attempts: int = 5
    first_pause_seconds: float = 1.0
    # A hub that asks for more than this by Retry-After is taken to refuse.
    longest_pause_seconds: float = 60.0


class Order(msgspec.Struct, frozen=True):
    """What the child is to do in ``root``, the models directory. ``token_name`` is where the token is from."""

    endpoint: str
    token: str | None
    token_name: str | None
    repo_id: str
    revision: str | None
    patterns: tuple[str, ...]
    root: str
    patience: Patience

    def __repr__(self) -> str:
        # Without the token, whoever prints it.
        return f"Order({self.repo_id!r}, {self.revision!r})"


class HubFile(msgspec.Struct, frozen=True):
    """A file as the hub lists it: ``sha256`` of one in large storage, otherwise ``blob_id``, git's own hash."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def digest(self) -> str:
        """The hash that tells whether the bytes are right."""
        return self.sha256 or self.blob_id or ""


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    """What will be downloaded, of which ``present`` bytes are here already (by path)."""

    commit: str
    files: tuple[HubFile, ...]
    present: dict[str, int]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Bytes of every file begun, those found from an earlier attempt included, and the files ended since the last."""

    bytes: dict[str, int]
    verified: tuple[str, ...]


class Recorded(msgspec.Struct, frozen=True, tag="recorded"):
    """Every file is whole, on disk and in models.lock; the directory awaits its rename."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """An error of errors.py: its class, and its arguments or, where it has none of its own, its message."""

    error: str
    message: str
    facts: dict[str, str | int | None] = {}

    @classmethod
    def of(cls, error: LmxError) -> "Failed":
        """The line that tells of ``error``."""
        facts: dict[str, str | int | None] = {}
        match error:
            case InvalidRequest():
                facts = {"message": str(error), "param": error.param, "code": error.code}
            case ModelNotFound():
                facts = {"name": error.name}
            case IntegrityMismatch():
                facts = {"path": error.path, "expected": error.expected, "actual": error.actual}
            case DiskFull():
                facts = {"need_bytes": error.need_bytes, "free_bytes": error.free_bytes}
        return cls(type(error).__name__, str(error), facts)

    def to_error(self) -> LmxError:
        """The error it tells of."""
        kind = _ERRORS[self.error]
        return kind(**self.facts) if self.facts else kind(self.message)


Report: TypeAlias = Plan | Progress | Recorded | Failed

_ERRORS: Final[Mapping[str, type[LmxError]]] = {
    kind.__name__: kind
    for kind in (InvalidRequest, ModelNotFound, Conflict, DiskFull, DownloadError, IntegrityMismatch, HubUnreachable)
}


def check_wish(repo_id: str, revision: str | None, patterns: Sequence[str] | None) -> None:
    """Raises InvalidRequest, naming the field, unless this is a repository, a revision and patterns of files."""
    if not _REPO_ID.fullmatch(repo_id) or repo_id.endswith((".git", INCOMPLETE_SUFFIX)):
        raise _invalid("repo_id", "it should be publisher/name, as on the hub")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise _invalid("revision", "it should be a branch, a tag or a commit")
    if patterns is not None and not (patterns and all(patterns)):
        raise _invalid("allow_patterns", "it should name files, such as *.safetensors")


def choose_files(repo_id: str, files: Sequence[HubFile], patterns: Sequence[str]) -> tuple[HubFile, ...]:
    """The files a download takes: data only, and a model that can be loaded.

    Without ``patterns``: the safetensors of the top folder (those called model* where there are such, because only
    they are loaded) and the JSON and text around them. With them: what they match. Raises InvalidRequest if no
    weights are among them, DownloadError if a path leaves the directory or stands there twice, or a file has no hash.
    """
    data = [file for file in files if _is_data(file.path)]
    if patterns:
        chosen = [file for file in data if any(fnmatchcase(file.path, pattern) for pattern in patterns)]
    else:
        chosen = [file for file in data if not file.path.endswith(".gguf")]
        weights = [file for file in chosen if _is_weights(file) and "/" not in file.path]
        weights = [file for file in weights if file.path.startswith("model")] or weights
        chosen = [file for file in chosen if not _is_weights(file)] + weights
    ggufs = [file.path for file in chosen if file.path.endswith(".gguf")]
    if not any(map(_is_weights, chosen)) and len(ggufs) != 1:
        raise _no_weights(repo_id, ggufs or [file.path for file in data if file.path.endswith(".gguf")])
    if len(chosen) > _MAX_FILES:
        raise DownloadError(f"The hub lists {len(chosen):,} files for {repo_id!r}; {_MAX_FILES:,} are the most.")
    taken: set[str] = set()
    for file in chosen:
        _check(file)
        if (name := file.path.casefold()) in taken:
            raise DownloadError(f"The hub lists {file.path!r} twice, or in two spellings that many disks take for one.")
        taken.add(name)
    return tuple(sorted(chosen, key=lambda file: file.path))


def _is_weights(file: HubFile) -> bool:
    return file.path.endswith(".safetensors")


def _is_data(path: str) -> bool:
    parts = path.split("/")
    return any(fnmatchcase(parts[-1], pattern) for pattern in _DATA_PATTERNS) and not any(
        # Hidden files are not the model's; ".." is left in, to be refused.
        part.startswith(".") and part != ".."
        for part in parts
    )


def _check(file: HubFile) -> None:
    path = PurePosixPath(file.path)
    is_plain = file.path.isprintable() and "\\" not in file.path and str(path) == file.path
    if not is_plain or path.is_absolute() or ".." in path.parts or len(file.path) > _MAX_PATH_CHARACTERS:
        raise DownloadError(f"The hub lists {file.path[:_MAX_PATH_CHARACTERS]!r}, which is no path inside a model.")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.digest) or file.size < 0:
        raise DownloadError(f"The hub gives no size and hash for {file.path!r}, so it could not be checked.")


def _invalid(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid {param!r}: {reason}.", param=param, code="invalid_value")


def _no_weights(repo_id: str, ggufs: Sequence[str]) -> InvalidRequest:
    message = f"Nothing of {repo_id!r} was chosen that holds weights: safetensors, or exactly one GGUF file"
    if ggufs:
        shown = ", ".join(path[:_MAX_PATH_CHARACTERS] for path in ggufs[:20])
        return InvalidRequest(f"{message}. Name one in 'allow_patterns': {shown}.", param="allow_patterns")
    return InvalidRequest(f"{message}.", param="repo_id")
