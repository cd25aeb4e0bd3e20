"""The verbs that ask a running server: what they send, what they print, and how they end."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from opta_lmx.cli import main
from opta_lmx.cli.failure import ExitCode
from tests.cli_server import FakeServer, server

__all__ = ["server"]

SECRET = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("OPTA_LMX")]:
        monkeypatch.delenv(name)


def test_ls_prints_a_table(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """ls asks for the models on disk and shows them in columns, sizes in binary units."""
    server.answer(
        {
            "models": [
                {"id": "a/b", "size_bytes": 3 * 2**29, "context_length": None, "verified": True},
                {"id": "tiny", "size_bytes": 1000, "context_length": 2048, "verified": False},
            ]
        }
    )
    assert main(["ls", "--url", server.url]) == ExitCode.DONE
    assert capsys.readouterr().out.splitlines() == [
        "id    size_bytes  context_length  verified",
        "a/b   1.5 GiB     -               yes",
        "tiny  1000 B      2048            no",
    ]
    assert server.seen[0][0] == "GET /admin/models/available"


def test_a_terminal_shows_the_import_that_a_load_waits_for(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the load is unanswered, each look at the server's imports is one line in the place of the last."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    imports = [{"model_id": "a/b", "done_bytes": 2**20, "total_bytes": 2**22}]
    server.answer({"imports": imports, "time_to_load_ms": 1500.0})
    server.slow = "POST /admin/models/load"
    assert main(["load", "a/b", "--url", server.url]) == ExitCode.DONE
    output = capsys.readouterr()
    assert output.out == "a/b loaded in 1.5 s\n"
    lines = output.err.split("\r\x1b[K")
    assert (lines[1], lines[-1]) == ("importing a/b  25%  1.0 MiB of 4.0 MiB", "")


def test_ps_without_models_prints_nothing(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """ps with nothing loaded is done, and its output is empty."""
    server.answer({"models": []})
    assert main(["ps", "--url", server.url]) == ExitCode.DONE
    assert capsys.readouterr() == ("", "")
    assert server.seen[0][0] == "GET /admin/models"


def test_status_prints_an_outline(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """status shows objects with dotted names and lists of objects as tables."""
    server.answer(
        {"version": "0.1.0", "memory": {"used_bytes": 2**20, "reason": None}, "models": [{"id": "m", "pins": []}]}
    )
    assert main(["status", "--url", server.url]) == ExitCode.DONE
    assert capsys.readouterr().out.splitlines() == [
        "version: 0.1.0",
        "memory.used_bytes: 1.0 MiB",
        "memory.reason: -",
        "models:",
        "  id  pins",
        "  m   -",
    ]


def test_load_and_unload_name_the_model(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """load and unload post the model's id and say what was done."""
    server.answer({"success": True, "model_id": "a/b", "memory_after_load_gb": 3.0, "time_to_load_ms": 1234})
    assert main(["load", "a/b", "--url", f"{server.url}/"]) == ExitCode.DONE
    server.answer({"success": True, "model_id": "a/b", "memory_freed_gb": 1.5})
    assert main(["unload", "a/b", "--url", server.url]) == ExitCode.DONE
    assert capsys.readouterr().out == "a/b loaded in 1.2 s\na/b unloaded, 1.5 GiB freed\n"
    assert [(line, sent) for line, _, sent in server.seen] == [
        ("POST /admin/models/load", {"model_id": "a/b"}),
        ("POST /admin/models/unload", {"model_id": "a/b"}),
    ]


