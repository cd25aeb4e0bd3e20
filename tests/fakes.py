"""The rooms behind the HTTP room, as tests need them: scripted, instant, and watchful.

Everything here may be used from the thread of a test while a server runs in another.
"""

import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio

from opta_lmx.api.services import Services
from opta_lmx.config import Config, ConfigError, MemoryConfig
from opta_lmx.config_changes import ConfigChanges
from opta_lmx.config_models import Preset
from opta_lmx.errors import LmxError
from opta_lmx.inference.engine import InferenceEngine
from opta_lmx.manager.changes import ChangeFeed
from opta_lmx.manager.download import DownloadManager
from opta_lmx.manager.download_job import Download, DownloadState, FileProgress
from opta_lmx.manager.importing import ImportProgress
from opta_lmx.manager.memory import LoadNeed, MemoryMonitor
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.residency import LoadResult, Residency, ResidentModel, UnloadResult
from opta_lmx.router.resolve import resolve
from opta_lmx.types import (
    CacheReport,
    Delta,
    FinishReason,
    GenerateRequest,
    Lane,
    MemoryReading,
    ModelFacts,
    ModelFiles,
    ModelState,
)

GIB = 1024**3


def text_deltas(*texts: str, choice: int = 0, finish: FinishReason = FinishReason.STOP) -> list[list[Delta]]:
    """One look for each text, one token each; the last carries the finish."""
    last = len(texts) - 1
    return [[Delta(choice, text, 1, finish if index == last else None)] for index, text in enumerate(texts)]


@dataclass(frozen=True)
class Script:
    """What the next generations do.

    ``refusal`` is raised by ``open``; otherwise the ``looks`` come, then ``failure`` is raised, or, if ``hangs``,
    nothing comes any more. ``opens`` False leaves ``open`` waiting for ever. ``tool_format`` and ``reasoning_format``
    are the model's; ``in_reasoning`` says that its template opened the reasoning.
    """

    looks: Sequence[list[Delta]] = field(default_factory=lambda: text_deltas("Hel", "lo", "."))
    prompt_tokens: int = 5
    cache: CacheReport = field(default_factory=CacheReport)
    refusal: Exception | None = None
    failure: Exception | None = None
    hangs: bool = False
    opens: bool = True
    tool_format: str | None = None
    reasoning_format: str | None = None
    in_reasoning: bool = False


class ScriptedGeneration:
    """A Generation that follows a script; ``closed`` is set by ``aclose``.

    Once it was told to ``stop`` only the deltas that end a choice come, as cancelled.
    """

    def __init__(self, request: GenerateRequest, script: Script) -> None:
        self.request_id = request.request_id
        self.model_id = request.model
        self.prompt_tokens = script.prompt_tokens
        self.cache = script.cache
        self.facts = ModelFacts(
            model_type="llama",
            context_length=2048,
            vocab_size=512,
            weights_bytes=900,
            kv_bytes_per_token=64,
            has_chat_template=True,
            tool_format=script.tool_format,
            reasoning_format=script.reasoning_format,
        )
        self.starts_in_reasoning = script.in_reasoning
        self.closed = threading.Event()
        self.stopped = False
        self._script = script

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        for deltas in self._script.looks:
            assert not self.closed.is_set(), "read after aclose"
            if self.stopped:
                ends = [Delta(delta.choice, "", 0, FinishReason.CANCELLED) for delta in deltas if delta.finish]
                if ends:
                    yield ends
            else:
                yield deltas
        if self._script.failure is not None:
            raise self._script.failure
        if self._script.hangs:
            await anyio.sleep_forever()

    def stop(self) -> None:
        """Asks for no more."""
        self.stopped = True

    async def aclose(self) -> None:
        """Lets go, after a moment in which a cancellation could strike."""
        await anyio.lowlevel.checkpoint()
        self.closed.set()


