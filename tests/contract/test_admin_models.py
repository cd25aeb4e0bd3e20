"""The admin routes that change what is in memory and on disk, over a real residency and a real models directory."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from opta_lmx.api.routes import build_app
from opta_lmx.config import Config
from opta_lmx.config_models import ModelsConfig
from opta_lmx.inference.engine import InferenceEngine
from opta_lmx.manager.importing import IMPORT_VERSION
from opta_lmx.manager.integrity import ModelsLock
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.starter import starter_files
from opta_lmx.types import JsonObject
from tests.contract.conftest import connect
from tests.fake_workers import GIB, WALL_OFFSET_SECONDS, House
from tests.fakes import make_world
from tests.gguf_files import byte_level_vocabulary, random_weights, write_llama

WALL = 1_700_000_000.9


@dataclass
class Desk:
    """An operator's client, and the machine behind the server it speaks to."""

    client: httpx.AsyncClient
    house: House
    root: Path

    async def post(self, path: str, status: int = 200, **body: Any) -> JsonObject:
        """The answer, or the error, of a request that must have this status."""
        response = await self.client.post(f"/admin/{path}", json=body)
        assert response.status_code == status, response.text
        answer: JsonObject = response.json()
        return answer["error"] if status >= 400 else answer

    async def delete(self, path: str, status: int = 200) -> JsonObject:
        """Likewise."""
        response = await self.client.delete(f"/admin/{path}")
        assert response.status_code == status, response.text
        answer: JsonObject = response.json()
        return answer["error"] if status >= 400 else answer

    async def shown(self, kind: str = "") -> dict[str, JsonObject]:
        """Models in memory by id, or those ``/available``."""
        models = (await self.client.get(f"/admin/models{kind}")).json()["models"]
        return {model["id"]: model for model in models}


