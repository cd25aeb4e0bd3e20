"""The service on macOS: a property list, and ``launchctl`` asked to load it.

Tested against recorded answers of ``launchctl``, in the form its releases since macOS 11 have; never run on a Mac.
"""

import plistlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from opta_lmx.service.commands import Outcome, RunCommand, ServiceError, run_command
from opta_lmx.service.job import (
    Account,
    Job,
    ServiceStatus,
    check_rights,
    make_places,
    remove,
    whole_number,
    write_whole,
)

LABEL: Final = "com.opta.lmx"

# launchd's own default, written down: at most one start in so many seconds. A server that ran longer starts at once.
_THROTTLE_SECONDS: Final = 10

# "Operation now in progress": bootout has sent its signal and does not wait.
_IN_PROGRESS: Final = 36

_LOOK_AGAIN_SECONDS: Final = 0.2

# `	state = running`, at the first level: deeper lines are about sockets and resources.
_FIELD: Final = re.compile(r"^\t([a-z][a-z ]*) = (.+)$", re.MULTILINE)


def render_plist(job: Job) -> bytes:
    """The property list of a job: a LaunchDaemon's for the system, else a LaunchAgent's."""
    plist: dict[str, Any] = {
        "Label": LABEL,
        "ProgramArguments": list(job.command),
        "EnvironmentVariables": job.environment,
        "WorkingDirectory": str(job.directory),
        "StandardOutPath": str(job.log),
        "StandardErrorPath": str(job.log),
        "Umask": 0o077,
        "RunAtLoad": True,
        # Started again after a crash and after a refusal (exit code 1), not after a stop that was asked for (0).
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": _THROTTLE_SECONDS,
        # The default is 20: a drain would end in SIGKILL.
        "ExitTimeOut": job.stop_seconds,
        # Every other type has its processor time and its reading from disk throttled by launchd.
        "ProcessType": "Interactive",
        # launchd gives 256 files, one for each connection.
        "SoftResourceLimits": {"NumberOfFiles": job.open_files},
        "HardResourceLimits": {"NumberOfFiles": job.open_files},
    }
    if job.system:
        # Without it a daemon is root. No SessionCreate: nothing here needs a keychain or a window server.
        plist["UserName"] = job.owner.name
    return plistlib.dumps(plist)


