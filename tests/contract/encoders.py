"""An engine that answers what encoders are asked, by the script of a test."""

import struct
from dataclasses import replace
from typing import Any

import anyio

from opta_lmx.errors import LmxError
from opta_lmx.inference.embedding import EmbedRequest, RankRequest
from opta_lmx.inference.protocol import Embedded, Ranked
from tests.fakes import ScriptedEngine, World, make_world


class EncoderEngine(ScriptedEngine):
    """Vectors of two numbers or more, the place of their input and halves; scores as told; a refusal; or no end."""

    asked: EmbedRequest | RankRequest | None = None
    scores: tuple[float, ...] = ()
    failure: LmxError | None = None
    hangs = False
    cancelled = False
    dimensions = 2

    async def embed(self, request: EmbedRequest) -> Embedded:
        """Three tokens an input."""
        await self._serve(request)
        halves = [0.5] * (self.dimensions - 1)
        numbers = [number for at in range(len(request.inputs)) for number in (float(at), *halves)]
        return Embedded(1, struct.pack(f"<{len(numbers)}f", *numbers), self.dimensions, 3 * len(request.inputs))

    async def rank(self, request: RankRequest) -> Ranked:
        """Nine tokens."""
        await self._serve(request)
        return Ranked(1, list(self.scores), 9)

    async def _serve(self, request: EmbedRequest | RankRequest) -> None:
        self.asked = request
        self.opening.set()
        if self.failure is not None:
            raise self.failure
        try:
            await (anyio.sleep_forever() if self.hangs else anyio.lowlevel.checkpoint())
        except BaseException:
            self.cancelled = True
            raise


def make_encoder_world(settings: dict[str, Any] | None = None) -> tuple[World, EncoderEngine]:
    """A world with such an engine."""
    world = make_world(settings)
    engine = EncoderEngine(world.config, world.models)
    return replace(world, engine=engine), engine
