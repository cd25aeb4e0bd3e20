"""The import job and its parent: refusals, sharing, cancelling and dying; nothing is ever left behind."""

import asyncio
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from gguf import GGMLQuantizationType as Kind

from opta_lmx.config import Config
from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import Conflict, Draining, LoadFailed, MemoryLimit
from opta_lmx.inference.engine import InferenceEngine
from opta_lmx.inference.worker.convert import STAGING_SUFFIX
from opta_lmx.manager.gguf import GgufError
from opta_lmx.manager.importing import GgufImporter
from opta_lmx.manager.memory import Verdict
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.starter import StarterModel, starter_files
from opta_lmx.types import GenerateRequest, SamplingParams, TextPrompt
from tests.fake_workers import House
from tests.gguf_files import byte_level_vocabulary, random_weights, write_llama

# Seconds; an import of the starter takes three on two slow cores.
_BOUND = 30.0


@pytest.fixture(scope="module")
def starter() -> StarterModel:
    """Its file is large enough that a job for it can be met at work."""
    found = starter_files(ModelsConfig())
    assert found is not None
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small GGUF file that can be imported."""
    vocabulary = byte_level_vocabulary()
    path = tmp_path / "models" / "acme" / "tiny" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    write_llama(path, random_weights(len(vocabulary.tokens)), vocabulary, Kind.Q4_0)
    return path


def manager(root: Path) -> ModelManager:
    return ModelManager(ModelsConfig(models_directory=str(root), starter=False))


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def staging_of(target: Path) -> Path:
    return target.with_name(target.name + STAGING_SUFFIX)


def job(source: Path, target: Path) -> "subprocess.Popen[bytes]":
    form = ["--precision", "full", "--bits", "8"]
    command = [sys.executable, "-m", "opta_lmx.inference.worker.convert", str(source), str(target), *form]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _BOUND
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Holds the lock of a job's directory, so that a job for it waits as long as the test likes."""
    directory.mkdir(parents=True)
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


# -- other models' GGUF files --------------------------------------------------------------------------


async def test_a_gguf_of_the_models_directory_is_imported_beside_it(tiny: Path) -> None:
    """Its import is hidden from the listing, used by every load, and made again when the file is another."""
    root = tiny.parents[2]
    models = manager(root)
    first = await models.ensure_local("acme/tiny")
    assert (first.path, first.format, first.verified) == (root / ".imported" / "acme" / "tiny", "mlx", True)
    assert [(files.id, files.format) for files in models.list_available()] == [("acme/tiny", "gguf")]
    inode = (first.path / "model.safetensors").stat().st_ino
    again = await manager(root).ensure_local("acme/tiny")
    assert again == first
    assert (again.path / "model.safetensors").stat().st_ino == inode
    vocabulary = byte_level_vocabulary()
    write_llama(tiny, random_weights(len(vocabulary.tokens), seed=9), vocabulary, Kind.Q8_0)
    models.refresh()
    assert (await models.ensure_local("acme/tiny")).quantization == "8bit"
    assert models.delete("acme/tiny") > tiny.parents[2].stat().st_size
    assert names_in(root) == {".imported", "models.lock"}
    assert names_in(root / ".imported") == set()


async def test_a_running_import_is_shown_and_keeps_its_model(tiny: Path) -> None:
    """While it runs it is listed with how far it is, and its model cannot be deleted; afterwards neither holds."""
    models = manager(tiny.parents[2])
    target = tiny.parents[2] / ".imported" / "acme" / "tiny"
    assert models.imports() == {}
    with anyio.fail_after(_BOUND):
        async with anyio.create_task_group() as group:
            with held(staging_of(target)):
                group.start_soon(models.ensure_local, "acme/tiny")
                await until(lambda: "acme/tiny" in models.imports())
                with pytest.raises(Conflict, match="being imported"):
                    models.delete("acme/tiny")
    assert models.imports() == {}
    assert models.delete("acme/tiny") > 0


async def test_other_bits_are_another_import(tmp_path: Path) -> None:
    """The setting decides the form of what is quantised again; a change makes the import again, and only then."""
    vocabulary = byte_level_vocabulary()
    source = tmp_path / "m" / "m.gguf"
    source.parent.mkdir()
    write_llama(source, random_weights(len(vocabulary.tokens)), vocabulary, Kind.MXFP4)
    eight = await manager(tmp_path).ensure_local("m")
    assert eight.quantization == "8bit"
    four = ModelManager(ModelsConfig(models_directory=str(tmp_path), starter=False, gguf_import_bits=4))
    files = await four.ensure_local("m")
    assert (files.quantization, files.verified) == ("4bit", True)
    made = (files.path / "model.safetensors").stat().st_mtime_ns
    again = await four.ensure_local("m")
    assert (again.path / "model.safetensors").stat().st_mtime_ns == made


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.999])
async def test_a_truncated_starter_is_refused(share: float, starter: StarterModel, tmp_path: Path) -> None:
    """Cut in its magic, its vocabulary or its tensors, it is refused by name and leaves nothing behind."""
    source = tmp_path / "models" / "cut" / "cut.gguf"
    source.parent.mkdir(parents=True)
    with starter.gguf.open("rb") as whole:
        source.write_bytes(whole.read(int(starter.gguf.stat().st_size * share)))
    with pytest.raises(LoadFailed, match=r"cut\.gguf: it is truncated"):
        await manager(tmp_path / "models").ensure_local("cut")
    with pytest.raises(GgufError, match="it is truncated"):
        await GgufImporter().import_gguf(source, tmp_path / "models" / "target")
    assert names_in(tmp_path / "models") == {"cut"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 10**12, 10**12), "claims 1,000,000,000,000 tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 10**12), "claims 1,000,000,000,000 bytes in one string"),
    ],
)
async def test_a_file_that_is_none_starts_no_job(content: bytes, reason: str, tmp_path: Path) -> None:
    """What the header already refuses costs no process and no byte of disk."""
    source = tmp_path / "bad.gguf"
    source.write_bytes(content)
    with pytest.raises(GgufError, match=reason):
        await GgufImporter().import_gguf(source, tmp_path / "target")
    assert names_in(tmp_path) == {"bad.gguf"}


