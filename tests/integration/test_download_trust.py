"""What a download may be trusted with: the token, bytes left from before, names, the state of things as told."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf import GGMLQuantizationType as Kind

from opta_lmx.cli import main
from opta_lmx.cli.failure import ExitCode
from opta_lmx.errors import Conflict, IntegrityMismatch
from opta_lmx.manager.download_job import Download, DownloadState
from opta_lmx.manager.integrity import ModelsLock, Verdict
from opta_lmx.types import EchoOptions
from tests.gguf_files import byte_level_vocabulary, random_weights, write_llama
from tests.hub_server import HubServer
from tests.integration.conftest import StartServer
from tests.integration.test_downloads import REPO, WEIGHTS, Place, ended, hub, place, running, tiny

__all__ = ["hub", "place", "running"]

TOKEN = "hf_aVeryGoodSecret"


def flip(path: Path) -> tuple[str, str]:
    """Changes one bit in the middle of a file; gives the whole content's SHA-256 before and after."""
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return before, hashlib.sha256(content).hexdigest()


async def paused(place: Place) -> None:
    """An attempt that was cut off in the weights, with everything else whole."""
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 120_000
    place.max_parallel = 4
    async with place.manager() as (downloads, _):
        async for now in downloads.events((await downloads.start(REPO)).id):
            begun, *_ = (file.done_bytes for file in now.files if file.path == WEIGHTS)
            if begun >= 120_000 and all(file.verified for file in now.files if file.path != WEIGHTS):
                break
    place.hub.repos[REPO].pauses_after.clear()


async def test_a_bit_that_flips_between_two_attempts(place: Place) -> None:
    """In a part that lies on the disk: failed with both hashes, the part gone; the next attempt is right."""
    await paused(place)
    [part] = (place.root / "acme" / "tiny.incomplete").rglob(f".parts/*/{WEIGHTS}")
    flip(part)
    download = await place.pull()
    assert download.state is DownloadState.FAILED
    assert isinstance(download.error, IntegrityMismatch)
    assert download.error.expected == hashlib.sha256(place.hub.repos[REPO].files[WEIGHTS]).hexdigest()
    assert download.error.actual != download.error.expected
    assert not [path for path in place.left() if path.endswith(WEIGHTS) or path == "models.lock"]
    assert (await place.pull()).state is DownloadState.COMPLETED


async def test_a_bit_that_flips_in_a_file_that_was_whole(place: Place) -> None:
    """Files ended by an earlier attempt are hashed again, and downloaded again where they are not right any more."""
    await paused(place)
    whole = place.root / "acme" / "tiny.incomplete" / "config.json"
    flip(whole)
    assert (await place.pull()).state is DownloadState.COMPLETED
    assert (place.root / REPO / "config.json").read_bytes() == place.hub.repos[REPO].files["config.json"]


@pytest.fixture
def gguf_place(place: Place, tmp_path: Path) -> Place:
    """Where the repository holds a GGUF alone."""
    vocabulary = byte_level_vocabulary()
    write_llama(tmp_path / "m.gguf", random_weights(len(vocabulary.tokens)), vocabulary, Kind.Q4_0)
    place.hub.repos[REPO].files = {"m.gguf": (tmp_path / "m.gguf").read_bytes()}
    return place


async def test_a_downloaded_gguf_has_a_record_beside_its_imports(gguf_place: Place) -> None:
    """It is listed as verified before its import and after, ``verify`` hashes both, and it is not downloaded again."""
    async with gguf_place.manager() as (downloads, models):
        for imported in (False, True):
            assert (await ended(downloads, await downloads.start(REPO, None, ["*.gguf"]))).error is None
            models.refresh()
            [listed] = models.list_available()
            assert (listed.format, listed.verified) == ("gguf", True)
            checks = {check.name: check.verdict for check in await models.verify(REPO)}
            assert ("m.gguf" in checks, "model.safetensors" in checks) == (True, imported)
            assert set(checks.values()) == {Verdict.VERIFIED}
            assert (await models.ensure_local(REPO)).verified
        models.delete(REPO)
    assert ModelsLock(gguf_place.root).find(REPO) is None
    assert gguf_place.left() == {"models.lock"}
    assert len(gguf_place.hub.ranges("m.gguf")) == 1


