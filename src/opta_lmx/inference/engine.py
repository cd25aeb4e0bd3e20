"""InferenceEngine: the front door. A request comes in free of any dialect; a Generation goes out.

``open`` raises every refusal before the first byte. After it the caller holds a Generation, which ends with the last
choice's finish, with one error, or with ``aclose``; slot and lease come back when the worker is done with the request,
not when the caller stops listening.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

from opta_lmx.config import Config
from opta_lmx.config_models import Preset
from opta_lmx.errors import (
    Draining,
    InvalidRequest,
    LmxError,
    LostTwice,
    ModelNotFound,
    UnsupportedParameter,
    WorkerLost,
)
from opta_lmx.inference.admission import Admission, House
from opta_lmx.inference.embedding import EmbedRequest, RankRequest
from opta_lmx.inference.held import Held
from opta_lmx.inference.protocol import Embedded, Ranked
from opta_lmx.inference.quarantine import Quarantine
from opta_lmx.inference.worker_client import WorkerClient
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.manager.catalog import is_encoder
from opta_lmx.manager.memory import LoadPlan, Verdict
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.residency import Lease, LoadResult, Residency, UnloadResult
from opta_lmx.monitoring.logging import get_logger
from opta_lmx.monitoring.timing import RequestBook, Timeline
from opta_lmx.router.resolve import preset_behind, resolve
from opta_lmx.types import CacheReport, Delta, GenerateRequest, Lane, ModelFacts, ModelFiles

# A client that keeps asking for a model that does not exist must not make us read the disk each time.
_LOOK_AGAIN_SECONDS = 1.0

_log = get_logger("engine")

Result = TypeVar("Result")


class Generation:
    """One request under way: iterate for lists of deltas, everything that has arrived since the last look."""

    def __init__(self, lease: Lease, request: GenerateRequest, stream: WorkerStream, timeline: Timeline) -> None:
        self.request_id = timeline.request_id
        self.model_id = lease.model_id
        self._worker = _worker(lease)
        self._request = request
        self._stream = stream
        self._timeline = timeline

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt as the model saw them, special ones included."""
        return self._stream.prompt_tokens

    @property
    def cache(self) -> CacheReport:
        """What the prefix cache served."""
        return self._stream.cache

    @property
    def facts(self) -> ModelFacts:
        """What the worker knows of its model, and what the request says of its formats."""
        return self._worker.facts.as_wanted(self._request.tool_format, self._request.reasoning_format)

    @property
    def starts_in_reasoning(self) -> bool:
        """True if the prompt ends inside a block of reasoning, so that the answer begins there."""
        return self._stream.in_reasoning

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Raises WorkerLost or GenerationFailed; ends after the last choice's last delta."""
        while True:
            await self._stream.arrived()
            deltas = self._stream.take()
            if not deltas:
                return
            self._timeline.looked(deltas)
            yield deltas

    def stop(self) -> None:
        """Ask for no more: the iteration ends with what the worker has made until it hears of it."""
        self._timeline.stopped = True
        self._stream.cancel()

    async def aclose(self) -> None:
        """Let the request go, if it has not ended; safe at any moment, any number of times."""
        self._stream.cancel()


