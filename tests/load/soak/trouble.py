"""What is done to the server while it works: its workers are killed, by the signal of a kernel or of Metal."""

import os
import random
import signal
from contextlib import suppress
from typing import Final

import anyio
import httpx

from tests.load.soak.sheet import Sheet
from tests.load.soak.traffic import ADMIN_KEY

_SIGNALS: Final = (signal.SIGKILL, signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGTERM)


async def kill_workers(client: httpx.AsyncClient, rng: random.Random, sheet: Sheet, every_seconds: float) -> None:
    """Ends the process of some loaded model again and again, until cancelled."""
    while True:
        await anyio.sleep(rng.uniform(0.5, 1.5) * every_seconds)
        status = (await client.get("/admin/status", headers={"x-admin-key": ADMIN_KEY})).json()
        pids = [model["pid"] for model in status["models"] if model["pid"] is not None and model["state"] == "ready"]
        if pids:
            number = rng.choice(_SIGNALS)
            # It may have been unloaded between the look and the signal.
            with suppress(ProcessLookupError):
                os.kill(rng.choice(pids), number)
                sheet.troubles[f"worker {number.name}"] += 1
