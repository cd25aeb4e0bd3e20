"""Whatever bytes and whatever JSON come in: they are answered in HTTP, or hung up on, soon, and nobody else notices.

The seed is the same in every run, so that no commit fails for another's fault; LMX_FUZZ_SEED gives another one, or
with -m load each run has its own. A failure names it.
"""

import json
import os
import random
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import anyio
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.hub_server import running_hub
from tests.integration.chatting import CHAT, chat, connect, leases, until_all_returned
from tests.integration.conftest import RunningServer, StartServer
from tests.integration.http_fuzzing import Answer, cut, read_answers, spoil, spoil_json, written

# The names in the document's own examples, and one that none of them unloads or leases.
_MODELS: Final = {"smollm2-135m-instruct": EchoOptions(), "all-minilm-l6-v2": EchoOptions(), "sane": EchoOptions()}

# The long run is on demand: ``scripts/test -m load tests/integration/test_http_fuzz.py``.
_CASES: Final = 500
_SEED: Final = 20261126
_RUNS: Final = pytest.mark.parametrize(
    "count", [_CASES, pytest.param(20_000, marks=[pytest.mark.load, pytest.mark.timeout(3600)])]
)
_AT_ONCE: Final = 24

# Seconds: what a client gets for a head or a body, far above what a busy machine holds a test up; and a connection's
# whole life, of which a request cut short and one more behind it take two such times.
_PATIENCE: Final = 1.0
_BOUND: Final = 15.0

# The 5xx that are documented and no bugs: busy or stopping, stalled, too little room.
_DOCUMENTED: Final = (503, 504, 507)

Body: TypeAlias = tuple[str, JsonObject]


@dataclass(frozen=True, slots=True)
class Case:
    """What is sent on one connection, in pieces; ``requests`` says how many they are, None if nobody can tell."""

    number: int
    pieces: list[bytes]
    requests: int | None


@pytest.fixture
def running(server: StartServer) -> Iterator[RunningServer]:
    """A server that gives nobody much time, so that a test sees the end of every connection; its hub has no models."""
    patience = {"request_head_seconds": _PATIENCE, "request_body_seconds": _PATIENCE, "keep_alive_seconds": 0.3}
    with running_hub() as hub:
        yield server(_MODELS, server=patience, downloads={"endpoint": hub.url})


@_RUNS
async def test_any_bytes(running: RunningServer, count: int) -> None:
    """Requests with faults in their heads, framing and bytes, several on a connection, in whatever pieces."""
    bodies = await _bodies(running)

    def make(rng: random.Random) -> bytes:
        paths = ["/v1/models", "/admin/status", "/admin/metrics", "/admin/config"]
        if rng.random() < 0.3:
            request = written(rng, "GET", rng.choice(paths), None)
        else:
            path, body = rng.choice(bodies)
            request = written(rng, "POST", path, json.dumps(body).encode())
        return spoil(rng, request)

    await _send_all(running, make, count)


@_RUNS
async def test_any_json(running: RunningServer, count: int) -> None:
    """Bodies of every route that takes one, with faults in their values, keys and text; each request is answered."""
    bodies = await _bodies(running)

    def make(rng: random.Random) -> bytes:
        path, body = rng.choice(bodies)
        return written(rng, "POST", path, spoil_json(rng, body)).encode()

    await _send_all(running, make, count, countable=True)


async def _bodies(running: RunningServer) -> list[Body]:
    """A good body or more for each POST route, as the server's own document shows them."""
    async with connect(running) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    posts = {path: operations["post"] for path, operations in paths.items() if "post" in operations}
    found: list[Body] = []
    for path, post in posts.items():
        content = post.get("requestBody", {}).get("content", {})
        examples = content.get("application/json", {}).get("examples", {})
        found += [(path, example["value"]) for example in examples.values()] or [(path, {"a": 1})]
    assert {path for path, _ in found} == posts.keys()
    return found


