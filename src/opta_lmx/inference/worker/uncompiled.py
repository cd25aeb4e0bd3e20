"""Requests whose grammars are still to be compiled, on their way from the reader thread to the compiler's.

A compile takes seconds at worst, in which the reader thread goes on with other requests.
"""

import queue
import threading

from opta_lmx.inference.protocol import Cancel
from opta_lmx.inference.worker.backend import Prepared


class Uncompiled:
    """A line of requests; the cancel of one that is in it, or in the compiler's hands, is held until it has left."""

    def __init__(self) -> None:
        self._line: queue.SimpleQueue[Prepared] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._cancels: dict[int, Cancel | None] = {}

    def put(self, request: Prepared) -> None:
        """Called by the reader thread."""
        with self._lock:
            self._cancels[request.id] = None
        self._line.put(request)

    def hold(self, cancel: Cancel) -> bool:
        """True if the request is still here; called by the reader thread."""
        with self._lock:
            if cancel.id not in self._cancels:
                return False
            self._cancels[cancel.id] = cancel
            return True

    def take(self) -> Prepared:
        """The next request, once there is one; called by the compiler's thread, as are the others below."""
        return self._line.get()

    def is_cancelled(self, id: int) -> bool:
        """True if nobody waits for the request any more."""
        with self._lock:
            return self._cancels[id] is not None

    def leave(self, id: int) -> Cancel | None:
        """The request has gone on; gives the cancel that must follow it."""
        with self._lock:
            return self._cancels.pop(id)
