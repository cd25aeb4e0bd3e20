"""A model hub on loopback that speaks what huggingface_hub asks for, and fails the way a test tells it to."""

import hashlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

COMMIT = "a" * 40


def git_blob_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    """A repository at one commit. Files in ``large`` are in large storage, reached by a redirect."""

    files: dict[str, bytes]
    large: set[str] = field(default_factory=set)
    commit: str = COMMIT
    # Gated: listed for everybody, its files for those with the token. Private: nothing without it.
    gated: bool = False
    private: bool = False
    # Path -> what is sent in place of the file.
    forged: dict[str, bytes] = field(default_factory=dict)
    # Path -> the connection breaks after so many bytes of each answer.
    breaks_after: dict[str, int] = field(default_factory=dict)
    # Path -> after so many bytes nothing comes until ``HubServer.resume`` is set.
    pauses_after: dict[str, int] = field(default_factory=dict)
    # Path -> so many bytes at a time, and the seconds before each.
    paces: dict[str, tuple[int, float]] = field(default_factory=dict)
    # Commit -> the files at an earlier one; ``files`` are those at ``commit``, which main stands for.
    older: dict[str, dict[str, bytes]] = field(default_factory=dict)
    # Answers that come before the first right one, with their headers.
    refusals: list[tuple[int, Mapping[str, str]]] = field(default_factory=list)
    ignores_range: bool = False
    # Where the bytes of large files are served; the hub itself where empty.
    storage: str = ""

    def files_at(self, revision: str) -> dict[str, bytes] | None:
        """What a branch or a commit holds; None if there is none of that name."""
        return self.files if revision in ("main", self.commit) else self.older.get(revision)


@dataclass
class HubServer:
    """``repos`` by id; ``seen`` holds each request's method, path, Range and whether it had a token."""

    url: str = ""
    token: str = "hf_right"
    repos: dict[str, Repo] = field(default_factory=dict)
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    resume: threading.Event = field(default_factory=threading.Event)
    paused: threading.Event = field(default_factory=threading.Event)

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the requests for a file's bytes, in order."""
        return [wanted for _, seen, wanted in self.seen if seen.endswith(path) and "/storage/" in seen]

    def app(self) -> Starlette:
        """The hub's routes."""
        return Starlette(
            routes=[
                Route("/api/models/{publisher}/{name}", self._info),
                Route("/api/models/{publisher}/{name}/revision/{revision:path}", self._info),
                Route("/{publisher}/{name}/resolve/{revision}/{path:path}", self._resolve),
                Route("/storage/{publisher}/{name}/{revision}/{path:path}", self._storage),
            ]
        )

    def _repo(self, request: Request) -> tuple[Repo | None, Response | None]:
        self.seen.append((request.method, request.url.path, request.headers.get("range")))
        token = request.headers.get("authorization")
        self.tokens.add(token)
        repo = self.repos.get(f"{request.path_params['publisher']}/{request.path_params['name']}")
        if repo is None:
            return None, PlainTextResponse("", 404, {"x-error-code": "RepoNotFound"})
        if repo.refusals:
            status, headers = repo.refusals.pop(0)
            return None, PlainTextResponse("", status, dict(headers))
        closed = repo.private or (repo.gated and "path" in request.path_params)
        if closed and token != f"Bearer {self.token}":
            return None, PlainTextResponse("", 401 if token is None else 403, {"x-error-code": "GatedRepo"})
        if repo.files_at(request.path_params.get("revision", "main")) is None:
            return None, PlainTextResponse("", 404, {"x-error-code": "RevisionNotFound"})
        return repo, None

    async def _info(self, request: Request) -> Response:
        repo, refusal = self._repo(request)
        if repo is None:
            assert refusal is not None
            return refusal
        revision = request.path_params.get("revision", "main")
        siblings: list[dict[str, object]] = []
        for path, content in (repo.files_at(revision) or {}).items():
            sibling: dict[str, object] = {"rfilename": path}
            if request.query_params.get("blobs"):
                sibling |= {"size": len(content), "blobId": git_blob_hash(content)}
                if path in repo.large:
                    sha256 = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
            siblings.append(sibling)
        commit = revision if revision in repo.older else repo.commit
        return JSONResponse({"id": "x/y", "sha": commit, "siblings": siblings, "gated": repo.gated and "manual"})

    async def _resolve(self, request: Request) -> Response:
        repo, refusal = self._repo(request)
        if repo is None:
            assert refusal is not None
            return refusal
        params = request.path_params
        content = (repo.files_at(params["revision"]) or {})[params["path"]]
        headers = {"x-repo-commit": params["revision"], "etag": f'"{git_blob_hash(content)}"'}
        if params["path"] in repo.large:
            headers |= {
                "x-linked-etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "x-linked-size": str(len(content)),
            }
        place = f"{repo.storage}/storage/{params['publisher']}/{params['name']}/{params['revision']}/{params['path']}"
        return RedirectResponse(place, 302, headers)

    async def _storage(self, request: Request) -> Response:
        self.tokens.add(request.headers.get("authorization"))
        self.seen.append((request.method, request.url.path, request.headers.get("range")))
        params = request.path_params
        repo, path = self.repos[f"{params['publisher']}/{params['name']}"], params["path"]
        content = repo.forged[path] if path in repo.forged else (repo.files_at(params["revision"]) or {})[path]
        start, status, headers = 0, 200, {}
        wanted = request.headers.get("range")
        if wanted is not None and not repo.ignores_range:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(content):
                return PlainTextResponse("", 416)
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["content-length"] = str(len(content) - start)
        return StreamingResponse(self._bytes(repo, path, content[start:]), status, headers)

    async def _bytes(self, repo: Repo, path: str, content: bytes) -> AsyncIterator[bytes]:
        cut = repo.breaks_after.get(path)
        if cut is not None and cut < len(content):
            yield content[:cut]
            # uvicorn closes the connection of an application that ends before its content-length.
            return
        pause = repo.pauses_after.get(path)
        if pause is not None:
            yield content[:pause]
            self.paused.set()
            # In a thread, because whoever sets it is in another; it is let go of when the client leaves.
            await anyio.to_thread.run_sync(self.resume.wait, abandon_on_cancel=True)
            content = content[pause:]
        size, seconds = repo.paces.get(path, (65536, 0))
        for start in range(0, len(content), size):
            await anyio.sleep(seconds)
            yield content[start : start + size]


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A hub in a thread of its own."""
    hub = HubServer()
    listener = socket.create_server(("127.0.0.1", 0))
    hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(hub.app(), log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="hub")
    thread.start()
    try:
        yield hub
    finally:
        hub.resume.set()
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()
