"""The service on Linux: the unit file to the byte, what systemd itself says of it, and every flow as recorded."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from opta_lmx.service.commands import Outcome, ServiceError
from opta_lmx.service.systemd import Systemd, render_unit
from tests.service_tools import SOMEONE, RecordedSystemctl, make_job

UNIT = """\
[Unit]
Description=Opta-LMX, an inference server for MLX models
After=network.target

[Service]
Type=exec
ExecStart="/Users/someone/lmx/.venv/bin/python" "-m" "opta_lmx" "serve" "--port" "8080"
WorkingDirectory=/Users/someone/.opta-lmx
Environment="HOME=/Users/someone"
Environment="PATH=/Users/someone/lmx/.venv/bin:/usr/bin:/bin:/usr/sbin:/sbin"
Environment="PYTHONSAFEPATH=1"
StandardOutput=append:/Users/someone/.opta-lmx/logs/server.log
StandardError=append:/Users/someone/.opta-lmx/logs/server.log
UMask=0077
LimitNOFILE=8192
NoNewPrivileges=yes
# A crash, and a refusal such as a busy port; not a stop that was asked for, and not settings that cannot be read.
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2
# The server alone gets SIGTERM, and ends its workers when they have drained.
KillMode=mixed
TimeoutStopSec=60
# A worker that the kernel kills for memory costs one model; the default would stop the whole service.
OOMPolicy=continue

[Install]
WantedBy=default.target
"""


@pytest.fixture
def systemctl(tmp_path: Path) -> RecordedSystemctl:
    """A user's manager without our unit."""
    return RecordedSystemctl(tmp_path / "units/opta-lmx.service")


@pytest.fixture
def systemd(tmp_path: Path, systemctl: RecordedSystemctl) -> Systemd:
    """The user's systemd over directories of the test's own."""
    return Systemd(system=False, owner=SOMEONE, caller_uid=501, units=tmp_path / "units", run=systemctl)


def test_the_unit_is_written_as_golden() -> None:
    """Every line of the unit is meant, and no other is in it."""
    assert render_unit(make_job()).decode() == UNIT


def test_the_machines_unit_differs_in_whose_and_when() -> None:
    """It names its user and starts with the machine."""
    unit, own = (set(render_unit(make_job(system=system)).decode().splitlines()) for system in (True, False))
    assert unit - own == {"User=someone", "WantedBy=multi-user.target"}
    assert own - unit == {"WantedBy=default.target"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_finds_nothing_to_say(tmp_path: Path) -> None:
    """systemd-analyze verify takes the unit without a word, odd paths included."""
    odd = tmp_path / "a b %h $c"
    job = replace(
        make_job(odd, system=True), owner=replace(SOMEONE, name="root"), flags=("--config", '/x "y" %h $z \\t')
    )
    job.python.parent.mkdir(parents=True)
    job.python.touch(mode=0o755)
    (tmp_path / "opta-lmx.service").write_bytes(render_unit(job))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "opta-lmx.service")],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_what_a_unit_cannot_hold_is_refused() -> None:
    """A line break in a path would be a setting of its own, and systemd starts no program with quotes in its path."""
    with pytest.raises(ServiceError, match="cannot stand in a unit file"):
        render_unit(make_job(Path("/Users/someone/a\nUser=root")))
    with pytest.raises(ServiceError, match="systemd does not start"):
        render_unit(make_job(Path("/Users/you'")))


def test_install_writes_enables_and_starts(tmp_path: Path, systemd: Systemd, systemctl: RecordedSystemctl) -> None:
    """After install the unit is there, enabled and running, and the user knows what a logout does."""
    (note,) = systemd.install(make_job(tmp_path))
    assert note.endswith("loginctl enable-linger someone")
    assert systemctl.enabled
    status = systemd.status()
    assert (status.installed, status.loaded, status.running, status.pid) == (True, True, True, 4242)
    assert (status.kind, status.restarts, status.last_exit) == ("systemd user unit", 0, None)
    assert status.program == tmp_path / "lmx/.venv/bin/python"
    assert status.log == tmp_path / ".opta-lmx/logs/server.log"


