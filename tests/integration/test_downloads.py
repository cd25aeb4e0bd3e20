"""Downloads from a real hub on loopback: what arrives, what is refused, and what is left after each way to fail."""

import hashlib
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import anyio
import psutil
import pytest

from opta_lmx.config import DownloadsConfig
from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import (
    Conflict,
    DiskFull,
    DownloadError,
    Draining,
    HubUnreachable,
    IntegrityMismatch,
    InvalidRequest,
    LmxError,
    ModelNotFound,
)
from opta_lmx.manager.download import DownloadManager, Machine
from opta_lmx.manager.download_job import Download, DownloadState
from opta_lmx.manager.hub import Patience
from opta_lmx.manager.integrity import ModelsLock
from opta_lmx.manager.model import ModelManager
from tests.hub_server import COMMIT, HubServer, Repo, running_hub

REPO = "acme/tiny"
WEIGHTS = "model.safetensors"
# Seconds. A child starts in one, on a busy machine in some more.
BOUND = 20


def weights(size: int = 300_000, seed: int = 1) -> bytes:
    """A safetensors file of one tensor, larger than a socket's buffers take at once."""
    data = hashlib.shake_128(bytes([seed])).digest(size)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def tiny(**changes: object) -> Repo:
    """A small model with everything around it that must not be downloaded."""
    repo = Repo(
        files={
            "config.json": b'{"model_type": "llama", "hidden_size": 8}',
            WEIGHTS: weights(),
            "1_Pooling/config.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "pytorch_model.bin": b"pickle",
            "modeling_tiny.py": b"import os",
            ".gitattributes": b"",
            ".cache/x.json": b"{}",
            "consolidated.safetensors": weights(1000),
            "tiny.Q4_0.gguf": b"GGUF",
            "README.md": b"# tiny",
        },
        large={WEIGHTS, "consolidated.safetensors"},
    )
    for name, value in changes.items():
        setattr(repo, name, value)
    return repo


@dataclass
class Place:
    """A models directory, and what downloads into it are given."""

    hub: HubServer
    root: Path
    environ: dict[str, str] = field(default_factory=lambda: {"NO_PROXY": "*"})
    endpoint: str = ""
    free_bytes: Callable[[Path], int] = lambda _: 10**12
    patience: Patience = field(default_factory=lambda: Patience(5, attempts=3, first_pause_seconds=0.01))
    max_parallel: int = 2
    token_file: str | None = None

    @asynccontextmanager
    async def manager(
        self, on_change: Callable[[Download], None] = lambda download: None
    ) -> AsyncIterator[tuple[DownloadManager, ModelManager]]:
        """A manager as of a server that has just started; at the end its downloads are cut off."""
        models = ModelManager(ModelsConfig(models_directory=str(self.root), starter=False))
        config = DownloadsConfig(
            endpoint=self.endpoint or self.hub.url, max_parallel=self.max_parallel, token_file=self.token_file
        )
        machine = Machine(environ=self.environ, free_bytes=self.free_bytes, patience=self.patience)
        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as tasks:
                yield DownloadManager(config, self.root, models, tasks, machine, on_change=on_change), models
                tasks.cancel_scope.cancel()

    async def pull(self, repo_id: str = REPO, revision: str | None = None, *patterns: str) -> Download:
        """One download from its start to its end."""
        async with self.manager() as (downloads, _):
            return await ended(downloads, await downloads.start(repo_id, revision, patterns or None))

    async def refusal(self, repo_id: str = REPO, revision: str | None = None, *patterns: str) -> LmxError:
        """The error of a download that does not start; it leaves no trace."""
        before = self.left()
        async with self.manager() as (downloads, _):
            with pytest.raises(LmxError) as caught:
                await downloads.start(repo_id, revision, patterns or None)
            assert downloads.list() == ()
        assert self.left() == before
        return caught.value

    def left(self) -> set[str]:
        """Every file below the models directory."""
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}


