"""The worker process: ``python -m opta_lmx.inference.worker --fd N [--echo]``, started by ``worker_client``.

The reader thread blocks on the socket, prepares requests and fills the inbox; those with a grammar go by way of the
compiler thread. The main thread owns the backend: it loads, then loops over inbox, step, frame. The socket is the
lifeline: at its end the process ends at once, whatever the main thread is doing.
"""

import argparse
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, NoReturn

from opta_lmx.errors import ContextTooLong, LoadFailed, RequestRejected, UnsupportedParameter, show_failure
from opta_lmx.inference import protocol
from opta_lmx.inference.worker.backend import Backend, EncoderBackend, Prepared, PreparedInputs
from opta_lmx.inference.worker.uncompiled import Uncompiled

_READ_BYTES = 1 << 16

# After so long without work, memory kept for reuse goes back to the system; before, the next request may want it.
_REST_SECONDS = 5.0

# The server takes a worker for stuck that is silent for far longer (workers.stall_seconds).
_TELL_SECONDS = 0.5
# What the server's answer to a question may take before the next step is made without it: it has a loop to get round.
_ANSWER_SECONDS = 0.005

# What compiled on trial (``grammar_trial.py``, 4 MiB) must not overflow the stack of the thread that compiles it again.
_STACK_BYTES = 16 * 1024**2

Inbox = queue.SimpleQueue[
    protocol.Load | Prepared | PreparedInputs | protocol.Cancel | protocol.KvGrant | protocol.Stop
]


class Pipe:
    """The socket to the server. Frames may be sent from every thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._splitter = protocol.FrameSplitter()

    def send(self, *frames: protocol.FromWorker) -> None:
        """Write frames in order; a server that has gone ends the process."""
        data = b"".join(map(protocol.encode, frames))
        with self._lock:
            try:
                self._socket.sendall(data)
            except OSError:
                leave(0)

    def receive(self) -> list[protocol.FromServer]:
        """Block for the next frames; end of file ends the process."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            leave(0)
        return [protocol.decode_from_server(body) for body in self._splitter.feed(data)]


