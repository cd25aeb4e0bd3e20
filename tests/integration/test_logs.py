"""The log of a real server: one canonical line a request, and nobody's words or keys at any level."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import CHAT, chat, connect, stream, until, until_all_returned, words
from tests.integration.conftest import Models, RunningServer, StartServer

# An echo model answers with its prompt, so PROMPT is a word of prompts and of answers.
PROMPT, SYSTEM, ARGUMENT, HEADER = "canaryprompt", "canarysystem", "canaryargument", "canaryheader"
TOOL, USER = "canarytool", "canaryuser"
API_KEY, ADMIN_KEY, WRONG_KEY, HUB_TOKEN = "sk-canary-api", "canary-admin", "sk-canary-wrong", "hf_canarytoken"
CANARIES = (PROMPT, SYSTEM, ARGUMENT, HEADER, TOOL, USER, API_KEY, ADMIN_KEY, WRONG_KEY, HUB_TOKEN)

ADMIN = {"x-admin-key": ADMIN_KEY}


def lines(server: RunningServer) -> list[JsonObject]:
    """Every line of the log; each must be an object, whoever wrote it."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def canonical(server: RunningServer) -> dict[str, JsonObject]:
    """The canonical lines by request id; each id must have one."""
    found = [line for line in lines(server) if line["event"] == "request_finished"]
    by_id = {line["request_id"]: line for line in found}
    assert len(by_id) == len(found), found
    return by_id


async def listening(client: httpx.AsyncClient) -> bool:
    """True once the server answers."""
    try:
        return (await client.get("/admin/health")).status_code == 200
    except httpx.TransportError:
        return False