async def ended(downloads: DownloadManager, download: Download) -> Download:
    """The download after its last event."""
    return [event async for event in downloads.events(download.id)][-1]


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(running: HubServer) -> Iterator[HubServer]:
    """The hub with one repository, as if just started; afterwards nothing hangs in it."""
    running.repos = {REPO: tiny()}
    running.seen.clear()
    running.tokens.clear()
    running.paused.clear()
    running.resume.clear()
    yield running
    running.resume.set()


@pytest.fixture
def place(hub: HubServer, tmp_path: Path) -> Place:
    """An empty models directory."""
    root = tmp_path / "models"
    root.mkdir()
    return Place(hub, root)


async def test_a_download_is_a_model(place: Place) -> None:
    """Only data arrives, whole, listed and verified; models.lock has its origin and each file's hash."""
    async with place.manager() as (downloads, models):
        started = await downloads.start(REPO)
        assert (started.state, started.commit, started.error) == (DownloadState.DOWNLOADING, COMMIT, None)
        download = await ended(downloads, started)
        files = models.find(REPO)
    assert (download.state, download.done_bytes) == (DownloadState.COMPLETED, download.total_bytes)
    assert all(file.verified and file.done_bytes == file.size_bytes for file in download.files)
    names = {"config.json", WEIGHTS, "1_Pooling/config.json", "chat_template.jinja"}
    assert place.left() == {f"{REPO}/{name}" for name in names} | {"models.lock"}
    assert files is not None
    assert (files.problem, files.verified) == (None, True)
    record = ModelsLock(place.root).find(REPO)
    assert record is not None
    assert (record.source, record.revision, set(record.files)) == (REPO, COMMIT, names)
    assert record.files[WEIGHTS].sha256 == hashlib.sha256(place.hub.repos[REPO].files[WEIGHTS]).hexdigest()


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
async def test_what_is_here_is_complete_at_once(place: Place, revision: str | None) -> None:
    """The same revision again costs no byte, and by its commit not even a hub."""
    await place.pull()
    place.hub.seen.clear()
    if revision == COMMIT:
        place.endpoint = "http://127.0.0.1:9"
    again = await place.pull(REPO, revision)
    assert (again.state, again.done_bytes, again.commit) == (DownloadState.COMPLETED, again.total_bytes, COMMIT)
    assert [path for _, path, _ in place.hub.seen if "/storage/" in path] == []


async def test_another_revision_is_a_conflict(place: Place) -> None:
    """A model on disk is not changed under those who use it; other files of it are not mixed in either."""
    await place.pull()
    for revision in (None, COMMIT):
        assert isinstance(await place.refusal(REPO, revision, "tiny.Q4_0.gguf"), Conflict)
    place.hub.repos[REPO].commit = "b" * 40
    assert isinstance(await place.refusal(), Conflict)


async def test_a_choice_is_remembered(place: Place) -> None:
    """The same patterns of the same commit need no hub again; without them it is asked, and other files are told of."""
    await place.pull(REPO, None, "*.gguf")
    place.hub.seen.clear()
    assert (await place.pull(REPO, COMMIT, "*.gguf")).state is DownloadState.COMPLETED
    assert place.hub.seen == []
    assert isinstance(await place.refusal(REPO, COMMIT), Conflict)
    assert (await place.pull(REPO, None, "tiny.*")).state is DownloadState.COMPLETED
    assert place.hub.ranges("") == []


