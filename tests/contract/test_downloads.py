"""The download routes: what they take, what they answer, and how a download is followed to its end."""

import json

import httpx
import pytest

from opta_lmx.errors import DiskFull, HubUnreachable, IntegrityMismatch, LmxError, ModelNotFound
from opta_lmx.manager.download_job import DownloadState
from tests.fakes import World, download

URL = "/admin/models/download"
RUNNING = {
    "download_id": "d1",
    "repo_id": "acme/new",
    "revision": None,
    "commit": "c0ffee",
    "state": "downloading",
    "done_bytes": 40,
    "total_bytes": 100,
    "bytes_per_second": 20.0,
    "eta_seconds": 3.0,
    "files": [{"path": "model.safetensors", "size_bytes": 100, "done_bytes": 40, "verified": False}],
    "error": None,
}


async def test_start(client: httpx.AsyncClient, world: World) -> None:
    """202 with the download; every field reaches the manager."""
    response = await client.post(URL, json={"repo_id": "acme/new"})
    assert (response.status_code, response.json()) == (202, RUNNING)
    body = {"repo_id": "acme/new", "revision": "v1", "allow_patterns": ["*.gguf"]}
    assert (await client.post(URL, json=body)).status_code == 202
    assert world.downloads.started == [("acme/new", None, None), ("acme/new", "v1", ["*.gguf"])]


async def test_status_and_list(client: httpx.AsyncClient) -> None:
    """The same shape everywhere."""
    assert (await client.get(f"{URL}/d1")).json() == RUNNING
    assert (await client.get(URL)).json() == {"downloads": [RUNNING]}


async def test_progress(client: httpx.AsyncClient, world: World) -> None:
    """An event for each state; the last has the end in it, an error in the shape of every error, and no [DONE]."""
    mismatch = IntegrityMismatch("model.safetensors", "aa", "bb")
    world.downloads.states = (download(), download(DownloadState.FAILED, error=mismatch))
    response = await client.get(f"{URL}/d1/progress")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n") if event]
    assert events[0] == RUNNING
    assert (len(events), events[1]["state"], events[1]["eta_seconds"]) == (2, "failed", None)
    assert events[1]["error"] == {
        "message": "model.safetensors: expected aa, found bb.",
        "type": "invalid_request_error",
        "param": None,
        "code": "integrity_mismatch",
    }


async def test_cancel(client: httpx.AsyncClient, world: World) -> None:
    """DELETE ends it and answers with how it ended."""
    world.downloads.states = (download(), download(DownloadState.CANCELLED))
    response = await client.delete(f"{URL}/d1")
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert world.downloads.cancelled == ["d1"]


@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("GET", "/progress"), ("DELETE", "")])
async def test_an_unknown_download(client: httpx.AsyncClient, method: str, tail: str) -> None:
    """404, in the shape of an error, before any event."""
    response = await client.request(method, f"{URL}/nobody{tail}")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "download_not_found", "download_id")
    assert "'nobody'" in error["message"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "repo_id"),
        ({"repo_id": 5}, "invalid_type", "repo_id"),
        ({"repo_id": "a/b", "force": True}, "unknown_parameter", "force"),
        ({"repo_id": "a/b", "revision": ""}, "string_below_min_length", "revision"),
        ({"repo_id": "a/b", "allow_patterns": "*"}, "invalid_type", "allow_patterns"),
        ({"repo_id": "a/b", "allow_patterns": []}, "empty_array", "allow_patterns"),
        ({"repo_id": "a/b", "allow_patterns": [1]}, "invalid_type", "allow_patterns[0]"),
    ],
)
async def test_a_wrong_wish(
    client: httpx.AsyncClient, world: World, body: dict[str, object], code: str, param: str
) -> None:
    """Refused by the name of the field, and nothing is asked of the hub."""
    response = await client.post(URL, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert world.downloads.started == []


@pytest.mark.parametrize(
    ("refusal", "status", "code", "param"),
    [
        (ModelNotFound("acme/new"), 404, "model_not_found", "repo_id"),
        (DiskFull(9, 8), 507, "insufficient_disk", None),
        (HubUnreachable("No hub."), 502, "hub_unreachable", None),
    ],
)
async def test_what_is_refused_before_the_first_byte(
    client: httpx.AsyncClient, world: World, refusal: LmxError, status: int, code: str, param: str | None
) -> None:
    """Keeps its status."""
    world.downloads.refusal = refusal
    response = await client.post(URL, json={"repo_id": "acme/new"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["param"] == param


async def test_no_download_begins_while_the_server_stops(client: httpx.AsyncClient, world: World) -> None:
    """503, so that whoever asked tries the next server."""
    world.engine.draining = True
    response = await client.post(URL, json={"repo_id": "acme/new"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert world.downloads.started == []