async def _send_all(
    running: RunningServer, make: Callable[[random.Random], bytes], count: int, *, countable: bool = False
) -> None:
    """Sends so many of what ``make`` makes, a good request after each; then the server must be as it was."""
    seed = int(os.environ.get("LMX_FUZZ_SEED") or (_SEED if count <= _CASES else secrets.randbelow(2**31)))
    sys.stdout.write(f"LMX_FUZZ_SEED={seed}, {count} cases\n")
    faults: list[str] = []
    cases = _cases(seed, make, count, countable=countable)

    async def work() -> None:
        for case in cases:
            fault = await _fault(running, case)
            if fault is not None:
                sent = b"".join(case.pieces)[:3000]
                faults.append(f"LMX_FUZZ_SEED={seed}, case {case.number}: {fault}\nsent {sent!r}")

    async with anyio.create_task_group() as tasks:
        for _ in range(_AT_ONCE):
            tasks.start_soon(work)
    assert not faults, "\n\n".join(faults[:5])
    await _check_nothing_is_left(running, seed)


def _cases(seed: int, make: Callable[[random.Random], bytes], count: int, *, countable: bool) -> Iterator[Case]:
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        requests = rng.choice([1, 1, 1, 2, 5])
        data = b"".join(make(rng) for _ in range(requests))
        places = sorted({rng.randint(0, len(data)) for _ in range(rng.choice([0, 0, 1, 8]))})
        yield Case(number, cut(data, places), requests if countable else None)


async def _fault(running: RunningServer, case: Case) -> str | None:
    """What is wrong with the server's answers to a case, or to a good request after it; None if nothing is."""
    try:
        with anyio.fail_after(_BOUND):
            answers = read_answers(await _talk(running, case.pieces))
            after = read_answers(await _talk(running, [_SANE]))
    except TimeoutError:
        return f"a connection is open after {_BOUND} s"
    except ValueError as error:
        return str(error)
    if [answer.status for answer in after] != [200] or b'"content":"still sane"' not in after[0].body:
        return f"a good request after it was answered {after}"
    return _fault_of(answers, case)


def _fault_of(answers: list[Answer], case: Case) -> str | None:
    if case.requests not in (None, len(answers)):
        return f"{case.requests} requests, answered {answers}"
    if not all(answer.whole for answer in answers[:-1]) and b"HEAD" not in b"".join(case.pieces):
        return f"an answer breaks off, and others follow: {answers}"
    return next((f"answered {answer}" for answer in answers if not _is_in_order(answer)), None)


def _is_in_order(answer: Answer) -> bool:
    """True for what is documented: no 5xx that says there is a bug, and every refusal of the one shape."""
    if answer.status < 400:
        return True
    if answer.status >= 500 and answer.status not in _DOCUMENTED:
        return False
    if not answer.body:
        return True
    error = json.loads(answer.body)["error"]
    return bool(error["message"]) and error.keys() >= {"type", "param", "code"}


_GOOD_BODY: Final = json.dumps(chat("sane", "still sane")).encode()
_GOOD_HEAD: Final = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(_GOOD_BODY)}"
_SANE: Final = f"{_GOOD_HEAD}\r\n\r\n".encode() + _GOOD_BODY


async def _talk(running: RunningServer, pieces: list[bytes]) -> bytes:
    """All that the server says on a connection of its own until it hangs up."""
    received = b""
    async with await anyio.connect_tcp("127.0.0.1", running.port) as connection, anyio.create_task_group() as tasks:

        async def write() -> None:
            try:
                for piece in pieces:
                    await connection.send(piece)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return

        tasks.start_soon(write)
        try:
            while True:
                received += await connection.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            tasks.cancel_scope.cancel()
    return received


async def _check_nothing_is_left(running: RunningServer, seed: int) -> None:
    """Nothing runs, waits or is leased, but by who asked for a lease; no worker died; the log tells of no bug."""
    async with connect(running) as client:
        for lease in (await client.get("/admin/leases")).json()["leases"]:
            assert (await client.delete(f"/admin/leases/{lease['lease_id']}")).status_code < 300
        await until_all_returned(client)
        assert (await leases(client)).keys() <= _MODELS.keys()
    log = running.log.read_text()
    faults = ("Traceback", "request_crashed", "worker_lost", "Exception in ASGI", '"level": "error"')
    for bad in faults:
        assert bad not in log, f"LMX_FUZZ_SEED={seed}: {log[log.index(bad) - 500 : log.index(bad) + 3000]}"
