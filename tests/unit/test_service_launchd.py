"""The service on macOS: the property list to the byte, and every flow against a recorded launchctl."""

import plistlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from opta_lmx.service.commands import ServiceError
from opta_lmx.service.launchd import Launchd, render_plist
from tests.service_tools import SOMEONE, RecordedLaunchctl, make_job

AGENT = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
	<key>EnvironmentVariables</key>
	<dict>
		<key>HOME</key>
		<string>/Users/someone</string>
		<key>PATH</key>
		<string>/Users/someone/lmx/.venv/bin:/usr/bin:/bin:/usr/sbin:/sbin</string>
		<key>PYTHONSAFEPATH</key>
		<string>1</string>
	</dict>
	<key>ExitTimeOut</key>
	<integer>60</integer>
	<key>HardResourceLimits</key>
	<dict>
		<key>NumberOfFiles</key>
		<integer>8192</integer>
	</dict>
	<key>KeepAlive</key>
	<dict>
		<key>SuccessfulExit</key>
		<false/>
	</dict>
	<key>Label</key>
	<string>com.opta.lmx</string>
	<key>ProcessType</key>
	<string>Interactive</string>
	<key>ProgramArguments</key>
	<array>
		<string>/Users/someone/lmx/.venv/bin/python</string>
		<string>-m</string>
		<string>opta_lmx</string>
		<string>serve</string>
		<string>--port</string>
		<string>8080</string>
	</array>
	<key>RunAtLoad</key>
	<true/>
	<key>SoftResourceLimits</key>
	<dict>
		<key>NumberOfFiles</key>
		<integer>8192</integer>
	</dict>
	<key>StandardErrorPath</key>
	<string>/Users/someone/.opta-lmx/logs/server.log</string>
	<key>StandardOutPath</key>
	<string>/Users/someone/.opta-lmx/logs/server.log</string>
	<key>ThrottleInterval</key>
	<integer>10</integer>
	<key>Umask</key>
	<integer>63</integer>
	<key>WorkingDirectory</key>
	<string>/Users/someone/.opta-lmx</string>
</dict>
</plist>
"""


@pytest.fixture
def launchctl() -> RecordedLaunchctl:
    """A user who is logged in, and no service."""
    return RecordedLaunchctl()


@pytest.fixture
def agent(tmp_path: Path, launchctl: RecordedLaunchctl) -> Launchd:
    """The user's launchd over a home of the test's own."""
    return Launchd(
        system=False, owner=replace(SOMEONE, home=tmp_path), caller_uid=501, run=launchctl, pause=lambda seconds: None
    )


def test_the_agent_is_written_as_golden() -> None:
    """Every key of the property list is meant, and nothing else is in it."""
    assert render_plist(make_job()).decode() == AGENT


def test_a_daemon_is_the_agent_with_a_user() -> None:
    """Of the machine's service only whose it is differs: it needs no session."""
    agent, daemon = (plistlib.loads(render_plist(make_job(system=system))) for system in (False, True))
    assert daemon == agent | {"UserName": "someone"}


def test_install_writes_loads_and_starts(tmp_path: Path, agent: Launchd, launchctl: RecordedLaunchctl) -> None:
    """After install the list and its directories are there, the service runs, and what is kept is closed to others."""
    launchctl.disabled = True
    (note,) = agent.install(make_job(tmp_path))
    assert "--system" in note
    file = tmp_path / "Library/LaunchAgents/com.opta.lmx.plist"
    assert plistlib.loads(file.read_bytes())["Label"] == "com.opta.lmx"
    assert file.stat().st_mode & 0o777 == 0o644
    modes = {place: (tmp_path / place).stat().st_mode & 0o777 for place in (".opta-lmx", ".opta-lmx/logs/server.log")}
    assert modes == {".opta-lmx": 0o700, ".opta-lmx/logs/server.log": 0o600}
    assert [line for line in launchctl.asked if not line.startswith(("print", "bootout"))] == [
        "enable gui/501/com.opta.lmx",
        f"bootstrap gui/501 {file}",
    ]
    status = agent.status()
    assert (status.installed, status.loaded, status.running, status.pid) == (True, True, True, 4242)
    assert (status.restarts, status.last_exit, status.kind) == (0, None, "LaunchAgent")
    assert status.program == tmp_path / "lmx/.venv/bin/python"
    assert status.log == tmp_path / ".opta-lmx/logs/server.log"


def test_installing_the_same_again_disturbs_nothing(
    tmp_path: Path, agent: Launchd, launchctl: RecordedLaunchctl
) -> None:
    """A service that runs from the same list is neither stopped nor loaded again."""
    agent.install(make_job(tmp_path))
    launchctl.asked.clear()
    agent.install(make_job(tmp_path))
    assert launchctl.asked == ["print gui/501/com.opta.lmx"]