async def test_a_refusal_of_the_job_reaches_everybody(tmp_path: Path) -> None:
    """What only the job can see fails all who wait with one error, and nothing is left behind."""
    vocabulary = byte_level_vocabulary()
    source = tmp_path / "m.gguf"
    changes = {"llama.rope.scaling.type": "yarn"}
    write_llama(source, random_weights(len(vocabulary.tokens)), vocabulary, changes=changes)
    importer = GgufImporter()
    calls = [importer.import_gguf(source, tmp_path / "target") for _ in range(3)]
    first, *others = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(first, GgufError)
    assert "rotary scaling of type 'yarn' is not supported" in first.reason
    assert all(other is first for other in others)
    assert names_in(tmp_path) == {"m.gguf"}


async def test_an_error_of_the_system_is_reported(tiny: Path, tmp_path: Path) -> None:
    """It is told in the system's own words."""
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(GgufError, match=r"File exists|Not a directory"):
        await GgufImporter().import_gguf(tiny, tmp_path / "file" / "target")


async def test_what_cannot_fit_is_not_imported(tiny: Path) -> None:
    """A load, and a request, of a GGUF one byte too large for the room are refused with its plan, and no job runs.

    With that byte it is imported and loaded, and takes what the plan had said.
    """
    root = tiny.parents[2]
    config = Config(models=ModelsConfig(models_directory=str(root), starter=False))
    async with House(config.models) as house:
        models = ModelManager(config.models)
        engine = InferenceEngine(config, models, house.residency, house.clock)
        plan = engine.plan_model("acme/tiny")
        assert plan.verdict is Verdict.FITS
        house.machine.others_bytes = house.machine.limit_bytes - plan.need.total_bytes + 1
        request = GenerateRequest("r", "acme/tiny", TextPrompt("x"), SamplingParams())
        for attempt in (engine.load_model("acme/tiny"), engine.open(request)):
            with pytest.raises(MemoryLimit) as caught:
                await attempt
            assert caught.value.plan == engine.plan_model("acme/tiny").as_dict()
            assert caught.value.need_bytes == plan.need.total_bytes
        assert names_in(root) == {"acme"}
        house.machine.others_bytes -= 1
        await engine.load_model("acme/tiny")
        assert house.shown("acme/tiny").need == plan.need
        assert engine.plan_model("acme/tiny").need == plan.need


# -- joining, cancelling, dying ------------------------------------------------------------------------


async def test_callers_share_one_job(tiny: Path, tmp_path: Path) -> None:
    """Many callers of one target make one import, which is finished once before anybody is answered."""
    importer, finished = GgufImporter(), list[bool]()
    target = tmp_path / "out"

    async def call() -> None:
        await importer.import_gguf(tiny, target, lambda: finished.append(target.is_dir()))
        assert finished == [True]

    await asyncio.gather(*(call() for _ in range(5)))
    assert finished == [True]


async def until(holds: Callable[[], bool]) -> None:
    """The waiting room of the tests below; their own bound ends it."""
    while not holds():  # noqa: ASYNC110 - processes and files set no event
        await anyio.sleep(0.002)


