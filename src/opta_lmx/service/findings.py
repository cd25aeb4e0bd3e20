"""What ``opta-lmx doctor`` finds, and the checks of the server itself: port, lock, rights, keys, workers, service.

Pure: facts in, findings out. ``cli/doctor.py`` gathers the facts; ``machine.py`` has the checks of the machine.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from opta_lmx.service.job import ServiceStatus
from opta_lmx.service.lock import DirectoryInUse
from opta_lmx.service.permissions import Lax

# A log of this size is the work of months, or of a server that writes the same line for ever.
_LARGE_LOG_BYTES: Final = 1024**3

# A list of files is for a look, not for reading all of it.
_SHOWN_PATHS: Final = 3


class Level(StrEnum):
    """``fail``: something does not work. ``warn``: something may surprise. ``ok``: a fact."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the installation. ``remedy`` says what to do; None where nothing need be done."""

    check: str
    level: Level
    what: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Listener:
    """What is at the address of the settings. ``problem`` is why a server cannot listen there, None if it can.

    ``health`` is what answers at ``/admin/health``, None if nothing of ours does.
    """

    url: str
    problem: str | None
    health: Mapping[str, Any] | None


def check_port(listener: Listener, version: str) -> Finding:
    """Free, ours, or somebody else's; ``version`` is that of this installation."""
    health = listener.health
    if health is None:
        if listener.problem is None:
            return Finding("port", Level.OK, f"no server at {listener.url}; the address is free")
        return Finding("port", Level.FAIL, listener.problem, "stop that program, or set server.host and server.port")
    if health.get("status") != "ok":
        what = f"the server at {listener.url} is degraded: {health.get('reason')}"
        return Finding("port", Level.WARN, what, "opta-lmx logs tells more; opta-lmx load MODEL tries again")
    if health.get("version") != version:
        what = f"the server at {listener.url} is version {health.get('version')}, this is {version}"
        return Finding("port", Level.WARN, what, "restart it: opta-lmx service stop, then opta-lmx service start")
    return Finding("port", Level.OK, f"the server at {listener.url} is well")


def check_lock(holder: DirectoryInUse | None, *, serving: bool) -> Finding:
    """Whether who serves at the address is who holds the models directory."""
    if holder is None:
        if not serving:
            return Finding("lock", Level.OK, "no server holds the models directory")
        what = "the server holds another models directory than these settings name, or cannot write in it"
        return Finding("lock", Level.WARN, what, "restart it with these settings, or give it its --config here")
    if serving:
        by = f" (pid {holder.pid})" if holder.pid is not None else ""
        return Finding("lock", Level.OK, f"the server{by} holds the models directory")
    remedy = "it may be starting, or listen elsewhere: opta-lmx status --url URL"
    if holder.pid is not None:
        remedy += f"; kill {holder.pid} stops it"
    return Finding("lock", Level.WARN, f"{holder}, which does not answer at the address of these settings", remedy)


def check_modes(data: Sequence[Lax], secrets: Sequence[Lax]) -> Iterator[Finding]:
    """Files that others can open: those of keys and tokens, and the rest of what the server keeps."""
    for secret in secrets:
        what = f"{secret.path} holds a secret, and its mode is {secret.mode:04o}"
        yield Finding("secrets", Level.FAIL, what, shlex.join(["chmod", "600", str(secret.path)]))
    if not data:
        yield Finding("permissions", Level.OK, "what the server keeps is closed to other users")
        return
    shown = ", ".join(f"{lax.path} ({lax.mode:04o})" for lax in data[:_SHOWN_PATHS])
    more = f" and {len(data) - _SHOWN_PATHS} more" if len(data) > _SHOWN_PATHS else ""
    # What lies in a directory of the list is closed along with it.
    tops = [lax.path for lax in data if not any(other.path in lax.path.parents for other in data)]
    remedy = shlex.join(["chmod", "-R", "go-rwx", *map(str, tops)])
    yield Finding("permissions", Level.WARN, f"other users can open {shown}{more}", remedy)