@pytest.mark.parametrize(
    ("command", "line", "sent", "said"),
    [
        (
            "unload m --force",
            "POST /admin/models/unload",
            {"model_id": "m", "force": True},
            "m unloaded, 0.5 GiB freed",
        ),
        ("pin a/b", "POST /admin/models/pin", {"model_id": "a/b"}, "a/b pinned"),
        ("unpin a/b", "POST /admin/models/unpin", {"model_id": "a/b"}, "a/b unpinned"),
        ("rm a/b+é", "DELETE /admin/models/a/b%2B%C3%A9", None, "a/b+é removed, 1.0 GiB freed"),
        (
            "lease m 90.5 --owner bot",
            "POST /admin/leases",
            {"model_id": "m", "seconds": 90.5, "owner": "bot"},
            " as 77ab",
        ),
    ],
)
def test_a_change_is_asked_for_and_told(
    server: FakeServer, capsys: pytest.CaptureFixture[str], command: str, line: str, sent: object, said: str
) -> None:
    """Each verb has its route and body, and says what was done in one line."""
    server.answer({"memory_freed_gb": 0.5, "freed_bytes": 2**30, "lease_id": "77ab", "expires_at": 1_800_000_000.0})
    assert main([*command.split(), "--url", server.url]) == ExitCode.DONE
    assert capsys.readouterr().out.endswith(f"{said}\n")
    assert [(seen_line, body) for seen_line, _, body in server.seen] == [(line, sent)]