async def test_cancelling_ends_the_job_and_removes_its_files(
    starter: StarterModel, tmp_path: Path, children: Callable[[], set[psutil.Process]]
) -> None:
    """The process is gone and nothing is left when the cancelled call returns, also in the middle of the weights."""
    target = tmp_path / "out"
    with anyio.fail_after(_BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(GgufImporter().import_gguf, starter.gguf, target)
            await until((staging_of(target) / "model.safetensors").exists)
            assert len(children()) == 1
            group.cancel_scope.cancel()
    assert children() == set()
    assert names_in(tmp_path) == set()


async def test_a_waiter_takes_over_from_a_cancelled_caller(
    tiny: Path, tmp_path: Path, children: Callable[[], set[psutil.Process]]
) -> None:
    """If the caller whose job it is leaves, the next one starts it again and everybody else gets that outcome."""
    importer, target = GgufImporter(), tmp_path / "out"
    done: list[str] = []

    async def call(name: str, *, task_status: anyio.abc.TaskStatus[anyio.CancelScope]) -> None:
        with anyio.CancelScope() as scope:
            task_status.started(scope)
            await importer.import_gguf(tiny, target)
            done.append(name)

    with anyio.fail_after(_BOUND):
        async with anyio.create_task_group() as group:
            with held(staging_of(target)):
                leader = await group.start(call, "leader")
                for name in ("second", "third"):
                    await group.start(call, name)
                await until(lambda: bool(children()))
                first = children()
                leader.cancel()
                await until(lambda: bool(children() - first) and not children() & first)
                assert done == []
    assert sorted(done) == ["second", "third"]
    assert (target / "model.safetensors").is_file()
    assert not staging_of(target).exists()


async def test_closing_ends_every_import(
    tiny: Path, tmp_path: Path, children: Callable[[], set[psutil.Process]]
) -> None:
    """Everybody who waits is told that the server stops, the process has gone then, and no other import begins."""
    importer, target = GgufImporter(), tmp_path / "out"

    async def call() -> None:
        with pytest.raises(Draining):
            await importer.import_gguf(tiny, target)

    with anyio.fail_after(_BOUND), held(staging_of(target)):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
            await until(lambda: bool(children()))
            importer.close()
        assert children() == set()
        await call()
    assert not target.exists()


async def test_a_job_that_stands_still_is_ended(
    tiny: Path, tmp_path: Path, children: Callable[[], set[psutil.Process]]
) -> None:
    """Without progress for the bound it is killed, and its callers are told."""
    with held(staging_of(tmp_path / "out")):
        with pytest.raises(GgufError, match=r"no progress for 0\.5 seconds"):
            await GgufImporter(stall_seconds=0.5).import_gguf(tiny, tmp_path / "out")
        assert children() == set()


def test_the_job_dies_with_its_parent_and_is_swept_up(starter: StarterModel, tmp_path: Path) -> None:
    """The end of its standard input ends it at once; the next look at the directory removes what it left."""
    target = tmp_path / "models" / "out"
    with job(starter.gguf, target) as process:
        wait_until((staging_of(target) / "model.safetensors").exists)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(_BOUND) == 1
    assert staging_of(target).is_dir()
    assert manager(target.parent).list_available() == ()
    assert names_in(target.parent) == set()


async def test_a_killed_job_leaves_nothing_that_is_served(starter: StarterModel, tiny: Path, tmp_path: Path) -> None:
    """Killed in the middle of the weights, it leaves no model; the next import of that target starts clean."""
    root = tmp_path / "other"
    target = root / "out"
    with job(starter.gguf, target) as process:
        wait_until((staging_of(target) / "model.safetensors").exists)
        process.kill()
        assert process.wait(_BOUND) == -signal.SIGKILL
    assert not target.exists()
    await GgufImporter().import_gguf(tiny, target)
    assert names_in(root) == {"out"}
    assert json.loads((target / "config.json").read_text())["hidden_size"] == 64


async def test_progress_is_known_while_a_job_runs(starter: StarterModel, tmp_path: Path) -> None:
    """It rises from nothing to the bytes of all tensors, and is gone with the job."""
    importer, target = GgufImporter(), tmp_path / "out"
    assert importer.progress(target) is None
    seen: set[tuple[int, int]] = set()
    with anyio.fail_after(_BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(importer.import_gguf, starter.gguf, target)
            await until(lambda: importer.progress(target) is not None)
            while (progress := importer.progress(target)) is not None:
                seen.add((progress.done_bytes, progress.total_bytes))
                await anyio.sleep(0.002)
    assert (0, 0) in seen
    totals = {total for _, total in seen} - {0}
    assert len(totals) == 1
    assert len(seen) > 5
    assert max(seen)[0] <= max(totals) < starter.gguf.stat().st_size


def test_a_running_job_is_not_swept_up(tmp_path: Path) -> None:
    """What a living job holds is left alone, whoever looks."""
    target = tmp_path / "models" / "out"
    with held(staging_of(target)):
        manager(target.parent).refresh()
        assert staging_of(target).is_dir()
    manager(target.parent).refresh()
    assert not staging_of(target).exists()


def test_two_servers_may_import_at_once(starter: StarterModel, tmp_path: Path) -> None:
    """Jobs of two processes for one target both succeed, one after the other, and leave one whole model."""
    target = tmp_path / "out"
    with job(starter.gguf, target) as first, job(starter.gguf, target) as second:
        assert [process.wait(_BOUND) for process in (first, second)] == [0, 0]
    assert names_in(tmp_path) == {"out"}
    files = manager(tmp_path).find("out")
    assert files is not None
    assert files.problem is None


def test_progress_is_told_in_bytes(tiny: Path, tmp_path: Path) -> None:
    """JSON lines that rise to their total, and nothing else on standard output."""
    with job(tiny, tmp_path / "out") as process:
        assert process.stdout is not None
        lines = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)
    assert {line["total"] for line in lines} == {lines[-1]["done"]}