def check_door(*, loopback: bool, api_keys: bool, admin_key: bool) -> Finding:
    """Who may call."""
    if loopback:
        return Finding("access", Level.OK, "only programs on this machine can connect")
    missing = [
        name for name, there in (("security.api_keys", api_keys), ("security.admin_key", admin_key)) if not there
    ]
    if not missing:
        return Finding("access", Level.OK, "other machines can connect, with a key")
    what = f"other machines can connect without a key: {' and '.join(missing)} not set"
    return Finding("access", Level.WARN, what, "set them as file:PATH, each a file with mode 0600")


def check_token(*, variable: str | None, in_environment: bool, in_file: bool, service: bool) -> Finding:
    """Whether downloads have a hub token, in the shell's environment or for a service too."""
    if in_file:
        return Finding("hub token", Level.OK, "there is one, in downloads.token_file")
    if not in_environment:
        return Finding("hub token", Level.OK, "there is none: models that ask for consent cannot be downloaded")
    if not service:
        return Finding("hub token", Level.OK, f"there is one, in ${variable}")
    what = f"${variable} is set here, and the service does not see it"
    return Finding(
        "hub token", Level.WARN, what, "put it into a file of mode 0600 and name that in downloads.token_file"
    )


def check_workers(status: Mapping[str, Any]) -> Iterator[Finding]:
    """The models in memory, by the answer of ``/admin/status``."""
    models = status.get("models", [])
    sound = True
    for model in models:
        name, restarts = model["id"], model.get("restarts", 0)
        if model["state"] == "failed":
            sound = False
            what, remedy = f"{name} failed: {model.get('reason')}", f"opta-lmx load {name} tries again"
            yield Finding("workers", Level.FAIL, what, remedy)
        elif restarts:
            sound = False
            what = f"the worker of {name} has been started again {restarts} times"
            yield Finding("workers", Level.WARN, what, "opta-lmx logs shows how it ended (worker_lost)")
    if status.get("draining"):
        sound = False
        yield Finding("workers", Level.WARN, "the server is stopping", "wait, then opta-lmx service start")
    if sound:
        ready = [model["id"] for model in models if model["state"] == "ready"]
        yield Finding("workers", Level.OK, f"loaded: {', '.join(ready) or 'nothing'}")


def check_service(services: Sequence[ServiceStatus], *, program_exists: bool = True) -> Iterator[Finding]:
    """Whether the server starts by itself; ``program_exists`` is about the Python the service's file names."""
    installed = [service for service in services if service.installed]
    if not installed:
        what = "not installed: the server runs only when somebody starts it (opta-lmx service install)"
        yield Finding("service", Level.OK, what)
    if len(installed) > 1:
        what = "installed both for a user and for the machine; one of them finds the port taken"
        yield Finding("service", Level.FAIL, what, "opta-lmx service uninstall --user")
    for service in installed:
        what, remedy = f"{service.kind} {service.file}", "opta-lmx service start"
        if not program_exists:
            what += f" names {service.program}, which is not there"
            yield Finding("service", Level.FAIL, what, "opta-lmx service install, with the environment of now")
        elif not service.loaded:
            yield Finding("service", Level.WARN, f"{what} is not loaded", remedy)
        elif not service.running:
            how = f" (last: {service.last_exit})" if service.last_exit else ""
            yield Finding("service", Level.WARN, f"{what} does not run{how}", f"opta-lmx logs tells why; {remedy}")
        elif service.restarts:
            what += f" runs (pid {service.pid}) and was started again {service.restarts} times"
            yield Finding("service", Level.WARN, what, "opta-lmx logs tells why it ended")
        else:
            yield Finding("service", Level.OK, f"{what} runs (pid {service.pid})")


def check_log(path: Path | None, size_bytes: int | None) -> Finding:
    """The file ``opta-lmx logs`` shows; both None where there is none."""
    if path is None or size_bytes is None:
        return Finding("log", Level.OK, "to standard error; logging.file and a service keep it in a file")
    what = f"{path}, {size_bytes / 1024**2:.1f} MiB"
    if size_bytes < _LARGE_LOG_BYTES:
        return Finding("log", Level.OK, what)
    return Finding("log", Level.WARN, what, "set logging.file and rotate it (docs/guides/service.md)")