def test_installing_anew_replaces_the_old(tmp_path: Path, agent: Launchd, launchctl: RecordedLaunchctl) -> None:
    """A changed list is loaded when launchd has let go of the old one, which takes as long as a drain."""
    agent.install(make_job(tmp_path))
    launchctl.lingers = 5
    agent.install(make_job(tmp_path, system=True))
    assert launchctl.running
    assert launchctl.asked.index("bootout gui/501/com.opta.lmx") < len(launchctl.asked) - 5


def test_a_stopped_service_stays_and_starts_again(tmp_path: Path, agent: Launchd, launchctl: RecordedLaunchctl) -> None:
    """Stop unloads, so that nothing starts it again; the list stays, and start loads it."""
    agent.install(make_job(tmp_path))
    agent.stop()
    status = agent.status()
    assert (status.installed, status.loaded, status.running) == (True, False, False)
    agent.stop()
    agent.start()
    assert agent.status().running
    launchctl.running = False
    agent.start()
    assert launchctl.asked[-1] == "kickstart gui/501/com.opta.lmx"
    agent.start()
    assert launchctl.asked[-1] == "print gui/501/com.opta.lmx"


def test_uninstall_stops_and_removes(tmp_path: Path, agent: Launchd, launchctl: RecordedLaunchctl) -> None:
    """Nothing of the service is left, what the server keeps stays, and a second time is no error."""
    agent.install(make_job(tmp_path))
    assert agent.uninstall()
    assert not launchctl.loaded
    assert not agent.status().installed
    assert (tmp_path / ".opta-lmx/logs/server.log").exists()
    assert not agent.uninstall()


@pytest.mark.parametrize(
    ("last_exit", "signal", "shown"),
    [
        ("1", None, "exit code 1"),
        ("(never exited)", "Killed: 9", "signal Killed: 9"),
        ("78: EX_CONFIG", None, "exit code 78: EX_CONFIG"),
    ],
)
def test_status_tells_how_the_last_run_ended(
    agent: Launchd, launchctl: RecordedLaunchctl, last_exit: str, signal: str | None, shown: str
) -> None:
    """A service that crashed shows its restarts and what ended it; deeper levels are not read."""
    launchctl.loaded, launchctl.runs, launchctl.last_exit, launchctl.signal = True, 3, last_exit, signal
    status = agent.status()
    assert (status.running, status.pid, status.restarts, status.last_exit) == (False, None, 2, shown)


def test_the_machines_service_is_roots(tmp_path: Path, launchctl: RecordedLaunchctl) -> None:
    """Without root nothing is asked of launchd and nothing written; the hint is sudo. And an agent is not root's."""
    daemon = Launchd(system=True, owner=SOMEONE, caller_uid=501, root=tmp_path, run=launchctl)
    agent = Launchd(system=False, owner=SOMEONE, caller_uid=0, run=launchctl)
    for manager, hint in ((daemon, "with sudo"), (agent, "without sudo")):
        install = partial(manager.install, make_job(tmp_path))
        acts: list[Callable[[], object]] = [install, manager.uninstall, manager.start, manager.stop]
        for act in acts:
            with pytest.raises(ServiceError) as caught:
                act()
            assert caught.value.hint.endswith(hint)
    assert launchctl.asked == []
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_is_loaded_for_the_machine(tmp_path: Path) -> None:
    """Root's install goes to /Library/LaunchDaemons and the system's domain, and has nothing to add."""
    launchctl = RecordedLaunchctl(domain="system")
    daemon = Launchd(system=True, owner=SOMEONE, caller_uid=0, root=tmp_path, run=launchctl)
    job = make_job(tmp_path / "home", system=True)
    assert daemon.install(job) == ()
    assert daemon.status().file == tmp_path / "Library/LaunchDaemons/com.opta.lmx.plist"
    assert daemon.status().running


def test_nobody_logged_in_is_told(tmp_path: Path, agent: Launchd, launchctl: RecordedLaunchctl) -> None:
    """Where the user has no session the error has launchd's words, and the hint is the service that needs none."""
    launchctl.logged_in = False
    with pytest.raises(ServiceError, match="did not load the service: Bootstrap failed: 125") as caught:
        agent.install(make_job(tmp_path))
    assert "sudo opta-lmx service install --system" in caught.value.hint


def test_nothing_to_start_is_told(agent: Launchd) -> None:
    """Start without an installed service names the command that installs one."""
    with pytest.raises(ServiceError) as caught:
        agent.start()
    assert "service install" in caught.value.hint


def test_a_service_that_does_not_end_is_told(tmp_path: Path, agent: Launchd, launchctl: RecordedLaunchctl) -> None:
    """Waiting for the end is bounded by what the list grants, and then an error."""
    agent.install(make_job(tmp_path))
    launchctl.lingers = 10_000
    with pytest.raises(ServiceError, match="not ended within 65 seconds"):
        agent.stop()
