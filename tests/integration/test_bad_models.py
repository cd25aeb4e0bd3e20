"""A model that cannot be loaded costs its own requests an answer that says why, and nobody else anything."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest

from opta_lmx.types import EchoOptions
from tests.gguf_files import byte_level_vocabulary, random_weights, write_llama
from tests.integration.chatting import (
    CHAT,
    ask,
    chat,
    check_error,
    connect,
    content,
    depths,
    model_status,
    status,
)
from tests.integration.conftest import StartServer

pytestmark = pytest.mark.mlx

WEIGHTS: Final = "model.safetensors"


def set_config(directory: Path, **changes: Any) -> None:
    """Sets keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path, share: float) -> None:
    """Keeps the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def lose_a_tensor(directory: Path) -> None:
    """Takes the last layer's norm out of the weights."""
    change_weights(directory, lambda weights: weights.pop("model.layers.1.input_layernorm.weight"))


def lose_all_numbers(directory: Path) -> None:
    """Makes every logit NaN."""
    name = "model.norm.weight"
    change_weights(directory, lambda weights: weights.update({name: weights[name] * float("nan")}))


def change_weights(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes the weights anew."""
    import mlx.core as mx

    weights: Any = mx.load(str(directory / WEIGHTS))
    change(weights)
    mx.save_safetensors(str(directory / WEIGHTS), weights)


def lose_the_tokenizer(directory: Path) -> None:
    """Takes all files of the tokenizer out."""
    for path in directory.glob("tokenizer*"):
        path.unlink()


# Told from the directory alone: what is done to a good model -> a part of the reason.
SEEN_ON_DISK: Final[Mapping[str, tuple[Callable[[Path], object], str]]] = {
    "garbage-weights": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 4096), WEIGHTS),
    "empty-weights": (lambda d: (d / WEIGHTS).write_bytes(b""), WEIGHTS),
    "truncated-weights": (lambda d: cut(d / WEIGHTS, 0.5), WEIGHTS),
    "no-weights": (lambda d: (d / WEIGHTS).unlink(), "weights"),
    "pickled-weights": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), "pickle"),
    "no-config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "broken-config": (lambda d: cut(d / "config.json", 0.5), "config.json"),
    "no-model-type": (lambda d: set_config(d, model_type=None), "model_type"),
    "model-file": (lambda d: set_config(d, model_file="run_me.py"), "model_file"),
    "auto-map": (lambda d: set_config(d, auto_map={"AutoModel": "run_me.Model"}), "auto_map"),
}

# Found by the worker that tries. Each costs an import of MLX, so these are few.
FOUND_BY_LOADING: Final[Mapping[str, tuple[Callable[[Path], object], str]]] = {
    "unsupported-type": (lambda d: set_config(d, model_type="martian"), "martian"),
    "missing-tokenizer": (lose_the_tokenizer, "tokenizer"),
    "missing-tensor": (lose_a_tensor, "input_layernorm"),
}


def spoil(good: Path, directory: Path, spoiling: Callable[[Path], object]) -> Path:
    """A copy of a good model with something done to it."""
    shutil.copytree(good, directory)
    spoiling(directory)
    return directory


async def check_refused(client: httpx.AsyncClient, model: str, reason: str) -> None:
    """Both ways of asking get the reason, before any byte of an answer."""
    for streaming in (False, True):
        response = await client.post(CHAT, json=chat(model, "hello", stream=streaming))
        error = check_error(response, 422, "model_load_failed")
        assert model in error["message"]
        assert reason in error["message"]
        assert response.headers["x-should-retry"] == "false"


async def test_a_bad_directory_is_refused_without_a_worker(
    server: StartServer, tiny_model: Callable[..., Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """What the files' names, sizes and headers tell is known before anything is started for the model."""
    good = tiny_model("llama")
    bad = {name: spoil(good, tmp_path / name, spoiling) for name, (spoiling, _) in SEEN_ON_DISK.items()}
    running = server({**bad, "good": EchoOptions()})
    async with connect(running) as client:
        for name, (_, reason) in SEEN_ON_DISK.items():
            with subtests.test(name):
                await check_refused(client, name, reason)
        assert not running.children()
        assert content(await ask(client, "good", "still here")) == "still here"
        available = (await client.get("/admin/models/available")).json()["models"]
        assert {model["id"] for model in available if model["problem"]} == set(bad)


async def test_a_bad_model_costs_its_own_worker_only(
    server: StartServer, tiny_model: Callable[..., Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """The worker that finds the fault ends, status keeps the reason without a path, and other models load."""
    good = tiny_model("llama")
    bad = {name: spoil(good, tmp_path / name, spoiling) for name, (spoiling, _) in FOUND_BY_LOADING.items()}
    nan = spoil(good, tmp_path / "nan", lose_all_numbers)
    running = server({**bad, "nan": nan, "good": EchoOptions()})
    answers: dict[str, httpx.Response] = {}
    async with connect(running) as client:

        async def try_to_load(name: str) -> None:
            answers[name] = await ask(client, name, "hello", max_tokens=2, logprobs=True, temperature=0)

        async with anyio.create_task_group() as tasks:
            for name in (*bad, "nan"):
                tasks.start_soon(try_to_load, name)
        await try_to_load("good")
        shown = await status(client)
        for name, (_, reason) in FOUND_BY_LOADING.items():
            with subtests.test(name):
                error = check_error(answers[name], 422, "model_load_failed")
                assert reason in error["message"]
                assert str(running.log.parent) not in error["message"]
                assert model_status(shown, name)["state"] == "failed"
                assert reason in model_status(shown, name)["reason"]
        with subtests.test("weights that are no numbers fail the request, not the worker"):
            assert "not a number" in check_error(answers["nan"], 500, None)["message"]
        content(answers["good"])
        assert depths(shown) == (0, 0)
        alive = {model_status(shown, name)["pid"] for name in ("good", "nan")}
        assert {child.pid for child in running.children()} == alive


# What is done to a good GGUF -> a part of the reason.
BAD_GGUFS: Final[Mapping[str, tuple[Callable[[bytes], bytes], str]]] = {
    "truncated": (lambda file: file[: len(file) * 7 // 10], "truncated"),
    "wrong-magic": (lambda file: b"GGML" + file[4:], "GGUF"),
    "unknown-architecture": (lambda file: file.replace(b"llama", b"alpac"), "alpac"),
}


async def test_a_bad_gguf_is_refused_and_leaves_nothing(
    server: StartServer, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """Truncated, of another format or architecture: the reason by name, no import begun, nothing on disk after it."""
    vocabulary = byte_level_vocabulary()
    write_llama(tmp_path / "good.gguf", random_weights(len(vocabulary.tokens)), vocabulary)
    for name, (spoiling, _) in BAD_GGUFS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.gguf").write_bytes(spoiling((tmp_path / "good.gguf").read_bytes()))
    running = server({name: tmp_path / name for name in BAD_GGUFS})
    models = running.log.parent / "models"
    before = sorted(models.rglob("*"))
    async with connect(running) as client:
        for name, (_, reason) in BAD_GGUFS.items():
            with subtests.test(name):
                await check_refused(client, name, reason)
        assert (await client.get("/admin/health")).json()["status"] == "ok"
    assert not running.children()
    assert sorted(models.rglob("*")) == before


async def test_a_failed_load_is_told_and_tried_again(server: StartServer) -> None:
    """Each request tries anew, since files can be mended; the admin's load gets the same reason as a chat."""
    running = server({"a": EchoOptions(fail_load="the disk is on fire")})
    async with connect(running) as client:
        for response in (
            await ask(client, "a", "x"),
            await client.post("/admin/models/load", json={"model_id": "a"}),
            await client.post(CHAT, json=chat("a", "x", stream=True)),
        ):
            assert "the disk is on fire" in check_error(response, 422, "model_load_failed")["message"]
        shown = await status(client)
        assert model_status(shown, "a")["state"] == "failed"
        assert "the disk is on fire" in model_status(shown, "a")["reason"]
        assert depths(shown) == (0, 0)
        assert not running.children()