@asynccontextmanager
async def desk(tmp_path: Path, *, starter: bool = False) -> AsyncIterator[Desk]:
    """A machine of 100 GiB, of which 90 may be used; ``a`` needs 40 GiB and a bit, ``acme/b`` 60."""
    root = tmp_path / "models"
    for model_id, size in (("a", 40 * GIB), ("acme/b", 60 * GIB)):
        (root / model_id).mkdir(parents=True)
        (root / model_id / "echo.json").write_bytes(b"{}")
        # Holes take no room on the disk.
        with (root / model_id / "weights.bin").open("wb") as file:
            file.truncate(size)
    config = Config.model_validate(
        {"models": {"models_directory": str(root), "starter": starter, "aliases": {"fast": "a", "big-*": "acme/b"}}}
    )
    async with House(config.models) as house:
        models = ModelManager(config.models)
        engine = InferenceEngine(config, models, house.residency, house.clock)
        services = replace(make_world().services, config=config, engine=engine, models=models)
        services = replace(services, residency=house.residency, memory=house.memory)
        transport = httpx.ASGITransport(build_app(services, wall=lambda: WALL), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield Desk(client, house, root)


def put_model(directory: Path) -> None:
    """A model of 64 bytes of weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_bytes(b'{"model_type": "llama"}')
    (directory / "model.safetensors").write_bytes(save({"a": np.zeros(16, np.float32)}))


async def test_a_plan_is_the_arithmetic_of_the_refusal(tmp_path: Path) -> None:
    """A load that is refused carries what the plan had said, number for number; the plan rounds it for people too."""
    async with desk(tmp_path) as lmx:
        lmx.house.machine.others_bytes = 80 * GIB
        plan = await lmx.post("models/plan", model_id="fast")
        refusal = await lmx.post("models/load", 507, model_id="fast")
        assert refusal["plan"] == {name: value for name, value in plan.items() if not name.endswith("_gb")}
        assert (plan["model_id"], plan["verdict"], plan["would_evict"]) == ("a", "does_not_fit", [])
        assert (plan["limit_bytes"], plan["used_bytes"]) == (90 * GIB, 80 * GIB)
        assert plan["need_bytes"] == plan["weights_bytes"] + plan["overhead_bytes"]
        assert plan["headroom_bytes"] == 10 * GIB - plan["need_bytes"]
        assert (plan["need_gb"], plan["free_gb"], plan["limit_gb"], plan["headroom_gb"]) == (40.1, 10.0, 90.0, -30.1)


async def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    """Neither the models it would evict nor the one it is about are touched."""
    async with desk(tmp_path) as lmx:
        await lmx.post("models/load", model_id="a")
        lmx.house.machine.others_bytes = 40 * GIB
        before = await lmx.shown()
        plan = await lmx.post("models/plan", model_id="acme/b", context_length=2048)
        assert (plan["verdict"], plan["would_evict"]) == ("fits_after_eviction", ["a"])
        assert (await lmx.post("models/plan", model_id="a"))["verdict"] == "resident"
        await lmx.house.settle()
        assert await lmx.shown() == before
        assert lmx.house.machine.loads == ["a"]


async def test_a_model_that_cannot_be_loaded_has_no_plan(tmp_path: Path) -> None:
    """It is refused as its load would be."""
    async with desk(tmp_path) as lmx:
        (lmx.root / "broken").mkdir()
        (lmx.root / "broken" / "config.json").write_bytes(b"{}")
        assert (await lmx.post("models/plan", 422, model_id="broken"))["code"] == "model_load_failed"


async def test_a_pin_holds_until_it_is_ended_or_overruled(tmp_path: Path) -> None:
    """A pinned model is neither evicted nor unloaded; unpin or force lets it go."""
    async with desk(tmp_path) as lmx:
        await lmx.post("models/load", model_id="a")
        assert await lmx.post("models/pin", model_id="fast") == {"success": True, "model_id": "a", "pinned": True}
        assert (await lmx.shown())["a"]["pinned"]
        assert "pinned" in (await lmx.post("models/unload", 409, model_id="a"))["message"]
        lmx.house.machine.others_bytes = 40 * GIB
        await lmx.post("models/load", 507, model_id="acme/b")
        assert await lmx.post("models/unpin", model_id="fast") == {"success": True, "model_id": "a", "pinned": False}
        await lmx.post("models/pin", model_id="a")
        assert (await lmx.post("models/unload", model_id="a", force=True))["success"]
        assert await lmx.shown() == {}


async def test_only_what_is_in_memory_can_be_kept_there(tmp_path: Path) -> None:
    """A pin or lease of a model that is not loaded is a conflict; the end of a pin that never was is done."""
    async with desk(tmp_path) as lmx:
        assert (await lmx.post("models/pin", 409, model_id="a"))["code"] == "conflict"
        assert (await lmx.post("leases", 409, model_id="a", seconds=1, owner="bot"))["code"] == "conflict"
        assert not (await lmx.post("models/unpin", model_id="a"))["pinned"]


async def test_a_lease_ends_with_its_time(tmp_path: Path) -> None:
    """Until then the model stays, and refusals name the owner."""
    async with desk(tmp_path) as lmx:
        await lmx.post("models/load", model_id="a")
        lease = await lmx.post("leases", model_id="fast", seconds=60, owner="nightly-report")
        assert (lease["model_id"], lease["expires_at"]) == ("a", WALL + 60)
        await lmx.house.advance(59)
        assert "nightly-report" in (await lmx.post("models/unload", 409, model_id="a"))["message"]
        await lmx.house.advance(1)
        await lmx.delete(f"leases/{lease['lease_id']}", 404)
        await lmx.post("models/unload", model_id="a")


async def test_a_lease_can_be_ended_once(tmp_path: Path) -> None:
    """Each lease protects by itself; one that has ended, or never was, is not found."""
    async with desk(tmp_path) as lmx:
        await lmx.post("models/load", model_id="a")
        first, second = [await lmx.post("leases", model_id="a", seconds=9, owner=name) for name in ("x", "y")]
        assert await lmx.delete(f"leases/{first['lease_id']}") == {"success": True, "lease_id": first["lease_id"]}
        error = await lmx.delete(f"leases/{first['lease_id']}", 404)
        assert (error["code"], error["param"]) == ("lease_not_found", "lease_id")
        assert "leased by y" in (await lmx.post("models/unload", 409, model_id="a"))["message"]
        await lmx.delete(f"leases/{second['lease_id']}")
        await lmx.post("models/unload", model_id="a")


async def test_leases_that_last_are_listed(tmp_path: Path) -> None:
    """With their owner and their end; also those of a model whose worker has died, which they keep from deletion."""
    async with desk(tmp_path) as lmx:
        await lmx.post("models/load", model_id="a")
        lease = await lmx.post("leases", model_id="a", seconds=60, owner="bot")
        end = lmx.house.clock() + WALL_OFFSET_SECONDS + 60
        row = {"lease_id": lease["lease_id"], "model_id": "a", "owner": "bot", "expires_at": end}
        assert (await lmx.client.get("/admin/leases")).json() == {"leases": [row]}
        lmx.house.machine.worker("a").end(-9)
        assert (await lmx.client.get("/admin/leases")).json() == {"leases": [row]}
        assert "leased by bot" in (await lmx.delete("models/a", 409))["message"]
        await lmx.house.advance(60)
        assert (await lmx.client.get("/admin/leases")).json() == {"leases": []}
        await lmx.delete("models/a")


async def test_a_model_is_deleted_only_while_nobody_needs_it(tmp_path: Path) -> None:
    """Refused while it loads and while it is loaded; then its bytes are counted and it is no longer listed."""
    async with desk(tmp_path) as lmx:
        lmx.house.machine.load_gate.clear()
        load = lmx.house.start(lmx.post("models/load", model_id="acme/b"))
        await lmx.house.settle()
        assert "loading" in (await lmx.delete("models/acme/b", 409))["message"]
        lmx.house.machine.load_gate.set()
        await load
        assert "ready" in (await lmx.delete("models/acme/b", 409))["message"]
        assert (lmx.root / "acme" / "b" / "echo.json").exists()
        await lmx.post("models/unload", model_id="acme/b")
        deleted = await lmx.delete("models/acme%2Fb")
        assert deleted == {"success": True, "model_id": "acme/b", "freed_bytes": 60 * GIB + 2}
        assert not (lmx.root / "acme").exists()
        assert list(await lmx.shown("/available")) == ["a"]
        assert (await lmx.delete("models/acme/b", 404))["param"] == "model_id"


@pytest.mark.parametrize("name", ["fast", "big-one"])
async def test_no_alias_deletes(tmp_path: Path, name: str) -> None:
    """A glob that catches a misspelt id must not cost a model."""
    async with desk(tmp_path) as lmx:
        error = await lmx.delete(f"models/{name}", 400)
        assert "by its own id" in error["message"]
        assert list(await lmx.shown("/available")) == ["a", "acme/b"]


async def test_a_starter_loses_its_import_and_stays_listed(tmp_path: Path) -> None:
    """What was imported can be had back from the wheel; what is in the wheel is not the server's to remove."""
    starter = starter_files(ModelsConfig(models_directory=str(tmp_path / "models")))
    assert starter is not None
    put_model(starter.target)
    lock = ModelsLock(tmp_path / "models")
    lock.record(starter.id, starter.target, starter.gguf.name, f"{starter.revision} import-{IMPORT_VERSION}")
    async with desk(tmp_path, starter=True) as lmx:
        assert (await lmx.shown("/available"))[starter.id]["format"] == "mlx"
        assert (await lmx.delete(f"models/{starter.id}"))["success"]
        assert not starter.target.exists()
        assert (await lmx.shown("/available"))[starter.id]["format"] == "gguf"
        assert "part of the installation" in (await lmx.delete(f"models/{starter.id}", 409))["message"]
        assert starter.gguf.exists()


async def test_an_imported_gguf_is_planned_and_verified_as_it_is_loaded(tmp_path: Path) -> None:
    """Before its import the weights are those it will have, and there is no record to hold the file against."""
    async with desk(tmp_path) as lmx:
        gguf = lmx.root / "acme" / "g" / "model.gguf"
        gguf.parent.mkdir()
        vocabulary = byte_level_vocabulary()
        held = write_llama(gguf, random_weights(len(vocabulary.tokens)), vocabulary)
        weights = sum(weight.nbytes for weight in held.values())
        assert (await lmx.post("models/plan", model_id="acme/g"))["weights_bytes"] == weights
        assert (await lmx.post("models/verify", model_id="acme/g"))["models"][0]["verdict"] == "unrecorded"
        imported = lmx.root / ".imported" / "acme" / "g"
        put_model(imported)
        revision = f"{gguf.stat().st_size}-{gguf.stat().st_mtime_ns} bits-8 import-{IMPORT_VERSION}"
        ModelsLock(lmx.root).record(".imported/acme/g", imported, gguf.name, revision)
        assert (await lmx.post("models/plan", model_id="acme/g"))["weights_bytes"] == 64
        verified = await lmx.post("models/verify", model_id="acme/g")
        assert [file["name"] for file in verified["models"][0]["files"]] == ["config.json", "model.safetensors"]


async def test_verification_tells_of_every_file(tmp_path: Path) -> None:
    """Also of a byte that changed under an unchanged time; whoever is not recorded is no failure."""
    async with desk(tmp_path) as lmx:
        model = lmx.root / "a"
        for name in ("weights.bin", "gone.json", "tokenizer.json"):
            (model / name).write_bytes(b"weights")
        (lmx.root / "acme" / "b" / "weights.bin").unlink()
        ModelsLock(lmx.root).record("a", model, "acme/a", "main")
        right = await lmx.post("models/verify", model_id="fast")
        assert (right["success"], right["models"][0]["verdict"]) == (True, "verified")

        status = (model / "weights.bin").stat()
        (model / "weights.bin").write_bytes(b"weighty")
        os.utime(model / "weights.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
        (model / "gone.json").unlink()
        (model / "new.json").write_bytes(b"{}")
        wrong = await lmx.post("models/verify")
        assert [(found["model_id"], found["verdict"]) for found in wrong["models"]] == [
            ("a", "mismatch"),
            ("acme/b", "unrecorded"),
        ]
        assert not wrong["success"]
        files = {file["name"]: file for file in wrong["models"][0]["files"]}
        assert {name: file["verdict"] for name, file in files.items()} == {
            "echo.json": "verified",
            "gone.json": "missing",
            "new.json": "added",
            "tokenizer.json": "verified",
            "weights.bin": "different",
        }
        assert files["weights.bin"]["expected_sha256"] == files["tokenizer.json"]["actual_sha256"]
        assert files["weights.bin"]["actual_sha256"] != files["weights.bin"]["expected_sha256"]
        assert (files["gone.json"]["actual_sha256"], files["new.json"]["expected_sha256"]) == (None, None)


async def test_a_touched_file_that_is_right_is_trusted_again(tmp_path: Path) -> None:
    """Once verified, the model is listed as verified without another hash."""
    async with desk(tmp_path) as lmx:
        model = lmx.root / "a"
        (model / "weights.bin").write_bytes(b"weights")
        ModelsLock(lmx.root).record("a", model, "acme/a", "main")
        (model / "weights.bin").touch()
        assert not (await lmx.shown("/available"))["a"]["verified"]
        assert (await lmx.post("models/verify", model_id="a"))["success"]
        assert (await lmx.shown("/available"))["a"]["verified"]


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("models/plan", {"model_id": "a", "context_length": 0}, "integer_below_min_value", "context_length"),
        ("models/plan", {"model_id": "a", "context": 1}, "unknown_parameter", "context"),
        ("models/pin", {}, "missing_required_parameter", "model_id"),
        ("models/unpin", {"model_id": 1}, "invalid_type", "model_id"),
        ("models/verify", {"model_id": ""}, "string_below_min_length", "model_id"),
        ("models/unload", {"model_id": "a", "force": "yes"}, "invalid_type", "force"),
        ("leases", {"model_id": "a", "seconds": 1}, "missing_required_parameter", "owner"),
        ("leases", {"model_id": "a", "owner": "x", "seconds": 0}, "decimal_below_min_value", "seconds"),
        ("leases", {"model_id": "a", "owner": "x", "seconds": 604801}, "decimal_above_max_value", "seconds"),
        ("leases", {"model_id": "a", "owner": "", "seconds": 1}, "string_below_min_length", "owner"),
    ],
)
async def test_a_wrong_wish_is_refused_by_name(
    client: httpx.AsyncClient, path: str, body: JsonObject, code: str, param: str
) -> None:
    """Before anything is asked of the rooms behind."""
    response = await client.post(f"/admin/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize(
    "path", [*(f"models/{verb}" for verb in ("load", "unload", "plan", "pin", "unpin", "verify", "download")), "leases"]
)
async def test_a_misspelt_field_is_refused(client: httpx.AsyncClient, path: str) -> None:
    """By its name, on every route with a body; so is a body that is no object."""
    right: dict[str, JsonObject] = {
        "models/download": {"repo_id": "a/b"},
        "leases": {"model_id": "a", "seconds": 1, "owner": "x"},
    }
    body = right.get(path, {"model_id": "a"})
    error = (await client.post(f"/admin/{path}", json=body | {"forse": True})).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_parameter", "forse")
    for other in (b"[]", b'"a"', b"null", b"{", b"\xff"):
        assert (await client.post(f"/admin/{path}", content=other)).status_code == 400


