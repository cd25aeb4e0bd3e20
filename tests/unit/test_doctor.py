"""What doctor says of each fact, and the command over a machine with its server down."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opta_lmx.cli.arguments import parse
from opta_lmx.cli.doctor import run_doctor
from opta_lmx.cli.failure import ExitCode
from opta_lmx.cli.service import Host
from opta_lmx.manager.metal import MetalFacts
from opta_lmx.service.commands import Outcome
from opta_lmx.service.findings import (
    Finding,
    Level,
    Listener,
    check_door,
    check_lock,
    check_log,
    check_modes,
    check_port,
    check_service,
    check_token,
    check_workers,
)
from opta_lmx.service.job import Account, ServiceStatus
from opta_lmx.service.lock import DirectoryInUse, hold
from opta_lmx.service.machine import LargestModel, check_disk, check_memory, check_metal, check_versions
from opta_lmx.service.permissions import Lax, find_lax

GIB = 1024**3
URL = "http://127.0.0.1:1234"
SECRET = "sk-very-secret-1234"


def levels(found: Iterable[Finding]) -> list[str]:
    """The levels, and on the way: whatever needs doing has a remedy, and whatever does not has none."""
    shown = list(found)
    assert all((finding.remedy is None) == (finding.level is Level.OK) for finding in shown), shown
    return [finding.level.value for finding in shown]


# -- the server -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "health", "level"),
    [
        (None, None, "ok"),
        ("127.0.0.1:1234 is in use by other (pid 7)", None, "fail"),
        ("in use by ours", {"status": "ok", "version": "1"}, "ok"),
        ("in use by ours", {"status": "degraded", "version": "1", "reason": "m: no"}, "warn"),
        ("in use by ours", {"status": "ok", "version": "0"}, "warn"),
    ],
)
def test_a_port_is_free_ours_or_taken(problem: str | None, health: dict[str, Any] | None, level: str) -> None:
    """Only somebody else's program in our place is a failure; a sick or an old server of ours is a warning."""
    assert levels([check_port(Listener(URL, problem, health), "1")]) == [level]


@pytest.mark.parametrize(
    ("pid", "held", "serving", "level"),
    [(None, False, False, "ok"), (7, True, True, "ok"), (7, True, False, "warn"), (None, False, True, "warn")],
)
def test_the_lock_agrees_with_the_port(pid: int | None, held: bool, serving: bool, level: str) -> None:
    """A server that holds the directory and does not answer, or answers and does not hold it, is told of."""
    found = check_lock(DirectoryInUse(Path("/m"), pid) if held else None, serving=serving)
    assert levels([found]) == [level]
    assert ("kill 7" in (found.remedy or "")) == (held and not serving)


def test_what_others_can_open_is_told_with_one_command() -> None:
    """The remedy closes the top of each tree; a secret is a failure of its own."""
    data = [Lax(Path(path), 0o755) for path in ("/d", "/d/a", "/d/a/b", "/e f")]
    secret, rest = check_modes(data, [Lax(Path("/k"), 0o644)])
    assert levels([secret, rest]) == ["fail", "warn"]
    assert secret.remedy == "chmod 600 /k"
    assert rest.remedy == "chmod -R go-rwx /d '/e f'"
    assert rest.what.endswith("/d (0755), /d/a (0755), /d/a/b (0755) and 1 more")
    assert levels(check_modes([], [])) == ["ok"]