def test_a_lease_is_the_users_unless_said(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --owner the lease is in the name of $USER, or of the program where there is none."""
    server.answer({"lease_id": "1", "expires_at": 0.0})
    for user in ("ann", ""):
        monkeypatch.setenv("USER", user)
        assert main(["lease", "m", "1", "--url", server.url]) == ExitCode.DONE
    assert [body["owner"] for _, _, body in server.seen] == ["ann", "opta-lmx"]


def test_plan_draws_memory(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """plan posts the model and its context, and prints a plain bar where there is no terminal."""
    gib = 2**30
    plan = dict.fromkeys(("overhead_bytes", "kv_bytes", "prefix_cache_bytes", "buffer_bytes", "reserved_bytes"), 0)
    plan |= {"total_bytes": 10 * gib, "limit_bytes": 9 * gib, "used_bytes": gib, "weights_bytes": 2 * gib}
    plan |= {"need_bytes": 2 * gib, "free_bytes": 8 * gib}
    server.answer({**plan, "model_id": "m", "verdict": "fits", "would_evict": []})
    assert main(["plan", "m", "--context-length", "512", "--url", server.url]) == ExitCode.DONE
    headline, bar, *_ = capsys.readouterr().out.splitlines()
    assert headline == "m fits"
    assert set(bar) == set("[#W.|]")
    assert server.seen[0][0] == "POST /admin/models/plan"
    assert server.seen[0][2] == {"model_id": "m", "context_length": 512}


def test_verify_fails_with_the_files_that_are_wrong(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """All files are listed, hashes for those that differ; the exit code says whether there are any."""
    files = [
        {"name": "a.json", "verdict": "verified", "expected_sha256": "11", "actual_sha256": "11"},
        {"name": "b.json", "verdict": "different", "expected_sha256": "22", "actual_sha256": "33"},
    ]
    models = [
        {"model_id": "m", "verdict": "mismatch", "files": files},
        {"model_id": "n", "verdict": "unrecorded", "files": []},
    ]
    server.answer({"success": False, "models": models})
    assert main(["verify", "--url", server.url]) == ExitCode.REFUSED
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "model  file    verdict     expected  actual",
        "m      a.json  verified    -         -",
        "m      b.json  different   22        33",
        "n      -       unrecorded  -         -",
    ]
    assert captured.err.startswith("error: not all files are what models.lock says\nhint: ")
    server.answer({"success": True, "models": models[1:]})
    assert main(["verify", "n", "--url", server.url]) == ExitCode.DONE
    assert [body for _, _, body in server.seen] == [{}, {"model_id": "n"}]


@pytest.mark.parametrize(
    "argv",
    [
        ["status"],
        ["ls"],
        ["ps"],
        ["load", "m"],
        ["unload", "m"],
        ["pin", "m"],
        ["unpin", "m"],
        ["rm", "m"],
        ["plan", "m"],
        ["lease", "m", "1"],
        ["verify"],
    ],
)
def test_json_is_the_servers_answer(server: FakeServer, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    """With --json every verb prints the answer as the server gave it."""
    answer = {"success": True, "models": [{"id": "m"}]}
    server.answer(answer)
    assert main([*argv, "--url", server.url, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == answer


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "--admin-key"), (404, "opta-lmx ls"), (409, "opta-lmx ps"), (507, "unload"), (500, "log")],
)
def test_refusal_is_told_in_the_servers_words(
    server: FakeServer, capsys: pytest.CaptureFixture[str], status: int, hint: str
) -> None:
    """A refusal ends with 1, the server's message as the error and a way out as the hint."""
    server.answer({"error": {"message": "No such thing.", "type": "t", "param": None, "code": None}}, status)
    assert main(["load", "m", "--url", server.url]) == ExitCode.REFUSED
    error, hinted = capsys.readouterr().err.splitlines()
    assert error == "error: No such thing."
    assert hint in hinted


def test_silence_and_strangers_are_not_the_server(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3 where nobody listens and where what listens does not speak our JSON; a bad address is usage."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    assert main(["ps", "--port", str(free)]) == ExitCode.UNREACHABLE
    assert f"error: no server answers at http://127.0.0.1:{free}: Connection refused" in capsys.readouterr().err
    for body in (b"<html>", b"[1]"):
        server.body = body
        assert main(["ps", "--url", server.url]) == ExitCode.UNREACHABLE
        assert "is not Opta-LMX" in capsys.readouterr().err
    for url in ("localhost:1234", "ftp://x", "http://", "http://x:99999"):
        assert main(["ps", "--url", url]) == ExitCode.USAGE
        assert "is no address of a server" in capsys.readouterr().err


def test_server_and_key_come_from_flag_variable_and_settings(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag's key beats the variable's; the settings' key goes only to the server of the settings."""
    server.answer({"models": []})
    file = tmp_path / ".opta-lmx" / "config.yaml"
    file.parent.mkdir()
    port = server.url.rpartition(":")[2]
    file.write_text(f"server: {{port: {port}}}\nsecurity: {{admin_key: from-settings}}\n", encoding="utf-8")
    assert main(["ps"]) == ExitCode.DONE
    assert main(["ps", "--url", server.url]) == ExitCode.DONE
    monkeypatch.setenv("OPTA_LMX_URL", server.url)
    monkeypatch.setenv("OPTA_LMX_ADMIN_KEY", "from-variable")
    assert main(["ps"]) == ExitCode.DONE
    assert main(["ps", "--admin-key", "from-flag"]) == ExitCode.DONE
    keys = [headers.get("X-Admin-Key") for _, headers, _ in server.seen]
    assert keys == ["from-settings", None, "from-variable", "from-flag"]


def test_key_that_no_header_can_carry_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    """An admin key with a line end is refused without being printed."""
    assert main(["ps", "--url", "http://127.0.0.1:1", "--admin-key", f"{SECRET}\n"]) == ExitCode.USAGE
    assert SECRET not in capsys.readouterr().err


def test_what_nobody_foresaw_ends_with_one(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """An unexpected exception is one error line, and with --log-level DEBUG its traceback too."""
    server.answer({})
    assert main(["ls", "--url", server.url]) == ExitCode.REFUSED
    quiet = capsys.readouterr().err
    assert quiet == "error: KeyError: 'models'\nhint: --log-level DEBUG shows where it failed\n"
    assert main(["ls", "--url", server.url, "--log-level", "DEBUG"]) == ExitCode.REFUSED
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_ends_with_130(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Control-C while waiting for the server ends the command quietly, as the shell expects."""
    server.interrupt = True
    assert main(["status", "--url", server.url]) == ExitCode.INTERRUPTED
    assert capsys.readouterr() == ("", "")