async def test_a_directory_of_somebody_else_is_a_conflict(place: Place) -> None:
    """Nor is one taken over that was not downloaded here; nor a folder that is itself a model or a link."""
    (place.root / REPO).mkdir(parents=True)
    (place.root / REPO / "config.json").write_bytes(b"{}")
    assert isinstance(await place.refusal(), Conflict)
    (place.root / "mine").mkdir()
    (place.root / "mine" / "config.json").write_bytes(b"{}")
    assert isinstance(await place.refusal("mine/tiny"), Conflict)
    (place.root / "link").symlink_to(place.root.parent)
    assert isinstance(await place.refusal("link/tiny"), Conflict)
    assert place.hub.seen == []


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
async def test_a_flipped_bit_is_never_served(place: Place, name: str) -> None:
    """In a large file or a small one: failed with both hashes, that file gone, nothing listed, the others kept."""
    content = place.hub.repos[REPO].files[name]
    forged = content[:-1] + bytes([content[-1] ^ 1])
    place.hub.repos[REPO].forged[name] = forged
    place.max_parallel = 1
    async with place.manager() as (downloads, models):
        download = await ended(downloads, await downloads.start(REPO))
        models.refresh()
        assert models.list_available() == ()
    assert download.state is DownloadState.FAILED
    assert isinstance(download.error, IntegrityMismatch)
    assert download.error.path == name
    assert download.error.expected in (hashlib.sha256(content).hexdigest(), hash_of_blob(content))
    assert download.error.actual in (hashlib.sha256(forged).hexdigest(), hash_of_blob(forged))
    assert not [path for path in place.left() if path.endswith(f"tiny.incomplete/{name}") or "models.lock" in path]
    place.hub.repos[REPO].forged.clear()
    assert (await place.pull()).state is DownloadState.COMPLETED


