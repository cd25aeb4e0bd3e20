"""The service on Linux: a unit file, and ``systemctl`` asked to start it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from opta_lmx.service.commands import NOT_FOUND, Outcome, RunCommand, ServiceError, run_command
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

UNIT: Final = "opta-lmx.service"

_PROPERTIES: Final = "LoadState,ActiveState,SubState,MainPID,NRestarts,ExecMainCode,ExecMainStatus,Result"

# CLD_EXITED of waitid(2), as ExecMainCode shows it; what ended otherwise was ended by a signal.
_EXITED: Final = "1"

_UNIT_TEXT: Final = """\
[Unit]
Description=Opta-LMX, an inference server for MLX models
After=network.target

[Service]
Type=exec
ExecStart={command}
WorkingDirectory={directory}
{environment}
{user}StandardOutput=append:{log}
StandardError=append:{log}
UMask=0077
LimitNOFILE={open_files}
NoNewPrivileges=yes
# A crash, and a refusal such as a busy port; not a stop that was asked for, and not settings that cannot be read.
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2
# The server alone gets SIGTERM, and ends its workers when they have drained.
KillMode=mixed
TimeoutStopSec={stop_seconds}
# A worker that the kernel kills for memory costs one model; the default would stop the whole service.
OOMPolicy=continue

[Install]
WantedBy={target}
"""


def render_unit(job: Job) -> bytes:
    """The unit file of a job. Raises ServiceError if a path in it cannot be written down there."""
    return _UNIT_TEXT.format(
        command=" ".join((_program(job.command[0]), *(_quoted(word).replace("$", "$$") for word in job.command[1:]))),
        directory=_path(job.directory),
        environment="\n".join(f"Environment={_quoted(f'{name}={value}')}" for name, value in job.environment.items()),
        user=f"User={job.owner.name}\n" if job.system else "",
        log=_path(job.log),
        open_files=job.open_files,
        stop_seconds=job.stop_seconds,
        target="multi-user.target" if job.system else "default.target",
    ).encode()


class Systemd:
    """systemd's manager of one user, or the machine's."""

    def __init__(
        self,
        *,
        system: bool,
        owner: Account,
        caller_uid: int,
        units: Path,
        run: RunCommand = run_command,
    ) -> None:
        """``owner`` is whose units these are; ``units`` the directory of unit files of this scope."""
        self._system = system
        self._owner = owner
        self._caller_uid = caller_uid
        self._file = units / UNIT
        self._run = run

    @property
    def scope(self) -> str:
        """See ``ServiceManager``."""
        return "--system" if self._system else "--user"

    def render(self, job: Job) -> bytes:
        """See ``ServiceManager``."""
        return render_unit(job)

    def install(self, job: Job) -> Sequence[str]:
        """See ``ServiceManager``. Leaves one that runs from the same file alone."""
        check_rights(self._owner, self._caller_uid, system=self._system)
        unit = render_unit(job)
        self._check_manager()
        make_places(job)
        changed = write_whole(self._file, unit)
        running = self.status().running
        self._do("daemon-reload")
        self._do("enable", UNIT)
        if changed or not running:
            self._do("restart", UNIT)
        return () if self._system else self._lingering()

    def uninstall(self) -> bool:
        """See ``ServiceManager``."""
        check_rights(self._owner, self._caller_uid, system=self._system)
        if not self._file.exists():
            return False
        self._check_manager()
        self._do("disable", "--now", UNIT)
        remove(self._file)
        self._do("daemon-reload")
        return True

    def start(self) -> None:
        """See ``ServiceManager``."""
        check_rights(self._owner, self._caller_uid, system=self._system)
        if not self._file.exists():
            raise ServiceError("there is no service to start", "opta-lmx service install writes it")
        self._check_manager()
        self._do("start", UNIT)

    def stop(self) -> None:
        """See ``ServiceManager``. It stays enabled."""
        check_rights(self._owner, self._caller_uid, system=self._system)
        if self._file.exists():
            self._check_manager()
            self._do("stop", UNIT)

    def status(self) -> ServiceStatus:
        """See ``ServiceManager``."""
        shown = self._systemctl("show", UNIT, f"--property={_PROPERTIES}")
        lines = shown.stdout.splitlines() if shown.exit_code == 0 else []
        fields = {name: value for name, _, value in (line.partition("=") for line in lines)}
        unit = self._unit()
        program, log = unit.get("ExecStart"), unit.get("StandardError", "").removeprefix("append:")
        return ServiceStatus(
            kind="systemd system unit" if self._system else "systemd user unit",
            file=self._file,
            installed=self._file.exists(),
            loaded=fields.get("LoadState") == "loaded",
            running=fields.get("ActiveState") == "active",
            pid=whole_number(fields, "MainPID") or None,
            restarts=whole_number(fields, "NRestarts"),
            last_exit=_last_exit(fields),
            program=Path(_first_word(program)) if program else None,
            log=Path(log.replace("%%", "%")) if log else None,
        )

    def _unit(self) -> dict[str, str]:
        """The unit file's settings, each by its last value; empty where there is none that can be read."""
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        return {name: value for name, is_setting, value in (line.partition("=") for line in lines) if is_setting}

    def _check_manager(self) -> None:
        """Raises ServiceError if nobody would answer: before anything is written or removed."""
        asked = self._systemctl("show", "--property=Version")
        if asked.exit_code == NOT_FOUND:
            raise ServiceError(
                "this machine does not run systemd", "run opta-lmx serve under whatever starts services here"
            )
        if asked.exit_code != 0:
            hint = "log in as that user itself (not by su or sudo), or install with --system"
            if self._system:
                hint = "run opta-lmx serve under whatever starts services here"
            raise ServiceError(f"systemd does not answer: {asked.reason}", hint)

    def _lingering(self) -> Sequence[str]:
        name = self._owner.name
        asked = self._run(("loginctl", "show-user", name, "--property=Linger"))
        if asked.stdout.strip() == "Linger=yes":
            return ()
        return (f"it runs while you are logged in; to have it start with the machine: loginctl enable-linger {name}",)

    def _do(self, *arguments: str) -> None:
        done = self._systemctl(*arguments)
        if done.exit_code != 0:
            raise ServiceError(
                f"systemctl {arguments[0]} was refused: {done.reason}",
                f"systemctl {self.scope} status {UNIT} and opta-lmx logs tell more",
            )

    def _systemctl(self, *arguments: str) -> Outcome:
        return self._run(("systemctl", self.scope, *arguments))


