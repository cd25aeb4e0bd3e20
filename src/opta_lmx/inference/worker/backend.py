"""What a worker's engine must do: the Protocol of the MLX backend and of the echo backend.

``__main__`` runs it: ``prepare`` is called on the reader thread, what it gives for compiling a grammar on the compiler
thread, everything else on the owner thread, the thread that also called ``load``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from opta_lmx.inference.protocol import Embed, Embedded, Failed, Generate, Load, Rank, Ranked, Refused, Started
from opta_lmx.types import Delta, ModelFacts, SamplingParams


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was checked and tokenised; ``max_tokens`` is already clamped to the context."""

    id: int
    request_id: str
    token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    # The compiled form of the request's grammar, in the backend's own terms.
    grammar: Any = None
    # Prompt positions where a later prompt is likely to part from this one (end of system, end of history).
    boundaries: tuple[int, ...] = ()
    # The prompt ends inside a block of reasoning that the template opened.
    in_reasoning: bool = False
    # What its tokens and marks mean, in the backend's own terms.
    speech: Any = None
    # Makes ``grammar``, in seconds at worst; raises RequestRejected. None for an answer that is free.
    compile_grammar: Callable[[], Any] | None = None

    def compiled(self) -> "Prepared":
        """The request as ``add`` takes it; raises RequestRejected naming the field if its grammar cannot be used."""
        if self.compile_grammar is None:
            return self
        return replace(self, grammar=self.compile_grammar(), compile_grammar=None)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step made. ``started`` precede ``deltas``; a failed id appears in neither afterwards."""

    started: Sequence[Started] = ()
    deltas: Sequence[tuple[int, Delta]] = ()
    failed: Sequence[Failed] = ()
    refused: Sequence[Refused] = ()
    # Bytes of KV cache to ask the server for.
    wants_kv_bytes: int | None = None
    # Nothing was computed yet: the answer may let somebody in who would wait for a chunk otherwise.
    asks_first: bool = False
    # What an encoder made.
    answers: Sequence[Embedded | Ranked] = ()


class Backend(Protocol):
    """One model and the sequences it is working on."""

    def load(self, frame: Load) -> ModelFacts:
        """Load the model; raises LoadFailed with a reason a user can act on."""
        ...

    def prepare(self, frame: Generate) -> Prepared:
        """Render, tokenise and check a request; raises RequestRejected. Reads only what ``load`` made."""
        ...

    def add(self, request: Prepared) -> None:
        """Put a request in line for the batch."""
        ...

    def cancel(self, id: int) -> None:
        """Mark a request to leave at the next step, which reports it with FinishReason.CANCELLED."""
        ...

    def grant_kv(self, granted_bytes: int) -> None:
        """The server's answer to ``wants_kv_bytes``."""
        ...

    def has_work(self) -> bool:
        """True while a step would do something."""
        ...

    def step(self) -> StepResult:
        """Admit, prefill or decode once for everybody; never raises for the fault of one request."""
        ...

    def running(self) -> tuple[int, int]:
        """Sequences in the batch and sequences in line."""
        ...

    def rest(self) -> None:
        """Nothing has happened for a while: give back memory that is only kept for reuse."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes live in the backend, and bytes its prefix cache holds."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedInputs:
    """A request to an encoder that was checked and tokenised; ``rows`` are in the encoder's own terms."""

    frame: Embed | Rank
    rows: Sequence[Any]


@runtime_checkable
class EncoderBackend(Backend, Protocol):
    """One encoder and its requests; what Backend says of threads holds here too."""

    def prepare_inputs(self, frame: Embed | Rank) -> PreparedInputs:
        """Tokenise and check a request; raises RequestRejected. Reads only what ``load`` made."""
        ...

    def add_inputs(self, request: PreparedInputs) -> None:
        """Put a request in line."""
        ...