def hash_of_blob(content: bytes) -> str:
    """git's hash."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("delta", [-1, 1])
async def test_a_file_of_another_size_is_never_served(place: Place, delta: int) -> None:
    """Longer than listed is a mismatch, shorter a connection that never gets to the end; nothing beyond is written."""
    content = place.hub.repos[REPO].files[WEIGHTS]
    place.hub.repos[REPO].forged[WEIGHTS] = content + b"x" if delta > 0 else content[:-1]
    download = await place.pull()
    assert download.state is DownloadState.FAILED
    assert isinstance(download.error, IntegrityMismatch if delta > 0 else HubUnreachable)


async def test_a_broken_connection_goes_on_where_it_broke(place: Place) -> None:
    """Each attempt asks for the rest by Range; attempts that bring bytes are not counted against the hub."""
    place.hub.repos[REPO].breaks_after[WEIGHTS] = 50_000
    assert (await place.pull()).state is DownloadState.COMPLETED
    ranges = place.hub.ranges(WEIGHTS)
    assert ranges == [None] + [f"bytes={at}-" for at in range(50_000, 300_001, 50_000)]


async def test_a_hub_without_range_sends_the_whole_again(place: Place) -> None:
    """The file is begun anew, and is right in the end."""
    place.hub.repos[REPO].ignores_range = True
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 100_000
    async with place.manager() as (downloads, _):
        started = await downloads.start(REPO)
        await reached(downloads, started, 100_000)
    place.hub.repos[REPO].pauses_after.clear()
    assert (await place.pull()).state is DownloadState.COMPLETED


async def reached(downloads: DownloadManager, download: Download, size: int) -> None:
    """Returns once so many bytes have been told of."""
    async for now in downloads.events(download.id):
        if now.done_bytes >= size:
            return
    pytest.fail(f"ended as {now}")


async def test_a_new_server_goes_on_where_the_old_one_stopped(place: Place) -> None:
    """Bytes from before the cut are hashed and kept, not asked for again; the model is right."""
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 120_000
    async with place.manager() as (downloads, _):
        await reached(downloads, await downloads.start(REPO), 120_000)
    assert not [path for path in place.left() if path.startswith(f"{REPO}/")]
    place.hub.repos[REPO].pauses_after.clear()
    place.hub.seen.clear()
    async with place.manager() as (downloads, _):
        started = await downloads.start(REPO)
        assert started.done_bytes >= 120_000
        assert (await ended(downloads, started)).state is DownloadState.COMPLETED
    assert place.hub.ranges(WEIGHTS) == ["bytes=120000-"]


async def test_other_bytes_under_the_same_name_are_not_mixed_in(place: Place) -> None:
    """A file that is another one when the download goes on: failed with both hashes, and begun anew by the next."""
    content = place.hub.repos[REPO].files[WEIGHTS]
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 120_000
    async with place.manager() as (downloads, _):
        await reached(downloads, await downloads.start(REPO), 120_000)
    place.hub.repos[REPO].pauses_after.clear()
    other = weights(seed=2)
    place.hub.repos[REPO].forged[WEIGHTS] = other
    place.hub.seen.clear()
    download = await place.pull()
    assert download.state is DownloadState.FAILED
    assert isinstance(download.error, IntegrityMismatch)
    mixed = content[:120_000] + other[120_000:]
    assert (download.error.expected, download.error.actual) == tuple(
        hashlib.sha256(whole).hexdigest() for whole in (content, mixed)
    )
    assert not [path for path in place.left() if path.endswith(WEIGHTS)]
    place.hub.repos[REPO].forged.clear()
    assert (await place.pull()).state is DownloadState.COMPLETED
    assert place.hub.ranges(WEIGHTS) == ["bytes=120000-", None]


async def test_a_revision_stays_what_it_was_at_the_start(place: Place) -> None:
    """main moves on while its files come: all are those of the commit it stood for, and models.lock says which."""
    repo = place.hub.repos[REPO]
    repo.pauses_after[WEIGHTS] = 1000
    old = dict(repo.files)
    async with place.manager() as (downloads, _):
        started = await downloads.start(REPO, "main")
        await reached(downloads, started, 1000)
        repo.older[COMMIT] = old
        repo.commit, repo.files = "b" * 40, old | {"config.json": b'{"model_type": "llama", "x": 1}'}
        place.hub.resume.set()
        assert (await ended(downloads, started)).state is DownloadState.COMPLETED
    assert (place.root / REPO / "config.json").read_bytes() == old["config.json"]
    record = ModelsLock(place.root).find(REPO)
    assert record is not None
    assert record.revision == COMMIT
    assert {path.split("/")[4] for _, path, _ in place.hub.seen if "/resolve/" in path} == {COMMIT}


async def test_an_older_commit_can_be_asked_for(place: Place) -> None:
    """By its name; main is something else by then."""
    repo = place.hub.repos[REPO]
    repo.older["c" * 40] = repo.files | {WEIGHTS: weights(seed=3)}
    download = await place.pull(REPO, "c" * 40)
    assert (download.state, download.commit) == (DownloadState.COMPLETED, "c" * 40)
    assert (place.root / REPO / WEIGHTS).read_bytes() == weights(seed=3)


async def test_parts_of_another_revision_are_not_mixed_in(place: Place) -> None:
    """What has changed on the hub between two attempts is downloaded anew, and leaves nothing of the old."""
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 120_000
    async with place.manager() as (downloads, _):
        await reached(downloads, await downloads.start(REPO), 120_000)
    place.hub.repos[REPO] = tiny(commit="b" * 40)
    place.hub.repos[REPO].files |= {WEIGHTS: weights(seed=2), "config.json": b'{"model_type": "llama", "x": 1}'}
    del place.hub.repos[REPO].files["chat_template.jinja"]
    assert (await place.pull()).state is DownloadState.COMPLETED
    assert (place.root / REPO / WEIGHTS).read_bytes() == weights(seed=2)
    assert not list((place.root / REPO).rglob(".*"))
    assert "acme/tiny/chat_template.jinja" not in place.left()


async def test_cancel_is_quick_and_keeps_the_bytes(place: Place) -> None:
    """In the middle of a file whose bytes have stopped coming: over within a second, and nothing is listed."""
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 120_000
    async with place.manager() as (downloads, models):
        started = await downloads.start(REPO)
        await reached(downloads, started, 120_000)
        before = time.monotonic()
        cancelled = await downloads.cancel(started.id)
        assert time.monotonic() - before < 1
        assert cancelled is not None
        assert (cancelled.state, cancelled.bytes_per_second) == (DownloadState.CANCELLED, 0)
        assert await downloads.cancel(started.id) == cancelled
        assert await downloads.cancel("nobody") is None
        models.refresh()
        assert models.find(REPO) is None
    assert any(".incomplete/" in path for path in place.left())


async def test_closing_ends_every_download(place: Place) -> None:
    """Those that run end as cancelled, who waits for one to begin is refused, and no other begins."""
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 120_000
    place.hub.repos["acme/busy"] = tiny(refusals=[(429, {"retry-after": "50"})])
    async with place.manager() as (downloads, _):
        started = await downloads.start(REPO)
        await reached(downloads, started, 120_000)

        async def ask() -> None:
            with pytest.raises(Draining):
                await downloads.start("acme/busy")

        async with anyio.create_task_group() as askers:
            askers.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            await downloads.close()
        assert [(one.repo_id, one.state) for one in downloads.list()] == [(REPO, DownloadState.CANCELLED)]
        with pytest.raises(Draining):
            await downloads.start(REPO)
    assert any(".incomplete/" in path for path in place.left())


async def test_a_killed_child_fails_its_download_alone(place: Place) -> None:
    """It is told of, what has come is kept, and the next attempt goes on with it."""
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 120_000
    async with place.manager() as (downloads, _):
        started = await downloads.start(REPO)
        await reached(downloads, started, 120_000)
        [child] = [one for one in psutil.Process().children() if "opta_lmx.manager.fetch" in one.cmdline()]
        child.kill()
        failed = await ended(downloads, started)
    assert (failed.state, type(failed.error)) == (DownloadState.FAILED, DownloadError)
    assert "ended unexpectedly" in str(failed.error)
    place.hub.repos[REPO].pauses_after.clear()
    assert (await place.pull()).state is DownloadState.COMPLETED
    assert place.hub.ranges(WEIGHTS) == [None, "bytes=120000-"]


async def test_the_same_download_is_joined(place: Place) -> None:
    """Two who ask for one repository share one download; who asks for it in another way is refused meanwhile."""
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 1000
    async with place.manager() as (downloads, _):
        found: list[Download] = []

        async def ask() -> None:
            found.append(await downloads.start(REPO))

        async with anyio.create_task_group() as askers:
            for _ in range(3):
                askers.start_soon(ask)
        assert len({download.id for download in found}) == 1 == len(downloads.list())
        with pytest.raises(Conflict):
            await downloads.start(REPO, COMMIT)
        with pytest.raises(Conflict):
            await downloads.start(REPO, None, ["*.json", "*.safetensors"])
        place.hub.resume.set()
        assert (await ended(downloads, found[0])).state is DownloadState.COMPLETED
    assert place.hub.ranges(WEIGHTS) == [None]


async def test_a_refusal_is_everybodys_who_joined(place: Place) -> None:
    """The hub is asked once for all of them, and each is told the same."""
    async with place.manager() as (downloads, _):
        told: list[LmxError] = []

        async def ask() -> None:
            with pytest.raises(ModelNotFound) as caught:
                await downloads.start("acme/nothing")
            told.append(caught.value)

        async with anyio.create_task_group() as askers:
            for _ in range(3):
                askers.start_soon(ask)
        assert downloads.list() == ()
    assert [str(error) for error in told] == [str(told[0])] * 3
    assert len(place.hub.seen) == 1


async def test_downloads_share_the_places_for_files(place: Place) -> None:
    """With one place, a second download waits for the first one's file, and gets its turn."""
    place.max_parallel = 1
    place.hub.repos = {REPO: Repo({WEIGHTS: weights()}, pauses_after={WEIGHTS: 1000}), "acme/two": tiny()}
    async with place.manager() as (downloads, _):
        first = await downloads.start(REPO)
        await reached(downloads, first, 1000)
        second = await downloads.start("acme/two")
        waiting = downloads.events(second.id)
        for _ in range(3):
            assert (await anext(waiting)).done_bytes == 0
        place.hub.resume.set()
        assert (await ended(downloads, second)).state is DownloadState.COMPLETED
        assert (await ended(downloads, first)).state is DownloadState.COMPLETED


