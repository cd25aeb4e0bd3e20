"""The verbs service and logs: what is checked before anything is changed, what is printed, how it ends."""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from opta_lmx.cli import main
from opta_lmx.cli.arguments import parse
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.logs import run_logs
from opta_lmx.cli.service import Host, run_service
from opta_lmx.service.commands import Outcome
from opta_lmx.service.job import Account
from tests.service_tools import RecordedLaunchctl, RecordedSystemctl


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("OPTA_LMX")]:
        monkeypatch.delenv(name)


@dataclass
class Machine:
    """Runs what the service verb runs: launchd's or systemd's tool, and the settings shown in a bare environment."""

    launchctl: RecordedLaunchctl = field(default_factory=RecordedLaunchctl)
    daemons: RecordedLaunchctl = field(default_factory=lambda: RecordedLaunchctl(domain="system"))
    systemctl: RecordedSystemctl | None = None
    port: int = 0
    settings: Outcome | None = None
    checked: list[str] = field(default_factory=list)

    def __call__(self, argv: Sequence[str]) -> Outcome:
        if argv[0] == "/bin/launchctl":
            return (self.daemons if any("system" in word for word in argv[2:3]) else self.launchctl)(argv)
        if argv[0] == "/usr/bin/env":
            self.checked = list(argv)
            server = {"host": "127.0.0.1", "port": self.port, "drain_seconds": 12.5, "max_connections": 10_000}
            return self.settings or Outcome(0, json.dumps({"server": server}))
        assert self.systemctl is not None
        return self.systemctl(argv)


@pytest.fixture
def machine() -> Machine:
    """A Mac, somebody logged in."""
    return Machine()


@pytest.fixture
def host(tmp_path: Path, machine: Machine) -> Host:
    """It, asked by that user."""
    owner = Account("someone", 501, 20, tmp_path)
    return Host("darwin", owner, owner.uid, tmp_path / "venv/bin/python", tmp_path / "root", machine)


def service(host: Host, command: str, **environ: str) -> int:
    """Run ``opta-lmx service ...`` on a host."""
    return run_service(parse(["service", *command.split()]), environ, host)