@pytest.mark.parametrize("path", ["models/plan", "models/pin", "models/unpin", "models/verify", "leases"])
async def test_an_unknown_model_is_not_found(tmp_path: Path, path: str) -> None:
    """By the name the field has on these routes."""
    extra = {"seconds": 1, "owner": "x"} if path == "leases" else {}
    async with desk(tmp_path) as lmx:
        error = await lmx.post(path, 404, model_id="../a", **extra)
        assert (error["code"], error["param"]) == ("model_not_found", "model_id")


async def test_settings_are_shown_without_keys() -> None:
    """What is in force, for whoever has the admin key; no key is in it."""
    secrets = {"admin_key": "sk-admin-secret", "api_keys": ["sk-api-secret"]}
    async with connect(make_world({"security": secrets, "models": {"ttl_seconds": 5}})) as client:
        assert (await client.get("/admin/config")).status_code == 401
        response = await client.get("/admin/config", headers={"X-Admin-Key": "sk-admin-secret"})
        assert response.json()["models"]["ttl_seconds"] == 5
        assert response.json()["security"]["admin_key"] == "**********"
        assert "secret" not in response.text
        for method, path in (
            ("POST", "models/plan"),
            ("POST", "leases"),
            ("DELETE", "leases/x"),
            ("DELETE", "models/a"),
        ):
            assert (await client.request(method, f"/admin/{path}")).status_code == 401
