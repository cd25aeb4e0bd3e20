"""Hot reload of a real server: all or nothing, said key by key, and unnoticed by whoever is being answered."""

import json
import signal
from typing import Any

import anyio
import httpx
import yaml

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import (
    ask,
    chat,
    check_error,
    connect,
    content,
    depths,
    stream,
    until,
    until_status,
    words,
)
from tests.integration.conftest import RunningServer, StartServer

SLOW = EchoOptions(token_seconds=0.02)
RELOAD = "/admin/config/reload"


def rewrite(server: RunningServer, /, **sections: dict[str, Any]) -> None:
    """Changes keys of the file the server was started with."""
    path = server.log.parent / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    path.write_text(yaml.safe_dump(config))


async def in_force(client: httpx.AsyncClient) -> JsonObject:
    """GET /admin/config."""
    shown: JsonObject = (await client.get("/admin/config")).json()
    return shown


async def test_a_reload_takes_what_it_can_and_says_the_rest(server: StartServer) -> None:
    """Changed names, bounds and times hold from the answer on; what needs a restart is named and stays as it was."""
    running = server({"a": SLOW, "b": EchoOptions()}, models={"aliases": {"old": "a"}})
    async with connect(running) as client:
        assert content(await ask(client, "old", "hello")) == "hello"
        rewrite(
            running,
            server={"port": 1, "max_body_bytes": 1024},
            models={"aliases": {"new": "a"}, "ttl_seconds": 77, "per_model": {"b": {"context_length": 100}}},
            scheduling={"prefill_chunk_tokens": 64},
        )
        answer = await client.post(RELOAD)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "success": True,
            "updated": ["server", "models", "scheduling"],
            "applied": ["server.max_body_bytes", "models.ttl_seconds", "models.aliases"],
            "at_next_load": ["models.per_model.b.context_length", "scheduling.prefill_chunk_tokens"],
            "restart_required": ["server.port"],
        }
        assert content(await ask(client, "new", "hello")) == "hello"
        check_error(await ask(client, "old", "hello"), 404, "model_not_found")
        check_error(await ask(client, "a", "x" * 2000), 413, None)
        [loaded] = (await client.get("/admin/models")).json()["models"]
        assert (loaded["id"], loaded["ttl"]) == ("a", 77)
        shown = await in_force(client)
        assert (shown["server"]["port"], shown["models"]["aliases"]) == (running.port, {"new": "a"})
        again = (await client.post(RELOAD)).json()
        assert (again["updated"], again["restart_required"]) == ([], ["server.port"])


async def test_running_requests_never_notice(server: StartServer) -> None:
    """A stream and those who wait behind it are answered in full through reloads that take away their alias."""
    running = server({"a": SLOW}, models={"aliases": {"mine": "a"}}, scheduling={"max_running": 1})
    text = words(40)
    answers: list[str] = []
    async with connect(running) as client:

        async def streamed(begun: anyio.Event) -> None:
            read = await stream(client, chat("mine", text), begun)
            assert read.done
            answers.append(read.text)

        async def waiting() -> None:
            answers.append(content(await ask(client, "mine", text)))

        async with anyio.create_task_group() as tasks:
            begun = anyio.Event()
            tasks.start_soon(streamed, begun)
            await begun.wait()
            tasks.start_soon(waiting)
            await until_status(client, lambda shown: depths(shown) == (1, 1))
            for number in range(5):
                rewrite(
                    running,
                    models={"aliases": {}, "ttl_seconds": 100 + number, "jit": False},
                    scheduling={"max_waiting": 0},
                    memory={"max_memory_percent": 60 + number},
                )
                assert (await client.post(RELOAD)).status_code == 200
            check_error(await ask(client, "a", "a newcomer"), 429, "rate_limit_exceeded")
    assert answers == [text, text]