@pytest.mark.parametrize("imported", [False, True])
async def test_a_bit_that_flips_in_a_gguf(gguf_place: Place, imported: bool) -> None:
    """Before its import or after, it is not imported (again): refused with both hashes; put right, it loads."""
    path = gguf_place.root / REPO / "m.gguf"
    async with gguf_place.manager() as (downloads, models):
        await ended(downloads, await downloads.start(REPO, None, ["*.gguf"]))
        if imported:
            await models.ensure_local(REPO)
        right = path.read_bytes()
        before, after = flip(path)
        models.refresh()
        assert [files.verified for files in models.list_available()] == [False]
        with pytest.raises(IntegrityMismatch) as caught:
            await models.ensure_local(REPO)
        assert (caught.value.path, caught.value.expected, caught.value.actual) == ("m.gguf", before, after)
        checks = {check.name: check.verdict for check in await models.verify(REPO)}
        assert checks["m.gguf"] is Verdict.DIFFERENT
        assert (gguf_place.root / ".imported").exists() == imported
        path.write_bytes(right)
        models.refresh()
        assert (await models.ensure_local(REPO)).verified


async def test_a_bit_that_flips_in_an_import(gguf_place: Place) -> None:
    """What a GGUF has become is held against its own record."""
    async with gguf_place.manager() as (downloads, models):
        await ended(downloads, await downloads.start(REPO, None, ["*.gguf"]))
        imported = await models.ensure_local(REPO)
        flip(imported.path / "model.safetensors")
        with pytest.raises(IntegrityMismatch, match=r"model\.safetensors"):
            await models.ensure_local(REPO)


async def test_names_that_differ_in_case_alone_are_one_directory(place: Place) -> None:
    """So they are on many disks: the second is refused while the first runs, and once it is here."""
    place.hub.repos |= {"Acme/tiny": tiny(), "acme/TINY": tiny()}
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 1000
    async with place.manager() as (downloads, _):
        first = await downloads.start(REPO)
        with pytest.raises(Conflict, match="'acme/tiny' is being downloaded"):
            await downloads.start("acme/TINY")
        place.hub.resume.set()
        assert (await ended(downloads, first)).state is DownloadState.COMPLETED
    for other in ("acme/TINY", "Acme/tiny"):
        assert isinstance(await place.refusal(other), Conflict)


async def test_changes_of_state_are_published(place: Place) -> None:
    """The beginning and the end of every download, and neither of one that was refused."""
    told: list[Download] = []
    async with place.manager(told.append) as (downloads, _):
        await ended(downloads, await downloads.start(REPO))
        with pytest.raises(Conflict):
            await downloads.start(REPO, None, ["tiny.Q4_0.gguf"])
    assert [(one.state, one.repo_id) for one in told] == [
        (DownloadState.DOWNLOADING, REPO),
        (DownloadState.COMPLETED, REPO),
    ]


async def test_a_token_from_a_file(place: Place, tmp_path: Path) -> None:
    """Opens a gated repository where no variable is set; a variable comes first, and a refusal names the right one."""
    place.hub.repos[REPO].gated = True
    path = tmp_path / "token"
    path.write_text("hf_old\n")
    path.chmod(0o600)
    place.token_file = str(path)
    assert "the token in downloads.token_file gives no access" in str(await place.refusal())
    path.write_text(f"{place.hub.token}\n")
    place.environ["HF_TOKEN"] = "hf_wrong"
    refusal = str(await place.refusal())
    assert "the token in HF_TOKEN gives no access" in refusal
    assert "hf_wrong" not in refusal
    del place.environ["HF_TOKEN"]
    assert (await place.pull()).state is DownloadState.COMPLETED


def test_the_token_is_seen_nowhere(server: StartServer, hub: HubServer, tmp_path: Path) -> None:
    """Not in the log at its finest, nor in answers, settings, events, arguments and environments of processes."""
    hub.token = TOKEN
    hub.repos[REPO].gated = True
    hub.repos[REPO].pauses_after[WEIGHTS] = 100_000
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o644)
    started = server({}, downloads={"endpoint": hub.url, "token_file": str(path)}, logging={"level": "DEBUG"})
    with started.client() as client:
        seen = [client.post("/admin/models/download", json={"repo_id": REPO}).text]
        assert hub.paused.wait(10)
        for child in started.children():
            seen += [*child.cmdline(), *child.environ().values()]
        seen += [*psutil.Process(started.pid).cmdline()]
        seen += [client.get(route).text for route in ("/admin/config", "/admin/models/download", "/admin/status")]
        seen.append(client.delete(f"/admin/models/download/{json.loads(seen[0])['download_id']}").text)
    log = started.log.read_text()
    assert "token_file_open" in log
    assert [text for text in (*seen, log) if TOKEN in text] == []