def by_sudo(host: Host) -> Host:
    """The same machine, asked by root on the user's behalf."""
    return replace(host, caller_uid=0)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A loopback port this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_the_whole_life_of_a_service(
    tmp_path: Path, host: Host, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Install, status, stop, start, uninstall: each says in a line or in JSON how it is after it."""
    assert service(host, "install --port 1299") == ExitCode.DONE
    captured = capsys.readouterr()
    file, log = tmp_path / "Library/LaunchAgents/com.opta.lmx.plist", tmp_path / ".opta-lmx/logs/server.log"
    assert captured.out == f"installed {file}\nits log is {log}\n"
    assert captured.err.startswith("note: it runs while you are logged in")
    assert b"<integer>43</integer>" in file.read_bytes(), "12.5 s to drain and 30 to end"
    assert b"<integer>11024</integer>" in file.read_bytes(), "10,000 connections and the rest"
    assert service(host, "status --json") == ExitCode.DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == str(file)
    assert (shown["installed"], shown["running"], shown["pid"]) == (True, True, 4242)
    for command, said in (("stop", "does not run"), ("start", "runs"), ("status", "running: yes")):
        assert service(host, command) == ExitCode.DONE
        assert said in capsys.readouterr().out.splitlines()
    assert service(host, "uninstall") == service(host, "uninstall") == ExitCode.DONE
    assert capsys.readouterr().out == "removed; models, settings and logs stay\nthere was no service\n"
    assert not machine.launchctl.loaded


def test_settings_are_read_as_the_service_will(host: Host, machine: Machine, tmp_path: Path) -> None:
    """In an environment with nothing of this shell's, with the flags and the file it will have."""
    service(host, "install --config conf.yaml --log-level debug", SECRET="x", OPTA_LMX_CONFIG="/other.yaml")
    assert machine.checked[:2] == ["/usr/bin/env", "-i"]
    assert machine.checked[5:] == [
        *(str(tmp_path / "venv/bin/python"), "-m", "opta_lmx", "config", "show", "--json"),
        *("--config", str(Path("conf.yaml").absolute()), "--log-level", "DEBUG"),
    ]
    assert {word.partition("=")[0] for word in machine.checked[2:5]} == {"HOME", "PATH", "PYTHONSAFEPATH"}


def test_settings_that_would_not_do_are_refused(host: Host, machine: Machine, tmp_path: Path) -> None:
    """A key from a variable is not there for a service: that is told now, and nothing is written."""
    reason = "error: c.yaml:2: security.admin_key: the environment variable KEY is not set\nhint: x\n"
    machine.settings = Outcome(2, stderr=reason)
    with pytest.raises(Failure, match=r"would not start as a service: c\.yaml:2: security\.admin_key") as caught:
        service(host, "install")
    assert "file:PATH" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_port_somebody_else_has_is_refused(host: Host, machine: Machine, tmp_path: Path, taken_port: int) -> None:
    """Install names who has the port; once the service itself runs there it is no obstacle."""
    machine.port = taken_port
    with pytest.raises(Failure, match=rf"is in use by .+ \(pid {os.getpid()}\)"):
        service(host, "install")
    assert list(tmp_path.iterdir()) == []
    machine.launchctl.loaded = machine.launchctl.running = True
    assert service(host, "install") == ExitCode.DONE


def test_there_is_one_service_on_a_machine(host: Host, machine: Machine) -> None:
    """With a user's service installed the machine's is refused, and the verbs find the one there is."""
    service(host, "install")
    with pytest.raises(Failure, match="installed with --user") as caught:
        service(by_sudo(host), "install --system")
    assert caught.value.hint == "opta-lmx service uninstall --user"


def test_the_machines_service_is_somebodys(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs as who called sudo, or as who is named; root by itself must say whose it is to be."""
    for command, user in (("install --print --system", "someone"), ("install --print --system --run-as root", "root")):
        assert service(by_sudo(host), command) == ExitCode.DONE
        assert f"<key>UserName</key>\n\t<string>{user}</string>" in capsys.readouterr().out
    with pytest.raises(Failure, match="--run-as is for a service of the machine"):
        service(host, "install --run-as root")
    root = replace(by_sudo(host), owner=Account("root", 0, 0, host.owner.home))
    for command in ("install --print --system", "install --print --system --run-as nobody-of-that-name"):
        with pytest.raises(Failure) as caught:
            service(root, command)
        assert caught.value.code == ExitCode.USAGE


def test_sudo_installs_for_the_machine(host: Host, machine: Machine, tmp_path: Path) -> None:
    """Without a flag root's install is the machine's, with its list below /Library and everything else in the home."""
    assert service(by_sudo(host), "install") == ExitCode.DONE
    assert machine.daemons.running
    assert (tmp_path / "root/Library/LaunchDaemons/com.opta.lmx.plist").exists()
    assert (tmp_path / ".opta-lmx/logs/server.log").exists()
    assert not (tmp_path / "Library").exists()


def test_print_changes_nothing(host: Host, machine: Machine, tmp_path: Path, taken_port: int) -> None:
    """The file can be seen by anybody, whoever has the port, and no tool is asked to do anything."""
    machine.port = taken_port
    assert service(host, "install --print --system") == ExitCode.DONE
    assert list(tmp_path.iterdir()) == []
    assert {line.partition(" ")[0] for line in machine.launchctl.asked + machine.daemons.asked} == {"print"}


def test_a_refusal_is_error_and_hint(host: Host) -> None:
    """What the service room refuses ends the command as every other refusal does."""
    with pytest.raises(Failure, match="root's to change") as caught:
        service(host, "stop --system")
    assert (caught.value.code, caught.value.hint) == (ExitCode.REFUSED, "run the same command with sudo")


def test_linux_has_the_same_verbs(host: Host, machine: Machine, tmp_path: Path) -> None:
    """There the file is a user unit."""
    unit = tmp_path / ".config/systemd/user/opta-lmx.service"
    machine.systemctl = RecordedSystemctl(unit)
    assert service(replace(host, platform="linux"), "install") == ExitCode.DONE
    assert "TimeoutStopSec=43\n" in unit.read_text()
    assert machine.systemctl.running


def test_elsewhere_there_are_no_services(host: Host) -> None:
    """On a system we know no manager of, the answer is a refusal."""
    with pytest.raises(Failure, match="macOS and Linux, not freebsd"):
        service(replace(host, platform="freebsd"), "status")


@pytest.mark.parametrize(
    "argv", [["service"], ["service", "restart"], ["service", "install", "--system", "--user"], ["logs", "-n", "x"]]
)
def test_usage_error_ends_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A deed there is not, and two scopes at once, are usage errors."""
    assert main(argv) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("error: ")


# -- logs -------------------------------------------------------------------------------------------


def test_logs_finds_the_services_log(host: Host, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """logs and service logs show the end of the installed service's log."""
    service(host, "install")
    log = host.owner.home / ".opta-lmx/logs/server.log"
    log.write_text('{"event": "one"}\n{"event": "two"}\nTraceback\n')
    capsysbinary.readouterr()
    assert run_logs(parse(["logs", "-n", "2"]), {}, host) == ExitCode.DONE
    assert capsysbinary.readouterr().out == b'{"event": "two"}\nTraceback\n'
    assert run_logs(parse(["service", "logs", "-n", "2", "--json"]), {}, host) == ExitCode.DONE
    rows = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert rows == [{"event": "two"}, {"event": "Traceback"}]


def test_logs_prefers_the_file_of_the_settings(host: Host, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Where logging.file is set the server writes there, and the service's own log is named on standard error."""
    service(host, "install")
    capsysbinary.readouterr()
    (host.owner.home / "own.log").write_text("line\n")
    assert run_logs(parse(["logs"]), {"OPTA_LMX__LOGGING__FILE": "~/own.log"}, host) == ExitCode.DONE
    captured = capsysbinary.readouterr()
    assert captured.out == b"line\n"
    assert captured.err.startswith(b"note: what the service itself says is in ")


def test_logs_with_broken_settings_shows_what_the_service_said(
    host: Host, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Settings that stop the server do not stop the look at why."""
    service(host, "install")
    (host.owner.home / ".opta-lmx/logs/server.log").write_text("error: bad key\n")
    capsysbinary.readouterr()
    assert run_logs(parse(["logs"]), {"OPTA_LMX__SERVER__PROT": "1"}, host) == ExitCode.DONE
    assert capsysbinary.readouterr().out == b"error: bad key\n"


def test_logs_follows_what_comes(host: Host, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """With -f new lines are shown as they come, until it is ended."""
    log = host.owner.home / ".opta-lmx/logs/server.log"
    log.parent.mkdir(parents=True)
    log.write_text("old\n")
    looks = iter([True, False])

    def wait() -> bool:
        with log.open("a") as file:
            file.write("new\n")
        return next(looks)

    assert run_logs(parse(["logs", "-f", "-n", "0"]), {}, host, wait) == ExitCode.DONE
    assert capsysbinary.readouterr().out == b"new\n"


def test_no_log_is_told(host: Host) -> None:
    """Without a file the answer names where it was looked for."""
    with pytest.raises(Failure, match=r"there is no log at .*/\.opta-lmx/logs/server\.log"):
        run_logs(parse(["logs"]), {}, host)
