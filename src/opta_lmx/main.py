"""The one place where the rooms are wired, started and stopped."""

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import anyio
import uvicorn
from starlette.applications import Starlette

from opta_lmx import __version__
from opta_lmx.api.connection import Connection, raise_open_files
from opta_lmx.api.large_bodies import clear_leftovers
from opta_lmx.api.routes import build_app
from opta_lmx.api.services import Services
from opta_lmx.config import Config
from opta_lmx.errors import LmxError
from opta_lmx.inference.engine import InferenceEngine
from opta_lmx.inference.spawner import WorkerSpawner
from opta_lmx.manager.catalog import is_encoder
from opta_lmx.manager.changes import ChangeFeed, ModelChange
from opta_lmx.manager.download import DownloadManager
from opta_lmx.manager.download_job import Download
from opta_lmx.manager.footprint import footprint_bytes
from opta_lmx.manager.memory import MemoryMonitor, SystemProbe
from opta_lmx.manager.metal import read_metal
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.residency import Residency
from opta_lmx.monitoring.logging import configure_logging, get_logger
from opta_lmx.monitoring.timing import RequestBook
from opta_lmx.reload import Reloader
from opta_lmx.types import LoadOptions, ModelFiles, ModelState, Worker, WorkerExit

# Once the drain is over nothing should be open; a connection that is gets this long before it is cut.
_CONNECTION_GRACE_SECONDS = 2
_STOP_WORKERS_SECONDS = 15.0
_TICK_SECONDS = 1.0

# ``prefix_cache.ram_bytes: auto``: tens of chats on a 48 GB machine, and small beside any model on a 512 GB one.
_PREFIX_CACHE_SHARE = 0.05
_PREFIX_CACHE_LEAST_BYTES = 128 * 1024**2
_PREFIX_CACHE_MOST_BYTES = 8 * 1024**3

_log = get_logger("main")