def test_lax_files_are_found_where_they_can_be_reached(tmp_path: Path) -> None:
    """Behind a closed directory nothing is open; links are not followed; the strict are passed over."""
    for name, mode in (("open", 0o755), ("open/closed", 0o700), ("open/closed/in", 0o755), ("closed", 0o700)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    for name, mode in (("open/strict", 0o600), ("open/lax", 0o640), ("closed/lax", 0o644)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "open/link").symlink_to(tmp_path)
    found = find_lax(tmp_path / "open", tmp_path / "closed", tmp_path / "none")
    assert found == [Lax(tmp_path / "open", 0o755), Lax(tmp_path / "open/lax", 0o640)]


@pytest.mark.parametrize(
    ("loopback", "api_keys", "admin_key", "level"),
    [(True, False, False, "ok"), (False, True, True, "ok"), (False, True, False, "warn"), (False, False, True, "warn")],
)
def test_an_open_door_is_told(loopback: bool, api_keys: bool, admin_key: bool, level: str) -> None:
    """Other machines without a key are a warning that names the key."""
    found = check_door(loopback=loopback, api_keys=api_keys, admin_key=admin_key)
    assert levels([found]) == [level]
    assert ("security.admin_key" in found.what) == (not loopback and not admin_key)


@pytest.mark.parametrize(
    ("in_environment", "in_file", "service", "level"),
    [
        (False, False, True, "ok"),
        (True, False, False, "ok"),
        (True, False, True, "warn"),
        (True, True, True, "ok"),
    ],
)
def test_a_token_only_this_shell_has_is_told(in_environment: bool, in_file: bool, service: bool, level: str) -> None:
    """A service does not see the shell's variables."""
    found = check_token(variable="HF_TOKEN", in_environment=in_environment, in_file=in_file, service=service)
    assert levels([found]) == [level]


def test_models_that_failed_or_died_are_told() -> None:
    """A failed model is a failure with its reason, a restarted one a warning; well ones are listed in one line."""
    models = [
        {"id": "a", "state": "ready", "restarts": 0},
        {"id": "b", "state": "failed", "restarts": 1, "reason": "no file"},
        {"id": "c", "state": "ready", "restarts": 2},
    ]
    failed, restarted = check_workers({"models": models, "draining": False})
    assert levels([failed, restarted]) == ["fail", "warn"]
    assert failed.what == "b failed: no file"
    (well,) = check_workers({"models": models[:1], "draining": False})
    assert (well.level, well.what) == (Level.OK, "loaded: a")
    assert levels(check_workers({"models": [], "draining": True})) == ["warn"]


def status(**changes: Any) -> ServiceStatus:
    """A service that runs well."""
    usual = {"installed": True, "loaded": True, "running": True, "pid": 7, "restarts": 0}
    return ServiceStatus(kind="LaunchAgent", file=Path("/x.plist"), **(usual | changes))


@pytest.mark.parametrize(
    ("services", "there", "found"),
    [
        ([], True, ["ok"]),
        ([status()], True, ["ok"]),
        ([status(restarts=3)], True, ["warn"]),
        ([status(running=False, last_exit="exit code 1")], True, ["warn"]),
        ([status(running=False, loaded=False)], True, ["warn"]),
        ([status(running=False, program=Path("/gone/python"))], False, ["fail"]),
        ([status(), status()], True, ["fail", "ok", "ok"]),
    ],
)
def test_a_service_that_does_not_do_its_work_is_told(
    services: Sequence[ServiceStatus], there: bool, found: list[str]
) -> None:
    """None is a fact; two are a failure, and so is one whose Python has gone."""
    assert levels(check_service(services, program_exists=there)) == found


def test_a_log_without_bounds_is_told() -> None:
    """A gigabyte of log is a warning."""
    sizes = (None, 10, 2 * GIB)
    assert levels(check_log(Path("/l") if size else None, size) for size in sizes) == ["ok", "ok", "warn"]


# -- the machine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free_gib", "level"), [(100, "ok"), (5, "warn"), (0.5, "fail")])
def test_a_full_disk_is_told(free_gib: float, level: str) -> None:
    """Little space is a warning, none a failure."""
    assert levels([check_disk(Path("/m"), int(free_gib * GIB))]) == [level]


def test_a_model_too_large_is_told() -> None:
    """The cap is held against the largest model on disk."""
    assert levels([check_memory(16 * GIB, 14 * GIB, None)]) == ["ok"]
    assert levels([check_memory(16 * GIB, 14 * GIB, LargestModel("m", 12 * GIB))]) == ["ok"]
    assert levels([check_memory(16 * GIB, 14 * GIB, LargestModel("m", 13 * GIB))]) == ["warn"]


@pytest.mark.parametrize(
    ("memory_gib", "wired_gib", "weights_gib", "level", "advised_mb"),
    [
        (64, 0, None, "ok", None),
        (64, 0, 40, "ok", None),
        (64, 0, 45, "warn", 58_982),
        (64, 0, 60, "warn", None),
        (64, None, 45, "warn", None),
        (64, 56, 45, "ok", None),
        (64, 62, 45, "warn", 58_982),
        (16, 0, 9, "ok", None),
        (16, 0, 10, "warn", None),
        (16, 15, 9, "warn", 10_240),
    ],
)
def test_the_gpu_limit_is_raised_only_where_it_helps(
    memory_gib: int, wired_gib: int | None, weights_gib: int | None, level: str, advised_mb: int | None
) -> None:
    """Advice comes for a model that fits under the memory cap but not into Metal's default, and never starves macOS."""
    gpu = MetalFacts("Apple M4", memory_gib * GIB, None if wired_gib is None else wired_gib * GIB)
    largest = None if weights_gib is None else LargestModel("m", weights_gib * GIB)
    found = check_metal(gpu, memory_gib * GIB * 9 // 10, largest)
    assert levels([found]) == [level]
    advice = "sudo sysctl iogpu.wired_limit_mb="
    assert (advised_mb is not None) == (found.remedy or "").startswith(advice)
    if advised_mb is not None:
        assert (found.remedy or "").startswith(f"{advice}{advised_mb} ")


def test_without_metal_there_is_nothing_to_advise() -> None:
    """On Linux that is a fact."""
    assert levels([check_metal(None, GIB, LargestModel("m", 2 * GIB))]) == ["ok"]


def test_versions_are_held_to_the_pins() -> None:
    """A missing package is a failure, another version a warning, all as pinned one line."""
    pins = {"mlx": {"1.0"}, "mlx-lm": {"2.0"}, "x": {"3"}}
    assert levels(check_versions("3.11", pins, {"mlx": "1.0", "mlx-lm": None, "x": "4"}, {"mlx"})) == ["fail", "warn"]
    (well,) = check_versions("3.11", pins, {"mlx": "1.0", "mlx-lm": "2.0", "x": "3"}, {"mlx", "mlx-lm", "other"})
    assert (well.level, well.what) == (Level.OK, "Python 3.11; mlx 1.0, mlx-lm 2.0; all as pinned")


# -- the command ------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A Linux machine without a service, a home of the test's own, and settings of nobody else's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("OPTA_LMX", "HF_TOKEN"))]:
        monkeypatch.delenv(name)
    owner = Account("someone", 501, 20, tmp_path)
    return Host("linux", owner, 501, tmp_path / "python", tmp_path / "root", lambda argv: Outcome(127))


def test_a_fresh_machine_is_well(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing there, not even a server, every check has an answer and none is a failure."""
    assert run_doctor(parse(["doctor", "--port", "0", "--json"]), {}, host) == ExitCode.DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is True
    checks = [finding["check"] for finding in shown["findings"]]
    assert checks == [
        *("config", "port", "lock", "permissions", "disk", "memory", "metal", "access", "hub token", "service"),
        *("log", "versions"),
    ]
    assert not (host.owner.home / ".opta-lmx").exists()


def test_keys_in_open_files_fail(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of keys and tokens, and settings with a key in them, must be their owner's alone; no key is shown."""
    home = host.owner.home
    for name in ("key", "token", "config.yaml"):
        (home / name).write_text(SECRET)
        (home / name).chmod(0o644)
    text = f"security: {{api_keys: ['file:{home}/key', {SECRET}], admin_key: null}}\n"
    (home / "config.yaml").write_text(f"{text}downloads: {{token_file: ~/token}}\n")
    arguments = parse(["doctor", "--port", "0", "--config", str(home / "config.yaml")])
    assert run_doctor(arguments, {}, host) == ExitCode.REFUSED
    shown = capsys.readouterr().out
    assert SECRET not in shown
    for name in ("key", "token", "config.yaml"):
        assert f"secrets: chmod 600 {home / name}\n" in shown
        (home / name).chmod(0o600)
    assert run_doctor(arguments, {}, host) == ExitCode.DONE


def test_bad_settings_are_one_finding_among_others(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """What needs no settings is still looked at."""
    assert run_doctor(parse(["doctor"]), {"OPTA_LMX__SERVER__PROT": "1"}, host) == ExitCode.REFUSED
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["fail", "config"],
        ["ok", "service"],
        ["ok", "log"],
        ["ok", "versions"],
    ]
    assert lines[-1] == "3 ok, 0 warn, 1 fail"


def test_a_holder_that_does_not_answer_is_told(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory in use and nobody at the address: the process is named."""
    with hold(host.owner.home / ".opta-lmx/models"):
        assert run_doctor(parse(["doctor", "--port", "0"]), {}, host) == ExitCode.DONE
    assert f"kill {os.getpid()} stops it" in capsys.readouterr().out