class InferenceEngine:
    """Resolves names, admits requests, leases models and starts generations."""

    def __init__(
        self,
        config: Config,
        models: ModelManager,
        residency: Residency,
        now: Callable[[], float] = time.monotonic,
        requests: RequestBook | None = None,
    ) -> None:
        """``now`` is monotonic; ``requests`` takes in what every request took."""
        self._config = config
        self._requests = requests or RequestBook()
        self._models = models
        self._residency = residency
        self._now = now
        self._house = House(config.scheduling.max_running_total, config.scheduling.max_waiting_total)
        self._admissions: dict[str, Admission] = {}
        self._quarantines: defaultdict[str, Quarantine] = defaultdict(Quarantine)
        self._looked_at = -_LOOK_AGAIN_SECONDS
        self._open: set[Held] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def open(self, request: GenerateRequest) -> Generation:
        """Start a request and wait for its first token. Raises any LmxError; then nothing is held."""
        return await self._enter(request, partial(self._first_token, request), encoder=False)

    async def embed(self, request: EmbedRequest) -> Embedded:
        """The vectors of some inputs. Raises any LmxError; whoever stops waiting lets the request go."""
        answer = await self._enter(request, partial(self._answer, request), encoder=True)
        assert isinstance(answer, Embedded)
        return answer

    async def rank(self, request: RankRequest) -> Ranked:
        """The scores of some documents; as ``embed``."""
        answer = await self._enter(request, partial(self._answer, request), encoder=True)
        assert isinstance(answer, Ranked)
        return answer

    def step(self, now: float) -> None:
        """End as failed what has had no new token for too long. Run it once a second."""
        limit = self._config.server.request_inactivity_seconds
        for held in self._open:
            if held.silent_seconds(now) >= limit:
                held.give_up(limit)

    def reconfigure(self, config: Config) -> None:
        """Take changed settings; requests that are open keep what they were told."""
        self._config = config
        for admission in self._admissions.values():
            admission.reconfigure(config.scheduling.max_running, config.scheduling.max_waiting)
        self._house.reconfigure(config.scheduling.max_running_total, config.scheduling.max_waiting_total)

    async def idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

    async def load_model(self, name: str) -> LoadResult:
        """Have a model in memory; joins a load in flight. Raises as a request for it would."""
        return await self._residency.load(await self._local_files(self._admit_name(name)))

    async def revive_model(self, model_id: str) -> LoadResult:
        """Have a model in memory again whose worker died; as a request would, so the count of its deaths goes on."""
        return await self._residency.load(await self._local_files(self._admit_name(model_id)), forgive=False)

    async def unload_model(self, name: str) -> UnloadResult:
        """End a model's process once its requests have ended. Raises Conflict if it is not loaded."""
        return await self._residency.unload(self.resolve(name))

    async def force_unload_model(self, name: str) -> UnloadResult:
        """As ``unload_model``, but its pin and its holds end first; running requests never do."""
        return await self._residency.unload(self.resolve(name), force=True)

    def plan_model(self, name: str, context_length: int | None = None) -> LoadPlan:
        """What a load would do now; changes nothing. Raises LoadFailed for a model that cannot be loaded."""
        return self._residency.plan(self._models.look_up(self.resolve(name)), context_length)

    async def _local_files(self, model_id: str) -> ModelFiles:
        """Files that a worker can load. A GGUF that cannot fit is refused with its plan before it is imported."""

        def admit(files: ModelFiles) -> None:
            plan = self._residency.plan(files)
            if plan.verdict is Verdict.DOES_NOT_FIT:
                raise plan.refusal()

        return await self._models.ensure_local(model_id, admit)

    def pin_model(self, name: str) -> str:
        """Keep a model in memory; gives its id. Raises Conflict unless it is loaded or being loaded."""
        model_id = self.resolve(name)
        self._residency.pin(model_id)
        return model_id

    def unpin_model(self, name: str) -> str:
        """End a model's pin, if it has one; gives its id."""
        model_id = self.resolve(name)
        self._residency.unpin(model_id)
        return model_id

    def hold_model(self, name: str, owner: str, seconds: float) -> tuple[str, str]:
        """Keep a model in memory for so long, in somebody's name; gives the hold's id and the model's.

        Raises Conflict unless it is loaded or being loaded.
        """
        model_id = self.resolve(name)
        return self._residency.hold(model_id, owner, seconds), model_id

    def delete_model(self, model_id: str) -> int:
        """Remove a model's files; gives the bytes freed. Takes no other name of it: a glob must not delete.

        Raises Conflict while it is in memory, waited for, or part of the installation; LmxError if the disk refuses.
        """
        resolved = self.resolve(model_id)
        if resolved != model_id:
            raise InvalidRequest(
                f"{model_id!r} stands for {resolved!r}; delete a model by its own id.", param="model_id"
            )
        with self._residency.kept_out(model_id):
            try:
                return self._models.delete(model_id)
            except OSError as error:
                self._models.refresh()
                raise LmxError(f"The files of {model_id!r} cannot be removed: {error.strerror}.") from error

    def resolve(self, name: str) -> str:
        """The model id behind a name; raises ModelNotFound with the nearest names.

        A name nobody knows may be that of a model copied in since the last look at the disk.
        """
        try:
            return resolve(name, *self._names())
        except ModelNotFound:
            if self._now() - self._looked_at < _LOOK_AGAIN_SECONDS:
                raise
            self._looked_at = self._now()
            self._models.refresh()
            return resolve(name, *self._names())

    def preset(self, name: str) -> Preset | None:
        """The preset a name stands for, directly or by an alias; None for a plain model."""
        return self.preset_finder()(name)

    def preset_finder(self) -> Callable[[str], Preset | None]:
        """``preset`` as of now, in a form that another process can be given."""
        return partial(_find_preset, self._names(), dict(self._config.models.presets))

    def _names(self) -> tuple[list[str], Mapping[str, str], dict[str, str]]:
        models = self._config.models
        known = [files.id for files in self._models.list_available()]
        return known, models.aliases, {name: preset.model for name, preset in models.presets.items()}

    def queue_depths(self) -> Mapping[str, tuple[int, int]]:
        """Requests (running, waiting) of each model that has any history."""
        return {model_id: admission.depths() for model_id, admission in self._admissions.items()}

    def lines(self) -> Mapping[str, list[tuple[Lane, str, int]]]:
        """Who waits for each model: (lane, caller, requests)."""
        return {model_id: line for model_id, admission in self._admissions.items() if (line := admission.line())}

    def _admit_name(self, name: str) -> str:
        if self.draining:
            raise Draining(retry_after_seconds=5.0)
        return self.resolve(name)

    def _admission(self, model_id: str) -> Admission:
        admission = self._admissions.get(model_id)
        if admission is None:
            bounds = self._config.scheduling
            admission = Admission(model_id, bounds.max_running, bounds.max_waiting, self._now, self._house)
            self._admissions[model_id] = admission
        return admission

    def _close(self, held: Held) -> None:
        """Give back what an open request held, and say how it went."""
        if held.slot is not None:
            held.slot.release()
        self._open.discard(held)
        if not self._open:
            self._idle.set()
        _log.info("request_finished", **held.finish())

    async def _enter(
        self,
        request: GenerateRequest | EmbedRequest | RankRequest,
        attempt: Callable[[Held, Lease], Awaitable[Result]],
        *,
        encoder: bool,
    ) -> Result:
        """Pass the door, then attempt with a lease; if the worker dies meanwhile, once more and apart from others."""
        choices = request.sampling.n if isinstance(request, GenerateRequest) else 0
        held = Held(Timeline(self._requests, request.request_id, choices, self._now, request.caller))
        self._open.add(held)
        self._idle.clear()
        try:
            model_id = self._admit_name(request.model)
            held.timeline.resolved(model_id)
            held.slot = await self._admission(model_id).enter(request.caller)
            held.timeline.admitted()
            files = await self._local_files(model_id)
            _check_task(files, encoder=encoder)
            start = partial(self._start, request, files, held, attempt)
            quarantine = self._quarantines[model_id]
            await quarantine.over()
            try:
                return await start()
            except WorkerLost as error:
                _log.warning("request_start_lost", request_id=request.request_id, model=model_id, cause=error.cause)
            async with quarantine.alone():
                try:
                    return await start()
                except WorkerLost as error:
                    _log.error("request_lost_twice", request_id=request.request_id, model=model_id, cause=error.cause)
                    raise LostTwice(model_id, error.cause) from error
        except BaseException as error:
            held.timeline.failed(error)
            raise
        finally:
            held.at_its_end(partial(self._close, held))

    async def _start(
        self,
        request: GenerateRequest | EmbedRequest | RankRequest,
        files: ModelFiles,
        held: Held,
        attempt: Callable[[Held, Lease], Awaitable[Result]],
    ) -> Result:
        ttl, jit = request.ttl_seconds, self._config.models.jit
        lease = await self._residency.lease(files, ttl_seconds=ttl, may_load=jit)
        held.timeline.leased()
        return await attempt(held, lease)

    async def _first_token(self, request: GenerateRequest, held: Held, lease: Lease) -> Generation:
        worker = _worker(lease)
        try:
            held.asked = stream = worker.generate(request, lease.release)
        except WorkerLost:
            lease.release()
            raise
        try:
            await stream.arrived()
        except BaseException:
            stream.cancel()
            raise
        held.timeline.first_token(stream.completion_tokens)
        held.timeline.prompt_tokens, held.timeline.cached_tokens = stream.prompt_tokens, stream.cache.hit_tokens
        return Generation(lease, request, stream, held.timeline)

    async def _answer(self, request: EmbedRequest | RankRequest, held: Held, lease: Lease) -> Embedded | Ranked:
        try:
            held.asked = reply = _worker(lease).ask(request.frame, lease.release)
        except WorkerLost:
            lease.release()
            raise
        answer = await reply.answer()
        held.timeline.prompt_tokens = answer.prompt_tokens
        return answer


def _find_preset(
    names: tuple[list[str], Mapping[str, str], dict[str, str]], presets: Mapping[str, Preset], name: str
) -> Preset | None:
    found = preset_behind(name, *names)
    return presets[found] if found is not None else None


def _worker(lease: Lease) -> WorkerClient:
    assert isinstance(lease.worker, WorkerClient)
    return lease.worker


def _check_task(files: ModelFiles, *, encoder: bool) -> None:
    """Refuses before a load what the model cannot do after it."""
    if is_encoder(files) == encoder:
        return
    can = "write text; it makes no embeddings" if encoder else "make embeddings; it writes no text"
    route = "/v1/chat/completions" if encoder else "/v1/embeddings"
    raise UnsupportedParameter(f"The model {files.id!r} can {can}. Use POST {route}.", param="model")
