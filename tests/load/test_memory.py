"""The memory tables: estimates and footprints up to 1 GB, what an unload returns, a hundred lives of a model.

``scripts/test -m load tests/load/test_memory.py -s`` prints them; about five minutes on two cores.
"""

import time
from pathlib import Path

import psutil
import pytest

from opta_lmx.manager.footprint import footprint_bytes
from tests.footprints import HEADER, measure_all
from tests.integration.conftest import StartServer, server
from tests.integration.test_memory import MOST_ERROR, cycle, holdings
from tests.tiny_models import Family, build_sized_model, build_tiny_model

__all__ = ["server"]

pytestmark = [pytest.mark.load, pytest.mark.mlx, pytest.mark.timeout(900)]

_FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "gemma3_text", "qwen3_next", "mamba2")
_MIB = 1024**2


async def test_estimates_of_every_test_model(tmp_path: Path) -> None:
    """Every family, both starters, and synthetic models up to 1 GB, plain, quantised and sharded: within 5 %."""
    for family in _FAMILIES:
        build_tiny_model(tmp_path / f"tiny-{family}", family)
    for hidden, layers in ((512, 8), (1024, 8), (2048, 8)):
        build_sized_model(tmp_path / f"{16 * hidden**2 * layers * 2 // _MIB}mb", hidden, layers)
    build_sized_model(tmp_path / "1024mb-4bit", 2048, 8, bits=4)
    build_sized_model(tmp_path / "1024mb-8bit-sharded", 2048, 8, bits=8, shards=5)
    table = await measure_all(tmp_path, serve=True)
    print("", HEADER, *table, sep="\n")  # noqa: T201 - the table is what this is run for
    assert all(abs(row.error) <= MOST_ERROR for row in table)


@pytest.mark.parametrize("hidden", [512, 1024, 2048])
def test_what_an_unload_returns(server: StartServer, tmp_path: Path, hidden: int) -> None:
    """Bytes and milliseconds, of the process and as the whole machine shows it (where others come and go)."""
    lmx = server({"sized": build_sized_model(tmp_path / "sized", hidden, 8)})
    with lmx.client() as client:
        client.post("/admin/models/load", json={"model_id": "sized"}, timeout=300).raise_for_status()
        (worker,) = lmx.children()
        held, available = footprint_bytes(worker.pid), psutil.virtual_memory().available
        started = time.monotonic()
        client.post("/admin/models/unload", json={"model_id": "sized"}).raise_for_status()
        seconds = time.monotonic() - started
        back, machine = held - footprint_bytes(worker.pid), psutil.virtual_memory().available - available
    print(  # noqa: T201 - the numbers are what this is run for
        f"\nheld {held / _MIB:.1f} MiB, returned {back / _MIB:.1f} ({back / held:.1%}) in {seconds * 1000:.0f} ms; "
        f"the machine has {machine / _MIB:.1f} more"
    )
    assert back >= 0.99 * held
    assert seconds <= 1.0


def test_a_hundred_lives_of_a_model(server: StartServer, tmp_path: Path) -> None:
    """The server after a hundred loads and unloads of a real model is the server before."""
    lmx = server({"tiny": build_tiny_model(tmp_path / "tiny", "llama")})
    cycle(lmx, "tiny", 2)
    process = psutil.Process(lmx.pid)
    before, resident = holdings(lmx), process.memory_info().rss
    started = time.monotonic()
    cycle(lmx, "tiny", 100)
    grown = process.memory_info().rss - resident
    seconds = (time.monotonic() - started) / 100
    print(  # noqa: T201 - the numbers are what this is run for
        f"\nserver RSS {resident / _MIB:.1f} MiB, after 100 cycles of {seconds:.2f} s {grown / _MIB:+.2f} MiB; "
        f"descriptors, threads, children {before} -> {holdings(lmx)}"
    )
    assert holdings(lmx) == before
    assert grown < 8 * _MIB
