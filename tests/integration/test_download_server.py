"""Downloads through a real server: ``opta-lmx pull``, requests to the model, and a server that is killed meanwhile."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from opta_lmx.cli import main
from opta_lmx.cli.failure import ExitCode
from opta_lmx.types import EchoOptions
from tests.hub_server import HubServer, Repo, running_hub
from tests.integration.conftest import RunningServer, StartServer

REPO = "acme/parrot"
WEIGHTS = "model.safetensors"
CONTENT = hashlib.shake_128(b"parrot").digest(400_000)
CHAT = {"model": REPO, "messages": [{"role": "user", "content": "Hello there"}]}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub with one model, of the kind that echoes."""
    with running_hub() as hub:
        files = {"echo.json": msgspec.json.encode(EchoOptions()), WEIGHTS: CONTENT}
        hub.repos[REPO] = Repo(files, large={WEIGHTS})
        yield hub


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models directory that outlives a server."""
    root = tmp_path / "models"
    root.mkdir()
    return root


def start(server: StartServer, hub: HubServer, root: Path) -> RunningServer:
    """A server over ``root`` that knows ``hub``."""
    return server({}, models={"models_directory": str(root), "starter": False}, downloads={"endpoint": hub.url})


def test_pull_and_chat(server: StartServer, hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was pulled is listed as verified and answers at once; pulling it again is no work."""
    running = start(server, hub, root)
    assert main(["pull", REPO, "--url", running.url]) == ExitCode.DONE
    assert capsys.readouterr() == (f"{REPO} downloaded and verified, 390.8 KiB\n", "")
    with running.client() as client:
        [listed] = client.get("/admin/models/available").json()["models"]
        assert (listed["id"], listed["verified"], listed["problem"]) == (REPO, True, None)
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert main(["pull", REPO, "--url", running.url, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["state"] == "completed"
    assert hub.ranges(WEIGHTS) == [None]


def test_pull_says_what_went_wrong(
    server: StartServer, hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal and a failed download both end with 1, the reason and a way out; nothing can be asked for then."""
    running = start(server, hub, root)
    assert main(["pull", "acme/nothing", "--url", running.url]) == ExitCode.REFUSED
    error, hint = capsys.readouterr().err.splitlines()
    assert "'acme/nothing' does not exist" in error
    assert "publisher/name" in hint
    hub.repos[REPO].forged[WEIGHTS] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    assert main(["pull", REPO, "--url", running.url]) == ExitCode.REFUSED
    output = capsys.readouterr()
    assert output.out == ""
    assert hashlib.sha256(CONTENT).hexdigest() in output.err
    assert f"opta-lmx pull {REPO}" in output.err
    with running.client() as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 404
        assert client.get("/admin/models/available").json() == {"models": []}


def test_a_killed_server_takes_its_download_along_and_the_next_one_resumes(
    server: StartServer, hub: HubServer, root: Path
) -> None:
    """kill -9 in the middle of a file: no process stays, nothing is listed, and the rest alone is downloaded then."""
    hub.repos[REPO].pauses_after[WEIGHTS] = 150_000
    first = start(server, hub, root)
    with first.client() as client:
        started = client.post("/admin/models/download", json={"repo_id": REPO}).json()
        with client.stream("GET", f"/admin/models/download/{started['download_id']}/progress") as events:
            for line in events.iter_lines():
                if line and json.loads(line.removeprefix("data: "))["done_bytes"] > 150_000:
                    break
        assert first.children()
    first.process.kill()
    hub.repos[REPO].pauses_after.clear()
    second = start(server, hub, root)
    with second.client() as client:
        assert client.get("/admin/models/available").json() == {"models": []}
    assert main(["pull", REPO, "--url", second.url]) == ExitCode.DONE
    assert hub.ranges(WEIGHTS) == [None, "bytes=150000-"]
    assert (root / REPO / WEIGHTS).read_bytes() == CONTENT


def test_a_stopping_server_ends_its_downloads(server: StartServer, hub: HubServer, root: Path) -> None:
    """SIGTERM in the middle of a file, with somebody following: the server ends soon and well, its child with it.

    Nothing of it can be loaded then, and the next server downloads the rest alone.
    """
    hub.repos[REPO].pauses_after[WEIGHTS] = 100_000
    running = start(server, hub, root)
    with running.client() as client:
        started = client.post("/admin/models/download", json={"repo_id": REPO}).json()
        with client.stream("GET", f"/admin/models/download/{started['download_id']}/progress") as events:
            lines = (json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line)
            assert any(download["done_bytes"] > 100_000 for download in lines)
            stop_soon(running)
            assert [download["state"] for download in lines][-1] == "cancelled"
    hub.repos[REPO].pauses_after.clear()
    second = start(server, hub, root)
    with second.client() as client:
        assert client.get("/admin/models/available").json() == {"models": []}
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 404
    assert main(["pull", REPO, "--url", second.url]) == ExitCode.DONE
    assert hub.ranges(WEIGHTS) == [None, "bytes=100000-"]


def stop_soon(running: RunningServer) -> None:
    """SIGTERM: exit code 0 within seconds, though the setting grants running requests half a minute."""
    before = time.monotonic()
    running.stop()
    assert time.monotonic() - before < 5
    assert running.process.returncode == 0
    assert "Traceback" not in running.log.read_text()


def test_a_stopping_server_does_not_wait_for_a_hub(server: StartServer, hub: HubServer, root: Path) -> None:
    """SIGTERM while somebody waits for a download to begin, because the hub wants to be asked again later."""
    hub.repos[REPO].refusals = [(429, {"retry-after": "50"})]
    running = start(server, hub, root)
    outcome: list[int | str] = []

    def ask() -> None:
        with running.client() as client:
            try:
                outcome.append(client.post("/admin/models/download", json={"repo_id": REPO}).status_code)
            except httpx.TransportError as error:
                outcome.append(type(error).__name__)

    asker = threading.Thread(target=ask)
    asker.start()
    wait_until(lambda: not hub.repos[REPO].refusals)
    stop_soon(running)
    asker.join(10)
    assert outcome == [503]
    assert [path.name for path in root.iterdir()] == [".server.lock"]


def wait_until(holds: Callable[[], bool]) -> None:
    """Returns as soon as it holds; fails if that takes long."""
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_bit_that_flips_in_a_model_that_is_here(
    server: StartServer, hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next load of it is refused with both hashes, ``verify`` names the file; put right, it loads again."""
    running = start(server, hub, root)
    assert main(["pull", REPO, "--url", running.url]) == ExitCode.DONE
    with running.client() as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        client.post("/admin/models/unload", json={"model_id": REPO}).raise_for_status()
        forged = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
        (root / REPO / WEIGHTS).write_bytes(forged)
        hashes = [hashlib.sha256(content).hexdigest() for content in (CONTENT, forged)]
        for route, body in (("/v1/chat/completions", CHAT), ("/admin/models/load", {"model_id": REPO})):
            response = client.post(route, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (422, "integrity_mismatch")
            assert all(digest in error["message"] for digest in hashes)
        assert client.get("/admin/models").json() == {"models": []}
        capsys.readouterr()
        assert main(["verify", REPO, "--url", running.url]) == ExitCode.REFUSED
        [row] = [line.split() for line in capsys.readouterr().out.splitlines() if WEIGHTS in line]
        assert row[:3] == [REPO, WEIGHTS, "different"]
        (root / REPO / WEIGHTS).write_bytes(CONTENT)
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert main(["verify", REPO, "--url", running.url]) == ExitCode.DONE


def test_cancel_and_a_leaving_follower(server: StartServer, hub: HubServer, root: Path) -> None:
    """Who stops following does not stop the download; DELETE does, and the one who still follows is told."""
    hub.repos[REPO].pauses_after[WEIGHTS] = 100_000
    running = start(server, hub, root)
    with running.client() as client:
        started = client.post("/admin/models/download", json={"repo_id": REPO}).json()
        path = f"/admin/models/download/{started['download_id']}"
        with client.stream("GET", f"{path}/progress") as events:
            next(events.iter_lines())
        assert client.get(path).json()["state"] == "downloading"
        seen: list[str] = []

        def follow() -> None:
            with running.client() as other, other.stream("GET", f"{path}/progress") as events:
                seen.extend(line for line in events.iter_lines() if line)

        follower = threading.Thread(target=follow)
        follower.start()
        assert hub.paused.wait(10)
        assert client.delete(path).json()["state"] == "cancelled"
        follower.join(10)
        assert json.loads(seen[-1].removeprefix("data: "))["state"] == "cancelled"
        assert [one["state"] for one in client.get("/admin/models/download").json()["downloads"]] == ["cancelled"]