class Worker:
    """One backend between inbox and pipe."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._backend: Backend
        self._inbox: Inbox = queue.SimpleQueue()
        self._uncompiled = Uncompiled()
        self._steps = 0

    def start(self) -> None:
        """Start the reader and the compiler thread."""
        for name, work in (("reader", self._read), ("compiler", self._compile)):
            threading.Thread(target=_for_ever, args=(work,), name=name, daemon=True).start()

    def _read(self) -> None:
        for frame in self._pipe.receive():
            if isinstance(frame, protocol.Generate | protocol.Embed | protocol.Rank):
                self._prepare(frame)
            elif not (isinstance(frame, protocol.Cancel) and self._uncompiled.hold(frame)):
                self._inbox.put(frame)

    def _compile(self) -> None:
        request = self._uncompiled.take()
        if self._uncompiled.is_cancelled(request.id):
            # Nobody reads what it says without its grammar: the cancel is next.
            self._inbox.put(request)
        else:
            with self._refusals(request.id):
                self._inbox.put(request.compiled())
        cancel = self._uncompiled.leave(request.id)
        if cancel is not None:
            self._inbox.put(cancel)

    def run(self, backend: Backend) -> None:
        """The owner thread: say Hello, load once, then serve until Stop."""
        self._backend = backend
        self._pipe.send(protocol.Hello(protocol.VERSION, os.getpid()))
        frame = self._inbox.get()
        if not isinstance(frame, protocol.Load) or not self._load(frame):
            return
        told_at = 0.0
        asked = False
        while self._drain(_ANSWER_SECONDS if asked else 0.0):
            result = self._backend.step()
            self._steps += 1
            asked = result.asks_first
            running, waiting = self._backend.running()
            frames: list[protocol.FromWorker] = [*result.started, *result.failed, *result.refused, *result.answers]
            if result.wants_kv_bytes is not None:
                frames.append(protocol.KvWant(result.wants_kv_bytes))
            # Prompts make no deltas; that steps go on is how the server knows that this process does.
            if result.deltas or time.monotonic() - told_at >= _TELL_SECONDS:
                told_at = time.monotonic()
                frames.append(protocol.Step(self._steps, running, waiting, list(result.deltas)))
            if not self._backend.has_work() and not waiting:
                frames.append(protocol.Idle(self._steps, *self._backend.memory()))
            if frames:
                self._pipe.send(*frames)

    def _load(self, frame: protocol.Load) -> bool:
        started = time.monotonic()
        if frame.embeds:
            self._backend = make_encoder_backend()
        try:
            facts = self._backend.load(frame)
        except LoadFailed as error:
            self._pipe.send(protocol.LoadError(error.reason))
            return False
        # What is there now stays: no collection while tokens are made goes through it all.
        gc.freeze()
        self._pipe.send(protocol.Ready(facts, time.monotonic() - started, self._backend.memory()[0]))
        return True

    def _prepare(self, frame: protocol.Generate | protocol.Embed | protocol.Rank) -> None:
        with self._refusals(frame.id):
            prepared = self._prepared(frame)
            if isinstance(prepared, Prepared) and prepared.compile_grammar is not None:
                self._uncompiled.put(prepared)
            else:
                self._inbox.put(prepared)

    @contextmanager
    def _refusals(self, id: int) -> Iterator[None]:
        try:
            yield
        except ContextTooLong as error:
            self._pipe.send(
                protocol.Refused(
                    id, "context", str(error), error.param, None, error.prompt_tokens, error.context_length
                )
            )
        except RequestRejected as error:
            kind: Literal["unsupported", "invalid"]
            kind = "unsupported" if isinstance(error, UnsupportedParameter) else "invalid"
            self._pipe.send(protocol.Refused(id, kind, str(error), error.param, error.code))

    def _prepared(self, frame: protocol.Generate | protocol.Embed | protocol.Rank) -> Prepared | PreparedInputs:
        if isinstance(frame, protocol.Generate):
            return self._backend.prepare(frame)
        if isinstance(self._backend, EncoderBackend):
            return self._backend.prepare_inputs(frame)
        raise UnsupportedParameter("This model writes text and makes no embeddings.", param="model")

    def _drain(self, patience_seconds: float) -> bool:
        """Take what has arrived, waiting for it if there is no work, and so long for a grant; False after Stop."""
        block = not self._backend.has_work()
        while True:
            try:
                frame = self._inbox.get(block or patience_seconds > 0, _REST_SECONDS if block else patience_seconds)
            except queue.Empty:
                if not block:
                    return True
                self._backend.rest()
                frame = self._inbox.get()
            if isinstance(frame, Prepared):
                self._backend.add(frame)
            elif isinstance(frame, PreparedInputs) and isinstance(self._backend, EncoderBackend):
                self._backend.add_inputs(frame)
            elif isinstance(frame, protocol.Cancel):
                self._backend.cancel(frame.id)
            elif isinstance(frame, protocol.KvGrant):
                self._backend.grant_kv(frame.granted_bytes)
                patience_seconds = 0.0
            elif isinstance(frame, protocol.Stop):
                return False
            block = block and not self._backend.has_work()


def _for_ever(work: Callable[[], None]) -> NoReturn:
    """A thread beside the owner's. A frame it cannot read, or a bug, ends the process: it must not live on deaf."""
    try:
        while True:
            work()
    except Exception as error:  # noqa: BLE001 - the border of the worker's loop: whatever it is, it ends the process
        sys.stderr.write(f"{show_failure(error)}\n")
        leave(1)


def leave(code: int) -> NoReturn:
    """End the process without unwinding: a thread inside MLX must not be torn down by the interpreter's own end."""
    sys.stderr.flush()
    os._exit(code)


def make_backend(echo: bool) -> Backend:
    """The heavy imports happen here, before Hello, so that a spare worker has them behind it."""
    if echo:
        from opta_lmx.inference.worker.echo_backend import EchoBackend

        return EchoBackend()
    from opta_lmx.inference.worker.vllm_backend import VllmBackend

    return VllmBackend()


def make_encoder_backend() -> Backend:
    """Made at its Load: until then a worker does not know that its model is an encoder."""
    from opta_lmx.inference.worker.embedding_backend import EmbeddingBackend

    return EmbeddingBackend()


def die(_kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    """The last words of a worker go to the server's log: where it failed, and not over which text."""
    sys.stderr.write(f"{show_failure(error)}\n")


def main() -> NoReturn:
    """Entry point."""
    sys.excepthook = die
    parser = argparse.ArgumentParser(prog="opta_lmx.inference.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--echo", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then stops its workers in order
    os.dup2(2, 1)  # libraries print to stdout; only stderr is read
    pipe = Pipe(socket.socket(fileno=arguments.fd))
    worker = Worker(pipe)
    # Before the imports, which take seconds: a server that dies meanwhile must not leave this process behind.
    threading.stack_size(_STACK_BYTES)
    worker.start()
    worker.run(make_backend(arguments.echo))
    leave(0)


if __name__ == "__main__":
    main()
