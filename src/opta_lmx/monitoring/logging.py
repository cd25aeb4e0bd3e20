"""One log for the whole process: our own events and every library's, one line each, in one form.

A line holds ``ts`` (ISO 8601, UTC), ``level``, ``event``, ``logger`` and what was bound or passed. Events are named
noun_verb_past (``model_loaded``); text of prompts and answers is never passed. A traceback comes without
the message of its exception, which may quote them. Values under the names of secrets
are masked here, whoever logs them.
"""

import logging
import os
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

# structlog draws tracebacks by rich where that is installed. Ours are plain, and loading it is a seventh of a start.
_RICH_IS_THERE = sys.modules.setdefault("rich", None) is not None  # type: ignore[arg-type]

import structlog  # noqa: E402
from structlog.typing import EventDict, ExcInfo, Processor  # noqa: E402

from opta_lmx.errors import show_failure  # noqa: E402

if not _RICH_IS_THERE:
    del sys.modules["rich"]

if TYPE_CHECKING:
    # A worker logs too, and need not load pydantic for it.
    from opta_lmx.config import LoggingConfig

MASK: Final = "**********"

_SECRET_NAMES: Final = frozenset(
    {"authorization", "api_key", "api_keys", "admin_key", "token", "x_api_key", "x_admin_key"}
)

# Tells our handler from one that a test or a debugger has added.
_HANDLER_NAME: Final = "opta_lmx"


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module (``__name__``). Usable at once; its lines take their form from ``configure_logging``."""
    return structlog.stdlib.get_logger(name)


def configure_logging(config: "LoggingConfig") -> None:
    """Send every line of this process to standard error, or to ``config.file``; a second call replaces the first.

    A file is created with mode 0600 and opened anew when something has moved it away. Raises OSError if it
    cannot be opened. A terminal gets the form for people unless the settings name one.
    """
    handler = logging.StreamHandler(sys.stderr) if config.path is None else _PrivateFileHandler(config.path)
    on_terminal = config.path is None and sys.stderr.isatty()
    form = "console" if on_terminal and "format" not in config.model_fields_set else config.format
    stamp: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *stamp,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=stamp,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.ExceptionRenderer(_show),
                _finish,
                _renderer(form, colour=on_terminal and not os.environ.get("NO_COLOR")),
            ],
        )
    )
    handler.set_name(_HANDLER_NAME)
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == _HANDLER_NAME]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(config.level)
    logging.captureWarnings(True)


def _renderer(form: str, *, colour: bool) -> Processor:
    if form == "json":
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(
        colors=colour, timestamp_key="ts", exception_formatter=structlog.dev.plain_traceback
    )


def _show(exc_info: ExcInfo) -> str:
    return show_failure(exc_info[1])


def _finish(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """The line with its secrets masked and its four fixed fields first."""
    fixed = {name: event.pop(name, None) for name in ("ts", "level", "event", "logger")}
    return fixed | cast(dict[str, Any], _mask(event))


def _mask(value: Any) -> Any:
    """``value`` with what stands under a secret's name masked, at any depth; pairs count as name and value."""
    match value:
        case Mapping():
            return {_text(name): MASK if _is_secret(name) else _mask(item) for name, item in value.items()}
        case (name, _) if _is_secret(name):
            return [_text(name), MASK]
        case list() | tuple():
            return [_mask(item) for item in value]
        case _:
            return value


def _is_secret(name: object) -> bool:
    """True for the names of secrets, however a header or a field spells them."""
    return _text(name).lower().replace("-", "_") in _SECRET_NAMES


def _text(name: object) -> str:
    return name.decode("latin-1") if isinstance(name, bytes) else str(name)


class _PrivateFileHandler(WatchedFileHandler):
    """Appends to a file that only its owner may read."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600))