async def test_a_bad_setting_changes_nothing(server: StartServer) -> None:
    """400 with the file, the line and the key; the good settings of the same file are not taken either."""
    running = server({"a": EchoOptions()})
    path = running.log.parent / "config.yaml"
    good = path.read_text()
    async with connect(running) as client:
        before = await in_force(client)
        bad = {
            "models: {aliases: {x: a}}\nserver:\n  prot: 1\n": (3, "server.prot"),
            "models: {aliases: {x: a}}\nmemory:\n  max_memory_percent: 101\n": (3, "memory.max_memory_percent"),
            "models:\n  ttl_seconds: 5\n  aliases:\n    gpt-3.5: gpt-4\n    gpt-4: gpt-3.5\n": (
                4,
                "models.aliases.gpt-3.5",
            ),
            "security: {api_keys: ['env:NO_SUCH_VARIABLE']}\n": (1, "security.api_keys.0"),
            "models: [\n": (2, None),
        }
        for text, (line, key) in bad.items():
            path.write_text(text)
            response = await client.post(RELOAD)
            error = check_error(response, 400, "invalid_config")
            assert error["message"].startswith(f"{path}:{line}: {key or ''}"), error
            assert error["param"] == key
            assert await in_force(client) == before
        path.unlink()
        check_error(await client.post(RELOAD), 400, "invalid_config")
        assert await in_force(client) == before
        # A log that cannot be opened is found out before anything else has changed.
        path.write_text(good + "\nlogging: {file: /proc/nowhere/log}\nmemory: {max_memory_percent: 50}\n")
        error = check_error(await client.post(RELOAD), 400, "invalid_config")
        assert error["param"] == "logging.file"
        assert await in_force(client) == before
        path.write_text(good)
        assert (await client.post(RELOAD)).json()["updated"] == []


async def test_keys_can_be_changed_while_the_server_runs(server: StartServer) -> None:
    """From the answer on the new keys open and the old do not; a key in a file is read again."""
    running = server({"a": EchoOptions()})
    secret = running.log.parent / "key"
    secret.write_text("sk-first\n")
    async with connect(running) as client:
        rewrite(running, security={"api_keys": [f"file:{secret}"], "admin_key": "boss"})
        assert (await client.post(RELOAD)).json()["applied"] == ["security.api_keys", "security.admin_key"]
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.post(RELOAD)).status_code == 401
        client.headers["x-admin-key"] = "boss"
        secret.write_text("sk-second\n")
        assert (await client.post(RELOAD)).json()["applied"] == ["security.api_keys"]
        statuses = {
            key: (await client.get("/v1/models", headers={"x-api-key": key})).status_code
            for key in ("sk-first", "sk-second")
        }
        assert statuses == {"sk-first": 401, "sk-second": 200}
    assert "sk-second" not in running.log.read_text()


async def test_a_reload_opens_no_door(server: StartServer) -> None:
    """A file that is safe only at another address is refused while the server listens at the one it has."""
    keys = {"api_keys": ["sk"], "admin_key": "boss"}
    running = server({}, server={"host": "0.0.0.0"}, security={"allow_open_lan": True})
    async with connect(running) as client:
        rewrite(running, security=keys | {"allow_open_lan": False})
        assert (await client.post(RELOAD)).status_code == 200
        client.headers["x-admin-key"] = "boss"
        rewrite(running, server={"host": "127.0.0.1"}, security={"api_keys": [], "admin_key": None})
        check_error(await client.post(RELOAD), 400, "invalid_config")
        assert (await client.get("/v1/models")).status_code == 401


async def test_sighup_is_a_reload_told_in_the_log(server: StartServer) -> None:
    """What was taken, or why nothing was, is a line; the server goes on either way."""
    running = server({"a": EchoOptions()})

    async def told() -> dict[str, JsonObject]:
        lines = map(json.loads, running.log.read_text().splitlines())
        return {line["event"]: line for line in lines if line["event"].startswith("config_reload")}

    async with connect(running) as client:
        rewrite(running, server={"prot": 5})
        running.process.send_signal(signal.SIGHUP)
        [refused] = (await until(told, bool)).values()
        assert "server.prot: unknown key" in refused["reason"]
        config = yaml.safe_load((running.log.parent / "config.yaml").read_text())
        del config["server"]["prot"]
        (running.log.parent / "config.yaml").write_text(yaml.safe_dump(config | {"logging": {"level": "DEBUG"}}))
        running.process.send_signal(signal.SIGHUP)
        taken = (await until(told, lambda lines: "config_reloaded" in lines))["config_reloaded"]
        assert (taken["applied"], taken["restart_required"]) == (["logging.level"], [])
        assert content(await ask(client, "a", "hello")) == "hello"
