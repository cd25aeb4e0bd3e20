"""The hub's token: from an environment variable, or from a file that only its owner should be able to read.

``download.py`` asks for it at each download, so that a token that was renewed is used without a restart.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from opta_lmx.config import DownloadsConfig
from opta_lmx.errors import DownloadError
from opta_lmx.monitoring.logging import get_logger

_log = get_logger(__name__)

# The hub's own tokens have 37 characters.
_MAX_BYTES: Final = 4096

FILE_KEY: Final = "downloads.token_file"


@dataclass(frozen=True, slots=True)
class HubToken:
    """``value`` is None where there is none; ``source`` says in words where it is from, or would be looked for."""

    value: str | None = field(repr=False)
    source: str | None


def find_token(config: DownloadsConfig, environ: Mapping[str, str]) -> HubToken:
    """The variable's token, else the file's; a file that others may read is told of in the log.

    Raises DownloadError if the file cannot be read, or if either holds what is no token; no message shows it.
    """
    if config.token_env and (value := environ.get(config.token_env, "").strip()):
        return _checked(value, config.token_env)
    if config.token_path is not None:
        return _checked(_read(str(config.token_path)), FILE_KEY)
    return HubToken(None, config.token_env)


def _checked(value: str, source: str) -> HubToken:
    # What a header carries unchanged.
    if not re.fullmatch(r"[!-~]+", value):
        raise DownloadError(f"What {source} holds is no token: it should be one word of printable ASCII characters.")
    return HubToken(value, source)


def _read(path: str) -> str:
    try:
        # A pipe in its place must not hold up the server.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            content = file.read(_MAX_BYTES) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise DownloadError(f"The file that {FILE_KEY} names cannot be read ({error.strerror}).") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning("token_file_open", mode=f"{stat.S_IMODE(mode):04o}", hint="chmod 600 keeps it from others")
    return content.decode("ascii", errors="replace").strip()