def test_events_of_a_server(server: StartServer, hub: HubServer) -> None:
    """A load, a download and an unload, in order; a stopping server ends the stream, and is not held up by it."""
    started = server({"parrot": EchoOptions()}, downloads={"endpoint": hub.url})
    events: list[tuple[str, str, str | None]] = []
    with started.client() as client, started.client() as reader, reader.stream("GET", "/admin/events") as response:
        lines = response.iter_lines()
        assert next(lines) == "event: snapshot"
        client.post("/admin/models/load", json={"model_id": "parrot"})
        client.post("/admin/models/download", json={"repo_id": REPO})
        client.post("/admin/models/unload", json={"model_id": "parrot"})
        while len(events) < 6:
            if (line := next(lines)).startswith("data: ") and "at" in (data := json.loads(line[6:])):
                events.append((data.get("model_id") or data["repo_id"], data["state"], data.get("cause")))
        before = time.monotonic()
        started.process.terminate()
        assert not "".join(lines)
    assert time.monotonic() - before < 2
    assert started.process.wait(10) == 0
    assert "Traceback" not in started.log.read_text()
    of_the_model = [event for event in events if event[0] == "parrot"]
    assert of_the_model == [
        ("parrot", "loading", None),
        ("parrot", "ready", None),
        ("parrot", "stopping", "unloaded"),
        ("parrot", "absent", None),
    ]
    assert [event[1] for event in events if event[0] == REPO] == ["downloading", "completed"]


def test_events_of_downloads_that_fail_or_are_cancelled(server: StartServer, hub: HubServer) -> None:
    """Each has its beginning and its one end, and a failure its reason: both hashes of a forged file."""
    content = hub.repos[REPO].files[WEIGHTS]
    hub.repos[REPO].forged[WEIGHTS] = forged = content[:-1] + bytes([content[-1] ^ 1])
    hub.repos["acme/two"] = tiny(pauses_after={WEIGHTS: 1000})
    started = server({}, downloads={"endpoint": hub.url})
    with started.client() as client, started.client() as reader, reader.stream("GET", "/admin/events") as response:
        lines = response.iter_lines()

        def event() -> dict[str, Any]:
            data: dict[str, Any] = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
            return data

        event()
        client.post("/admin/models/download", json={"repo_id": REPO}).raise_for_status()
        began, failed = event(), event()
        assert (began["repo_id"], began["state"], failed["repo_id"]) == (REPO, "downloading", REPO)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "integrity_mismatch")
        assert all(hashlib.sha256(one).hexdigest() in failed["error"]["message"] for one in (content, forged))
        two = client.post("/admin/models/download", json={"repo_id": "acme/two"}).json()["download_id"]
        assert event()["state"] == "downloading"
        client.delete(f"/admin/models/download/{two}").raise_for_status()
        cancelled = event()
        assert (cancelled["repo_id"], cancelled["state"]) == ("acme/two", "cancelled")


def test_offline_everything_local_works(
    server: StartServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that may not reach the hub starts in an empty home, lists, loads and answers; a pull says why not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = server({"parrot": EchoOptions()})
    with started.client() as client:
        chat = {"model": "parrot", "messages": [{"role": "user", "content": "Hello there"}]}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        for route in ("/v1/models", "/admin/models/available", "/admin/status", "/admin/ready"):
            assert client.get(route).status_code == 200
        assert client.post("/admin/models/verify", json={}).status_code == 200
        error = client.post("/admin/models/download", json={"repo_id": REPO}).json()["error"]
    assert error["code"] == "hub_unreachable"
    assert main(["pull", REPO, "--url", started.url]) == ExitCode.REFUSED
    said = capsys.readouterr().err.splitlines()[0]
    assert said == "error: HF_HUB_OFFLINE is set, so nothing is downloaded; models on disk go on working."
