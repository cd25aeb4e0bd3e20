"""``opta-lmx bench``: what it asks for, what it makes of the answers, and how it ends."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from opta_lmx.cli import main
from opta_lmx.cli.bench import Answer, percentile, summarise
from opta_lmx.cli.failure import ExitCode, Failure
from tests.cli_server import FakeServer, server

__all__ = ["server"]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("OPTA_LMX")]:
        monkeypatch.delenv(name)


def chunk(**delta: str) -> dict[str, Any]:
    """A piece of a streamed answer."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def events(*bodies: dict[str, Any]) -> bytes:
    """A stream, ended as OpenAI's are."""
    return b"".join(b"data: %s\n\n" % json.dumps(body).encode() for body in bodies) + b"data: [DONE]\n\n"


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
WHOLE = events(chunk(role="assistant"), chunk(content="a"), chunk(reasoning_content="b"), chunk(), USAGE)


def test_every_request_is_asked_for_and_counted(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """One to begin with, then each turn's; no prompt is another's or another run's; the key is in the API's header."""
    server.body = WHOLE
    command = ["bench", "m", "--concurrency", "1", "2", "--requests", "3", "--max-tokens", "7", "--prompt-words", "50"]
    assert main([*command, "--json", "--url", server.url, "--api-key", "sk-1"]) == ExitCode.DONE
    turns = json.loads(capsys.readouterr().out)["turns"]
    shown = [(t["concurrency"], t["requests"], t["errors"], t["prompt_tokens"], t["completion_tokens"]) for t in turns]
    assert shown == [(1, 3, 0, 27, 9), (2, 3, 0, 27, 9)]
    assert all(turn["tokens_per_second"] > 0 and turn["itl_p50_seconds"] is not None for turn in turns)
    assert {line for line, _, _ in server.seen} == {"POST /v1/chat/completions"}
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer sk-1"}
    assert {(body["model"], body["max_tokens"], body["stream"]) for _, _, body in server.seen} == {("m", 7, True)}
    prompts = [body["messages"][0]["content"] for _, _, body in server.seen]
    assert len(set(prompts)) == len(prompts) == 7
    assert {len(prompt.split()) for prompt in prompts} == {50}
    assert main([*command, "--json", "--url", server.url]) == ExitCode.DONE
    assert not {body["messages"][0]["content"] for _, _, body in server.seen[7:]} & set(prompts)


def test_a_row_for_each_turn(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Four requests for each that is asked at a time."""
    server.body = WHOLE
    assert main(["bench", "m", "--url", server.url]) == ExitCode.DONE
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "at a time"
    assert [row.split()[:3] for row in rows] == [["1", "4", "0"], ["4", "16", "0"]]


def test_a_server_that_refuses_is_not_measured(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The first refusal is the error, with a hint for the key; nothing is printed."""
    server.answer({"error": {"message": "Incorrect API key provided."}}, 401)
    assert main(["bench", "m", "--url", server.url]) == ExitCode.REFUSED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: Incorrect API key provided.\nhint: give an API key with --api-key or $OPTA_LMX_API_KEY\n"
    )
    assert len(server.seen) == 1


def test_an_answer_that_breaks_off_is_an_error(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """An error event inside a stream counts as one."""
    server.body = events(chunk(content="a"), {"error": {"message": "The worker ended."}})
    assert main(["bench", "m", "--url", server.url]) == ExitCode.REFUSED
    assert capsys.readouterr().err.startswith("error: The worker ended.\n")


def test_the_settings_key_is_for_the_settings_server(server: FakeServer, tmp_path: Path) -> None:
    """The first of ``security.api_keys`` goes where the settings point, and to no URL from elsewhere."""
    file = tmp_path / ".opta-lmx" / "config.yaml"
    file.parent.mkdir()
    port = server.url.rpartition(":")[2]
    file.write_text(f"server: {{port: {port}}}\nsecurity: {{api_keys: [sk-own, sk-other]}}\n")
    server.body = WHOLE
    assert main(["bench", "m", "--concurrency", "1", "--requests", "1"]) == ExitCode.DONE
    assert main(["bench", "m", "--concurrency", "1", "--requests", "1", "--url", server.url]) == ExitCode.DONE
    assert [headers.get("Authorization") for _, headers, _ in server.seen] == ["Bearer sk-own"] * 2 + [None] * 2


def test_failed_answers_are_in_no_figure() -> None:
    """Their tokens and times are left out, and a turn of failures alone has no times."""
    good = Answer(0.0, [0.1, 0.2, 0.5], 5, 3)
    bad = Answer(0.0, [9.0, 99.0], 5, 3, Failure("no", "hint"))
    turn = summarise(2, [good, bad], 2.0)
    assert (turn.requests, turn.errors, turn.completion_tokens, turn.tokens_per_second) == (2, 1, 3, 1.5)
    assert (turn.ttft_p50_seconds, turn.itl_p50_seconds, turn.itl_p95_seconds) == (0.1, 0.1, 0.3)
    assert summarise(1, [bad], 1.0).ttft_p95_seconds is None


def test_percentiles_are_values_that_were_seen() -> None:
    """The nearest rank: of a hundred values the 95th, of one that one."""
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(50, values), percentile(95, values)) == (50.0, 95.0)
    assert percentile(95, [3.0]) == 3.0
    assert percentile(95, []) is None