def _quoted(word: str) -> str:
    """One word of a command or an assignment, as systemd reads words."""
    return '"' + _plain(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _program(path: str) -> str:
    """The first word of a command: systemd takes no variables in it, and no quotes."""
    if set(path) & set("\"'\\"):
        raise ServiceError(f"systemd does not start {path}", "move the environment to a path without quotes")
    return f'"{_plain(path).replace("%", "%%")}"'


def _path(path: Path) -> str:
    """A path that is a setting's whole value."""
    return _plain(str(path)).replace("%", "%%")


def _plain(text: str) -> str:
    if not text.isprintable():
        raise ServiceError(f"{text!r} cannot stand in a unit file", "use a path and flags of printable characters")
    return text


def _first_word(command: str) -> str:
    """The program of an ExecStart that was rendered here."""
    return command.removeprefix('"').partition('"')[0].replace("%%", "%")


def _last_exit(fields: dict[str, str]) -> str | None:
    """How the last run ended; None before that."""
    code, status = fields.get("ExecMainCode", "0"), fields.get("ExecMainStatus", "0")
    if code == "0":
        return None
    result = fields.get("Result", "success")
    ended = f"{'exit code' if code == _EXITED else 'signal'} {status}"
    return ended if result in ("success", "exit-code", "signal") else f"{ended} ({result})"
