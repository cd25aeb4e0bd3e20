"""What a service is made of, whoever runs it, and what can be asked of the one who does.

``cli/service.py`` gathers the facts; ``launchd.py`` and ``systemd.py`` write them down in their own words.
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from opta_lmx.service.commands import ServiceError

# After ``drain_seconds`` workers get 15 s to stop and connections 2 s to end (main.py); the rest is for a slow disk.
_STOP_MARGIN_SECONDS: Final = 30

# What the server opens besides a file for each connection, with room for more connections by a reload of the settings.
_OTHER_OPEN_FILES: Final = 1024
_LEAST_OPEN_FILES: Final = 8192

# The system's tools, wherever the environment was installed from.
_SYSTEM_PATH: Final = "/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody with a home on this machine."""

    name: str
    uid: int
    gid: int
    home: Path


@dataclass(frozen=True, slots=True)
class Job:
    """The server as a service of ``owner``. ``system``: started with the machine; else when the owner logs in.

    ``python`` is the environment's own, links unresolved: that is how it finds its packages. ``flags`` follow
    ``serve``. ``directory`` is where the server runs, ``log`` what its output goes to.
    """

    owner: Account
    python: Path
    flags: tuple[str, ...]
    directory: Path
    log: Path
    system: bool = False
    drain_seconds: float = 30
    max_connections: int = 1024

    @property
    def command(self) -> tuple[str, ...]:
        """Program and arguments."""
        return (str(self.python), "-m", "opta_lmx", "serve", *self.flags)

    @property
    def environment(self) -> dict[str, str]:
        """All the variables it gets. No secret is among them: keys and tokens come from files."""
        return {
            "HOME": str(self.owner.home),
            "PATH": f"{self.python.parent}:{_SYSTEM_PATH}",
            # What lies in the working directory is data: none of it is imported.
            "PYTHONSAFEPATH": "1",
        }

    @property
    def stop_seconds(self) -> int:
        """How long a stop may take before the service manager may kill."""
        return math.ceil(self.drain_seconds) + _STOP_MARGIN_SECONDS

    @property
    def open_files(self) -> int:
        """The limit of open files it needs."""
        return max(_LEAST_OPEN_FILES, self.max_connections + _OTHER_OPEN_FILES)


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """How the service is. ``program`` is the Python its file names; ``restarts`` counts starts after the first.

    What the service manager does not tell is None. ``last_exit`` is its own word for how the last run ended.
    """

    kind: str
    file: Path
    installed: bool
    loaded: bool = False
    running: bool = False
    pid: int | None = None
    restarts: int | None = None
    last_exit: str | None = None
    program: Path | None = None
    log: Path | None = None


class ServiceManager(Protocol):
    """launchd or systemd, for one scope of it (a user's services, or the machine's). All methods raise ServiceError."""

    @property
    def scope(self) -> str:
        """The flag that chooses it: ``--user`` or ``--system``."""
        ...

    def render(self, job: Job) -> bytes:
        """The content of the service's file."""
        ...

    def install(self, job: Job) -> Sequence[str]:
        """Write the file and start the service; again: bring both up to date. Gives what the user should know."""
        ...

    def uninstall(self) -> bool:
        """Stop the service and remove its file; False if there was nothing to remove."""
        ...

    def start(self) -> None:
        """Start it, or leave it running."""
        ...

    def stop(self) -> None:
        """Stop it until the next start, login or boot; returns when the process has ended."""
        ...

    def status(self) -> ServiceStatus:
        """How it is now."""
        ...


def check_rights(owner: Account, caller_uid: int, *, system: bool) -> None:
    """Raises ServiceError if the caller may not change the machine's services, or else those of ``owner``."""
    if system and caller_uid != 0:
        raise ServiceError("a service of the whole machine is root's to change", "run the same command with sudo")
    if not system and caller_uid != owner.uid:
        raise ServiceError(f"a service of {owner.name}'s own is theirs to change", "run the same command without sudo")


def make_places(job: Job) -> None:
    """The directories and the log, with no rights for others, the owner's. Raises ServiceError."""
    try:
        for directory in (job.directory, job.log.parent):
            missing = [directory, *directory.parents]
            for made in reversed([place for place in missing if not place.exists()]):
                made.mkdir(mode=0o700)
                _give(made, job)
        if not job.log.exists():
            os.close(os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            _give(job.log, job)
    except OSError as error:
        raise _unwritable(Path(error.filename or job.directory), error) from None


def _give(path: Path, job: Job) -> None:
    # The machine's service is installed by root and runs as somebody else.
    if os.geteuid() == 0:
        os.chown(path, job.owner.uid, job.owner.gid)


def write_whole(path: Path, content: bytes) -> bool:
    """Put ``content`` in the place of the file at once; False if it was there already. Raises ServiceError."""
    try:
        if path.is_file() and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            # launchd refuses what others may write; that others can read it harms nobody: it holds no secret.
            os.fchmod(descriptor, 0o644)
            file.write(content)
        Path(fresh).replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    return True


def remove(path: Path) -> bool:
    """False if there was no such file. Raises ServiceError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unwritable(path, error) from None
    return True


def _unwritable(path: Path, error: OSError) -> ServiceError:
    return ServiceError(f"{path} cannot be written: {error.strerror}", "look at who owns the directories above it")


def whole_number(values: Mapping[str, str], name: str) -> int | None:
    """A field of a tool's answer as a number; None where it is absent or none."""
    text = values.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None
