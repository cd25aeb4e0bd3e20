"""An operator at a real server: plans, pins, leases, deletions and verification, by HTTP and by the command line."""

import subprocess
import sys

import httpx

from opta_lmx.manager.integrity import ModelsLock
from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import check_error, connect, status, until
from tests.integration.conftest import RunningServer, StartServer

MODELS = {"a": EchoOptions(), "acme/b": EchoOptions()}

# Long enough to be seen, short enough to be waited for: the server ends leases once a second.
_LEASE_SECONDS = 1.5


async def post(client: httpx.AsyncClient, path: str, **body: object) -> JsonObject:
    """The answer of a request that must succeed."""
    response = await client.post(f"/admin/{path}", json=body)
    assert response.status_code == 200, response.text
    answer: JsonObject = response.json()
    return answer


async def test_what_is_kept_stays_and_what_is_deleted_is_gone(server: StartServer) -> None:
    """A plan changes nothing; a pin and then a lease keep the model until they end; only then can it be deleted."""
    running = server(MODELS)
    directory = running.log.parent / "models" / "acme" / "b"
    async with connect(running) as client:
        plan = await post(client, "models/plan", model_id="acme/b")
        assert plan["verdict"] == "fits"
        assert plan["headroom_bytes"] == plan["limit_bytes"] - plan["used_bytes"] - plan["need_bytes"]
        assert (await status(client))["models"] == []
        assert not running.children()

        await post(client, "models/load", model_id="acme/b")
        await post(client, "models/pin", model_id="acme/b")
        check_error(await client.post("/admin/models/unload", json={"model_id": "acme/b"}), 409, "conflict")

        lease = await post(client, "leases", model_id="acme/b", seconds=_LEASE_SECONDS, owner="bot")
        await post(client, "models/unpin", model_id="acme/b")
        error = check_error(await client.post("/admin/models/unload", json={"model_id": "acme/b"}), 409, "conflict")
        assert "leased by bot" in error["message"]
        check_error(await client.delete("/admin/models/acme/b"), 409, "conflict")

        async def unload() -> httpx.Response:
            return await client.post("/admin/models/unload", json={"model_id": "acme/b"})

        await until(unload, lambda response: response.status_code == 200)
        check_error(await client.delete(f"/admin/leases/{lease['lease_id']}"), 404, "lease_not_found")

        size = (directory / "echo.json").stat().st_size
        deleted = (await client.delete("/admin/models/acme/b")).json()
        assert deleted == {"success": True, "model_id": "acme/b", "freed_bytes": size}
        assert not directory.parent.exists()
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["a"]
        check_error(await client.post("/admin/models/load", json={"model_id": "acme/b"}), 404, "model_not_found")


def test_a_flipped_byte_is_found(server: StartServer) -> None:
    """verify passes what is as recorded, and names the file in which one byte differs, with both hashes."""
    running = server(MODELS)
    root = running.log.parent / "models"
    weights = root / "a" / "weights.bin"
    weights.write_bytes(bytes(4_000_000))
    ModelsLock(root).record("a", root / "a", "acme/a", "main")
    right = command(running, "verify", "a")
    assert (right.returncode, right.stderr) == (0, "")
    assert "different" not in right.stdout

    with weights.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"\1")
    wrong = command(running, "verify")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: not all files are what models.lock says")
    [row] = [line.split() for line in wrong.stdout.splitlines() if "weights.bin" in line]
    assert row[:3] == ["a", "weights.bin", "different"]
    assert len({len(row[3]), len(row[4]), 64}) == 1
    assert row[3] != row[4]
    assert "unrecorded" in wrong.stdout


def command(server: RunningServer, *words: str) -> subprocess.CompletedProcess[str]:
    """What ``opta-lmx`` says when it is pointed at the server."""
    line = [sys.executable, "-m", "opta_lmx", *words, "--url", server.url]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
