"""What the ledger counts is what a real worker holds; what an unload frees has really come back."""

import time
from pathlib import Path

import psutil
import pytest
from gguf import GGMLQuantizationType as Kind

from opta_lmx.config_models import ModelsConfig
from opta_lmx.manager.footprint import footprint_bytes
from opta_lmx.manager.memory import load_need
from opta_lmx.manager.model import ModelManager
from opta_lmx.types import EchoOptions
from tests.footprints import HEADER, measure_all
from tests.gguf_files import Sizes, byte_level_vocabulary, write_random_llama
from tests.integration.conftest import RunningServer, StartServer

# Of the footprint, either way.
MOST_ERROR = 0.05

_NEED = {"weights_bytes", "kv_bytes", "overhead_bytes", "prefix_cache_bytes", "buffer_bytes", "need_bytes"}

# Sixteen hidden squared a layer: 4 Mi numbers of float16 each.
_HIDDEN, _LAYERS = 512, 8


def _build(models: Path) -> None:
    from tests.tiny_models import build_sized_model, build_tiny_model

    build_tiny_model(models / "tiny", "llama")
    build_sized_model(models / "64mb", _HIDDEN, _LAYERS)
    build_sized_model(models / "64mb-8bit-sharded", _HIDDEN, _LAYERS, bits=8, shards=3)
    build_sized_model(models / "128mb-4bit", 2 * _HIDDEN, _LAYERS, bits=4)
    # 17 MB of file that an import makes 73 MB of.
    (models / "iq2-gguf").mkdir()
    sizes = Sizes(2 * _HIDDEN, 4 * _HIDDEN, _LAYERS)
    write_random_llama(models / "iq2-gguf" / "m.gguf", byte_level_vocabulary(), Kind.IQ2_XXS, sizes)


@pytest.mark.mlx
@pytest.mark.timeout(150)
async def test_the_estimate_is_within_5_percent_of_the_footprint(tmp_path: Path) -> None:
    """Weights and overhead, known before a tensor is read, against a real worker's footprint once it is ready.

    Plain, quantised and sharded models, the starter with its vocabulary of 49,152, and a real encoder. A GGUF's is
    known to the byte before its import, the starter's too.
    """
    _build(tmp_path)
    models = ModelManager(ModelsConfig(models_directory=str(tmp_path)))
    expected = {files.id: load_need(files, None, 0.1) for files in models.list_available()}
    table = await measure_all(tmp_path, serve=False)
    assert len(table) == 7
    assert {row.name: row.need for row in table} == expected
    assert all(abs(row.error) <= MOST_ERROR for row in table), "\n".join([HEADER, *map(str, table)])


@pytest.mark.mlx
def test_the_plan_of_a_gguf_is_that_of_its_import(server: StartServer, tmp_path: Path) -> None:
    """Before the import and after it the plan needs the same bytes, part by part, with the server's own caches."""
    (tmp_path / "gguf").mkdir()
    write_random_llama(tmp_path / "gguf" / "m.gguf", byte_level_vocabulary(), Kind.Q3_K, Sizes(256, 512, 2))
    lmx = server({"g": tmp_path / "gguf"})
    with lmx.client() as client:

        def plan() -> dict[str, int]:
            answer = client.post("/admin/models/plan", json={"model_id": "g"}).raise_for_status().json()
            return {name: answer[name] for name in _NEED}

        before = plan()
        client.post("/admin/models/load", json={"model_id": "g"}).raise_for_status()
        assert plan() == before
        client.post("/admin/models/unload", json={"model_id": "g"}).raise_for_status()
        assert plan() == before


@pytest.mark.mlx
def test_an_unload_returns_the_footprint_within_a_second(server: StartServer, tmp_path: Path) -> None:
    """The answer comes when the process has gone, and with it at least 99 % of what it held."""
    from tests.tiny_models import build_sized_model

    lmx = server({"sized": build_sized_model(tmp_path / "sized", _HIDDEN, _LAYERS)})
    with lmx.client() as client:
        client.post("/admin/models/load", json={"model_id": "sized"}).raise_for_status()
        (worker,) = lmx.children()
        held = footprint_bytes(worker.pid)
        assert held > 64 * 1024**2
        started = time.monotonic()
        client.post("/admin/models/unload", json={"model_id": "sized"}).raise_for_status()
        seconds = time.monotonic() - started
        assert not worker.is_running()
        assert footprint_bytes(worker.pid) <= held // 100
        assert seconds <= 1.0


def cycle(lmx: RunningServer, model_id: str, times: int) -> None:
    """Load and unload a model so often."""
    with lmx.client() as client:
        for _ in range(times):
            client.post("/admin/models/load", json={"model_id": model_id}).raise_for_status()
            client.post("/admin/models/unload", json={"model_id": model_id}).raise_for_status()


def holdings(lmx: RunningServer) -> tuple[int, int, int]:
    """File descriptors but those of connections, threads and children of the server."""
    process = psutil.Process(lmx.pid)
    connections = process.net_connections("tcp")
    for _ in range(100):
        held = process.num_fds() - len(connections), process.num_threads(), len(process.children())
        # One that was closed between the two looks would be missing among the descriptors.
        before, connections = connections, process.net_connections("tcp")
        if connections == before:
            return held
    raise AssertionError("connections come and go all the time")


def test_loads_and_unloads_leave_nothing_behind(server: StartServer) -> None:
    """Ten lives of a model cost the server no descriptor, no thread, no child and no memory worth the name."""
    lmx = server({"echo": EchoOptions()})
    cycle(lmx, "echo", 2)  # what is made once and kept
    before, resident = holdings(lmx), psutil.Process(lmx.pid).memory_info().rss
    cycle(lmx, "echo", 10)
    assert holdings(lmx) == before
    assert psutil.Process(lmx.pid).memory_info().rss - resident < 2 * 1024**2
