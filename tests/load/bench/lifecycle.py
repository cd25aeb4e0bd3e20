"""The ends of things: a client who leaves, a server that starts, and the memory both leave behind."""

from statistics import median
from time import perf_counter
from typing import Final

from tests.load.bench.client import Connection, connected
from tests.load.bench.processes import BenchError
from tests.load.bench.session import Bench
from tests.load.bench.targets import Target, started
from tests.load.bench.workload import Ask

# Clients who leave in one round, of each kind.
_LEAVERS: Final = 3

# Reads after which a stream is well under way; looks at a busy server after which a whole answer is.
_UNDER_WAY: Final = 10


async def disconnect(bench: Bench) -> None:
    """From a client's leaving to nothing running, as /admin/status tells it; only where that route exists."""
    for target in bench.turns():
        if target.has_status:
            for metric, stream in (("leave_stream", True), ("leave_whole", False)):
                async with bench.attempt(target.name, "disconnect"):
                    seconds = [await _leave(bench, target, stream=stream) for _ in range(_LEAVERS)]
                    bench.book.add(target.name, metric, median(seconds))


async def cold_start(bench: Bench) -> None:
    """From exec to the first answer of /v1/models, and to the first token; only of servers that are started here."""
    for target in bench.turns():
        if target.launch is None:
            continue
        async with bench.attempt(target.name, "cold start"), started(target.launch) as fresh:
            async with connected(fresh.host, fresh.port, 1) as [connection]:
                answer = await fresh.ask(connection, Ask(bench.question(), 1))
            bench.book.add(target.name, "start_listed", fresh.listed_at - fresh.started_at)
            bench.book.add(target.name, "start_token", answer.sent_at + answer.ttft - fresh.started_at)


async def memory(bench: Bench, target: Target, when: str) -> None:
    """Resident bytes of a server started here and of its worker, at a named moment."""
    async with bench.attempt(target.name, "memory"):
        server, worker = await target.resident_bytes()
        if server is not None:
            bench.book.add(target.name, f"rss_server@{when}", server)
        if worker is not None:
            bench.book.add(target.name, f"rss_worker@{when}", worker)


async def _leave(bench: Bench, target: Target, *, stream: bool) -> float:
    """Seconds from leaving a request under way to an idle server."""
    request = target.to_http(Ask(bench.question(), bench.profile.background_tokens, stream=stream))
    async with connected(target.host, target.port, 2) as [leaver, watcher]:
        exchange, done = leaver.send(request, mark=_UNDER_WAY)
        if stream:
            await exchange.under_way.wait()
        else:
            seen = 0
            while seen < _UNDER_WAY and not done.done():
                seen += await _open_requests(target, watcher) > 0
        if done.done():
            raise BenchError("the answer ended before its client could leave")
        left_at = perf_counter()
        leaver.close()
        while await _open_requests(target, watcher) > 0:
            pass
        return perf_counter() - left_at


async def _open_requests(target: Target, watcher: Connection) -> int:
    status, body = await target.get(watcher, "/admin/status")
    if status != 200:
        raise BenchError(f"/admin/status answered {status}")
    return int(body["requests_running"] + body["requests_waiting"])