class ScriptedEngine:
    """An InferenceEngine whose generations follow ``script``; every request and generation is kept."""

    def __init__(self, config: Config, models: "FixedModels") -> None:
        self.script = Script()
        self.requests: list[GenerateRequest] = []
        self.generations: list[ScriptedGeneration] = []
        self.opening = threading.Event()
        self.opened = threading.Event()
        self.open_cancelled = threading.Event()
        self.depths: dict[str, tuple[int, int]] = {}
        self.waiting: dict[str, list[tuple[Lane, str, int]]] = {}
        self.draining = False
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.refusal: LmxError | None = None
        self._config = config
        self._models = models

    async def open(self, request: GenerateRequest) -> ScriptedGeneration:
        """A generation by the current script, or its refusal."""
        self.requests.append(request)
        self.opening.set()
        if self.script.refusal is not None:
            raise self.script.refusal
        try:
            await (anyio.lowlevel.checkpoint() if self.script.opens else anyio.sleep_forever())
        except BaseException:
            self.open_cancelled.set()
            raise
        generation = ScriptedGeneration(request, self.script)
        self.generations.append(generation)
        self.opened.set()
        return generation

    def resolve(self, name: str) -> str:
        """As the engine does."""
        settings = self._config.models
        known = [files.id for files in self._models.list_available()]
        return resolve(name, known, settings.aliases, {id: preset.model for id, preset in settings.presets.items()})

    def preset(self, name: str) -> Preset | None:
        """As the engine does."""
        return self._config.models.presets.get(name)

    def preset_finder(self) -> Callable[[str], Preset | None]:
        """As the engine does; it pickles."""
        return self._config.models.presets.get

    async def load_model(self, name: str) -> LoadResult:
        """1.5 GiB used after 0.25 seconds, or ``refusal``."""
        if self.refusal is not None:
            raise self.refusal
        self.loads.append(self.resolve(name))
        return LoadResult(self.resolve(name), 3 * GIB // 2, 0.25)

    async def unload_model(self, name: str) -> UnloadResult:
        """2 GiB freed, or ``refusal``."""
        if self.refusal is not None:
            raise self.refusal
        self.unloads.append(self.resolve(name))
        return UnloadResult(self.resolve(name), 2 * GIB)

    def queue_depths(self) -> Mapping[str, tuple[int, int]]:
        """Whatever the test put into ``depths``."""
        return self.depths

    def lines(self) -> Mapping[str, list[tuple[Lane, str, int]]]:
        """Whatever the test put into ``waiting``."""
        return self.waiting


class FixedModels:
    """A ModelManager whose catalog is a list."""

    def __init__(self, *available: ModelFiles) -> None:
        self.available = available
        self.importing: Mapping[str, ImportProgress] = {}

    def imports(self) -> Mapping[str, ImportProgress]:
        """Whatever the test put into ``importing``."""
        return self.importing

    def list_available(self) -> tuple[ModelFiles, ...]:
        """The list."""
        return self.available

    def refresh(self) -> None:
        """The list does not change."""


class FixedResidency:
    """A Residency that shows what a test put into ``residents``."""

    def __init__(self, *residents: ResidentModel) -> None:
        self.residents = residents

    def snapshot(self) -> tuple[ResidentModel, ...]:
        """The list."""
        return self.residents


class ScriptedDownloads:
    """A DownloadManager whose only download goes through ``states``; what was asked for is kept."""

    def __init__(self) -> None:
        self.states: Sequence[Download] = (download(),)
        self.refusal: LmxError | None = None
        self.started: list[tuple[str, str | None, Sequence[str] | None]] = []
        self.cancelled: list[str] = []

    async def start(self, repo_id: str, revision: str | None, allow_patterns: Sequence[str] | None) -> Download:
        """The first state, or ``refusal``."""
        self.started.append((repo_id, revision, allow_patterns))
        if self.refusal is not None:
            raise self.refusal
        return self.states[0]

    def list(self) -> tuple[Download, ...]:
        """The one."""
        return (self.states[0],)

    def get(self, download_id: str) -> Download | None:
        """The first state."""
        return self.states[0] if download_id == self.states[0].id else None

    async def events(self, download_id: str) -> AsyncIterator[Download]:
        """All states."""
        for state in self.states:
            await anyio.lowlevel.checkpoint()
            yield state

    async def cancel(self, download_id: str) -> Download | None:
        """The last state."""
        self.cancelled.append(download_id)
        return self.states[-1] if download_id == self.states[-1].id else None


def download(
    state: DownloadState = DownloadState.DOWNLOADING, done_bytes: int = 40, *, error: LmxError | None = None
) -> Download:
    """A download of one file of 100 bytes."""
    return Download(
        id="d1",
        repo_id="acme/new",
        revision=None,
        commit="c0ffee",
        state=state,
        done_bytes=done_bytes,
        total_bytes=100,
        bytes_per_second=0.0 if state.is_last else 20.0,
        eta_seconds=None if state.is_last else 3.0,
        files=(FileProgress("model.safetensors", 100, done_bytes, verified=done_bytes == 100),),
        error=error,
    )


class FixedProbe:
    """A machine of 16 GiB of which 4 GiB are used."""

    def read(self) -> MemoryReading:
        """Always the same."""
        return MemoryReading(total_bytes=16 * GIB, used_bytes=4 * GIB, working_set_bytes=None, at=0.0)


@dataclass
class World:
    """The fakes behind one application."""

    config: Config
    engine: ScriptedEngine
    models: FixedModels
    residency: FixedResidency
    memory: MemoryMonitor
    downloads: ScriptedDownloads = field(default_factory=ScriptedDownloads)
    changes: ChangeFeed = field(default_factory=ChangeFeed)
    reloaded: ConfigChanges | ConfigError = field(default_factory=ConfigChanges)

    async def reload(self) -> ConfigChanges:
        """Whatever the test put into ``reloaded``."""
        if isinstance(self.reloaded, ConfigError):
            raise self.reloaded
        return self.reloaded

    @property
    def services(self) -> Services:
        """The fakes as what the routes are given."""
        return Services(
            config=self.config,
            engine=cast(InferenceEngine, self.engine),
            models=cast(ModelManager, self.models),
            residency=cast(Residency, self.residency),
            memory=self.memory,
            downloads=cast(DownloadManager, self.downloads),
            changes=self.changes,
            uptime=lambda: 12.5,
            reload=self.reload,
        )

    @property
    def generation(self) -> ScriptedGeneration:
        """The only generation so far."""
        [generation] = self.engine.generations
        return generation

    @property
    def request(self) -> GenerateRequest:
        """The only request so far."""
        [request] = self.engine.requests
        return request


def make_world(settings: Mapping[str, Any] | None = None) -> World:
    """Two models on disk (``tiny`` and ``acme/small-4bit``), nothing in memory; ``settings`` as in config.yaml."""
    config = Config.model_validate(settings or {})
    models = FixedModels(model_files("tiny"), model_files("acme/small-4bit"))
    memory = MemoryMonitor(MemoryConfig(), FixedProbe())
    return World(config, ScriptedEngine(config, models), models, FixedResidency(), memory)


def model_files(model_id: str, *, problem: str | None = None) -> ModelFiles:
    """A small quantised llama on disk."""
    return ModelFiles(
        id=model_id,
        path=Path("/models") / model_id,
        format="mlx",
        size_bytes=1000,
        weights_bytes=900,
        model_type="llama",
        context_length=2048,
        quantization="4-bit",
        layers=2,
        kv_heads=2,
        head_dim=32,
        created=1_700_000_000,
        problem=problem,
    )


def resident(model_id: str, state: ModelState = ModelState.READY, *, reason: str | None = None) -> ResidentModel:
    """A model in memory with a need of 2 GiB of weights, or one that is not, for ``reason``."""
    in_memory = state in (ModelState.READY, ModelState.LOADING, ModelState.STOPPING)
    need = LoadNeed(weights_bytes=2 * GIB, kv_bytes=GIB // 4, overhead_bytes=GIB // 8) if in_memory else None
    return ResidentModel(
        id=model_id,
        state=state,
        pid=4711 if in_memory else None,
        memory_bytes=need.total_bytes if need else 0,
        need=need,
        loaded_at=1_700_000_100.0 if in_memory else None,
        last_used_at=1_700_000_200.0 if in_memory else None,
        request_count=7,
        pinned=False,
        leases=1,
        holds=0,
        ttl_seconds=3600,
        restarts=2,
        reason=reason,
        waiters=0,
        facts=None,
    )