class Caller:
    """Sends requests under ids of their own."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def ask(self, request_id: str, model: str, text: str, **fields: Any) -> int:
        """The status of a chat."""
        body = chat(model, text, **fields)
        body["messages"].insert(0, {"role": "system", "content": SYSTEM})
        response = await self._client.post(CHAT, json=body, headers={"x-request-id": request_id})
        return response.status_code


@pytest.fixture
def guarded(server: StartServer) -> Iterator[RunningServer]:
    """A server with both keys; the settings and models are those of one without, which has ended before."""
    models: Models = {
        "good": EchoOptions(),
        "slow": EchoOptions(token_seconds=0.02),
        "dies": EchoOptions(exit_at=3),
        "bad": EchoOptions(fail_load="it is broken"),
    }
    open_one = server(models, logging={"level": "DEBUG"})
    open_one.stop()
    home = open_one.log.parent
    keys = {"OPTA_LMX__SECURITY__API_KEYS": json.dumps([API_KEY]), "OPTA_LMX__SECURITY__ADMIN_KEY": ADMIN_KEY}
    # The server is its own hub: the token reaches it as the key of a download, and is a wrong one.
    hub = {"OPTA_LMX__DOWNLOADS__ENDPOINT": open_one.url, "HF_TOKEN": HUB_TOKEN}
    log = home / "guarded.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "opta_lmx", "--config", str(home / "config.yaml")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(home), **keys, **hub},
            cwd=home,
        )
    running = RunningServer(open_one.url, open_one.port, process, log)
    yield running
    running.stop()


async def test_the_log_tells_every_request_and_no_words(guarded: RunningServer) -> None:
    """At DEBUG, through answers, streams, refusals, deaths, departures and broken bodies: ids and numbers alone."""
    running = guarded
    text = f"{PROMPT} {words(12)}"
    limits = httpx.Timeout(30)
    key = {"authorization": f"Bearer {API_KEY}", "x-other": HEADER}
    async with httpx.AsyncClient(base_url=running.url, trust_env=False, headers=key, timeout=limits) as client:
        await until(lambda: listening(client), bool)
        caller = Caller(client)
        assert await caller.ask("whole", "good", text) == 200
        assert await caller.ask("short", "good", text, max_tokens=2) == 200
        assert await caller.ask("unknown", PROMPT, text) == 404
        assert await caller.ask("long", "good", words(5000)) == 400
        assert await caller.ask("failing", "bad", text) == 422
        assert await caller.ask("dying", "dies", text) in (500, 503)
        assert await caller.ask("malformed", "good", text, temperature=ARGUMENT) == 400
        await client.post(CHAT, content=f'{{"broken": {PROMPT}'.encode(), headers={"x-request-id": "broken"})
        await client.post(CHAT, json=chat("good", text), headers={"authorization": f"Bearer {WRONG_KEY}"})
        await client.get(f"/v1/models/{PROMPT}?key={API_KEY}")
        assert (await stream(client, chat("good", text))).done
        begun = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream, client, chat("slow", f"{PROMPT} {words(500)}"), begun)
            await begun.wait()
            tasks.cancel_scope.cancel()
        await client.post(CHAT, json={**chat("good", text, user=USER, metadata={"k": USER}), **tools()})
        async with httpx.AsyncClient(base_url=running.url, trust_env=False, headers=ADMIN, timeout=limits) as admin:
            await until_all_returned(admin)
            await provoke(admin)
            shown = [(await admin.get(path)).text for path in SHOWN]

    async def logged() -> dict[str, JsonObject]:
        return canonical(running)

    # The server's own write is behind its answer by a moment.
    told = await until(logged, lambda found: len(found) >= 9)
    assert len(told) == 9
    ends = {id: (told[id]["model"], told[id]["outcome"], told[id]["error"]) for id in told if id in SENT}
    assert ends == SENT
    others = sorted(line["outcome"] for id, line in told.items() if id not in SENT)
    assert others == ["cancelled", "stop", "stop"]
    whole = told["whole"]
    assert whole["completion_tokens"] >= 13
    assert 0 <= whole["queue_s"] <= whole["ttft_s"] <= whole["duration_s"]
    assert told["short"]["completion_tokens"] == 2
    written = running.log.read_text() + "".join(shown)
    assert [canary for canary in CANARIES if canary in written] == []
    assert '"level":"DEBUG"' in written


SHOWN = (
    "/admin/requests",
    "/admin/status",
    "/admin/models",
    "/admin/metrics",
    "/admin/metrics/json",
    "/admin/config",
    "/admin/health",
)


def tools() -> JsonObject:
    """A call that was made, its result, and a tool to call."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": json.dumps({"at": TOOL})}}
    return {
        "messages": [
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": TOOL},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "description": TOOL, "parameters": {}}}],
    }


async def provoke(admin: httpx.AsyncClient) -> None:
    """What fails in other ways: a wrong admin key, bodies that are none, a hub that is not there, a foreign page."""
    wrong = {"x-admin-key": WRONG_KEY}
    assert (await admin.get("/admin/status", headers=wrong)).status_code == 401
    assert (await admin.post("/admin/models/load", content=f'{{"model_id": {PROMPT}')).status_code == 400
    assert (await admin.post("/admin/models/load", json={"model_id": PROMPT})).status_code == 404
    assert (await admin.post("/admin/models/download", json={"repo_id": "a/b"})).status_code >= 400
    assert (await admin.post(f"/{PROMPT}", headers={"origin": f"https://{HEADER}.example"})).status_code == 403
    assert (await admin.get("/admin/status", headers={"host": f"{HEADER}.example"})).status_code == 403
    assert (await admin.get(f"/{PROMPT}?{ARGUMENT}")).status_code == 404
    assert (await admin.post("/admin/config/reload")).status_code == 200


SENT = {
    "whole": ("good", "stop", None),
    "short": ("good", "length", None),
    "unknown": (None, "refused", "ModelNotFound"),
    "long": ("good", "refused", "ContextTooLong"),
    "failing": ("bad", "error", "LoadFailed"),
    "dying": ("dies", "error", "WorkerLost"),
}


async def test_every_change_of_a_model_has_its_line(server: StartServer) -> None:
    """In the order in which it happens, under one name for the model, with the numbers that led to it."""
    running = server({"a": EchoOptions(), "dies": EchoOptions(exit_at=3), "bad": EchoOptions(fail_load="it is broken")})
    async with connect(running) as client:
        await client.post("/admin/models/load", json={"model_id": "a"})
        await client.post("/admin/models/unload", json={"model_id": "a"})
        await client.post("/admin/models/load", json={"model_id": "bad"})
        await client.post(CHAT, json=chat("dies", words(9)))
        await until_all_returned(client)

    def changes(model: str) -> list[JsonObject]:
        return [line for line in lines(running) if line.get("model") == model and line["event"] in CHANGES]

    assert [line["event"] for line in changes("a")] == [
        "load_started",
        "model_loaded",
        "stop_started",
        "model_unloaded",
    ]
    assert [line["event"] for line in changes("bad")] == ["load_started", "load_failed"]
    dead = [line["event"] for line in changes("dies")]
    assert dead == ["load_started", "model_loaded", "worker_lost", "model_unloaded"]
    for line in changes("a") + changes("bad") + changes("dies"):
        assert CHANGES[line["event"]] <= line.keys(), line
    started, loaded, stopped, _ = changes("a")
    assert loaded["need_bytes"] == started["need_bytes"] > 0
    assert stopped["cause"] == "unloaded"


# What each line has beside the model and its time: the numbers of the decision, or of what came of it.
CHANGES = {
    "load_started": {"need_bytes", "used_bytes", "reserved_bytes", "limit_bytes", "verdict", "arithmetic"},
    "model_loaded": {"pid", "seconds", "need_bytes", "used_bytes"},
    "load_failed": {"seconds", "reason"},
    "stop_started": {"cause", "idle_seconds"},
    "worker_lost": {"pid", "leases", "reason"},
    "model_unloaded": {"freed_bytes", "used_bytes"},
}


async def test_metrics_are_the_sum_of_the_lines(server: StartServer) -> None:
    """After a mixed run of real processes, every count of /admin/metrics is what the canonical lines add up to."""
    running = server({"a": EchoOptions(), "b": EchoOptions(), "bad": EchoOptions(fail_load="it is broken")})
    async with connect(running) as client:
        for model in ("a", "b", "bad", "nobody"):
            for count in (3, 40):
                await client.post(CHAT, json=chat(model, words(count), n=2))
                await stream(client, chat(model, words(count)))
        await until_all_returned(client)
        shown = (await client.get("/admin/metrics/json")).json()
    told = canonical(running).values()
    assert len(told) == 16
    outcomes = Counter((line["model"] or "", line["outcome"]) for line in told)
    samples = shown["lmx_requests_total"]["samples"]
    assert {(s["labels"]["model"], s["labels"]["outcome"]): s["value"] for s in samples if s["value"]} == outcomes
    for metric, field in (
        ("lmx_prompt_tokens_total", "prompt_tokens"),
        ("lmx_prompt_tokens_cached_total", "cached_tokens"),
        ("lmx_generation_tokens_total", "completion_tokens"),
    ):
        counted = {s["labels"]["model"]: s["value"] for s in shown[metric]["samples"]}
        assert counted == {model: sum(line[field] for line in told if line["model"] == model) for model in counted}
    first_tokens = {s["labels"]["model"]: s["count"] for s in shown["lmx_time_to_first_token_seconds"]["samples"]}
    assert first_tokens == {"a": 4, "b": 4}
    loads = {s["labels"]["model"]: s["count"] for s in shown["lmx_model_load_seconds"]["samples"]}
    assert loads == {"a": 1, "b": 1}