async def test_a_full_disk_is_refused_before_the_first_byte(place: Place) -> None:
    """With both numbers; bytes that are here already, and those that others have still to write, count."""
    total = sum(len(place.hub.repos[REPO].files[name]) for name in (WEIGHTS, "config.json", "chat_template.jinja")) + 2
    place.free_bytes = lambda _: total - 1
    refusal = await place.refusal()
    assert isinstance(refusal, DiskFull)
    assert (refusal.need_bytes, refusal.free_bytes) == (total, total - 1)
    assert place.hub.ranges("") == []
    place.free_bytes = lambda _: total
    place.hub.repos |= {"acme/two": tiny()}
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 1000
    async with place.manager() as (downloads, _):
        await downloads.start(REPO)
        with pytest.raises(DiskFull):
            await downloads.start("acme/two")
        place.hub.resume.set()


@pytest.mark.parametrize("door", ["gated", "private"])
async def test_gated_without_and_with_a_token(place: Place, door: str) -> None:
    """What to do is said before the first byte; the token comes from its variable, and goes into no message."""
    setattr(place.hub.repos[REPO], door, True)
    refusal = await place.refusal()
    assert isinstance(refusal, InvalidRequest)
    assert (refusal.param, refusal.code) == ("repo_id", "hub_access_denied")
    assert "gated" in str(refusal)
    assert "no token is given in HF_TOKEN" in str(refusal)
    place.environ["HF_TOKEN"] = "hf_wrong"
    refusal = await place.refusal()
    assert "the token in HF_TOKEN gives no access" in str(refusal)
    assert "hf_wrong" not in str(refusal)
    place.environ["HF_TOKEN"] = place.hub.token
    assert (await place.pull()).state is DownloadState.COMPLETED
    assert place.hub.tokens == {None, "Bearer hf_wrong", f"Bearer {place.hub.token}"}


