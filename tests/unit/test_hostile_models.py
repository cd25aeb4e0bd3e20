"""Model directories made to hurt: a look at one is over at once, and nothing but data would be loaded."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import LoadFailed
from opta_lmx.manager.integrity import ModelsLock
from opta_lmx.manager.model import ModelManager

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GIB = 1024**3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A good model, the only one of its models directory."""
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (model / CONFIG).write_text(json.dumps({"model_type": "llama"}))
    (model / WEIGHTS).write_bytes(save({"a": np.zeros(4, np.float16)}))
    return model


def hole(path: Path, size: int, head: bytes = b"") -> None:
    """A file that claims much and takes no room on the disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def link(path: Path, target: str) -> None:
    """A link in the place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    """A pipe that nobody writes to in the place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    """A folder in the place of a file."""
    path.unlink()
    path.mkdir()


# What is done to a good model -> a part of the reason it is refused with.
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "endless-config": (lambda m: hole(m / CONFIG, GIB), "config.json is larger than"),
    "endless-index": (lambda m: hole(m / "model.safetensors.index.json", GIB), "is larger than"),
    "endless-tokenizer": (lambda m: hole(m / "tokenizer.json", GIB), "tokenizer.json is larger than"),
    "endless-tokenizer-config": (lambda m: hole(m / "tokenizer_config.json", GIB), "is larger than"),
    "header-of-a-terabyte": (lambda m: hole(m / WEIGHTS, GIB, struct.pack("<Q", 2**40)), "its header claims"),
    "header-of-zeros": (lambda m: hole(m / WEIGHTS, GIB, struct.pack("<Q", 2**24)), "not a table of tensors"),
    "deep-header": (
        lambda m: (m / WEIGHTS).write_bytes(struct.pack("<Q", 2**20) + b'{"x":' + b"[" * (2**20 - 5)),
        "not a table of tensors",
    ),
    "config-is-a-pipe": (lambda m: pipe(m / CONFIG), "config.json is neither a file nor a folder"),
    "weights-are-a-pipe": (lambda m: pipe(m / WEIGHTS), "model.safetensors is neither a file nor a folder"),
    "tokenizer-is-a-pipe": (lambda m: pipe(m / "tokenizer.json"), "tokenizer.json is neither"),
    "weights-are-a-device": (lambda m: link(m / WEIGHTS, "/dev/zero"), "a link that leaves the models directory"),
    "config-is-elsewhere": (lambda m: link(m / CONFIG, "/etc/passwd"), "a link that leaves the models directory"),
    "config-climbs": (lambda m: link(m / CONFIG, "../../../etc/passwd"), "a link that leaves the models directory"),
    "tokenizer-is-elsewhere": (lambda m: link(m / "tokenizer.json", "/etc/passwd"), "a link that leaves"),
    "folder-is-elsewhere": (lambda m: link(m / "1_Pooling", "/etc"), "a link that leaves the models directory"),
    "loop": (lambda m: link(m / CONFIG, CONFIG), "it has no config.json"),
    "config-is-a-folder": (lambda m: folder(m / CONFIG), "it has no config.json"),
    "only-pickles": (lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), "its weights are pickled"),
    "only-a-checkpoint": (lambda m: (m / WEIGHTS).rename(m / "model.pt"), "its weights are pickled"),
    "only-an-archive": (lambda m: (m / WEIGHTS).rename(m / "model.zip"), "it has no weights"),
    "only-numpy": (lambda m: (m / WEIGHTS).rename(m / "weights.npz"), "it has no weights"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_it_is_refused_with_the_reason_in_little_memory(name: str, model: Path) -> None:
    """By the listing and by a load alike; a header within the limit is the most that is read."""
    spoil, reason = HOSTILE[name]
    spoil(model)
    tracemalloc.start()
    try:
        models = ModelManager(ModelsConfig(models_directory=str(model.parent), starter=False))
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024**2
    finally:
        tracemalloc.stop()
    [files] = models.list_available()
    assert files.problem is not None
    assert reason in files.problem
    assert len(files.problem) < 300
    with pytest.raises(LoadFailed):
        await models.ensure_local("m")


def test_code_beside_the_model_is_no_part_of_it(model: Path) -> None:
    """Files that nothing names are not loaded, and so are no reason to refuse the model."""
    for name in ("modeling_llama.py", "setup.sh", "pytorch_model.bin", "more.zip"):
        (model / name).write_bytes(b"import os")
    [files] = ModelManager(ModelsConfig(models_directory=str(model.parent), starter=False)).list_available()
    assert files.problem is None


def test_hashing_waits_for_no_pipe_and_follows_no_folder(model: Path, tmp_path: Path) -> None:
    """What is no file of the model is in no record."""
    pipe(model / "pipe.json")
    link(model / "folder", "/etc")
    lock = ModelsLock(tmp_path)
    lock.record("m", model, "acme/m", "main")
    record = lock.find("m")
    assert record is not None
    assert set(record.files) == {CONFIG, WEIGHTS}
    assert [check.name for check in lock.check("m", model)] == [CONFIG, WEIGHTS]
