"""Downloads through a real server: ``opta-lmx pull``, requests to the model, and a server that is killed meanwhile."""

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

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
    """SIGTERM in the middle of a file, with somebody following: the server ends well, its child with it."""
    hub.repos[REPO].pauses_after[WEIGHTS] = 100_000
    running = start(server, hub, root)
    with running.client() as client:
        started = client.post("/admin/models/download", json={"repo_id": REPO}).json()
        with client.stream("GET", f"/admin/models/download/{started['download_id']}/progress") as events:
            next(events.iter_lines())
            assert hub.paused.wait(10)
            running.stop()
    assert running.process.returncode == 0
    assert "Traceback" not in running.log.read_text()
    assert not (root / REPO).exists()


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