async def test_the_token_goes_to_the_hub_alone(place: Place) -> None:
    """Where a hub sends us on to another host for the bytes, that host learns nothing."""
    place.environ["HF_TOKEN"] = place.hub.token
    with running_hub() as storage:
        storage.repos = place.hub.repos
        place.hub.repos[REPO].storage = storage.url
        assert (await place.pull()).state is DownloadState.COMPLETED
        assert (len(storage.seen), storage.tokens) == (4, {None})
    assert place.hub.tokens == {f"Bearer {place.hub.token}"}


async def test_what_the_hub_does_not_have(place: Place) -> None:
    """A repository and a revision that do not exist are told apart."""
    missing = await place.refusal("acme/nothing")
    assert isinstance(missing, ModelNotFound)
    assert missing.name == "acme/nothing"
    wrong = await place.refusal(REPO, "v9")
    assert isinstance(wrong, InvalidRequest)
    assert (wrong.param, wrong.code) == ("revision", "revision_not_found")


async def test_a_busy_hub_is_waited_for(place: Place) -> None:
    """As long as it says, for the list and for a file; not for ever, and not longer than is reasonable."""
    soon = {"retry-after": "0"}
    place.hub.repos[REPO].refusals = [(429, soon), (503, {})]
    assert (await place.pull()).state is DownloadState.COMPLETED
    place.hub.repos["acme/busy"] = tiny(refusals=[(429, soon)] * 3)
    refusal = await place.refusal("acme/busy")
    assert isinstance(refusal, HubUnreachable)
    assert "429" in str(refusal)
    place.hub.repos["acme/busy"] = tiny(refusals=[(429, {"retry-after": "3600"})])
    assert isinstance(await place.refusal("acme/busy"), HubUnreachable)


def in_seconds(seconds: int) -> str:
    """A Retry-After by number."""
    return str(seconds)