class Launchd:
    """launchd's domain of one user (LaunchAgent, while that user is logged in) or of the machine (LaunchDaemon)."""

    def __init__(
        self,
        *,
        system: bool,
        owner: Account,
        caller_uid: int,
        root: Path = Path("/"),
        run: RunCommand = run_command,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """``owner`` is whose agents these are; ``root`` where the machine's ``Library`` is.

        ``pause`` waits between two looks at a service that ends.
        """
        self._system = system
        self._owner = owner
        self._caller_uid = caller_uid
        self._domain = "system" if system else f"gui/{owner.uid}"
        library = root / "Library" / "LaunchDaemons" if system else owner.home / "Library" / "LaunchAgents"
        self._file = library / f"{LABEL}.plist"
        self._run = run
        self._pause = pause

    @property
    def scope(self) -> str:
        """See ``ServiceManager``."""
        return "--system" if self._system else "--user"

    def render(self, job: Job) -> bytes:
        """See ``ServiceManager``."""
        return render_plist(job)

    def install(self, job: Job) -> Sequence[str]:
        """See ``ServiceManager``. Leaves one that runs from the same file alone."""
        self._check_rights()
        make_places(job)
        changed = write_whole(self._file, render_plist(job))
        if not changed and self.status().running:
            return ()
        self._unload(job.stop_seconds)
        self._load()
        if self._system:
            return ()
        return (
            "it runs while you are logged in; for a Mac with nobody logged in: "
            "opta-lmx service uninstall, then sudo opta-lmx service install --system",
        )

    def uninstall(self) -> bool:
        """See ``ServiceManager``."""
        self._check_rights()
        self.stop()
        return remove(self._file)

    def start(self) -> None:
        """See ``ServiceManager``."""
        self._check_rights()
        status = self.status()
        if not status.installed:
            raise ServiceError("there is no service to start", "opta-lmx service install writes it")
        if not status.loaded:
            self._load()
        elif not status.running:
            self._check(self._launchctl("kickstart", self._target), "start")

    def stop(self) -> None:
        """See ``ServiceManager``. It is unloaded: a loaded one would be started again if it ended with an error."""
        self._check_rights()
        self._unload(_stop_seconds(_read(self._file)))

    def status(self) -> ServiceStatus:
        """See ``ServiceManager``."""
        plist = _read(self._file)
        arguments = plist.get("ProgramArguments")
        log = plist.get("StandardErrorPath")
        printed = self._launchctl("print", self._target)
        loaded = printed.exit_code == 0
        fields = dict(_FIELD.findall(printed.stdout)) if loaded else {}
        runs = whole_number(fields, "runs")
        return ServiceStatus(
            kind="LaunchDaemon" if self._system else "LaunchAgent",
            file=self._file,
            installed=self._file.exists(),
            loaded=loaded,
            running=fields.get("state") == "running",
            pid=whole_number(fields, "pid"),
            restarts=None if runs is None else max(0, runs - 1),
            last_exit=_last_exit(fields),
            program=Path(arguments[0]) if isinstance(arguments, list) and arguments else None,
            log=Path(log) if isinstance(log, str) else None,
        )

    @property
    def _target(self) -> str:
        return f"{self._domain}/{LABEL}"

    def _check_rights(self) -> None:
        check_rights(self._owner, self._caller_uid, system=self._system)

    def _load(self) -> None:
        # A service that was disabled by hand is refused by bootstrap until it is enabled.
        self._launchctl("enable", self._target)
        done = self._launchctl("bootstrap", self._domain, str(self._file))
        hint = "launchctl print-disabled and the system log (log show --predicate 'process == \"launchd\"') tell more"
        if not self._system and self._launchctl("print", self._domain).exit_code != 0:
            hint = "nobody is logged in at this Mac's screen: sudo opta-lmx service install --system needs no login"
        self._check(done, "load", hint)

    def _unload(self, bound_seconds: float) -> None:
        """Returns when launchd no longer knows the service: only then its process has gone."""
        done = self._launchctl("bootout", self._target)
        if done.exit_code not in (0, _IN_PROGRESS) and self._knows():
            self._check(done, "stop")
        for _ in range(int(bound_seconds / _LOOK_AGAIN_SECONDS)):
            if not self._knows():
                return
            self._pause(_LOOK_AGAIN_SECONDS)
        raise ServiceError(
            f"the service has not ended within {bound_seconds:g} seconds", "opta-lmx service status shows its process"
        )

    def _knows(self) -> bool:
        """Whether launchd has the service, running or not."""
        return self._launchctl("print", self._target).exit_code == 0

    def _launchctl(self, *arguments: str) -> Outcome:
        return self._run(("/bin/launchctl", *arguments))

    def _check(self, done: Outcome, deed: str, hint: str = "opta-lmx service status shows how it is") -> None:
        if done.exit_code != 0:
            raise ServiceError(f"launchd did not {deed} the service: {done.reason}", hint)


def _read(file: Path) -> dict[str, Any]:
    """The property list; empty where there is none that can be read."""
    try:
        plist = plistlib.loads(file.read_bytes())
    except (OSError, plistlib.InvalidFileException, ValueError):
        return {}
    return plist if isinstance(plist, dict) else {}


def _stop_seconds(plist: dict[str, Any]) -> float:
    """How long a stop may take by the list that is loaded; launchd's own default where it does not say."""
    seconds = plist.get("ExitTimeOut", 20)
    # launchd kills at that time, and then has to notice.
    return 5.0 + (seconds if isinstance(seconds, int) else 20)


def _last_exit(fields: dict[str, str]) -> str | None:
    """In launchd's words: a signal, or an exit code; None before the first end."""
    if signal := fields.get("last terminating signal"):
        return f"signal {signal}"
    code = fields.get("last exit code")
    return None if code is None or code.startswith("(never") else f"exit code {code}"