class Supervisor:
    """Owns every background task. One that fails takes the server down: no server runs with a dead organ.

    Plain asyncio tasks, because they are also started from callbacks of the event loop (a worker's end, a signal),
    where anyio's groups cannot be entered.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tasks can be started inside; leaving cancels them and waits for their end."""
        self._open = True
        try:
            yield
        finally:
            self._open = False
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def start_soon(self, func: Callable[..., Awaitable[object]], /, *args: object) -> None:
        """Run a coroutine function in the background; nothing happens once the server is ending."""
        if self._open:
            task = asyncio.get_running_loop().create_task(self._supervise(func, args))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _supervise(self, func: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            await func(*args)
        except Exception as error:  # noqa: BLE001 - a border: whatever ends a task ends the server, and says so
            name = getattr(func, "__qualname__", repr(func))
            _log.critical("task_failed", task=name, exc_info=True)
            self.failure = self.failure or error
            self.on_failure()


class Runtime:
    """Everything a running server holds, built from its configuration and from nothing else."""

    def __init__(self, config: Config, reread: Callable[[], Config] | None = None) -> None:
        """``reread`` reads the settings again for a reload; None: they come from nowhere that could have changed."""
        started = time.monotonic()
        self.config = config
        self.reloader = Reloader(config, self._put_in_force, reread)
        self.supervisor = Supervisor()
        self.requests = RequestBook()
        self.changes = ChangeFeed()
        self.memory = MemoryMonitor(config.memory, SystemProbe(read_metal(), self._footprints))
        self.models = ModelManager(config.models)
        self.downloads = DownloadManager(
            config.downloads, config.models.directory, self.models, self.supervisor, on_change=self._download_changed
        )
        self.spawner = WorkerSpawner(keep_spare=config.models.spare_worker, start_soon=self.supervisor.start_soon)
        self.residency = Residency(
            config=config.models,
            memory=self.memory,
            spawn=self._spawn,
            options=self._load_options,
            tasks=self.supervisor,
            auto_evict=config.memory.auto_evict_lru,
            workers=config.workers,
            on_change=self._model_changed,
        )
        self.engine = InferenceEngine(config, self.models, self.residency, requests=self.requests)
        self.services = Services(
            config=config,
            engine=self.engine,
            models=self.models,
            residency=self.residency,
            memory=self.memory,
            downloads=self.downloads,
            uptime=lambda: time.monotonic() - started,
            requests=self.requests,
            changes=self.changes,
            reload=self.reloader.reload,
        )

    def app(self) -> Starlette:
        """The ASGI application, with this runtime's lifespan."""
        return build_app(self.services, self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        async with self.supervisor.running():
            for work in (self.spawner.warm, self._tick_forever, self._load_wanted):
                self.supervisor.start_soon(work)
            try:
                yield
            finally:
                with anyio.move_on_after(_STOP_WORKERS_SECONDS, shield=True):
                    await self.residency.close()
                    await self.spawner.close()

    def _put_in_force(self, config: Config) -> None:
        """Tell every owner of changed settings, the memory cap before those who wait for room under it."""
        self.config = self.services.config = config
        self.memory.reconfigure(config.memory)
        self.residency.reconfigure(config.models, auto_evict=config.memory.auto_evict_lru, workers=config.workers)
        self.engine.reconfigure(config)
        self.downloads.reconfigure(config.downloads)

    async def _tick_forever(self) -> None:
        while True:
            await anyio.sleep(_TICK_SECONDS)
            self.residency.step(time.monotonic())
            self.engine.step(time.monotonic())

    async def _load_wanted(self) -> None:
        """Import the starter, so that the first request finds it ready, and load what the configuration asks for."""
        models = self.config.models
        if models.starter:
            await self._try("starter_import_failed", self.models.ensure_local, models.default_model)
        for name in models.auto_load:
            await self._try("auto_load_failed", self.engine.load_model, name)

    async def _try(self, event: str, work: Callable[[str], Awaitable[object]], name: str) -> None:
        try:
            await work(name)
        except LmxError as error:
            _log.error(event, model=name, reason=str(error))

    async def _spawn(self, model: ModelFiles, options: LoadOptions, on_exit: Callable[[WorkerExit], None]) -> Worker:
        """As the spawner; the time of a load that succeeds goes into the books."""
        started = time.monotonic()
        worker = await self.spawner(model, options, on_exit)
        self.requests.loaded(model.id, time.monotonic() - started)
        return worker

    def _model_changed(self, change: ModelChange) -> None:
        if change.cause is not None:
            self.requests.stopped(change.model_id, change.cause)
        if change.state is ModelState.FAILED:
            self.requests.load_failed(change.model_id)
        if change.state is ModelState.ABSENT and change.reason is not None and self._is_wanted(change.model_id):
            self.supervisor.start_soon(self._try, "restart_failed", self.engine.revive_model, change.model_id)
        self.changes.publish(change)

    def _is_wanted(self, model_id: str) -> bool:
        """True for models that are to be in memory whether or not anybody asks."""
        known = [files.id for files in self.models.list_available()]
        return model_id in {self.engine.resolve(name) for name in self.config.models.auto_load if name in known}

    def _download_changed(self, download: Download) -> None:
        if download.state.is_last:
            self.requests.downloads[download.state.value] += 1
        self.changes.publish(download)

    def _footprints(self) -> int:
        """What the workers hold together, in bytes."""
        return sum(footprint_bytes(model.pid) for model in self.residency.snapshot() if model.pid is not None)

    def _load_options(self, files: ModelFiles) -> LoadOptions:
        scheduling = self.config.scheduling
        per_model = self.config.models.per_model.get(files.id)
        return LoadOptions(
            max_running=scheduling.max_running,
            prefill_chunk_tokens=scheduling.prefill_chunk_tokens,
            stall_bound_seconds=scheduling.stall_bound_seconds,
            prefix_cache_bytes=self._prefix_cache_bytes(files),
            context_length=per_model.context_length if per_model else None,
            kv_bits=per_model.kv_bits if per_model else None,
            tool_format=per_model.tool_format if per_model else None,
            reasoning_format=per_model.reasoning_format if per_model else None,
            echo=files.echo,
        )

    def _prefix_cache_bytes(self, files: ModelFiles) -> int:
        """One model's budget: the configured one, or a share of the memory cap that is no wild multiple of its size."""
        if is_encoder(files):
            return 0
        configured = self.config.scheduling.prefix_cache.ram_bytes
        if configured != "auto":
            return configured
        share = int(self.memory.limit_bytes * _PREFIX_CACHE_SHARE)
        weights = files.weights_bytes or files.size_bytes
        return min(_PREFIX_CACHE_MOST_BYTES, share, _PREFIX_CACHE_LEAST_BYTES + weights)


class Server(uvicorn.Server):
    """uvicorn with our own way to stop: SIGTERM drains and exits 0, a second one ends at once."""

    def __init__(self, runtime: Runtime) -> None:
        server = runtime.config.server
        super().__init__(
            uvicorn.Config(
                runtime.app(),
                host=server.host,
                port=server.port,
                loop="uvloop",
                http=cast("type[asyncio.Protocol]", partial(Connection, limits=lambda: runtime.config.server)),
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_CONNECTION_GRACE_SECONDS,
            )
        )
        self._runtime = runtime
        self._in_terminal = os.isatty(0)
        runtime.supervisor.on_failure = self._stop_now

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the place of uvicorn's handlers, which end the process by re-raising the signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and say so."""
        await super().startup(sockets)
        if self.started:
            server = self._runtime.config.server
            _log.info("server_started", version=__version__, url=f"http://{server.host}:{server.port}")
            # What is there now stays: collections that went through it all would hold up every stream for 30 ms.
            gc.freeze()
            gc.enable()

    def _stop_now(self) -> None:
        self.should_exit = True

    def _hung_up(self) -> None:
        """SIGHUP: somebody asks for a reload, or the terminal the server was started in has gone, which ends it."""
        if self._in_terminal and not os.isatty(0):
            self._asked_to_stop()
        else:
            self._runtime.supervisor.start_soon(self._runtime.reloader.reload_by_signal)

    def _asked_to_stop(self) -> None:
        engine = self._runtime.engine
        if engine.draining:
            self.force_exit = True
            self.should_exit = True
            # Whoever still waits sees that there is no answer, rather than half of one.
            for connection in self.server_state.connections:
                connection.transport.abort()
            return
        engine.draining = True
        _log.info("drain_started", running=sum(running for running, _ in engine.queue_depths().values()))
        self._runtime.supervisor.start_soon(self._drain)

    async def _drain(self) -> None:
        """Let what runs finish, for at most ``drain_seconds``; new requests are refused meanwhile."""
        engine = self._runtime.engine
        with anyio.move_on_after(self._runtime.config.server.drain_seconds):
            await engine.idle()
        # Whatever still runs or waits ends with an error of ours, not with a connection cut by uvicorn.
        self._runtime.models.close()
        await self._runtime.residency.close()
        # Followers of downloads, and readers of changes, would keep the server waiting for them.
        await self._runtime.downloads.close()
        self._runtime.changes.close()
        self.should_exit = True


def serve(config: Config, config_path: Path | None, reread: Callable[[], Config]) -> int:
    """Run until asked to stop; 0 after a stop, 1 if a part of the server failed. ``reread`` is for reloads."""
    configure_logging(config.logging)
    raise_open_files(config.server.max_connections)
    clear_leftovers()
    _log.info("config_read", path=str(config_path) if config_path else None)
    runtime = Runtime(config, reread)
    server = Server(runtime)
    server.run()
    failed = runtime.supervisor.failure is not None or not server.started
    _log.info("server_stopped", exit_code=int(failed))
    return int(failed)
