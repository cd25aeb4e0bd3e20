"""Over a real socket: the bytes of a stream, and clients who leave."""

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import structlog

from opta_lmx.config import LoggingConfig
from opta_lmx.monitoring.logging import configure_logging
from opta_lmx.types import Delta, FinishReason
from tests.contract.conftest import CHAT, Running
from tests.fakes import Script, text_deltas

HEAD = (
    b'{"id":"chatcmpl-0123abcd","object":"chat.completion.chunk","created":1700000000,"model":"tiny",'
    b'"system_fingerprint":"opta-lmx-0.1.0","choices":['
)

GOLDEN = (
    b"data: "
    + HEAD
    + b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    b"data: " + HEAD + b'{"index":0,"delta":{"content":"Caf\xc3\xa9 \\""},"logprobs":null,"finish_reason":null}]}\n\n'
    b"data: " + HEAD + b'{"index":0,"delta":{"content":"!"},"logprobs":null,"finish_reason":null}]}\n\n'
    b"data: " + HEAD + b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'
    b"data: [DONE]\n\n"
)

GOLDEN_WITH_USAGE = (
    GOLDEN.replace(b"]}\n\n", b'],"usage":null}\n\n').removesuffix(b"data: [DONE]\n\n")
    + b"data: "
    + HEAD
    + b'],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,'
    b'"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
    b'"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,'
    b'"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, GOLDEN), ({"stream_options": {"include_usage": True}}, GOLDEN_WITH_USAGE)],
    ids=["plain", "usage"],
)
def test_the_bytes_of_a_stream(running: Running, options: dict[str, object], expected: bytes) -> None:
    """Role, content, finish, usage if asked for, [DONE]; not a byte more."""
    running.world.engine.script = Script(text_deltas('Café "', "!", finish=FinishReason.LENGTH))
    response = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"stream": True} | options)
    assert response.content == expected
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


def send(running: Running, **fields: object) -> socket.socket:
    """A request on a bare socket, which the caller closes."""
    body = json.dumps(CHAT | fields).encode()
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=5)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_who_leaves_a_stream_frees_its_slot(running: Running) -> None:
    """Also while the model is silent: nothing needs to be written to notice it."""
    running.world.engine.script = Script([[Delta(0, "a", 1)]], hangs=True)
    with send(running, stream=True) as connection:
        received = b""
        while b'"content":"a"' not in received:
            received += connection.recv(65536)
        generation = running.world.generation
        assert not generation.closed.is_set()
    assert generation.closed.wait(5)


def test_a_client_who_leaves_before_a_whole_answer_frees_its_slot(running: Running) -> None:
    """Nobody polls: the answer is raced against the departure."""
    engine = running.world.engine
    engine.script = Script(hangs=True)
    with send(running):
        assert engine.opened.wait(5)
        assert not running.world.generation.closed.is_set()
    assert running.world.generation.closed.wait(5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_who_leaves_while_waiting_is_forgotten(running: Running, stream: bool) -> None:
    """A request that waits for room or for its model to load is taken back."""
    engine = running.world.engine
    engine.script = Script(opens=False)
    with send(running, stream=stream):
        assert engine.opening.wait(5)
        assert not engine.open_cancelled.is_set()
    assert engine.open_cancelled.wait(5)
    assert engine.generations == []


def test_a_client_who_leaves_amid_its_body_is_no_fault(running: Running) -> None:
    """Half a request is dropped; the server serves on."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{")
    assert httpx.post(f"{running.url}/v1/chat/completions", json=CHAT).status_code == 200
    assert len(running.world.engine.requests) == 1


def test_a_bug_amid_a_stream_cuts_the_connection(running: Running) -> None:
    """No client can take half an answer for a whole one, and the slot is free."""
    running.world.engine.script = Script([[Delta(0, "a", 1)]], failure=RuntimeError("secret of the house"))
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"stream": True})
    assert running.world.generation.closed.is_set()


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Everything this process logs, at DEBUG, to a file; afterwards all is as before."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    configure_logging(LoggingConfig(level="DEBUG", file=str(path)))
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()


def test_the_log_of_a_bug_quotes_nobody(running: Running, tmp_path: Path) -> None:
    """Where it happened and of what kind it was is told; what it stumbled over may be a prompt, and is not."""
    log = tmp_path / "log"
    with logging_to(log):
        for stream in (False, True):
            running.world.engine.script = Script(refusal=RuntimeError("canaryprompt"))
            body = CHAT | {"stream": stream}
            assert httpx.post(f"{running.url}/v1/chat/completions", json=body).status_code == 500
        running.world.engine.script = Script([[Delta(0, "a", 1)]], failure=KeyError("canaryprompt"))
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"stream": True})
        assert running.world.generation.closed.wait(5)
    written = log.read_text()
    assert "canaryprompt" not in written
    assert (written.count('"request_crashed"'), "RuntimeError" in written, "fakes.py" in written) == (3, True, True)


@pytest.mark.parametrize("path", ["/%ff%fe", "/v1/models/%ed%a0%80", "/v1/models/..%2f..%2fetc%2fpasswd", "/%00"])
def test_a_path_of_garbage_is_unknown(running: Running, path: str) -> None:
    """Whatever its bytes are."""
    response = httpx.get(f"{running.url}{path}")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")


def test_an_oversized_body_is_refused_and_the_connection_survives(running: Running) -> None:
    """20 MB are answered with 413 in the error's shape, and the next request on the connection works."""
    with httpx.Client(base_url=running.url) as client:
        response = client.post("/v1/chat/completions", content=b" " * 20_000_000)
        assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
