"""Tiny models of every cache family, loaded once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.engine.driver import TinyModel
    from tests.tiny_models import Family


@pytest.fixture(scope="session")
def tiny(tiny_model: "Callable[[Family], Path]") -> "Callable[[Family], TinyModel]":
    """Loads the tiny model of a family."""
    loaded: dict[Family, TinyModel] = {}

    def load(family: "Family") -> "TinyModel":
        if family not in loaded:
            loaded[family] = _load(family, tiny_model(family))
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Family], TinyModel]":
    """Loads a tiny model of a family whose head size (32) lets its KV cache be quantised."""
    loaded: dict[Family, TinyModel] = {}

    def load(family: "Family") -> "TinyModel":
        from tests.tiny_models import build_tiny_model

        if family not in loaded:
            path = build_tiny_model(tmp_path_factory.mktemp("wide") / family, family, head_dim=32)
            loaded[family] = _load(family, path)
        return loaded[family]

    return load


def _load(family: "Family", path: Path) -> "TinyModel":
    from vllm_mlx.utils.tokenizer import collect_eos_token_ids, load_model_with_fallback

    from opta_lmx.inference.worker.detokenizer import TokenTable
    from opta_lmx.inference.worker.geometry import measure
    from tests.integration.engine.driver import TinyModel, WatchedModel

    wrapped: Any
    model, wrapped = load_model_with_fallback(str(path), {"trust_remote_code": False}, model_id=family)
    tokenizer = getattr(wrapped, "_tokenizer", wrapped)
    stop_ids = frozenset(collect_eos_token_ids(tokenizer, str(path)))
    return TinyModel(family, WatchedModel(model), wrapped, TokenTable(tokenizer), stop_ids, measure(model))
