"""How the hidden states of an encoder become one vector, as the files of sentence-transformers say it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from opta_lmx.types import JsonObject

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len"]

_KEYS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}


@dataclass(frozen=True, slots=True)
class SentenceConfig:
    """``longest`` is in tokens, None where the files do not say; ``normalise`` to the length 1."""

    pooling: Pooling = "mean"
    normalise: bool = False
    longest: int | None = None
    lowercase: bool = False


def read_sentence_config(directory: Path) -> SentenceConfig:
    """What modules.json and the files it names say; without them the mean of the hidden states, as they are.

    Raises ValueError for a step that is not supported or is not in the directory, and what reading JSON raises.
    """
    text = _read(directory / "sentence_bert_config.json")
    pooling: Pooling = "mean"
    normalise = False
    for module in _read(directory / "modules.json", []):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(_read(_within(directory, module["path"]) / "config.json"))
        elif kind == "Normalize":
            normalise = True
        elif kind != "Transformer":
            raise ValueError(f"modules.json asks for a step of type {kind!r}, which is not supported")
    return SentenceConfig(pooling, normalise, text.get("max_seq_length"), bool(text.get("do_lower_case")))


def _within(directory: Path, folder: str) -> Path:
    """A folder of the model; its files may be links, as in the hub's cache, but the folder leads nowhere else."""
    path = directory / folder
    if ".." in Path(folder).parts or not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError("modules.json names a path that leaves the model's directory")
    return path


def _pooling(config: JsonObject) -> Pooling:
    wanted = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if len(wanted) != 1 or wanted[0] not in _KEYS:
        raise ValueError(f"the pooling {' with '.join(wanted) or 'of its config'} is not supported")
    return _KEYS[wanted[0]]


def _read(path: Path, otherwise: Any = None) -> Any:
    if not path.is_file():
        return {} if otherwise is None else otherwise
    return json.loads(path.read_text(encoding="utf-8"))


def pool(states: mx.array, mask: mx.array, config: SentenceConfig) -> mx.array:
    """One float32 vector for each row of hidden states; padding (``mask`` False) has no part in it."""
    vectors = _POOLS[config.pooling](states.astype(mx.float32), mask[:, :, None])
    return normalised(vectors) if config.normalise else vectors


def normalised(vectors: mx.array) -> mx.array:
    """Vectors of length 1; one of length 0 stays."""
    return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _sum(states: mx.array, mask: mx.array) -> mx.array:
    return mx.sum(mx.where(mask, states, 0.0), axis=1)


_POOLS: dict[Pooling, Callable[[mx.array, mx.array], mx.array]] = {
    "cls": lambda states, mask: states[:, 0],
    "mean": lambda states, mask: _sum(states, mask) / mask.sum(axis=1),
    "max": lambda states, mask: mx.max(mx.where(mask, states, -mx.inf), axis=1),
    "mean_sqrt_len": lambda states, mask: _sum(states, mask) / mx.sqrt(mask.sum(axis=1).astype(mx.float32)),
}
