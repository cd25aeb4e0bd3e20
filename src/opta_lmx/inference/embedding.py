"""What an encoder can be asked, free of any dialect. ``model`` is the name the client used, ``ttl_seconds`` as in
GenerateRequest.
"""

from dataclasses import dataclass

from opta_lmx.inference.protocol import Embed, Rank
from opta_lmx.types import ANYBODY, Caller, TextPrompt, TokenPrompt


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One vector for each input, cut to ``dimensions`` and then of length 1; None leaves the model's size."""

    request_id: str
    model: str
    inputs: tuple[TextPrompt | TokenPrompt, ...]
    dimensions: int | None = None
    ttl_seconds: float | None = None
    caller: Caller = ANYBODY

    def frame(self, id: int) -> Embed:
        """The request as request ``id`` of one pipe."""
        return Embed(id, list(self.inputs), self.dimensions)


@dataclass(frozen=True, slots=True)
class RankRequest:
    """How relevant each document is to the query."""

    request_id: str
    model: str
    query: str
    documents: tuple[str, ...]
    ttl_seconds: float | None = None
    caller: Caller = ANYBODY

    def frame(self, id: int) -> Rank:
        """The request as request ``id`` of one pipe."""
        return Rank(id, self.query, list(self.documents))
