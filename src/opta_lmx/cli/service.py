"""The verb ``service``: have launchd or systemd run the server."""

import json
import os
import pwd
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.service.commands import RunCommand, ServiceError, run_command
from opta_lmx.service.job import Account, Job, ServiceManager, ServiceStatus, check_rights

# The flags of ``serve`` that an installed service keeps.
_KEPT_FLAGS: Final = {"server.host": "--host", "server.port": "--port", "logging.level": "--log-level"}


@dataclass(frozen=True, slots=True)
class Host:
    """The machine a service is for, and who asks: ``owner``, or root on the owner's behalf, by sudo.

    ``root`` is where its ``/etc`` and ``/Library`` are.
    """

    platform: str
    owner: Account
    caller_uid: int
    python: Path
    root: Path
    run: RunCommand

    def manager(self, *, system: bool) -> ServiceManager:
        """The one that runs services of this scope. Raises Failure where there is none we know."""
        if self.platform == "darwin":
            from opta_lmx.service.launchd import Launchd

            return Launchd(system=system, owner=self.owner, caller_uid=self.caller_uid, root=self.root, run=self.run)
        if self.platform == "linux":
            from opta_lmx.service.systemd import Systemd

            users, machines = self.owner.home / ".config/systemd/user", self.root / "etc/systemd/system"
            units = machines if system else users
            return Systemd(system=system, owner=self.owner, caller_uid=self.caller_uid, units=units, run=self.run)
        raise Failure(
            f"services are for macOS and Linux, not {self.platform}",
            "run opta-lmx serve under what starts services here",
        )


def this_host(environ: Mapping[str, str]) -> Host:
    """Where this process runs, and for whom."""
    uid = os.geteuid()
    if uid == 0 and (name := environ.get("SUDO_USER")):
        owner = _account(name)
    else:
        # The home as the shell has it: where the settings are looked for. A container may have no name for its user.
        known = [entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == uid]
        owner = Account(known[0] if known else str(uid), uid, os.getegid(), Path.home())
    return Host(sys.platform, owner, uid, Path(sys.executable), Path("/"), run_command)


def run_service(arguments: Arguments, environ: Mapping[str, str], host: Host | None = None) -> int:
    """Do what the command says about the service. Raises Failure if that is refused."""
    if arguments.action == "logs":
        from opta_lmx.cli.logs import run_logs

        return run_logs(arguments, environ)
    host = host or this_host(environ)
    try:
        manager = _choose(arguments, host)
        match arguments.action:
            case "install":
                done = _install(arguments, environ, host, manager)
            case "uninstall":
                done = {"removed": manager.uninstall()}
            case "start" | "stop":
                manager.start() if arguments.action == "start" else manager.stop()
                done = {"running": manager.status().running}
            case _:
                done = _shown(manager.status())
    except ServiceError as error:
        raise Failure(str(error), error.hint) from None
    if arguments.json:
        print(json.dumps(done, indent=2))
    elif arguments.only_print:
        print(done["content"], end="")
    else:
        _tell(arguments.action, done)
    return ExitCode.DONE


def find_services(host: Host) -> list[ServiceStatus]:
    """Every service of ours on this machine that this user can see."""
    found = [host.manager(system=system).status() for system in (False, True)]
    return [status for status in found if status.installed]


def _shown(status: ServiceStatus) -> dict[str, Any]:
    """A status as JSON has it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(status).items()}


def _choose(arguments: Arguments, host: Host) -> ServiceManager:
    """Of the scope that was named; else of the one that is installed; else the caller's own."""
    if arguments.system is not None:
        return host.manager(system=arguments.system)
    both = [host.manager(system=system) for system in (False, True)]
    installed = [manager for manager in both if manager.status().installed]
    if len(installed) > 1:
        raise Failure("there is a service of this user and one of the machine", "say which: --user or --system")
    return installed[0] if installed else host.manager(system=host.caller_uid == 0)


def _install(arguments: Arguments, environ: Mapping[str, str], host: Host, manager: ServiceManager) -> dict[str, Any]:
    system = manager.scope == "--system"
    if arguments.run_as and not system:
        raise Failure("--run-as is for a service of the machine", "add --system", ExitCode.USAGE)
    if not arguments.only_print:
        check_rights(host.owner, host.caller_uid, system=system)
        other = host.manager(system=not system)
        if other.status().installed:
            raise Failure(
                f"there is a service already, installed with {other.scope}; two would want one port",
                f"opta-lmx service uninstall {other.scope}",
            )
    job = _with_settings(_job(arguments, environ, host, system=system), host, manager, arguments)
    status = manager.status()
    if arguments.only_print:
        return {"file": str(status.file), "content": manager.render(job).decode()}
    notes = manager.install(job)
    status = manager.status()
    return {"file": str(status.file), "log": str(job.log), "running": status.running, "notes": list(notes)}


def _job(arguments: Arguments, environ: Mapping[str, str], host: Host, *, system: bool) -> Job:
    owner = _whose(arguments, host) if system else host.owner
    flags: list[str] = []
    named = arguments.config or (Path(environ["OPTA_LMX_CONFIG"]) if environ.get("OPTA_LMX_CONFIG") else None)
    if named is not None:
        # A service has another working directory.
        flags += ["--config", str(named.expanduser().absolute())]
    for key, flag in _KEPT_FLAGS.items():
        if key in arguments.flags:
            flags += [flag, str(arguments.flags[key])]
    directory = owner.home / ".opta-lmx"
    return Job(
        owner=owner,
        python=host.python,
        flags=tuple(flags),
        directory=directory,
        log=directory / "logs" / "server.log",
        system=system,
    )


def _whose(arguments: Arguments, host: Host) -> Account:
    """The account a service of the machine runs as: never root by accident."""
    if arguments.run_as:
        return _account(arguments.run_as)
    if host.owner.uid == 0:
        raise Failure("it is not clear whose server this is to be", "say so: --run-as USER", ExitCode.USAGE)
    return host.owner


def _account(name: str) -> Account:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise Failure(f"there is no user {name!r} on this machine", "id USER tells who is", ExitCode.USAGE) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def _with_settings(job: Job, host: Host, manager: ServiceManager, arguments: Arguments) -> Job:
    """The job with what it takes from the settings, read as the service will read them: in its environment."""
    variables = [f"{name}={value}" for name, value in job.environment.items()]
    shown = host.run(
        ("/usr/bin/env", "-i", *variables, str(job.python), "-m", "opta_lmx", "config", "show", "--json", *job.flags)
    )
    if shown.exit_code != 0:
        reason = shown.reason.removeprefix("error: ")
        hint = "a service has no variables of this shell: give keys as file:PATH, and settings in config.yaml"
        raise Failure(f"the server would not start as a service: {reason}", hint)
    settings = json.loads(shown.stdout)
    server = settings["server"]
    if not arguments.only_print and not manager.status().running:
        from opta_lmx.cli.serve import check_address

        check_address(server["host"], server["port"])
    return replace(job, drain_seconds=server["drain_seconds"], max_connections=server["max_connections"])


def _tell(action: str, done: Mapping[str, Any]) -> None:
    """What was done, for people."""
    match action:
        case "install":
            print(f"installed {done['file']}\nits log is {done['log']}")
            for note in done["notes"]:
                print(f"note: {note}", file=sys.stderr)
        case "uninstall":
            print("removed; models, settings and logs stay" if done["removed"] else "there was no service")
        case "start" | "stop":
            print("runs" if done["running"] else "does not run")
        case _:
            from opta_lmx.cli.remote import outline

            print("\n".join(outline(done)))
