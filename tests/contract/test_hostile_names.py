"""Names that are paths, addresses, tricks of writing or endless, on every route that takes one."""

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest

from opta_lmx.api.routes import build_app
from opta_lmx.config import Config
from opta_lmx.inference.engine import InferenceEngine
from opta_lmx.manager.download import DownloadManager
from opta_lmx.manager.model import ModelManager
from tests.fake_workers import House
from tests.fakes import make_world

NAMES: Final = {
    "empty": "",
    "space": " ",
    "space-after": "acme/small ",
    "tab": "acme/small\t",
    "line-break": "acme/small\n",
    "header": "acme/small\r\nx-evil: 1",
    "null": "acme/small\x00",
    "bell": "\x07",
    "escape": "\x1b[31mred",
    "dot": ".",
    "dots": "..",
    "climb": "../outside/secret",
    "climb-inside": "acme/../acme/small",
    "climb-far": "big-/../../../../etc/passwd",
    "climb-back": "acme\\..\\..\\outside",
    "climb-quoted": "%2e%2e%2foutside%2fsecret",
    "slash-before": "/acme/small",
    "slash-after": "acme/small/",
    "slashes": "acme//small",
    "absolute": "/etc/passwd",
    "drive": "C:\\windows",
    "share": "\\\\host\\share",
    "home": "~/models/small",
    "file-address": "file:///etc/passwd",
    "web-address": "https://evil.example/acme/small",
    "hidden": ".imported/acme/small",
    "lock": "models.lock",
    "incomplete": "acme/small.incomplete",
    "other-case": "ACME/Small",
    "full-width": "\uff41\uff43\uff4d\uff45/small",
    "full-width-dots": "\uff0e\uff0e/outside",
    "cyrillic": "\u0430cme/small",
    "ligature": "acme/\ufb01le",
    "combining": "acme/small\u0301",
    "zero-width": "acme/sm\u200ball",
    "right-to-left": "acme/\u202esmall",
    "byte-order-mark": "\ufeffacme/small",
    "slash-alike": "acme\u2215small",
    "half-character": "acme/\ud800",
    "glob": "ac*/sm?ll",
    "endless": "a" * 10_240,
    "endless-path": "a/" * 5_000,
    "endless-climb": "../" * 3_000,
}

BODIES: Final = {
    **{f"/admin/models/{verb}": "model_id" for verb in ("load", "unload", "plan", "pin", "unpin", "verify")},
    "/admin/leases": "model_id",
    "/admin/models/download": "repo_id",
    "/v1/chat/completions": "model",
    "/v1/completions": "model",
    "/v1/embeddings": "model",
    "/v1/rerank": "model",
}
# What the bodies need besides.
REST: Final[dict[str, Any]] = {
    "/admin/leases": {"seconds": 60, "owner": "me"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/rerank": {"query": "Hi", "documents": ["Ho"]},
}
PATHS: Final = (
    ("GET", "/v1/models/{}"),
    ("DELETE", "/admin/models/{}"),
    ("DELETE", "/admin/leases/{}"),
    ("GET", "/admin/models/download/{}"),
    ("GET", "/admin/models/download/{}/progress"),
    ("DELETE", "/admin/models/download/{}"),
)


REVISIONS: Final = ("../main", "a..b", "/main", "-f", "a b", "\u202emain", "a" * 300, "m\n")
PATTERNS: Final[tuple[object, ...]] = ([""], ["*"] * 65, ["a" * 300], "*", [["*"]], {})


class NoTasks:
    """Of whoever may start nothing."""

    def start_soon(self, func: Callable[..., Coroutine[Any, Any, object]], /, *args: object) -> None:
        """Must not be reached."""
        raise AssertionError(f"{func} was started")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models directory with one model, and something beside it that is none of its business."""
    for directory in ("models/acme/small", "outside/secret"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "echo.json").write_bytes(b"{}")
    return tmp_path / "models"


@pytest.fixture
async def client(root: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of real rooms that could load, download and delete."""
    aliases = {"big-*": "acme/small", "*:latest": "acme/small"}
    config = Config.model_validate({"models": {"models_directory": str(root), "starter": False, "aliases": aliases}})
    async with House(config.models) as house:
        models = ModelManager(config.models)
        services = replace(
            make_world().services,
            config=config,
            models=models,
            engine=InferenceEngine(config, models, house.residency, house.clock),
            residency=house.residency,
            memory=house.memory,
            downloads=DownloadManager(config.downloads, root, models, NoTasks()),
        )
        transport = httpx.ASGITransport(build_app(services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


def everything(directory: Path) -> set[str]:
    """All paths below."""
    return {str(path) for path in directory.rglob("*")}


def check_refused(response: httpx.Response, where: str) -> None:
    """As the client's mistake, in the shape of every error, in few and visible characters."""
    assert response.status_code in (400, 404, 405), (where, response.status_code, response.text[:200])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, where
    assert len(error["message"]) < 1500, where
    assert error["message"].isprintable(), where
    assert "evil: 1" not in str(response.headers)


@pytest.mark.parametrize("kind", NAMES)
async def test_no_route_takes_it(kind: str, client: httpx.AsyncClient, root: Path) -> None:
    """Refused at once wherever it is sent; nothing is loaded, started, written or removed."""
    name = NAMES[kind]
    before = everything(root.parent)
    for path, field in BODIES.items():
        if (path, kind) == ("/admin/models/download", "other-case"):
            # A hub may have it. That it is the same directory on some disks is the downloads' to notice.
            continue
        # Halves of characters can only be sent escaped.
        response = await client.post(path, content=json.dumps({field: name, **REST.get(path, {})}))
        check_refused(response, f"{path} {kind}")
    quoted = quote(name.encode("utf-8", "surrogatepass"), safe="")
    for method, path in PATHS:
        # Clients resolve dots between slashes themselves.
        for sent in {quoted} if ".." in name else {quoted, quoted.replace("%2F", "/")}:
            response = await client.request(method, path.format(sent))
            # Without a name it may be another route, which lists.
            if response.status_code == 200:
                assert (method, kind in ("empty", "dot", "dots")) == ("GET", True), (path, kind)
            else:
                check_refused(response, f"{method} {path} {kind}")
    assert everything(root.parent) == before
    assert (await client.get("/admin/models")).json() == {"models": []}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("revision", value) for value in REVISIONS),
        *(("allow_patterns", value) for value in PATTERNS),
    ],
)
async def test_no_download_takes_it(field: str, value: object, client: httpx.AsyncClient) -> None:
    """A revision and patterns are checked as the name is, and told of by their own name."""
    response = await client.post("/admin/models/download", json={"repo_id": "acme/new", field: value})
    check_refused(response, field)
    assert response.json()["error"]["param"].startswith(field)


async def test_the_right_names_are_taken(client: httpx.AsyncClient) -> None:
    """The id and what a glob catches: so the refusals above are no accident of this house."""
    for name in ("acme/small", "big-one", "any:latest"):
        assert (await client.get(f"/v1/models/{name}")).status_code == 200
        assert (await client.post("/admin/models/plan", json={"model_id": name})).status_code == 200
