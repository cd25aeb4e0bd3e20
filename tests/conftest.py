"""What every test may ask for: the event loop the server runs on, and tiny models built once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.tiny_models import Family

# A deadline would measure the machine's other tenants; a replayed example belongs in an @example, not in a folder.
settings.register_profile("house", deadline=None, database=None, max_examples=50)
settings.load_profile("house")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Coroutine tests run on uvloop, as the server does."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Family], Path]":
    """Gives the directory of a tiny real model of one family; imports MLX, so only for tests marked mlx."""
    built: dict[Family, Path] = {}

    def build(family: "Family") -> Path:
        from tests.tiny_models import build_tiny_model

        if family not in built:
            built[family] = build_tiny_model(tmp_path_factory.mktemp("models") / f"tiny-{family}", family)
        return built[family]

    return build
