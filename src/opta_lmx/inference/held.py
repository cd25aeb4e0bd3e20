"""What one open request holds, from the door until the worker is done with it. The engine makes and closes these."""

from collections.abc import Callable

from opta_lmx.errors import GenerationStalled
from opta_lmx.inference.admission import Slot
from opta_lmx.inference.worker_reply import WorkerReply
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.monitoring.timing import Outcome, Timeline
from opta_lmx.types import FinishReason


class Held:
    """What one request holds on its way in."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.slot: Slot | None = None
        self.asked: WorkerStream | WorkerReply | None = None
        # How far the worker had come when it was last seen to go on, and when that was.
        self._progress: tuple[WorkerStream | WorkerReply | None, int] = (None, 0)
        self._since = 0.0

    def silent_seconds(self, now: float) -> float:
        """Seconds in which the worker that was asked has made no token for it, as far as these looks tell."""
        tokens = self.asked.completion_tokens if isinstance(self.asked, WorkerStream) else 0
        if self.asked is None or (self.asked, tokens) != self._progress:
            self._progress, self._since = (self.asked, tokens), now
        return now - self._since

    def give_up(self, seconds: float) -> None:
        """End it for its caller; the worker is told, and slot and lease come back when it has let go."""
        if self.asked is not None:
            self.asked.give_up(GenerationStalled(self.timeline.model_id or "", seconds))

    def at_its_end(self, act: Callable[[], None]) -> None:
        """Act once the worker is done with the request; now, if it never had it or is done already."""
        if self.asked is None or self.asked.ended:
            act()
        else:
            self.asked.then(act)

    def finish(self) -> dict[str, object]:
        """End the timeline by the worker's word; gives the canonical log line."""
        stream, timeline = self.asked, self.timeline
        if not isinstance(stream, WorkerStream):
            return timeline.end(Outcome.STOP)
        timeline.prompt_tokens, timeline.cached_tokens = stream.prompt_tokens, stream.cache.hit_tokens
        timeline.completion_tokens = stream.completion_tokens
        if stream.error is not None:
            timeline.failed(stream.error)
        if FinishReason.CANCELLED in stream.finishes and not timeline.stopped:
            return timeline.end(Outcome.CANCELLED)
        return timeline.end(Outcome.LENGTH if FinishReason.LENGTH in stream.finishes else Outcome.STOP)
