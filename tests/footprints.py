"""How much a real worker holds, beside what the ledger had counted for it before the load."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from opta_lmx.config_models import ModelsConfig
from opta_lmx.inference.worker_client import WorkerClient
from opta_lmx.manager.catalog import is_encoder
from opta_lmx.manager.footprint import footprint_bytes
from opta_lmx.manager.memory import LoadNeed, load_need
from opta_lmx.manager.model import ModelManager
from opta_lmx.types import GenerateRequest, LoadOptions, ModelFiles, SamplingParams, TokenPrompt, WorkerExit

_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Measured:
    """``ready_bytes`` once the model was loaded, ``served_bytes`` after a first answer (0: it was not asked)."""

    name: str
    need: LoadNeed
    ready_bytes: int
    served_bytes: int

    @property
    def error(self) -> float:
        """The estimate's, as a share of the footprint; positive where it was too high."""
        return self.need.footprint_bytes / self.ready_bytes - 1

    def __str__(self) -> str:
        """One line of the table, in MiB."""
        columns = (self.need.weights_bytes, self.need.footprint_bytes, self.ready_bytes, self.served_bytes)
        return f"{self.name:<28}" + "".join(f"{column / _MIB:>10.1f}" for column in columns) + f"{self.error:>9.1%}"


HEADER = f"{'MiB':<28}{'weights':>10}{'estimate':>10}{'ready':>10}{'served':>10}{'error':>9}"


async def measure_all(models: Path, *, serve: bool) -> list[Measured]:
    """Every model of a directory, and both starters, one after the other; ``serve``: each is asked for a few tokens."""
    manager = ModelManager(ModelsConfig(models_directory=str(models)))
    manager.refresh()
    ids = [files.id for files in manager.list_available()]
    return [await _measure(await manager.ensure_local(model_id), serve=serve) for model_id in ids]


async def _measure(files: ModelFiles, *, serve: bool) -> Measured:
    """Load a model in a worker of its own, bounded as the server would, and look."""
    need = load_need(files, None, 0.1)
    exited: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
    worker = await WorkerClient.start(echo=False)
    try:
        await worker.load(files, need.limit_worker(LoadOptions()), exited.set_result)
        ready, served = footprint_bytes(worker.pid), 0
        if serve and not is_encoder(files):
            await _generate(worker, files.id)
            served = footprint_bytes(worker.pid)
    finally:
        await worker.stop(5)
    assert (await exited).exit_code == 0
    return Measured(files.id, need, ready, served)


async def _generate(worker: WorkerClient, model_id: str) -> None:
    ended = asyncio.Event()
    request = GenerateRequest("r", model_id, TokenPrompt([1] * 4), SamplingParams(max_tokens=2))
    worker.generate(request, ended.set)
    async with asyncio.timeout(120):  # MLX multiplies quantised float16 matrices slowly on a CPU
        await ended.wait()
