"""The application over scripted rooms: in process for shapes, behind a real uvicorn for bytes, sockets and SDKs."""

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from opta_lmx.api.routes import build_app
from tests.fakes import Script, World, make_world

CHAT: Final[dict[str, Any]] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def build(world: World) -> Starlette:
    """The application with an id and a time that golden bytes can name."""
    return build_app(world.services, new_id=lambda: "0123abcd", wall=lambda: 1_700_000_000.9)


@pytest.fixture
def world() -> World:
    """Fresh fakes with the default settings."""
    return make_world()


@asynccontextmanager
async def connect(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application over ``world``, in process; crashes are answered as uvicorn's clients see them."""
    transport = httpx.ASGITransport(build(world), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application over ``world``."""
    async with connect(world) as client:
        yield client


@dataclass
class Running:
    """A real server on a free port, in a thread of its own."""

    url: str
    port: int
    world: World


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    world = make_world()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    uvicorn_server = uvicorn.Server(uvicorn.Config(build(world), log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    thread.start()
    try:
        # The socket listens already: whoever connects before the server is up waits in its backlog.
        yield Running(f"http://127.0.0.1:{port}", port, world)
    finally:
        uvicorn_server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture
def running(server: Running) -> Iterator[Running]:
    """The real server, its engine as new; afterwards every generation must have been closed."""
    engine = server.world.engine
    engine.script = Script()
    engine.requests.clear()
    engine.generations.clear()
    engine.opening.clear()
    engine.opened.clear()
    engine.open_cancelled.clear()
    yield server
    assert all(generation.closed.wait(5) for generation in engine.generations)