def at_time(seconds: int) -> str:
    """A Retry-After by date, which knows whole seconds only."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds + 1), usegmt=True)


@pytest.mark.parametrize("later", [in_seconds, at_time])
async def test_the_hub_says_when_to_come_back(place: Place, later: Callable[[int], str]) -> None:
    """By a number or a date: it is asked no sooner, and no later although our own pause would be half a minute."""
    place.patience = Patience(5, attempts=3, first_pause_seconds=30)
    place.hub.repos[REPO].refusals = [(429, {"retry-after": later(1)})]
    before = time.monotonic()
    assert (await place.pull()).state is DownloadState.COMPLETED
    assert time.monotonic() - before >= 1
    place.hub.repos["acme/busy"] = tiny(refusals=[(503, {"retry-after": later(3600)})])
    assert isinstance(await place.refusal("acme/busy"), HubUnreachable)


async def test_a_slow_connection_is_no_broken_one(place: Place) -> None:
    """Bytes that keep coming are waited for, though all of them take longer than the silence that is borne."""
    place.patience = Patience(silence_seconds=1.5, attempts=1)
    place.hub.repos[REPO].paces[WEIGHTS] = (60_000, 0.4)
    before = time.monotonic()
    assert (await place.pull()).state is DownloadState.COMPLETED
    assert time.monotonic() - before > place.patience.silence_seconds
    assert place.hub.ranges(WEIGHTS) == [None]


async def test_a_hub_that_falls_silent(place: Place) -> None:
    """The silence is bounded, then tried again, then told of; what came before is kept."""
    place.patience = Patience(silence_seconds=0.1, attempts=2, first_pause_seconds=0.01)
    place.hub.repos[REPO].pauses_after[WEIGHTS] = 0
    download = await place.pull()
    assert download.state is DownloadState.FAILED
    assert isinstance(download.error, HubUnreachable)
    assert "no answer within 0.1 seconds" in str(download.error)


async def test_no_hub_and_offline(place: Place) -> None:
    """Each is one clear sentence; offline is not even tried, and what is here stays usable."""
    place.endpoint = "http://127.0.0.1:9"
    refusal = await place.refusal()
    assert isinstance(refusal, HubUnreachable)
    assert "http://127.0.0.1:9 cannot be reached" in str(refusal)
    place.endpoint = place.hub.url
    place.environ["HF_HUB_OFFLINE"] = "1"
    refusal = await place.refusal()
    assert isinstance(refusal, HubUnreachable)
    assert "HF_HUB_OFFLINE is set" in str(refusal)
    assert place.hub.seen == []


@pytest.mark.parametrize("path", ["../model.safetensors", "a/../../model.safetensors", "/model.safetensors"])
async def test_a_path_that_leaves_the_model_is_refused(place: Place, path: str) -> None:
    """Whatever a hub lists, nothing is written outside, and nothing inside either."""
    place.hub.repos[REPO].files = {path: weights(), "config.json": b"{}"}
    assert isinstance(await place.refusal(REPO, None, "*"), DownloadError)


async def test_weights_must_be_chosen(place: Place) -> None:
    """A repository of GGUF files names them, one can be asked for, and pickles are never an answer."""
    place.hub.repos[REPO].files = {"a.Q4.gguf": b"GGUF", "a.Q8.gguf": b"GGUF", "config.json": b"{}"}
    refusal = await place.refusal()
    assert isinstance(refusal, InvalidRequest)
    assert "a.Q4.gguf, a.Q8.gguf" in str(refusal)
    assert (await place.pull(REPO, None, "*Q8.gguf")).state is DownloadState.COMPLETED
    assert f"{REPO}/a.Q8.gguf" in place.left()
    place.hub.repos["acme/pickle"] = Repo({"pytorch_model.bin": b"x", "config.json": b"{}"})
    assert isinstance(await place.refusal("acme/pickle", None, "*.bin", "*.json"), InvalidRequest)


async def test_files_where_the_server_was_started_are_not_imported(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file called like a package, as anybody's directory may hold, neither runs nor breaks a download."""
    (tmp_path / "h2.py").write_text("print('taken for a package'); raise SystemExit(3)")
    (tmp_path / "huggingface_hub.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert (await place.pull()).state is DownloadState.COMPLETED


async def test_words_among_the_reports_fail_the_download_alone(place: Place, tmp_path: Path) -> None:
    """What a site's own start-up file prints is no report: the download is refused, the manager goes on."""
    (tmp_path / "sitecustomize.py").write_text("print('welcome', flush=True)")
    place.environ["PYTHONPATH"] = str(tmp_path)
    refused = await place.refusal()
    assert type(refused) is DownloadError
    assert "ended unexpectedly" in str(refused)
    del place.environ["PYTHONPATH"]
    assert (await place.pull()).state is DownloadState.COMPLETED