def test_installing_the_same_again_disturbs_nothing(
    tmp_path: Path, systemd: Systemd, systemctl: RecordedSystemctl
) -> None:
    """Only a changed unit, or one that does not run, is started anew."""
    systemctl.linger = "yes"
    assert systemd.install(make_job(tmp_path)) == ()
    systemctl.asked.clear()
    systemd.install(make_job(tmp_path))
    assert "restart opta-lmx.service" not in systemctl.asked
    systemd.install(replace(make_job(tmp_path), drain_seconds=5))
    assert "restart opta-lmx.service" in systemctl.asked


def test_it_stops_starts_and_goes(tmp_path: Path, systemd: Systemd, systemctl: RecordedSystemctl) -> None:
    """Stop leaves it enabled, start brings it back, uninstall leaves nothing but data, and again is no error."""
    systemd.install(make_job(tmp_path))
    systemd.stop()
    assert (systemd.status().running, systemctl.enabled) == (False, True)
    systemd.start()
    assert systemd.status().running
    assert systemd.uninstall()
    assert (systemctl.running, systemctl.enabled, systemctl.read, systemctl.file.exists()) == (False,) * 4
    assert not systemd.uninstall()
    systemd.stop()
    with pytest.raises(ServiceError) as caught:
        systemd.start()
    assert "service install" in caught.value.hint


@pytest.mark.parametrize(
    ("ended", "shown"),
    [
        ((1, 1, "exit-code"), "exit code 1"),
        ((2, 9, "signal"), "signal 9"),
        ((2, 9, "oom-kill"), "signal 9 (oom-kill)"),
        ((1, 0, "success"), "exit code 0"),
    ],
)
def test_status_tells_how_the_last_run_ended(
    systemd: Systemd, systemctl: RecordedSystemctl, ended: tuple[int, int, str], shown: str
) -> None:
    """A service that crashed shows its restarts and what ended it."""
    systemctl.restarts, systemctl.ended = 2, ended
    status = systemd.status()
    assert (status.pid, status.restarts, status.last_exit) == (None, 2, shown)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (Outcome(127, stderr="systemctl: No such file or directory"), "does not run systemd"),
        (Outcome(1, stderr="Failed to connect to bus: No medium found\n"), "does not answer: Failed to connect"),
    ],
)
def test_without_systemd_nothing_is_written(
    tmp_path: Path, systemd: Systemd, systemctl: RecordedSystemctl, problem: Outcome, said: str
) -> None:
    """Where nobody would run it install is refused before it has changed anything, and status says not installed."""
    systemctl.problem = problem
    with pytest.raises(ServiceError, match=said):
        systemd.install(make_job(tmp_path))
    assert list(tmp_path.iterdir()) == []
    status = systemd.status()
    assert (status.installed, status.loaded, status.running) == (False, False, False)


def test_a_refusal_has_systemds_words(tmp_path: Path, systemd: Systemd, systemctl: RecordedSystemctl) -> None:
    """What systemctl says when it does not start the service is the error."""
    systemctl.refusal = Outcome(1, stderr="Job for opta-lmx.service failed because of unavailable resources.\n")
    with pytest.raises(ServiceError, match="restart was refused: Job for opta-lmx"):
        systemd.install(make_job(tmp_path))


def test_the_machines_service_is_roots(tmp_path: Path, systemctl: RecordedSystemctl) -> None:
    """Without root nothing is asked and nothing written; the hint is sudo."""
    systemd = Systemd(system=True, owner=SOMEONE, caller_uid=501, units=tmp_path / "units", run=systemctl)
    for act in (lambda: systemd.install(make_job(tmp_path)), systemd.uninstall, systemd.start, systemd.stop):
        with pytest.raises(ServiceError) as caught:
            act()
        assert "sudo" in caught.value.hint
    assert systemctl.asked == []
    assert list(tmp_path.iterdir()) == []
